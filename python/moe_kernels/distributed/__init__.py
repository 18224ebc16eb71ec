"""Mixture-of-experts layers whose experts are spread over the ranks of ``torch.distributed``.

Imported on demand: ``import moe_kernels`` does not load it.
"""

from moe_kernels.distributed.expert_parallel import ExpertParallel, expert_parallel_ffn, shard_experts

__all__ = ["ExpertParallel", "expert_parallel_ffn", "shard_experts"]
