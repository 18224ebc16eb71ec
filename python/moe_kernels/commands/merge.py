"""``python -m moe_kernels merge MODEL[=WEIGHT] … --base BASE --out PATH``: several checkpoints as one."""

import hashlib
import json
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path

from moe_kernels.commands.arguments import (
    CommandError,
    add_leave_out,
    file_and_number,
    is_left_out,
    listed,
    progress_bar,
)

HELP = "several fine-tuned checkpoints, or files of task vectors, as one"
#: option -> key of moe_kernels.merge, for what a file of settings may hold under `parameters`
_NUMBERS = {
    "density": "density", "lambda": "lambda_", "gamma": "gamma", "epsilon": "epsilon", "select_topk": "select_topk",
    "t": "t", "normalize": "normalize",
}  # fmt: skip


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "models", nargs="*", metavar="MODEL[=WEIGHT]", help="files or folders, or what compress wrote; weight 1"
    )
    parser.add_argument("--base", help="what they were fine-tuned from")
    parser.add_argument(
        "--out", "-o", required=True, help="file or folder to write, like the base; its shards that are done are kept"
    )
    parser.add_argument("--config", help="YAML as mergekit's, instead of the models and options (methods we share)")
    parser.add_argument("--method", default="ties", help="as moe_kernels.merge; default ties")
    parser.add_argument("--semantics", default="official", help="official (default), peft or mergekit")
    for name in ("density", "lambda", "gamma", "epsilon", "select-topk", "t"):
        parser.add_argument(f"--{name}", type=float, help="as moe_kernels.merge")
    parser.add_argument("--normalize", action="store_const", const=True, help="divide by the sum of the weights")
    parser.add_argument("--seed", type=int, default=0, help="of random masks; default 0")
    add_leave_out(parser)


def main(arguments: Namespace) -> None:
    from moe_kernels import merge_tensors
    from moe_kernels.integrations.safetensors import Checkpoint, write_checkpoint

    base_path, models, options = _from_config(arguments) if arguments.config else _from_options(arguments)
    if not models:
        raise CommandError("merge: there must be a model to merge; give files or folders, or --config")
    experts = [_load(path) for path, _ in models]
    base = Checkpoint(base_path) if base_path else None
    like = base or experts[0]
    if isinstance(like, dict):
        raise CommandError("merge: --base must be given where the first model is a file of task vectors")
    names = [name for name in like if not is_left_out(name, arguments.leave_out)]
    for (path, _), expert in zip(models, experts, strict=True):
        # task vectors need not have every tensor: what they lack was not changed
        lone = expert.keys() - like.keys() if isinstance(expert, dict) else expert.keys() ^ like.keys()
        lone = {name for name in lone if not is_left_out(name, arguments.leave_out)}
        if lone:
            raise CommandError(
                f"merge: {path} and {like.path} must have the same tensors, got in one alone: {listed(sorted(lone))}; "
                "name them with --leave-out"
            )
    asked: list[str] = []

    def queue() -> Iterator[str]:
        while True:
            yield asked.pop()

    weights = [weight for _, weight in models]
    with progress_bar(len(like), "merge") as bar:
        merged = merge_tensors(
            None if base is None else Part(base, names),
            [_part(expert, names) for expert in experts],
            weights=weights if any(weight != 1 for weight in weights) else None,
            names=queue(),
            **options,
        )
        kept_as_is = set(like) - set(names)

        def make(name: str):
            if name in kept_as_is:
                return like[name]
            asked.append(name)
            return next(merged)[1]

        settings = {"moe_kernels.merge": _settings(base_path, models, options, arguments.leave_out)}
        kept = write_checkpoint(arguments.out, like, make, settings=settings, progress=lambda name: bar.update())
    print(
        f"{arguments.out}: {options['semantics']} {options['method']} of {len(models)} models, {len(names)} of "
        f"{len(like)} tensors" + (f"; kept {listed(kept)}" if kept else "")
    )


def _load(path: str):
    """A checkpoint, or the task vectors of a file that compress wrote."""
    from moe_kernels import Patch
    from moe_kernels.integrations.safetensors import Checkpoint, load_task_vectors
    from moe_kernels.integrations.safetensors.task_vectors import FORMAT

    checkpoint = Checkpoint(path)
    if checkpoint.metadata.get("format") != FORMAT:
        return checkpoint
    deltas = load_task_vectors(path)
    patches = [name for name, delta in deltas.items() if isinstance(delta, Patch)]
    if patches:
        raise CommandError(f"merge: {path}: patches cannot be merged, got those of {listed(patches)}; apply them first")
    return deltas


