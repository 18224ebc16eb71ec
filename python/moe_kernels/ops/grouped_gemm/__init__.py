from moe_kernels.ops.grouped_gemm.api import grouped_gemm, prepack
from moe_kernels.ops.grouped_gemm.prepacked import PrepackedWeights

__all__ = ["PrepackedWeights", "grouped_gemm", "prepack"]
