"""``python -m moe_kernels demo``: a real language model split into experts, real layers beside transformers' own.

Read in this order: :mod:`run` (what happens), :mod:`text` and :mod:`model` (the data and the weights),
:mod:`perplexity`, :mod:`layers`, :mod:`finetune` (the three parts), :mod:`report` (tables and plots).
``demo route`` is :mod:`routers`; it, ``demo quantize`` and ``demo tune`` are shown by :mod:`report_tuning`.
``demo lora`` is :mod:`lora`, shown by :mod:`report_lora`; ``demo logits`` :mod:`logits` and :mod:`tuned_pair`, by
:mod:`report_logits`.
"""
