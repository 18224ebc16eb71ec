from moe_kernels.ops.task_vector.api import Undo, apply_, decompress, unapply_
from moe_kernels.ops.task_vector.compress import compress
from moe_kernels.ops.task_vector.packed import PackedDelta
from moe_kernels.ops.task_vector.ternary import TernaryDelta

__all__ = ["PackedDelta", "TernaryDelta", "Undo", "apply_", "compress", "decompress", "unapply_"]
