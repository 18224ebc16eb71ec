from moe_kernels.ops.quantize.api import quantize, quantized_from_fp8, quantized_from_mxfp4
from moe_kernels.ops.quantize.quantized import QuantizedWeights

__all__ = ["QuantizedWeights", "quantize", "quantized_from_fp8", "quantized_from_mxfp4"]
