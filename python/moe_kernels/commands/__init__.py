"""``python -m moe_kernels compress | apply | inspect``: task vectors of whole checkpoints."""
