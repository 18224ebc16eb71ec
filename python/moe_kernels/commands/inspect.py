"""``python -m moe_kernels inspect FILE …``: what checkpoints and task vectors hold, and how task vectors agree."""

from argparse import ArgumentParser, Namespace
from collections import Counter

HELP = "what files of task vectors or checkpoints hold; of several task vectors, how far they agree"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", help="safetensors files, or folders as transformers saves them")
    parser.add_argument("--base", help="checkpoint: say whether the task vectors are differences from it")
    parser.add_argument("--tensors", action="store_true", help="a line for each tensor")


def main(arguments: Namespace) -> None:
    from moe_kernels.integrations.safetensors import Checkpoint, load_task_vectors
    from moe_kernels.integrations.safetensors.task_vectors import FORMAT

    vectors = {}
    for path in arguments.files:
        checkpoint = Checkpoint(path)
        if checkpoint.metadata.get("format") == FORMAT:
            vectors[path] = load_task_vectors(path)
            _print_task_vectors(path, vectors[path], checkpoint.metadata, arguments)
        else:
            _print_checkpoint(path, checkpoint, arguments)
    paths = list(vectors)
    for i, first in enumerate(paths):
        for second in paths[i + 1 :]:
            _print_agreement(first, second, *(_ternary(vectors[path]) for path in (first, second)))


def _ternary(deltas: dict) -> dict:
    """Those that can be compared by their signs."""
    from moe_kernels import PackedDelta

    return {name: d for name, d in deltas.items() if isinstance(d, PackedDelta) and d.values is None}


def _print_task_vectors(path: str, deltas: dict, metadata: dict, arguments: Namespace) -> None:
    numel, nnz = sum(delta.numel for delta in deltas.values()), sum(delta.nnz for delta in deltas.values())
    nbytes = sum(delta.nbytes for delta in deltas.values())
    said = ", ".join(f"{key} {value}" for key, value in sorted(metadata.items()) if key not in ("format", "version"))
    print(f"{path}: task vectors of {len(deltas)} tensors, {numel:,} parameters; {said}")
    print(f"  density {nnz / max(numel, 1):.4f}, {nbytes:,} bytes, {8 * nbytes / max(numel, 1):.3f} bit a parameter")
    if arguments.base:
        from moe_kernels.integrations.safetensors import Checkpoint

        base = Checkpoint(arguments.base)
        others = [name for name, delta in deltas.items() if name not in base or not delta.fits(base[name])]
        fits = "all are differences from it" if not others else f"of another base: {', '.join(others[:8])}"
        print(f"  base {arguments.base}: {fits}")
    if arguments.tensors:
        for name, delta in deltas.items():
            bits = 8 * delta.nbytes / max(delta.numel, 1)
            print(f"  {name} {list(delta.shape)} density {delta.density:.4f} {_kind(delta)} {bits:.3f} bit")


def _kind(delta) -> str:
    from moe_kernels import Patch

    if isinstance(delta, Patch):
        return f"patch of {delta.dtype}".replace("torch.", "")
    values = "" if delta.values is None else f" values in {delta.values}"
    return f"scale {delta.scale:.4g}{values}".replace("torch.", "")


def _print_checkpoint(path: str, checkpoint, arguments: Namespace) -> None:
    counts = Counter()
    for name in checkpoint:
        counts[str(checkpoint.dtype(name)).removeprefix("torch.")] += checkpoint.shape(name).numel()
    said = ", ".join(f"{count:,} {dtype}" for dtype, count in counts.most_common())
    print(f"{path}: checkpoint of {len(checkpoint)} tensors in {len(checkpoint.shards)} files; {said}")
    if arguments.tensors:
        for name in checkpoint:
            print(f"  {name} {list(checkpoint.shape(name))} {str(checkpoint.dtype(name)).removeprefix('torch.')}")


def _print_agreement(first: str, second: str, one: dict, other: dict) -> None:
    from moe_kernels import compare

    same = [name for name in one if name in other and one[name].shape == other[name].shape]
    found = compare({name: one[name] for name in same}, {name: other[name] for name in same})
    conflicts = (found.both - found.agree) / found.both if found.both else 0.0
    print(
        f"{first} and {second}: {found.both:,} parameters in both, opposite signs in {conflicts:.1%} of them, "
        f"cosine {found.cosine:.4f}"
    )
