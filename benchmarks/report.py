"""Tables for people, CSV for history."""

import csv
import math
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.harness import MEMCPY, READ_PROBE, Cell, Row

_STYLES = {"red": "bold red", "wrong": "red", "failed": "red", "noisy": "yellow", "ungated": "yellow"}


def _number(value: float, digits: int = 3) -> str:
    """Three significant digits without an exponent."""
    if math.isnan(value):
        return "-"
    if value == 0:
        return "0"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def print_cell(console: Console, cell: Cell, rows: list[Row]) -> None:
    """One table; what was skipped stands below it, each with its reason."""
    shown = [row for row in rows if row.status != "skipped"]
    floor = shown[0].floor_ms if shown else math.nan
    heading = cell.title
    if not math.isnan(floor):
        heading += f"   floor {_number(floor)} ms" if floor >= 0.1 else f"   floor {_number(floor * 1e3)} us"
    if cell.flops:
        heading += f"   {cell.flops / 1e9:.3g} GFLOP"
    if cell.bytes:
        heading += f"   {cell.bytes / 1e6:.3g} MB"
    table = Table(title=heading, title_justify="left", box=None, pad_edge=False, header_style="dim")
    table.add_column("provider", no_wrap=True)
    on_gpu = any(not math.isnan(row.extra_mib) for row in shown)
    columns = ("ms p50", "p20–p80", "GFLOP/s", "GB/s", "% of floor", "/ ours", "clean", "max error", "status")
    if on_gpu:
        columns = (*columns[:2], "TFLOP/s", *columns[3:-1], "MiB", "status")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=column != "status")
    for row in shown:
        in_us = row.p50_ms < 0.1
        scale, unit = (1e3, " us") if in_us else (1.0, "")
        timed = row.samples > 0
        table.add_row(
            row.provider,
            _number(row.p50_ms * scale) + (unit if timed else ""),
            f"{_number(row.p20_ms * scale)}–{_number(row.p80_ms * scale)}{unit}" if timed else "-",
            _number(row.gflops / 1e3 if on_gpu else row.gflops),
            _number(row.gbs),
            "-" if math.isnan(row.floor_ms) or not timed else f"{100 * row.floor_ms / row.p50_ms:.0f}",
            _number(row.ratio),
            f"{row.clean}/{row.samples}",
            "-" if math.isnan(row.max_error) else f"{row.max_error:.1e}",
            *([_number(row.extra_mib)] if on_gpu else []),
            Text(row.status if not row.note else f"{row.status}: {row.note}", style=_STYLES.get(row.status, "")),
            style="dim" if row.provider in (READ_PROBE, MEMCPY) else None,
        )
    if shown:
        console.print(table)
    else:
        console.print(heading)
    for row in rows:
        if row.status == "skipped":
            console.print(f"  skipped {row.provider}: {row.note}", style="dim", markup=False, soft_wrap=True)
    console.print()


def append_csv(path: Path, rows: Iterable[Row]) -> None:
    """Appends to the history; a file with other columns is refused, never mixed."""
    columns = Row.columns()
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists() or path.stat().st_size == 0
    if not is_new:
        with path.open(newline="") as existing:
            found = next(csv.reader(existing), [])
        if found != columns:
            raise ValueError(f"{path} has columns {', '.join(found)}; move it away, its rows cannot be continued")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if is_new:
            writer.writeheader()
        for row in rows:
            cells = asdict(row)
            for name, value in cells.items():
                if isinstance(value, float):
                    cells[name] = "" if math.isnan(value) else f"{value:.6g}"
            writer.writerow(cells)


def read_latest(paths: Iterable[Path]) -> list[Row]:
    """The newest run of each cell in these histories; older ones are left out, since only one run's rows compare."""
    kinds = {column.name: column.type for column in fields(Row)}
    newest: dict[tuple, list[Row]] = {}
    for path in paths:
        with path.open(newline="") as file:
            for record in csv.DictReader(file):
                if set(record) != set(kinds):
                    raise ValueError(f"{path} is no history of these benchmarks")
                values = {
                    name: float(text or "nan") if kinds[name] is float else kinds[name](text)
                    for name, text in record.items()
                }
                row = Row(**values)
                cell = (row.op, row.shape, row.dtype, row.num_tokens, row.threads, row.device)
                same = newest.setdefault(cell, [])
                if same and same[0].date != row.date:
                    if row.date < same[0].date:
                        continue
                    same.clear()
                same.append(row)
    return [row for rows in newest.values() for row in rows]
