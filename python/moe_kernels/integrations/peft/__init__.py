"""PEFT's LoRA adapters, many in one batch.

Read in this order: :mod:`folder` (what a folder holds, and what is refused), :mod:`adapters` (serving), :mod:`new`.
"""

from moe_kernels.integrations.peft.adapters import PeftAdapters, load_peft_adapters
from moe_kernels.integrations.peft.new import new_peft_adapter

__all__ = ["PeftAdapters", "load_peft_adapters", "new_peft_adapter"]
