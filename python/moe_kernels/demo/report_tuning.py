"""What ``demo route``, ``demo quantize`` and ``demo tune`` show. Every number comes from the results."""

from pathlib import Path

from moe_kernels.demo.report import make_figure, make_table, print_table


def print_routers(result: dict) -> None:
    """Table of ``demo route``."""
    table = make_table(
        f"{result['model']}: {result['active_experts']} of {result['num_experts']} experts a token",
        f"{result['evaluation_tokens']} tokens that training has not seen; error: of a layer's output, squared and "
        "relative, on the tokens of training. Expert choice sees the whole window, later tokens too.",
        ("router", "perplexity", "experts a token", "layer error, first steps", "last steps", "training s"),
    )
    table.add_row("dense", f"{result['dense']['perplexity']:.3f}", "", "", "", "")
    for name, key in (("experts at random", "random"), ("linear, not trained", "untrained")):
        measured = result[key]
        table.add_row(name, f"{measured['perplexity']:.3f}", f"{measured['experts_per_token']:.2f}", "", "", "")
    for row in result["rows"]:
        table.add_row(
            row["kind"],
            f"{row['perplexity']:.3f}",
            f"{row['experts_per_token']:.2f}",
            f"{row['first_error']:.3f}",
            f"{row['last_error']:.3f}",
            f"{row['train_seconds']:.0f}",
        )
    print_table(table)


def plot_routers(result: dict, path: Path) -> None:
    """Perplexity of each kind of router, beside the dense model and the untrained router."""
    figure, axes = make_figure(1, 1, (7, 4))
    rows = result["rows"]
    axes.bar([row["kind"] for row in rows], [row["perplexity"] for row in rows], color="tab:blue")
    for name, style in (("dense", "-"), ("untrained", "--")):
        axes.axhline(result[name]["perplexity"], color="0.3", linestyle=style, label=name)
    axes.set(
        ylabel="perplexity", title=f"{result['model']}, {result['active_experts']} of {result['num_experts']} experts"
    )
    axes.legend()
    figure.savefig(path, dpi=150)


def print_formats(result: dict) -> None:
    """Table of ``demo quantize``."""
    table = make_table(
        f"{result['model']}: {result['num_experts']} experts of each of {result['num_layers']} layers, all active",
        f"{result['evaluation_tokens']} tokens; error: of the weights, root mean square over theirs; ms: of all "
        "feed-forward layers",
        ("format", "bits a weight", "weight error", "perplexity", "ms, 1 token", f"ms, {result['window_size']} tokens"),
    )
    exact = result["rows"][0]
    for row in result["rows"]:
        change = row["perplexity"] / exact["perplexity"] - 1
        table.add_row(
            row["format"],
            f"{row['bits']:.2f}",
            f"{row['weight_error']:.2%}",
            f"{row['perplexity']:.3f}" + ("" if row is exact else f" ({change:+.2%})"),
            f"{row['feed_forward_decode_ms']:.2f}",
            f"{row['feed_forward_prefill_ms']:.0f}",
        )
    print_table(table)


def plot_formats(result: dict, path: Path) -> None:
    """Perplexity over bits a weight."""
    figure, axes = make_figure(1, 1, (6, 4))
    for row in result["rows"]:
        axes.plot(row["bits"], row["perplexity"], "o", color="tab:blue")
        axes.annotate(row["format"], (row["bits"], row["perplexity"]), (4, 4), textcoords="offset points")
    axes.set(xlabel="bits a weight", ylabel="perplexity", xscale="log", title=result["model"])
    figure.savefig(path, dpi=150)


def print_tuning(result: dict) -> None:
    """Table of ``demo tune``."""
    names = result["kinds"]
    total = result["num_layers"] * result["num_experts"]
    table = make_table(
        f"{result['model']}: experts switched off or on, {result['top_k']} of {result['num_experts']} experts a token",
        f"perplexity (against no switch) on {result['tokens_of_each_kind']} tokens of each kind; an expert is a kind's "
        "that more of its tokens take than of the other's",
        ("experts switched", *names),
    )
    untouched = result["untouched"]
    table.add_row("none", *(f"{untouched[name]:.3f}" for name in names))
    for row in result["rows"]:
        cells = (
            f"{row['perplexity'][name]:.3f} ({row['perplexity'][name] / untouched[name] - 1:+.1%})" for name in names
        )
        table.add_row(f"{row['switched']} of {total} {row['choice']}", *cells)
    print_table(table)
    for name in names:
        listed = ", ".join(f"{layer}.{expert} ({share:+.0%})" for layer, expert, share in result["distinctive"][name])
        print(f"most distinctive of {name} (layer.expert, share of its tokens less the other's): {listed}")


def plot_tuning(result: dict, path: Path) -> None:
    """How much each switch raises the perplexity of each kind of text."""
    figure, axes = make_figure(1, 1, (9, 4.2))
    names, rows = result["kinds"], result["rows"]
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        changes = [100 * (row["perplexity"][name] / result["untouched"][name] - 1) for row in rows]
        axes.bar([at + number * width for at in range(len(rows))], changes, width, label=name)
    labels = [f"{row['switched']} {row['choice']}" for row in rows]
    axes.set_xticks([at + (len(names) - 1) * width / 2 for at in range(len(rows))], labels, rotation=20, ha="right")
    axes.set(ylabel="change of perplexity, %")
    axes.legend()
    figure.savefig(path, dpi=150)
