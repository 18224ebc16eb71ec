"""What ``demo taskvector`` shows. Every number comes from the results."""

from pathlib import Path

from moe_kernels.demo.report import make_figure, make_table, print_table


def print_task_vectors(result: dict) -> None:
    """Tables of losses at each density and alpha, of both texts at once, and of the switches."""
    settings, loss = result["settings"], result["loss"]
    table = make_table(
        f"{result['model']}: fine-tuned for {settings['num_steps']} steps of {settings['batch_size']} x "
        f"{settings['window_size']} tokens on each text, its change kept as signs and one scale",
        f"loss on {settings['evaluation_windows']} x {settings['window_size']} tokens that training has not seen; "
        "* the best alpha",
        ("text", "density", "MiB", "bits a parameter", "smaller than bfloat16", "base", "fine-tuned",
         *(f"alpha {alpha:g}" for alpha in settings["alphas"])),
    )  # fmt: skip
    for row in result["rows"]:
        kind = row["kind"]
        table.add_row(
            kind,
            f"{row['density']:.0%}",
            f"{row['bytes'] / 2**20:.1f}",
            f"{row['bits']:.3f}",
            f"{16 / row['bits']:.0f}x",
            f"{loss['base'][kind]:.3f}",
            f"{loss[kind][kind]:.3f}",
            *(f"{found:.3f}{'*' if alpha == row['alpha'] else ''}" for alpha, found in row["losses"].items()),
        )
    print_table(table)

    merged = result["merged"]
    table = make_table("Both in one pass", "loss on each text", ("model", *result["kinds"]))
    for name in ("base", *result["kinds"]):
        table.add_row(
            f"fine-tuned on {name}" if name != "base" else "base", *(f"{loss[name][k]:.3f}" for k in result["kinds"])
        )
    said = " + ".join(f"{alpha:g} {expert}" for expert, alpha in merged["experts"].items())
    table.add_row(f"base + {said}", *(f"{merged['loss'][kind]:.3f}" for kind in result["kinds"]))
    print_table(table)

    found = result["agreement"]
    print(
        f"At {found['density']:.0%}, {found['both']:.1%} of what one fine-tune changed the other changed too, "
        f"in the opposite direction in {found['opposite']:.1%} of these."
    )
    times = ", ".join(f"{what} {milliseconds:.0f} ms" for what, milliseconds in result["milliseconds"].items())
    print(f"On the live model of {result['num_parameters'] / 1e6:.0f}M parameters: {times} (medians).")
    print(
        f"With both active, undoing takes {result['undo_bytes'] / 2**20:.1f} MiB, "
        f"{8 * result['undo_bytes'] / result['num_parameters']:.3f} bit a parameter. "
        f"Every bit of the base came back: {'yes' if result['restored'] else 'NO'}."
    )


def plot_task_vectors(result: dict, path: Path) -> None:
    """Loss over alpha for each density, a panel for each text."""
    kinds = result["kinds"]
    figure, panels = make_figure(1, len(kinds), (6 * len(kinds), 4.2))
    for kind, axes in zip(kinds, panels, strict=True):
        for row in (row for row in result["rows"] if row["kind"] == kind):
            label = f"{row['density']:.0%}: {row['bits']:.2f} bit, {16 / row['bits']:.0f}x smaller"
            axes.plot(list(row["losses"]), list(row["losses"].values()), "o-", label=label)
        axes.axhline(result["loss"]["base"][kind], color="0.4", linestyle="--", label="base")
        axes.axhline(result["loss"][kind][kind], color="0.4", linestyle=":", label="fine-tuned")
        axes.set(xlabel="alpha", ylabel="loss", title=kind)
        axes.legend(fontsize=8)
    figure.suptitle(f"{result['model']}: a fine-tune as signs and one scale")
    figure.savefig(path, dpi=150)
