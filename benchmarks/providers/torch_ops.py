"""What one writes with torch alone."""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.providers.base import Batch, Layer, Provider, Run


class TorchMM(Provider):
    name = "torch_mm"
    devices = ("cpu", "cuda")
    what = "tokens sorted by expert, two torch.mm for each expert that has any, index_add_"
    trains = True

    def prepare(self, layer: Layer) -> Run:
        num_experts = layer.shape.num_experts
        gate_up_proj, down_proj = layer.gate_up_proj, layer.down_proj

        def run(batch: Batch) -> Tensor:
            # indexing inside autograd makes a full-size zero gradient for each expert; unbind stacks them once
            training = torch.is_grad_enabled()
            gate_up_of = gate_up_proj.unbind(0) if training else gate_up_proj
            down_of = down_proj.unbind(0) if training else down_proj
            ids = batch.topk_ids.reshape(-1)
            order = ids.argsort(stable=True)
            token = order // batch.topk_ids.shape[1]
            rows = batch.hidden_states[token]
            weights = batch.topk_weights.reshape(-1)[order, None]
            out = torch.zeros_like(batch.hidden_states)
            begin = 0
            for expert, count in enumerate(torch.bincount(ids, minlength=num_experts).tolist()):
                if count == 0:
                    continue
                end = begin + count
                gate, up = torch.mm(rows[begin:end], gate_up_of[expert].T).chunk(2, dim=1)
                y = torch.mm(F.silu(gate) * up, down_of[expert].T)
                out.index_add_(0, token[begin:end], y * weights[begin:end])
                begin = end
            return out

        return run


def grouped_mm_ffn(
    hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor
) -> Tensor:
    """The expert FFN with ``F.grouped_mm`` and no loop in Python."""
    num_tokens, top_k = topk_ids.shape
    ids = topk_ids.reshape(-1)
    order = ids.argsort(stable=True)
    experts = torch.arange(gate_up_proj.shape[0], device=ids.device)
    ends = torch.searchsorted(ids[order], experts, right=True, out_int32=True)  # bincount would wait for a GPU
    gate, up = F.grouped_mm(hidden_states[order // top_k], gate_up_proj.transpose(1, 2), offs=ends).chunk(2, dim=1)
    y = F.grouped_mm(F.silu(gate) * up, down_proj.transpose(1, 2), offs=ends)
    back = torch.empty_like(order)
    back[order] = torch.arange(order.numel(), device=order.device)
    return (y[back].view(num_tokens, top_k, -1) * topk_weights[..., None]).sum(1)


class TorchGroupedMM(Provider):
    name = "torch_grouped_mm"
    devices = ("cpu", "cuda")
    what = "torch.nn.functional.grouped_mm, gather before and weighted sum after"
    trains = True

    def missing(self) -> str | None:
        return None if hasattr(F, "grouped_mm") else "torch.nn.functional.grouped_mm is not in this torch"

    def prepare(self, layer: Layer) -> Run:
        return lambda batch: grouped_mm_ffn(
            batch.hidden_states, batch.topk_ids, batch.topk_weights, layer.gate_up_proj, layer.down_proj
        )


class TorchCompile(TorchGroupedMM):
    name = "torch_compile"
    what = "torch_grouped_mm under torch.compile(dynamic=True); compiling takes minutes, so only when asked for"
    default = False
    trains_by_default = False

    def prepare(self, layer: Layer) -> Run:
        compiled = torch.compile(grouped_mm_ffn, dynamic=True)
        return lambda batch: compiled(
            batch.hidden_states, batch.topk_ids, batch.topk_weights, layer.gate_up_proj, layer.down_proj
        )
