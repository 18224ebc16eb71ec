"""What the project promises, read off the rows of a run: passed, missed, or not shown by these rows.

A promise counts as shown only by undisturbed samples: a cell with a noisy, wrong or absent side is listed as open.
"""

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.harness import Row


@dataclass(frozen=True)
class Verdict:
    """``state`` is "pass", "MISS" or "open"."""

    bar: str
    state: str
    detail: str


Key = tuple[str, str, int]


def _cells(rows: list[Row], op: str) -> dict[Key, dict[str, Row]]:
    cells: dict[Key, dict[str, Row]] = {}
    for row in rows:
        if row.op == op:
            cells.setdefault((row.shape, row.dtype, row.num_tokens), {})[row.provider] = row
    return cells


def _name(key: Key) -> str:
    return f"{key[0]} {key[1]} T={key[2]}"


def _faster(
    rows: list[Row], bar: str, op: str, ours: str, is_rival: Callable[[str], bool], factor: float,
    only_tokens: int | None = None,
) -> Verdict | None:  # fmt: skip
    cells = {key: cell for key, cell in _cells(rows, op).items() if only_tokens in (None, key[2])}
    if not cells:
        return None
    passed, missed, unknown = [], [], []
    for key, cell in cells.items():
        mine = cell.get(ours)
        rivals = [row for name, row in cell.items() if is_rival(name) and row.samples and row.status in ("ok", "noisy")]
        if mine is None or not mine.samples or not rivals:
            unknown.append(f"{_name(key)} (no {ours if mine is None or not mine.samples else 'rival'})")
            continue
        best = min(rivals, key=lambda row: row.p50_ms)
        ratio = best.p50_ms / mine.p50_ms
        measured = f"{_name(key)} {ratio:.2f}x {best.provider}"
        if "noisy" in (mine.status, best.status) or mine.status not in ("ok", "noisy"):
            unknown.append(measured + " (noisy)")
        elif ratio >= factor:
            passed.append((ratio, measured))
        else:
            missed.append(measured)
    state = "MISS" if missed else "open" if unknown else "pass"
    detail = f"{len(passed)} of {len(cells)} cells"
    if passed:
        detail += "; least: " + min(passed)[1]
    if missed:
        detail += "; missed: " + ", ".join(missed)
    if unknown:
        detail += "; open: " + ", ".join(unknown)
    return Verdict(bar, state, detail)


def _below(bar: str, values: dict[str, float], most: float, unit: str, noisy: set[str]) -> Verdict | None:
    if not values:
        return None
    missed = any(value > most for name, value in values.items() if name not in noisy)
    state = "MISS" if missed else "open" if noisy & set(values) else "pass"
    shown = (
        f"{name} {value:.3g} {unit}{' (noisy or not native)' if name in noisy else ''}"
        for name, value in values.items()
    )
    return Verdict(bar, state, ", ".join(shown))


def verdicts(rows: list[Row]) -> list[Verdict]:
    """Those promises that the rows say something about."""

    def torch_or_transformers(name: str) -> bool:
        return name.startswith(("torch_", "transformers_"))

    found = [
        _faster(
            rows, "forward, plain layout: ahead of every torch and transformers path", "expert_ffn", "ours",
            torch_or_transformers, 1.0,
        ),
        _faster(
            rows, "forward, prepacked: at least 1.4x the best torch or transformers path", "expert_ffn",
            "ours_prepacked", torch_or_transformers, 1.4,
        ),
        _faster(
            rows, "forward + backward at T = 512: at least 2x transformers grouped_mm", "expert_ffn_train", "ours",
            lambda name: name == "transformers_grouped_mm", 2.0, 512,
        ),
    ]  # fmt: skip

    overhead, noisy = {}, set()
    for row in rows:
        if row.op.startswith("call_overhead.") and row.provider == "public_call" and row.samples:
            same_cell = (row.op, row.dtype, row.num_tokens)
            below = [r for r in rows if (r.op, r.dtype, r.num_tokens) == same_cell and r.provider == "kernel_op"]
            if below and below[0].samples:
                name = f"{row.op.removeprefix('call_overhead.')} {row.dtype} T={row.num_tokens}"
                overhead[name] = 1e3 * (row.p50_ms - below[0].p50_ms)
                if "noisy" in (row.status, below[0].status) or row.version != "native":
                    noisy.add(name)
    found.append(_below("a public call over its kernel: at most 5 us", overhead, 5.0, "us", noisy))
    for bar, provider, most in (
        ("import over torch's own: at most 0.3 s", "import_over_torch", 0.3),
        ("clean CPU build: at most 120 s on two cores", "cpu_build", 120.0),
    ):
        values = {row.provider: row.p50_ms / 1e3 for row in rows if row.provider == provider and row.samples}
        found.append(_below(bar, values, most, "s", set()))
    return [verdict for verdict in found if verdict is not None]
