from moe_kernels.ops.task_vector.api import Overlap, Undo, apply_, compare, decompress, unapply_
from moe_kernels.ops.task_vector.compress import compress
from moe_kernels.ops.task_vector.packed import PackedDelta
from moe_kernels.ops.task_vector.ternary import TernaryDelta

__all__ = ["Overlap", "PackedDelta", "TernaryDelta", "Undo", "apply_", "compare", "compress", "decompress", "unapply_"]
