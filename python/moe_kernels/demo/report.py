"""What the demo shows: progress bars, tables and plots. Every number comes from the results."""

import sys
from collections.abc import Iterable, Sized
from pathlib import Path


def progress(iterable: Iterable, description: str) -> Iterable:
    """A progress bar around ``iterable``, on a terminal only: its lines would fill a log file."""
    from tqdm import tqdm

    total = len(iterable) if isinstance(iterable, Sized) else None
    return tqdm(iterable, description, total=total, file=sys.stderr, disable=None, leave=False)


def print_perplexity(result: dict) -> None:
    """Table of part 1."""
    table = make_table(
        f"{result['model']}: each feed-forward layer split into {result['num_experts']} experts of "
        f"{result['neurons_per_expert']} neurons",
        f"{result['evaluation_tokens']} tokens of text that calibration has not seen",
        ("active experts", "perplexity", "against dense", "model tokens/s", "feed-forward ms, 1 token",
         f"feed-forward ms, {result['window_size']} tokens"),
    )  # fmt: skip
    dense = result["dense"]
    for row in (dense, *result["rows"]):
        change = row["perplexity"] / dense["perplexity"] - 1
        table.add_row(
            "dense" if row is dense else f"{row['active_experts']} of {result['num_experts']}",
            f"{row['perplexity']:.4f}",
            "" if row is dense else f"{change:+.2%}" if abs(change) >= 5e-5 else f"{change:+.1e}",
            f"{row['model_tokens_per_second']:.0f}",
            _speed(row["feed_forward_decode_ms"], dense["feed_forward_decode_ms"]),
            _speed(row["feed_forward_prefill_ms"], dense["feed_forward_prefill_ms"]),
        )
    print_table(table)
    if "all_active" in result:
        exact = result["all_active"]
        relative = exact["max_logit_difference"] / exact["max_logit"]
        print(
            f"All experts active: loss differs by {abs(exact['loss_difference']):.1e}, logits by at most "
            f"{relative:.1e} of the largest (float32 rounds at {exact['float32_eps']:.1e}).\n"
        )


def print_layers(rows: list[dict]) -> None:
    """Table of part 2."""
    implementations = list(rows[0]["implementations"]) if rows else []
    order = [name for name in ("eager", "batched_mm", "grouped_mm", "moe_kernels") if name in implementations]
    table = make_table(
        "Experts of real layers in bfloat16: ms (error)",
        "error: largest difference to the layer in float32, relative to its largest value",
        ("layer", "tokens", "experts", *order, "fastest other / ours"),
    )
    for row in rows:
        cells = row["implementations"]
        others = [cell["ms"] for name, cell in cells.items() if name != "moe_kernels" and "ms" in cell]
        table.add_row(
            f"{row['layer']} ({row['hidden_size']} x {row['intermediate_size']})",
            str(row["num_tokens"]),
            f"{row['top_k']} of {row['num_experts']}",
            *(
                f"{cells[name]['ms']:.4g} ({cells[name]['error']:.0e})"
                if "ms" in cells[name]
                else cells[name]["skipped"]
                for name in order
            ),
            f"{min(others) / cells['moe_kernels']['ms']:.2f}x",
        )
    print_table(table)


def print_finetune(result: dict) -> None:
    """Table of part 3."""
    settings = result["settings"]
    table = make_table(
        f"Training a Qwen3-MoE of {settings['num_layers']} layers, {settings['num_experts']} experts top-"
        f"{settings['top_k']}, hidden {settings['hidden_size']}, {settings['num_steps']} steps of "
        f"{settings['batch_size']} x {settings['window_size']} bytes",
        "saved: what autograd keeps between forward and backward",
        (
            "experts",
            "first loss",
            "last loss",
            f"largest difference to {next(iter(result['implementations']))}",
            "ms a step",
            "tokens/s",
            "saved MiB",
            "peak MiB",
            "peak over start MiB",
        ),
    )
    for name, run in result["implementations"].items():
        peak, start = run["peak_resident_bytes"], run["resident_bytes"]
        known = peak is not None and start is not None
        table.add_row(
            name,
            f"{run['losses'][0]:.5f}",
            f"{run['losses'][-1]:.5f}",
            f"{max(run['loss_differences']):.1e}",
            f"{run['step_ms']:.0f}",
            f"{run['tokens_per_second']:.0f}",
            f"{run['saved_bytes'] / 2**20:.1f}",
            f"{peak / 2**20:.0f}" if known else "unknown",
            f"{(peak - start) / 2**20:.0f}" if known else "unknown",
        )
    print_table(table)
    print()


