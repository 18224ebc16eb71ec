"""One module an op: ``SUMMARY``, ``DEFAULTS`` (shapes, dtypes, tokens) and ``cells(context)``."""

OPS = (
    "expert_ffn",
    "expert_ffn_train",
    "quantized_ffn",
    "route",
    "route_methods",
    "permute",
    "grouped_gemm",
    "routed_lora",
    "logit_fusion",
    "task_vector",
    "ternary_linear",
    "call_overhead",
    "build",
)
