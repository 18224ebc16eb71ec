"""What ``demo logits`` shows. Every number comes from the results."""

from pathlib import Path

from moe_kernels.demo.report import make_figure, make_table, print_table


def print_logits(result: dict) -> None:
    """Answers, texts, losses, and where the time went."""
    _print_prompts(result)
    _print_tuning(result["tuning"], result["settings"])
    _print_times(result)


def _print_prompts(result: dict) -> None:
    settings = result["settings"]
    table = make_table(
        f"{result['model']}: context-aware decoding, strength {settings['strength']:g}",
        "greedy; * holds the word that the context says",
        ("context", "question", "without the context", "with it", "context-aware"),
    )
    ways = ("without", "with", "aware")
    for row in result["context"]:
        answers = (f"{'* ' if row['said'] in row[way]['text'] else ''}{row[way]['text']!r}" for way in ways)
        table.add_row(row["context"], row["question"], *answers)
    print_table(table)
    right = {way: sum(row["said"] in row[way]["text"] for row in result["context"]) for way in ways}
    print(
        f"Of {len(result['context'])} answers {right['with']} hold the context's word when the model reads it, "
        f"{right['aware']} with context-aware decoding.\n"
    )
    print(f"Guidance, scale {settings['scale']:g}:")
    for row in result["guidance"]:
        print(f"  {row['role']!r}, away from {row['away_from']!r}: {row['question']!r}")
        print(f"    plain:  {row['plain']['text']!r}\n    guided: {row['guided']['text']!r}")
    others = [row for row in result["beams"] if row["transformers"] != row["ours"]]
    print(
        f"With {settings['num_beams']} beams transformers' own guidance writes something else than ours in "
        f"{len(others)} of {len(result['beams'])}: the cache of its negative prompt does not follow the beams."
    )
    for row in others:
        print(f"    transformers: {row['transformers']!r}\n    ours:         {row['ours']!r}")
    print()


def _print_tuning(tuning: dict, settings: dict) -> None:
    losses = tuning["losses"]
    first, last = ({name: of[i] for name, of in tuning["training"].items()} for i in (0, -1))
    print(
        f"A model of {tuning['num_parameters'] / 1e6:.1f}M parameters, most of them embeddings, trained in "
        f"{tuning['seconds']:.0f} s: untuned {settings['base_steps']} steps on {' and '.join(tuning['before'])} (loss "
        f"{first['untuned']:.2f} to {last['untuned']:.2f}), tuned {settings['tuning_steps']} more on {tuning['last']} "
        f"({first['tuned']:.2f} to {last['tuned']:.2f})."
    )
    ways = list(next(iter(losses.values())))[:-1]
    table = make_table(
        "Emulated fine-tuning: large + scale (tuned - untuned)",
        f"loss on {settings['evaluation_windows']} x {settings['evaluation_size']} tokens that training has not seen; "
        "solved: Dynamic Logits Fusion's weight for each token; * the best fusion",
        ("text", *ways, "mean solved weight"),
    )
    for name, row in losses.items():
        best = min(row[way] for way in ways[3:])
        marks = (f"{row[way]:.3f}{'*' if way in ways[3:] and row[way] == best else ''}" for way in ways)
        table.add_row(name, *marks, f"{row['solved weight']:.2f}")
    print_table(table)
    row = losses[tuning["last"]]
    change = row["solved"] - row[f"scale {tuning['best']:g}"]
    print(
        "The solved weights move the large model as far as tuning moved the small one. On "
        f"{tuning['last']} their loss is {abs(change):.3f} {'above' if change > 0 else 'below'} that of the best scale."
    )
    print(f"After {settings['prompt']!r}:")
    for name, row in tuning["texts"].items():
        print(f"  {name}: {row['text']!r}")
    drafted = tuning["drafted"]
    print(
        f"Drafted {settings['num_draft']} at a time by the tuned small model, the large one is called "
        f"{drafted['calls']} times for {drafted['tokens']} tokens; the text is "
        f"{'the same' if drafted['is_the_same'] else 'ANOTHER'}.\n"
    )


def _print_times(result: dict) -> None:
    table = make_table(
        "Where the time goes",
        "milliseconds a token, prompt included; the fusion reads every source's logits and chooses the token",
        ("", "tokens", "generation", "in the fusion", "share"),
    )
    for name, rows in timed(result).items():
        tokens, seconds = (sum(row[key] for row in rows) for key in ("tokens", "seconds"))
        inside = [row["fusion_seconds"] for row in rows if "fusion_seconds" in row]
        fused = (f"{1e3 * sum(inside) / tokens:.2f}", f"{sum(inside) / seconds:.1%}") if inside else ("", "")
        table.add_row(name, str(tokens), f"{1e3 * seconds / tokens:.1f}", *fused)
    print_table(table)


def timed(result: dict) -> dict[str, list[dict]]:
    """Each way to generate, and its generations."""
    return {
        "the model alone": [row["plain"] for row in result["guidance"]],
        "context-aware, two contexts": [row["aware"] for row in result["context"]],
        "guidance, two prompts": [row["guided"] for row in result["guidance"]],
        **{
            f"emulated fine-tuning, {name}": [row]
            for name, row in result["tuning"]["texts"].items()
            if "fusion_seconds" in row
        },
        "the same, drafted": [result["tuning"]["drafted"]],
    }


def plot_logits(result: dict, path: Path) -> None:
    """How far each step moves from the model alone, the solved weights, and the loss at each scale."""
    figure, (left, middle, right) = make_figure(1, 3, (15, 4.2))
    tuning = result["tuning"]
    curves = {
        "context-aware": result["context"][0]["aware"]["moved"],
        "guidance": result["guidance"][0]["guided"]["moved"],
        **{name: row["moved"] for name, row in tuning["texts"].items() if "moved" in row},
    }
    for name, moved in curves.items():
        left.plot(range(1, len(moved) + 1), moved, "o-", markersize=3, label=name)
    left.set(xlabel="step", ylabel="KL(fused || model alone), nats", title="how far each step moves")
    left.legend(fontsize=8)
    weights = tuning["texts"]["solved"]["weights"]
    middle.plot(range(1, len(weights) + 1), weights, "o-", markersize=3, label="solved for each token")
    middle.axhline(tuning["best"], color="0.4", linestyle="--", label="best fixed scale")
    middle.set(xlabel="step", ylabel="weight of tuned - untuned", title="the pair's weight per step")
    middle.legend(fontsize=8)
    for name, row in tuning["losses"].items():
        scales = [0.0, *result["settings"]["scales"]]
        found = [row["large"], *(row[f"scale {scale:g}"] for scale in scales[1:])]
        (line,) = right.plot(scales, found, "o-", markersize=3, label=name)
        right.axhline(row["solved"], color=line.get_color(), linestyle=":", label=f"{name}, solved")
    right.set(xlabel="scale", ylabel="loss", title="reading with the pair")
    right.legend(fontsize=8)
    figure.suptitle(result["model"])
    figure.savefig(path, dpi=150)
