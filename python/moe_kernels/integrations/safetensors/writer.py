"""Safetensors files written a tensor at a time: into a temporary file beside the target, which is then renamed."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from moe_kernels.integrations.safetensors.checkpoint import DTYPES, INDEX, Checkpoint

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
#: headers are padded to this, so that tensors of whole cache lines stay that in a mapped file
_ALIGNMENT = 64
#: weights that transformers saves in other forms, and shards, are not copied
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".index.json")

Layout = Mapping[str, tuple[torch.dtype, torch.Size]]


def write_file(
    path: str | Path, layout: Layout, tensors: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes one safetensors file of the tensors in ``layout``, in that order, as ``tensors`` yields them.

    safetensors' own writer takes all tensors at once; this one holds one. The file appears under its name when it is
    whole and on the disk, and not before: whatever fails, a file that was there is still what it was.

    Raises:
        ValueError: ``tensors`` yields other names, shapes or dtypes than ``layout`` has.
        OSError: the disk is full or the folder cannot be written; the temporary file is removed.
    """
    path = Path(path)
    header: dict = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, (dtype, shape) in layout.items():
        size = shape.numel() * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-(len(text) + 8) // _ALIGNMENT) * _ALIGNMENT - 8)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            wanted = iter(layout.items())
            for name, tensor in tensors:
                expected, (dtype, shape) = next(wanted, (None, (None, None)))
                if (name, tensor.dtype, tensor.shape) != (expected, dtype, shape):
                    raise ValueError(f"write_file: {expected} must come next, got {name} {list(tensor.shape)}")
                file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            lost = [name for name, _ in wanted]
            if lost:
                raise ValueError(f"write_file: tensors must hold all of the layout, got none for {', '.join(lost[:8])}")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_checkpoint(
    target: str | Path,
    like: Checkpoint,
    make: Callable[[str], Tensor],
    *,
    settings: Mapping[str, str],
    layout: Layout | None = None,
    progress: Callable[[str], object] = lambda name: None,
) -> list[str]:
    """Writes a checkpoint with the files of another: its shards, its index, its tokenizer and configuration.

    Args:
        target: a file where ``like`` is one, else a folder, made where it is not there.
        make: gives the tensor of a name.
        settings: how the tensors are made. They go into the metadata, and a shard that is there already with the same
            ones is kept: a run that was stopped goes on where it was.
        layout: dtypes and shapes, where they are not those of ``like``.
        progress: is called after each tensor.

    Returns:
        Names of the shards that were kept.
    """
    target = Path(target)
    metadata = {"format": "pt", **like.metadata, **settings}
    if layout is None:
        layout = {name: (like.dtype(name), like.shape(name)) for name in like}

    def tensors(names: list[str]):
        for name in names:
            yield name, make(name)
            progress(name)

    if not like.path.is_dir():
        write_file(target, {name: layout[name] for name in like}, tensors(list(like)), metadata)
        return []
    target.mkdir(parents=True, exist_ok=True)
    kept = []
    for shard, names in like.shards.items():
        wanted = {name: layout[name] for name in names}
        if _is_there(target / shard, wanted, settings):
            kept.append(shard)
            for name in names:
                progress(name)
            continue
        write_file(target / shard, wanted, tensors(names), metadata)
    _copy_others(like.path, target)
    if (like.path / INDEX).exists():
        index = json.loads((like.path / INDEX).read_text())
        index.setdefault("metadata", {})["total_size"] = sum(
            shape.numel() * dtype.itemsize for dtype, shape in layout.values()
        )
        (target / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return kept


def _is_there(path: Path, layout: Layout, settings: Mapping[str, str]) -> bool:
    if not path.exists():
        return False
    there = Checkpoint(path)
    same = {name: (there.dtype(name), there.shape(name)) for name in there} == dict(layout)
    return same and settings.items() <= there.metadata.items()


def _copy_others(source: Path, target: Path) -> None:
    """Tokenizer, configuration and whatever else is small and no weight."""
    for file in source.iterdir():
        if file.is_file() and not file.name.startswith(".") and not file.name.endswith(_WEIGHT_SUFFIXES):
            shutil.copyfile(file, target / file.name)
