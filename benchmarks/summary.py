"""The README's tables, one a processor, and its plot, from the newest run of each cell in the histories.

python benchmarks/summary.py [--plot benchmarks/results/expert_ffn.png]
"""

import argparse
import sys
from pathlib import Path

_HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(_HERE.parent))

from benchmarks.harness import Row  # noqa: E402
from benchmarks.report import read_latest  # noqa: E402

_PEERS = ("torch_", "transformers_")


def _cells(rows: list[Row]) -> dict[tuple[str, str], dict[int, dict[str, Row]]]:
    cells: dict[tuple[str, str], dict[int, dict[str, Row]]] = {}
    for row in rows:
        if row.samples:
            cells.setdefault((row.shape, row.dtype), {}).setdefault(row.num_tokens, {})[row.provider] = row
    return cells


def _cell(providers: dict[str, Row]) -> str:
    ours = providers["ours"]
    peers = [row for name, row in providers.items() if name.startswith(_PEERS) and row.status in ("ok", "noisy")]
    if not peers:
        return f"{ours.p50_ms:.3g} ms"
    best = min(peers, key=lambda row: row.p50_ms)
    noisy = " ~" if "noisy" in (ours.status, best.status) else ""
    return f"{ours.p50_ms:.3g} ms, **{best.p50_ms / ours.p50_ms:.2f}x**{noisy}"


def table(rows: list[Row]) -> str:
    """Our time and how many times it the best torch or transformers path takes; ``~`` marks disturbed samples."""
    cells = _cells(rows)
    tokens = sorted({t for by_tokens in cells.values() for t in by_tokens})
    lines = ["| shape, dtype | " + " | ".join(f"T = {t}" for t in tokens) + " |", "|---|" + "---|" * len(tokens)]
    for (shape, dtype), by_tokens in sorted(cells.items()):
        row = [_cell(by_tokens[t]) if "ours" in by_tokens.get(t, {}) else "" for t in tokens]
        lines.append(f"| {shape} {dtype} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def plot(rows: list[Row], path: Path) -> None:
    """Time over the floor, for every provider, one panel a shape and dtype."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cells = sorted(_cells(rows).items())
    figure, axes = plt.subplots(2, (len(cells) + 1) // 2, figsize=(12, 6), squeeze=False, sharex=True, sharey=True)
    providers = sorted(
        {name for _, by_tokens in cells for cell in by_tokens.values() for name in cell} - {"read_probe"}
    )
    for axis, ((shape, dtype), by_tokens) in zip(axes.T.flat, cells, strict=False):
        for name in providers:
            points = [
                (t, cell[name].p50_ms / cell[name].floor_ms) for t, cell in sorted(by_tokens.items()) if name in cell
            ]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=name, linewidth=3 if name == "ours" else 1)
        axis.set_title(f"{shape} {dtype}")
        axis.set_xscale("log", base=2)
        axis.set_ylim(0, 6)
        axis.axhline(1, color="grey", linestyle=":")
    figure.supxlabel("tokens")
    figure.supylabel("time over the machine's floor")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path, help="write the forward plot of the newest processor here")
    options = parser.parse_args()
    for op in ("expert_ffn", "expert_ffn_train"):
        path = _HERE / "results" / f"{op}.csv"
        if not path.exists():
            print(f"{op}: no history; run benchmarks/run.py --op {op}")
            continue
        by_device: dict[str, list[Row]] = {}
        for row in sorted(read_latest([path]), key=lambda row: row.date):
            by_device.setdefault(row.device, []).append(row)
        for device, rows in by_device.items():
            print(f"\n{op}, {device}, {rows[-1].threads} threads, torch {rows[-1].torch}\n\n{table(rows)}")
        if op == "expert_ffn" and options.plot:
            plot(max(by_device.values(), key=lambda rows: rows[-1].date), options.plot)


if __name__ == "__main__":
    main()
