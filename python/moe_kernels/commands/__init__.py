"""``python -m moe_kernels compress | apply | merge | inspect``: task vectors of whole checkpoints."""