def plot_perplexity(result: dict, path: Path) -> None:
    """Perplexity over the number of active experts, and over speed."""
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, (left, right) = make_figure(1, 2, (11, 4.2))
    dense, rows = result["dense"], result["rows"]
    active = [row["active_experts"] for row in rows]
    perplexities = [row["perplexity"] for row in rows]
    left.plot(active, perplexities, "o-", label="split into experts")
    left.axhline(dense["perplexity"], color="0.4", linestyle="--", label="dense")
    left.set(xlabel=f"active experts of {result['num_experts']}", ylabel="perplexity", yscale="log")
    left.legend()
    speeds = {
        "feed-forward layers, 1 token": [
            dense["feed_forward_decode_ms"] / row["feed_forward_decode_ms"] for row in rows
        ],
        f"feed-forward layers, {result['window_size']} tokens": [
            dense["feed_forward_prefill_ms"] / row["feed_forward_prefill_ms"] for row in rows
        ],
        f"whole model, {result['window_size']} tokens": [
            row["model_tokens_per_second"] / dense["model_tokens_per_second"] for row in rows
        ],
    }
    for label, speed in speeds.items():
        right.plot(speed, perplexities, "o-", label=label)
        for x, y, experts in zip(speed, perplexities, active, strict=True):
            right.annotate(str(experts), (x, y), textcoords="offset points", xytext=(4, 4), fontsize=7)
    right.axvline(1, color="0.4", linestyle="--", label="dense")
    right.set(xlabel="speed relative to dense (numbers: active experts)", ylabel="perplexity", yscale="log")
    right.legend()
    for axes in (left, right):
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    figure.suptitle(f"{result['model']}, feed-forward layers split into experts")
    figure.savefig(path, dpi=150)


def plot_finetune(result: dict, path: Path) -> None:
    """The loss curves, and how far they are from the first; zero shows at the bottom."""
    figure, (left, right) = make_figure(1, 2, (11, 4.2))
    curves = {name: run["losses"] for name, run in result["implementations"].items()}
    for (name, losses), style in zip(curves.items(), ("-", "--", ":"), strict=False):
        left.plot(range(1, len(losses) + 1), losses, style, label=name)
    left.set(xlabel="step", ylabel="loss (nats per byte)")
    left.legend()
    first, *others = result["implementations"]
    for name in others:
        differences = result["implementations"][name]["loss_differences"]
        right.plot(range(1, len(differences) + 1), differences, "o-", markersize=3, label=f"{name}, {first}")
    right.set(xlabel="step", ylabel="difference of the losses")
    right.set_yscale("symlog", linthresh=1e-7)
    right.legend()
    figure.suptitle("Training a small Qwen3-MoE")
    figure.savefig(path, dpi=150)


def make_figure(num_rows: int, num_columns: int, size: tuple[float, float]):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(num_rows, num_columns)


def make_table(title: str, caption: str, columns: tuple[str, ...]):
    from rich.table import Table

    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for position, column in enumerate(columns):
        table.add_column(column, justify="right" if position else "left")
    return table


def print_table(table) -> None:
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=150)  # a log file has no width of its own
    console.print(table)


def _speed(milliseconds: float, dense_milliseconds: float) -> str:
    return f"{milliseconds:.1f} ({dense_milliseconds / milliseconds:.2f}x)"
