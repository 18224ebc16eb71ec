"""What ``demo lora`` shows. Every number comes from the results."""

from pathlib import Path
from statistics import fmean

from moe_kernels.demo.report import make_figure, make_table, print_table


def print_lora(result: dict) -> None:
    """Tables of the adapters, of the differences and of the times."""
    names, settings = result["kinds"], result["settings"]
    table = make_table(
        f"{result['model']}: {len(names)} adapters trained together, {settings['num_steps']} steps of "
        f"{settings['batch_size']} x {settings['window_size']} tokens each",
        f"perplexity of each adapter on {settings['evaluation_windows']} x {settings['window_size']} tokens that "
        "training has not seen; every window is read by all adapters in one mixed batch",
        ("adapter", "rank", "layers", "MiB", "loss, first 5 steps", "last 5", *(f"on {name}" for name in names)),
    )
    table.add_row("none", "", "", "", "", "", *(f"{result['perplexity'][text]['']:.2f}" for text in names))
    for name in names:
        adapter = result["adapters"][name]
        table.add_row(
            name,
            str(adapter["rank"]),
            " ".join(target.removesuffix("_proj") for target in adapter["target_modules"]),
            f"{adapter['bytes'] / 2**20:.1f}",
            f"{fmean(adapter['losses'][:5]):.3f}",
            f"{fmean(adapter['losses'][-5:]):.3f}",
            *(f"{result['perplexity'][text][name]:.2f}" for text in names),
        )
    print_table(table)

    print("Largest difference of logits, relative to the largest:")
    for name, difference in result["difference"].items():
        print(f"  {name}: {difference:.1e}")
    print()

    times = result["milliseconds"]
    base = {part: found.get("base model") for part, found in times.items()}
    table = make_table(
        f"{result['sequences']} sequences of {settings['window_size']} tokens, {len(names)} adapters and none",
        "milliseconds (above the base model); medians, taking turns. A training step is forward and backward.",
        ("", *times),
    )
    for way in dict.fromkeys(way for found in times.values() for way in found):
        cells = []
        for part, found in times.items():
            above = "" if base[part] is None or way == "base model" else f" ({found[way] - base[part]:+.0f})"
            cells.append(f"{found[way]:.0f}{above}" if way in found else "")
        table.add_row(way, *cells)
    print_table(table)
    if not any("PEFT" in way for found in times.values() for way in found):
        print("pip install peft to see PEFT's times beside")

    print(f"After {settings['prompt']!r}, in one batch:")
    for user, text in result["continuations"].items():
        print(f"  {user or 'no adapter'}: {text!r}")


def plot_lora(result: dict, path: Path) -> None:
    """The losses in training, and the times above the base model's."""
    figure, (left, right) = make_figure(1, 2, (12, 4.2))
    for name, adapter in result["adapters"].items():
        left.plot(range(1, len(adapter["losses"]) + 1), adapter["losses"], label=f"{name}, rank {adapter['rank']}")
    left.set(xlabel="step", ylabel="loss", title="trained together, each on its own text")
    left.legend()
    times = {part: found for part, found in result["milliseconds"].items() if "base model" in found}
    ways = [way for way in next(iter(times.values())) if way != "base model"]
    for number, (part, found) in enumerate(times.items()):
        above = [found[way] / found["base model"] for way in ways]
        right.barh([at + 0.4 * number for at in range(len(ways))], above, 0.4, label=part)
    right.axvline(1, color="0.3")
    right.set_yticks([at + 0.2 for at in range(len(ways))], ways)
    right.invert_yaxis()
    right.set(xlabel="time relative to the base model")
    right.legend()
    figure.suptitle(result["model"])
    figure.savefig(path, dpi=150)
