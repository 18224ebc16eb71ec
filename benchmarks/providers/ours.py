"""moe_kernels: the plain layout of transformers, and prepacked copies."""

import torch

from benchmarks.providers.base import Layer, Provider, Run
from moe_kernels import _dispatch, expert_ffn, prepack
from moe_kernels.ops.expert_ffn import native


def our_backends(op: str) -> dict[str, str]:
    """Provider -> backend of our op on the default device: ``ours`` is the one that "auto" takes, ``ours_triton`` is
    Triton where that has kernels too."""
    device = torch.get_default_device().type
    backends = {"ours": _dispatch.resolve(op, "auto", device)}
    if backends["ours"] != "triton" and _dispatch.missing_reason(op, "triton", device) is None:
        backends["ours_triton"] = "triton"
    return backends


class Ours(Provider):
    name = "ours"
    what = "moe_kernels.expert_ffn on the weights as transformers stores them"
    ours = True
    devices = ("cpu", "cuda")
    trains = True
    distribution = "moe-kernels-torch"
    backend = "auto"

    def unsuited(self, layer: Layer, num_tokens: int | None = None) -> str | None:
        on_reference = layer.gate_up_proj.requires_grad and self.version(layer) == "reference"
        if on_reference and layer.weight_bytes > 1 << 26:
            # autograd adds a zero gradient of the size of all experts for each expert that is used
            return "the reference's backward takes minutes at this size and the native kernels are not there"
        return None

    def prepare(self, layer: Layer) -> Run:
        gate_up_proj, down_proj, backend = layer.gate_up_proj, layer.down_proj, self.backend

        def run(batch):
            ids, weights = batch.topk_ids, batch.topk_weights
            return expert_ffn(batch.hidden_states, ids, weights, gate_up_proj, down_proj, backend=backend)

        return run

    def version(self, layer: Layer | None = None) -> str:
        """The backend that runs."""
        if layer is None:
            return _dispatch.resolve("expert_ffn", "auto", torch.get_default_device().type)
        weights = layer.gate_up_proj
        op = "expert_ffn with gradients" if weights.requires_grad else "expert_ffn"
        backend = _dispatch.resolve(op, "auto", weights.device.type)
        if backend == "native" and weights.is_cuda and native.cuda_misfit(weights[0], weights, layer.down_proj):
            return "triton"
        return backend


class OursTriton(Ours):
    name = "ours_triton"
    what = "moe_kernels.expert_ffn with backend='triton'"
    devices = ("cuda",)
    backend = "triton"

    def missing(self) -> str | None:
        return _dispatch.missing_reason("expert_ffn", "triton", "cuda")

    def unsuited(self, layer: Layer, num_tokens: int | None = None) -> str | None:
        return "it is what ours runs here" if Ours.version(self, layer) == "triton" else None

    def version(self, layer: Layer | None = None) -> str:
        return "triton"


class OursPrepacked(Ours):
    name = "ours_prepacked"
    what = "moe_kernels.expert_ffn on moe_kernels.prepack() copies"
    devices = ("cpu",)
    trains = False
    copies = 1.0

    def missing(self) -> str | None:
        reason = _dispatch.missing_reason("expert_ffn", "native", "cpu")
        return reason and f"prepack needs the native kernels: {reason}"

    def prepare(self, layer: Layer) -> Run:
        gate_up_proj, down_proj = prepack(layer.gate_up_proj, num_splits=2), prepack(layer.down_proj)

        def run(batch):
            return expert_ffn(batch.hidden_states, batch.topk_ids, batch.topk_weights, gate_up_proj, down_proj)

        return run
