"""``python -m moe_kernels apply BASE DELTA[=COEFFICIENT] … --out PATH``: task vectors added to a checkpoint."""

import hashlib
from argparse import ArgumentParser, Namespace
from pathlib import Path

from moe_kernels.commands.arguments import (
    CommandError,
    add_leave_out,
    file_and_number,
    is_left_out,
    listed,
    progress_bar,
)

HELP = "task vectors added to a checkpoint, all of them with one rounding"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("base", help="safetensors file, or folder as transformers saves it")
    parser.add_argument("deltas", nargs="+", metavar="DELTA[=COEFFICIENT]", help="files that compress wrote; default 1")
    parser.add_argument(
        "--out", "-o", required=True, help="file or folder to write, like the base; its shards that are done are kept"
    )
    parser.add_argument("--any-base", action="store_true", help="also task vectors of another base")
    add_leave_out(parser)


def main(arguments: Namespace) -> None:
    from moe_kernels import Patch, apply_, apply_patch_
    from moe_kernels.integrations.safetensors import Checkpoint, load_task_vectors, write_checkpoint

    base = Checkpoint(arguments.base)
    experts = [file_and_number("apply", argument) for argument in arguments.deltas]
    vectors = [(load_task_vectors(path), coefficient) for path, coefficient in experts]
    plan: dict[str, list] = {}
    for (path, _), (deltas, coefficient) in zip(experts, vectors, strict=True):
        deltas = {name: delta for name, delta in deltas.items() if not is_left_out(name, arguments.leave_out)}
        unknown = [name for name in deltas if name not in base]
        if unknown:
            raise CommandError(f"apply: {path}: the base has no {listed(unknown)}; name them with --leave-out")
        for name, delta in deltas.items():
            if delta.shape != base.shape(name):
                raise CommandError(
                    f"apply: {path}: {name} must be of shape {list(base.shape(name))}, got {list(delta.shape)}"
                )
            plan.setdefault(name, []).append((path, delta, coefficient))
    for name, entries in plan.items():
        for path, delta, coefficient in entries:
            if isinstance(delta, Patch) and (len(entries) > 1 or coefficient != 1 or arguments.any_base):
                raise CommandError(
                    f"apply: {path}: {name} has a patch, which leads from its own base to one tensor: give it alone, "
                    "without a coefficient and without --any-base"
                )
            if isinstance(delta, Patch) and delta.dtype != base.dtype(name):
                raise CommandError(f"apply: {path}: {name} must be {delta.dtype}, got {base.dtype(name)}")

    def make(name: str):
        weight = base[name]
        if name not in plan:
            return weight
        for path, delta, _ in plan[name]:
            if not arguments.any_base and not delta.fits(weight):
                raise CommandError(
                    f"apply: {path}: {name} is the difference from another base, got {arguments.base}; "
                    "pass --any-base to add it all the same"
                )
        weight = weight.clone()
        if isinstance(plan[name][0][1], Patch):
            apply_patch_(weight, plan[name][0][1])
            return weight
        apply_(weight, [delta for _, delta, _ in plan[name]], [coefficient for _, _, coefficient in plan[name]])
        return weight

    settings = {"moe_kernels.apply": _settings(arguments, experts)}
    with progress_bar(len(base), "apply") as bar:
        kept = write_checkpoint(arguments.out, base, make, settings=settings, progress=lambda name: bar.update())
    print(f"{arguments.out}: {len(plan)} of {len(base)} tensors changed" + (f"; kept {listed(kept)}" if kept else ""))


def _settings(arguments: Namespace, experts: list[tuple[str, float]]) -> str:
    """A digest of all that the result depends on: shards of another run are not taken for this one's."""
    digest = hashlib.blake2b(repr((str(Path(arguments.base).resolve()), sorted(arguments.leave_out))).encode())
    for path, coefficient in experts:
        digest.update(repr(coefficient).encode() + Path(path).read_bytes())
    return digest.hexdigest()[:32]
