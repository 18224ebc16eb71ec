"""``experts_implementation="moe_kernels"`` for Hugging Face transformers, registered by importing this module.

::

    import moe_kernels.integrations.transformers
    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="moe_kernels")

or, for a model that is there already, and for the mixture-of-experts models that transformers does not dispatch::

    from moe_kernels.integrations.transformers import replace_modules
    report = replace_modules(model)      # print(report) says what was replaced, what was refused, and why
    report.restore()
"""

try:
    from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface
    from transformers.integrations.moe import ExpertsInterface
except ImportError as error:
    raise ImportError(
        "moe_kernels.integrations.transformers: transformers must be installed and have ExpertsInterface and "
        f"FP8ExpertsInterface, got {error}; run: pip install 'transformers>=5.23'"
    ) from error

from moe_kernels.integrations.transformers.experts import experts_forward, fp8_experts_forward
from moe_kernels.integrations.transformers.quantize import quantize_experts
from moe_kernels.integrations.transformers.replace import IMPLEMENTATION, ReplacementReport, replace_modules

ExpertsInterface.register(IMPLEMENTATION, experts_forward)
FP8ExpertsInterface.register(IMPLEMENTATION, fp8_experts_forward)

__all__ = [
    "IMPLEMENTATION",
    "ReplacementReport",
    "experts_forward",
    "fp8_experts_forward",
    "quantize_experts",
    "replace_modules",
]
