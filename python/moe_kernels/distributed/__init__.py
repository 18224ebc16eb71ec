"""Mixture-of-experts layers whose experts are spread over the ranks of ``torch.distributed``.

Imported on demand: ``import moe_kernels`` does not load it.
"""

from moe_kernels.distributed.balance import balance_loss
from moe_kernels.distributed.checkpoint import checkpointable
from moe_kernels.distributed.data import data_parallel, fully_shard_experts
from moe_kernels.distributed.expert_parallel import ExpertParallel, shard_experts
from moe_kernels.distributed.ffn import expert_parallel_ffn
from moe_kernels.distributed.lora import expert_parallel_lora
from moe_kernels.distributed.quantized import quantize_experts
from moe_kernels.distributed.task_vectors import apply_, apply_patch_, unapply_, unapply_patch_

__all__ = [
    "ExpertParallel",
    "apply_",
    "apply_patch_",
    "balance_loss",
    "checkpointable",
    "data_parallel",
    "expert_parallel_ffn",
    "expert_parallel_lora",
    "fully_shard_experts",
    "quantize_experts",
    "shard_experts",
    "unapply_",
    "unapply_patch_",
]
