from moe_kernels.ops.task_vector.api import Undo, apply_, unapply_
from moe_kernels.ops.task_vector.ternary import TernaryDelta

__all__ = ["TernaryDelta", "Undo", "apply_", "unapply_"]
