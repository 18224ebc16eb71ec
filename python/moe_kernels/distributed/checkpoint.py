"""Weights cut so that a rank's part is several blocks of the whole, saved and loaded: :func:`checkpointable`."""

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard


def checkpointable(state: Any) -> Any:
    """A state dict for ``torch.distributed.checkpoint``, which takes every DTensor for one block of the whole.

    ::

        dcp.save(checkpointable(state), checkpoint_id=folder)
        dcp.load(checkpointable(state), checkpoint_id=folder)     # fills ``state``

    A rank that has a slice of an expert's gate rows and the same slice of its up rows (``ExpertParallel`` with
    ``tensor_dim``) has two. Saved, the whole lies in the file as any other tensor: a world of another size, of another
    split or of one process loads it, and its files are loaded here.

    Args:
        state: a state dict of a model, of an optimizer, or dicts and lists of them, however deep.

    Returns:
        The same, with each DTensor of several blocks seen as :class:`Blocks`; all else is the very object.

    Without it, what ``torch.distributed.checkpoint`` is given of such a layer is refused.
    """
    if isinstance(state, Mapping):
        return {name: checkpointable(value) for name, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(checkpointable(value) for value in state)
    return Blocks(state) if _has_blocks(state) else state


def need_checkpointable(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """A hook of ``state_dict``: PyTorch would take each weight of several blocks for one, and load others' rows."""

    def refuse(*_: Any) -> None:
        raise RuntimeError(f"torch.distributed.checkpoint must be given checkpointable(state), got {prefix}* as it is")

    for name, _ in module.named_parameters(prefix.removesuffix(".")):
        if _has_blocks(state.get(name)):
            state[name].__create_write_items__ = state[name].__create_chunk_list__ = refuse


def _has_blocks(value: Any) -> bool:
    return isinstance(value, DTensor) and any(isinstance(placement, _StridedShard) for placement in value.placements)


class Blocks(Tensor):
    """A DTensor as the blocks of the whole that its local part consists of, in the protocol of PyTorch's planners."""

    @staticmethod
    def __new__(cls, whole: DTensor):
        return Tensor._make_wrapper_subclass(cls, whole.shape, dtype=whole.dtype, device=whole.device)

    def __init__(self, whole: DTensor):
        self.blocks = dict(_blocks(whole))

    def __create_write_items__(self, name: str, _: Any) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                index=MetadataIndex(name, offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(ChunkStorageMetadata(offsets, block.shape), properties, self.shape),
            )
            for offsets, block in self.blocks.items()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offsets, block.shape) for offsets, block in self.blocks.items()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return self.blocks[index.offset]

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), options=None):
        if function is torch.ops.aten.new_empty.default:  # async_save makes a copy, and copies the attributes into it
            whole, shape = arguments
            return Tensor._make_wrapper_subclass(cls, shape, dtype=whole.dtype, device=options["device"])
        raise NotImplementedError(f"checkpointable: what it gives is for torch.distributed.checkpoint, not {function}")


def _blocks(whole: DTensor) -> list[tuple[torch.Size, Tensor]]:
    """(where in the whole it begins, that part of the local tensor)"""
    local = whole.detach().to_local()
    runs = [_runs(positions) for positions in _positions(whole)]
    return [
        (torch.Size(first for first, _ in block), local[tuple(part for _, part in block)])
        for block in itertools.product(*runs)
    ]


def _positions(whole: DTensor) -> list[Tensor]:
    """For each dimension, where in the whole the local tensor's entries are."""
    positions = [torch.arange(size) for size in whole.shape]
    for place, ranks, placement in zip(
        whole.device_mesh.get_coordinate(), whole.device_mesh.shape, whole.placements, strict=True
    ):
        if isinstance(placement, Shard | _StridedShard):  # of each of the split's parts, the rank's chunk
            parts = placement.split_factor if isinstance(placement, _StridedShard) else 1
            whole_dim = positions[placement.dim]
            chunks = [part.chunk(ranks)[place : place + 1] for part in whole_dim.chunk(parts)]
            # a small dimension has fewer chunks than ranks
            positions[placement.dim] = torch.cat([whole_dim[:0], *itertools.chain.from_iterable(chunks)])
    return positions


def _runs(positions: Tensor) -> list[tuple[int, slice]]:
    """(first position, where it stands) of each run of positions that follow each other."""
    ends = [0, *((positions.diff() != 1).nonzero().flatten() + 1).tolist(), positions.numel()]
    return [(int(positions[begin]), slice(begin, end)) for begin, end in itertools.pairwise(ends) if begin < end]
