"""``python -m moe_kernels compress BASE TUNED --out FILE``: what a fine-tune changed, as task vectors or a patch."""

from argparse import ArgumentParser, Namespace

from moe_kernels.commands.arguments import CommandError, add_leave_out, is_left_out, listed, progress_bar

HELP = "a fine-tuned checkpoint as task vectors of its base, or as a lossless patch"
#: passes over each tensor: two histograms, the moments, the choice
_PASSES = 4


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("base", help="safetensors file, or folder as transformers saves it")
    parser.add_argument("tuned", help="the same after fine-tuning")
    parser.add_argument("--out", "-o", required=True, help="safetensors file to write")
    parser.add_argument("--density", type=float, default=0.05, help="part of the entries that is kept; default 0.05")
    parser.add_argument("--scale", choices=("std", "mean"), default="std", help="default: std, as ComPEFT")
    parser.add_argument(
        "--values",
        choices=("float32", "bfloat16", "float16"),
        help="keep the values of the entries in this dtype; default: their signs alone",
    )
    parser.add_argument(
        "--lossless",
        action="store_true",
        help="a patch that gives the tuned checkpoint back to the last bit; density, scale, scope have no part in it",
    )
    parser.add_argument(
        "--scope",
        choices=("global", "tensor"),
        default="global",
        help="one threshold for all tensors (default) or each",
    )
    add_leave_out(parser)


def main(arguments: Namespace) -> None:
    import torch

    from moe_kernels.integrations.safetensors import Checkpoint, save_task_vectors

    base, tuned = Checkpoint(arguments.base), Checkpoint(arguments.tuned)
    lone = sorted(name for name in set(base) ^ set(tuned) if not is_left_out(name, arguments.leave_out))
    if lone:
        raise CommandError(
            f"compress: both checkpoints must have the same tensors, got in one alone: {listed(lone)}; "
            "name them with --leave-out"
        )
    names = sorted(name for name in base if name in tuned and not is_left_out(name, arguments.leave_out))
    for what, of in (("shape", Checkpoint.shape), ("dtype", Checkpoint.dtype)):
        differing = [name for name in names if of(base, name) != of(tuned, name)]
        differing = [f"{name} ({of(base, name)}, {of(tuned, name)})" for name in differing]
        if differing:
            raise CommandError(
                f"compress: tensors must have one {what} in both checkpoints, got {listed(differing)}; "
                "convert one of them, or name them with --leave-out"
            )
    floating = [name for name in names if base.dtype(name).is_floating_point]
    unequal = [name for name in names if name not in floating and not torch.equal(base[name], tuned[name])]
    if unequal:
        raise CommandError(
            f"compress: tensors of integers must be equal in both checkpoints, got others in {listed(unequal)}; "
            "name them with --leave-out"
        )
    if arguments.lossless:
        deltas, method = _patches(base, tuned, floating), {"method": "patch"}
    else:
        deltas, method = _task_vectors(base, tuned, floating, arguments)
    metadata = {**method, "base": str(arguments.base), "tuned": str(arguments.tuned)}
    save_task_vectors(arguments.out, deltas, metadata)
    numel = sum(delta.numel for delta in deltas.values())
    packed, dense = sum(delta.nbytes for delta in deltas.values()), sum(base.nbytes(name) for name in floating)
    nnz = sum(delta.nnz for delta in deltas.values())
    what = "patches" if arguments.lossless else "task vectors"
    print(
        f"{arguments.out}: {len(deltas)} {what} of {numel:,} parameters, density {nnz / max(numel, 1):.4f}, "
        f"{packed:,} bytes, {8 * packed / max(numel, 1):.3f} bit a parameter, "
        f"{dense / max(packed, 1):.1f} times smaller than the tensors"
    )


def _task_vectors(base, tuned, names: list[str], arguments: Namespace) -> tuple[dict, dict[str, str]]:
    """And what says how they were made."""
    import torch

    from moe_kernels import compress

    # mapped from the files, not read: a checkpoint may be larger than memory
    pairs = [{name: checkpoint[name] for name in names} for checkpoint in (tuned, base)]
    with progress_bar(_PASSES * len(names), "compress") as bar:
        deltas = compress(
            pairs[0],
            arguments.density,
            base=pairs[1],
            scale=arguments.scale,
            scope=arguments.scope,
            values=None if arguments.values is None else getattr(torch, arguments.values),
            progress=lambda name: bar.update(),
        )
    settings = {"density": str(arguments.density), "scope": arguments.scope}
    if arguments.values is None:
        return deltas, {"method": "compeft", "scale": arguments.scale, **settings}
    return deltas, {"method": "largest values", "values": arguments.values, **settings}


def _patches(base, tuned, names: list[str]) -> dict:
    from moe_kernels import make_patch

    patches = {}
    with progress_bar(len(names), "compress") as bar:
        for name in names:
            patches[name] = make_patch(tuned[name], base[name])
            bar.update()
    return patches