def _part(expert, names: list[str]) -> Mapping:
    if isinstance(expert, dict):
        return {name: expert[name] for name in names if name in expert}
    return Part(expert, names)


class Part(Mapping):
    """Some of a checkpoint's tensors, loaded when they are asked for."""

    def __init__(self, checkpoint, names: list[str]):
        self._checkpoint, self._names = checkpoint, dict.fromkeys(names)

    def __getitem__(self, name: str):
        if name not in self._names:
            raise KeyError(name)
        return self._checkpoint[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _from_options(arguments: Namespace) -> tuple[str | None, list[tuple[str, float]], dict]:
    options = {"method": arguments.method, "semantics": arguments.semantics, "seed": arguments.seed}
    for name, key in _NUMBERS.items():
        value = getattr(arguments, name)
        if value is not None:
            options[key] = value
    return arguments.base, [file_and_number("merge", model) for model in arguments.models], options


def _from_config(arguments: Namespace) -> tuple[str | None, list[tuple[str, float]], dict]:
    """What we and mergekit both have: methods, and numbers for all models or weights for each."""
    try:
        import yaml
    except ImportError:
        raise CommandError("merge: pyyaml must be installed to read --config; run: pip install pyyaml") from None
    if arguments.models or arguments.base:
        raise CommandError("merge: --config must be given alone, got models or --base beside it")
    try:
        config = yaml.safe_load(Path(arguments.config).read_text())
    except yaml.YAMLError as error:
        raise CommandError(f"merge: {arguments.config}: not YAML: {error}") from None
    if not isinstance(config, dict):
        raise CommandError(f"merge: {arguments.config}: must hold keys and values")
    unknown = set(config) - {"merge_method", "base_model", "models", "parameters", "dtype"}
    if unknown:
        raise CommandError(f"merge: {arguments.config}: has keys that are not understood: {listed(sorted(unknown))}")
    options = {"method": config.get("merge_method"), "semantics": "mergekit", "seed": arguments.seed}
    base = config.get("base_model")
    models, given = [], dict(config.get("parameters") or {})
    for entry in config.get("models") or []:
        entry = {"model": entry} if isinstance(entry, str) else entry
        parameters = dict(entry.get("parameters") or {})
        if entry["model"] == base and not parameters:
            continue
        weight = parameters.pop("weight", given.get("weight", 1.0))
        for name, value in parameters.items():
            if given.setdefault(name, value) != value:
                raise CommandError(f"merge: {arguments.config}: {name} must be one number for all models")
        if not isinstance(weight, (int, float)):
            raise CommandError(f"merge: {arguments.config}: weight must be a number, got {weight!r}")
        models.append((entry["model"], float(weight)))
    given.pop("weight", None)
    for name, value in given.items():
        if name in ("int8_mask", "rescale") and bool(value) == (name == "rescale"):
            continue  # what mergekit does by default, or a matter of its memory
        if name not in _NUMBERS or not isinstance(value, (int, float, bool)):
            raise CommandError(f"merge: {arguments.config}: parameter {name}={value!r} is not understood")
        options[_NUMBERS[name]] = value
    _check_dtype(arguments.config, config.get("dtype"), base or (models[0][0] if models else None))
    return base, models, options


def _check_dtype(config: str, dtype: str | None, like: str | None) -> None:
    """A merge here has the dtypes of the base; another is refused, not ignored."""
    if dtype is None or like is None:
        return
    from moe_kernels.integrations.safetensors import Checkpoint

    checkpoint = Checkpoint(like)
    others = sorted({str(checkpoint.dtype(name)).removeprefix("torch.") for name in checkpoint} - {dtype})
    floating = [other for other in others if "float" in other]
    if floating:
        raise CommandError(
            f"merge: {config}: dtype must be that of the models ({', '.join(floating)}), got {dtype}; leave it out"
        )


def _settings(base: str | None, models: list[tuple[str, float]], options: dict, leave_out: list[str]) -> str:
    """A digest of all that the result depends on: shards of another run are not taken for this one's."""
    paths = [str(Path(path).resolve()) for path in (*([base] if base else []), *(path for path, _ in models))]
    files = [(path, file) for path in paths for file in _files(Path(path))]
    states = [(path, file.name, file.stat().st_size, file.stat().st_mtime_ns) for path, file in files]
    text = json.dumps([states, [weight for _, weight in models], sorted(options.items()), sorted(leave_out)])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _files(path: Path) -> list[Path]:
    return sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
