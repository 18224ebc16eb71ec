from moe_kernels.ops.task_vector.api import Overlap, Undo, apply_, compare, decompress, unapply_
from moe_kernels.ops.task_vector.compress import compress
from moe_kernels.ops.task_vector.packed import Packed, PackedDelta, from_bytes
from moe_kernels.ops.task_vector.part import part_of_delta
from moe_kernels.ops.task_vector.patch import Patch, apply_patch_, make_patch, part_of_patch, unapply_patch_
from moe_kernels.ops.task_vector.ternary import TernaryDelta

__all__ = [
    "Overlap",
    "Packed",
    "PackedDelta",
    "Patch",
    "TernaryDelta",
    "Undo",
    "apply_",
    "apply_patch_",
    "compare",
    "compress",
    "decompress",
    "from_bytes",
    "make_patch",
    "part_of_delta",
    "part_of_patch",
    "unapply_",
    "unapply_patch_",
]
