"""PEFT's LoRA adapters, many in one batch.

Read in this order: :mod:`folder` (what a folder holds, and what is refused), :mod:`convert`, :mod:`adapters` (serving),
:mod:`new`, :mod:`bases`.
"""

from moe_kernels.integrations.peft.adapters import PeftAdapters, load_peft_adapters
from moe_kernels.integrations.peft.bases import BaseChange, fingerprint
from moe_kernels.integrations.peft.new import new_peft_adapter

__all__ = ["BaseChange", "PeftAdapters", "fingerprint", "load_peft_adapters", "new_peft_adapter"]
