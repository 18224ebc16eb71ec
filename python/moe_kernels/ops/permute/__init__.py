from moe_kernels.ops.permute.api import DispatchPlan, permute, plan_dispatch, unpermute

__all__ = ["DispatchPlan", "permute", "plan_dispatch", "unpermute"]
