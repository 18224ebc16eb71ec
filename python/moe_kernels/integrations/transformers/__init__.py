"""``experts_implementation="moe_kernels"`` for Hugging Face transformers, registered by importing this module.

::

    import moe_kernels.integrations.transformers
    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="moe_kernels")

or, for a model that is there already, and for the mixture-of-experts models that transformers does not dispatch::

    from moe_kernels.integrations.transformers import replace_modules
    report = replace_modules(model)      # print(report) says what was replaced, what was refused, and why
    report.restore()

Expert parallelism of transformers works with it (``DistributedConfig(ep_size=...)``), and has a way of its own to bring
tokens to their experts, ``ep_implementation="moe_kernels"``: see :mod:`.expert_parallel`.

Generation from the fused logits of several models or prompts::

    from moe_kernels.integrations.transformers import fusions
    model.generate(**inputs, custom_generate=fusions.guidance(1.5, negative_ids), num_beams=4)

It also registers the classes of models whose layers ``moe_kernels.nn.split_dense`` has split, so that
``AutoModelForCausalLM.from_pretrained`` loads them.
"""

from importlib.util import find_spec

import torch

try:
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface
    from transformers.integrations.moe import ExpertsInterface
except ImportError as error:
    raise ImportError(
        "moe_kernels.integrations.transformers: transformers must be installed and have ExpertsInterface and "
        f"FP8ExpertsInterface, got {error}; run: pip install 'transformers>=5.23'"
    ) from error

from moe_kernels.integrations.transformers import fusions
from moe_kernels.integrations.transformers.experts import experts_forward, fp8_experts_forward
from moe_kernels.integrations.transformers.fused_generation import FusedGeneration
from moe_kernels.integrations.transformers.fusion_processor import FusionLogitsProcessor
from moe_kernels.integrations.transformers.quantize import quantize_experts
from moe_kernels.integrations.transformers.replace import IMPLEMENTATION, ReplacementReport, replace_modules
from moe_kernels.integrations.transformers.source_state import FusionSource, check_tokenizers
from moe_kernels.nn.split_models import split_classes

ExpertsInterface.register(IMPLEMENTATION, experts_forward)
FP8ExpertsInterface.register(IMPLEMENTATION, fp8_experts_forward)
if torch.distributed.is_available() and find_spec("transformers.distributed") is not None:
    if find_spec("transformers.distributed.expert_parallel") is not None:  # not in every transformers that we take
        from moe_kernels.integrations.transformers import expert_parallel

        expert_parallel.register(IMPLEMENTATION)
for split_class in split_classes().values():
    AutoConfig.register(split_class.config_class.model_type, split_class.config_class, exist_ok=True)
    AutoModelForCausalLM.register(split_class.config_class, split_class, exist_ok=True)

__all__ = [
    "IMPLEMENTATION",
    "FusedGeneration",
    "FusionLogitsProcessor",
    "FusionSource",
    "ReplacementReport",
    "check_tokenizers",
    "experts_forward",
    "fp8_experts_forward",
    "fusions",
    "quantize_experts",
    "replace_modules",
]
