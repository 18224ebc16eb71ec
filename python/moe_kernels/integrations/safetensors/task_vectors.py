"""Packed task vectors and patches in one safetensors file: a tensor of bytes for each weight, under its name."""

from collections.abc import Mapping
from pathlib import Path

import torch

from moe_kernels.integrations.safetensors.checkpoint import Checkpoint, CheckpointError
from moe_kernels.integrations.safetensors.writer import write_file
from moe_kernels.ops.task_vector.packed import Packed, from_bytes

#: value of "format" in the file's metadata; docs/task_vector_format.md
FORMAT = "moe_kernels.task_vector"
VERSION = "1"


def save_task_vectors(
    path: str | Path, deltas: Mapping[str, Packed], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes what :func:`moe_kernels.compress` or :func:`moe_kernels.make_patch` gave for a state dict.

    No pickle; each tensor has its own checksum.

    Args:
        metadata: strings that go with it: the method, the density, where the base came from.
    """
    layout = {name: (torch.uint8, delta.data.shape) for name, delta in deltas.items()}
    tensors = ((name, delta.data) for name, delta in deltas.items())
    write_file(path, layout, tensors, {"format": FORMAT, "version": VERSION, **(metadata or {})})


def load_task_vectors(path: str | Path) -> dict[str, Packed]:
    """Reads and checks every task vector or patch of a file.

    Raises:
        CheckpointError: it holds none, or a damaged one, whose name is in the message.
    """
    file = Checkpoint(path)
    if file.metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path}: holds no task vectors; make them with python -m moe_kernels compress")
    deltas = {}
    for name in file:
        try:
            deltas[name] = from_bytes(file[name])
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{path}: {name}: {error}") from None
    return deltas
