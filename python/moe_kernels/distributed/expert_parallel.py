"""Experts spread over the ranks of a mesh: :class:`ExpertParallel`, :func:`shard_experts`."""

from torch import nn
from torch.distributed import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle

from moe_kernels._checks import value_error
from moe_kernels.distributed.experts_module import is_experts_module, spread_experts_module
from moe_kernels.distributed.feed_forward import spread_feed_forward
from moe_kernels.distributed.shards import locate
from moe_kernels.nn import MoEFeedForward

_OP = "ExpertParallel"
_KINDS = "a MoEFeedForward or an experts module of transformers"


class ExpertParallel(ParallelStyle):
    """Spreads the experts of a module over a mesh dimension, for ``parallelize_module``.

    The module is a :class:`MoEFeedForward`, or the experts of a transformers model (any class that
    ``use_experts_implementation`` decorates, with an ``experts_implementation`` that skips ids past the last expert:
    "moe_kernels" does; transformers' own "eager" refuses them in some models, such as GPT-OSS).

    ::

        mesh = init_device_mesh("cuda", (8,), mesh_dim_names=("expert",))
        parallelize_module(model, mesh, {"layers.*.mlp": ExpertParallel()})     # or shard_experts(model, mesh)

    ``gate_up_proj``, ``down_proj`` (and the biases of transformers' modules) become DTensors with ``Shard(0)``: a rank
    keeps a block of num_experts / world_size experts. The router, the shared expert and the buffers stay plain tensors,
    the same on all ranks. Forward takes the rank's own tokens; see :func:`expert_parallel_ffn`. The shared expert of a
    :class:`MoEFeedForward` runs while they travel.

    With ``tensor_dim``, experts are split too, in their intermediate dimension (tensor parallelism inside an expert)::

        mesh = init_device_mesh("cuda", (4, 2), mesh_dim_names=("expert", "tensor"))
        shard_experts(model, mesh, tensor_dim="tensor")

    ``gate_up_proj`` is then cut by rows, the same slice of gate and of up, ``down_proj`` by columns. A token goes to
    both ranks of its expert, and their parts are added where the experts' are, on its own rank. Ranks of ``tensor_dim``
    have tokens of their own like all others (under sequence parallelism they do; where tensor-parallel attention gave
    them the same tokens, let each take its part). Such a ``gate_up_proj`` needs :func:`checkpointable`.

    Gradients: each rank's loss is that of its own tokens, as in data parallelism. An expert's gradient is the mean over
    the ranks of the mesh (each adds ``1 / world_size`` of its tokens' gradient), as DDP and FSDP average those of what
    is replicated, which are left to them: see :mod:`moe_kernels.distributed.data`.

    Args:
        layer: name for errors; by default the layer's class and sizes. :func:`shard_experts` gives its path in the
            model.
        chunk_tokens: see :func:`expert_parallel_ffn`.
        tensor_dim: name of the mesh's second dimension, over which each expert is split.

    Raises:
        TypeError: another module.
        ValueError: experts that the ranks cannot share equally, a mesh of other dimensions, quantised experts with
            ``tensor_dim``, or layers that are not the same on all ranks (raised on every rank).
        RuntimeError: another rank cannot spread its own.
    """

    def __init__(self, layer: str = "", *, chunk_tokens: int | None = None, tensor_dim: str | None = None):
        super().__init__()
        self.layer = layer
        self.chunk_tokens = chunk_tokens
        self.tensor_dim = tensor_dim

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        layer = self.layer or f"{type(module).__name__}({module.extra_repr()})"
        where = locate(device_mesh, layer, self.chunk_tokens, self.tensor_dim)
        if isinstance(module, MoEFeedForward):
            spread_feed_forward(module, where, self.src_data_rank)
        elif is_experts_module(module):
            spread_experts_module(module, where, self.src_data_rank)
        else:
            raise TypeError(f"{_OP}: module must be {_KINDS}, got {type(module).__name__}")
        return module


def shard_experts(
    model: nn.Module, mesh: DeviceMesh, *, chunk_tokens: int | None = None, tensor_dim: str | None = None
) -> nn.Module:
    """Applies :class:`ExpertParallel` to all modules of a model that it fits, and names each by its path."""
    found = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, MoEFeedForward) or is_experts_module(module)
    ]
    if not found:
        raise value_error("shard_experts", "model", f"one with {_KINDS}", type(model).__name__)
    for path, module in found:
        ExpertParallel(path, chunk_tokens=chunk_tokens, tensor_dim=tensor_dim)._apply(module, mesh)
    return model
