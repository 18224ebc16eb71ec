"""Settings and the report."""

import pytest

from moe_kernels import _dispatch, env


def test_report_is_plain_and_complete():
    report = env.report()
    assert report["native cpu"] == (_dispatch.missing_reason("permute", "native", "cpu") or "available")
    assert set(env.VARIABLES) <= set(report)


def test_variable_defaults(monkeypatch):
    monkeypatch.delenv("MOE_KERNELS_BACKEND", raising=False)
    assert env.variable("MOE_KERNELS_BACKEND") == "auto"
    monkeypatch.setenv("MOE_KERNELS_BACKEND", "native")
    assert env.variable("MOE_KERNELS_BACKEND") == "native"


def test_backends_that_are_not_there_say_why(monkeypatch):
    monkeypatch.setattr(_dispatch.torch.cuda, "is_available", lambda: False)
    for op, backend, device, reason in [
        ("grouped_gemm", "native", "cuda", "grouped_gemm has no CUDA kernels yet"),
        ("solve_tilt", "triton", "cuda", "solve_tilt has no Triton kernels yet"),
        ("expert_ffn", "native", "cuda", "the CUDA kernels of expert_ffn are for GPUs of compute capability 9.0"),
        ("permute", "native", "xpu", "there are no native kernels for device type 'xpu'"),
    ]:
        with pytest.raises(RuntimeError, match=f"{op}: backend='{backend}' is unavailable: {reason}"):
            _dispatch.resolve(op, backend, device)
    assert _dispatch.resolve("op", "auto", "meta") == "reference"


def test_triton_on_the_cpu_needs_its_interpreter(monkeypatch):
    monkeypatch.setattr(_dispatch, "_TRITON_INTERPRETS", False)
    with pytest.raises(RuntimeError, match="Triton kernels run on CUDA tensors, not on 'cpu'"):
        _dispatch.resolve("permute", "triton", "cpu")


def test_auto_takes_what_is_there(monkeypatch):
    missing = "not there"
    for cuda, triton, choice in [(None, missing, "native"), (missing, None, "triton"), (missing, missing, "reference")]:
        monkeypatch.setattr(_dispatch._extension, "cuda_missing_reason", lambda cuda=cuda: cuda)
        monkeypatch.setattr(_dispatch._extension, "triton_missing_reason", lambda triton=triton: triton)
        assert _dispatch._auto("permute", "cuda") == choice
        assert _dispatch._auto("solve_tilt", "cuda") == "reference"
        for capability in (8, 9):
            monkeypatch.setattr(_dispatch.torch.cuda, "is_available", lambda: True)
            monkeypatch.setattr(
                _dispatch.torch.cuda, "get_device_capability", lambda capability=capability: (capability, 0)
            )
            fits = capability == 9 or choice != "native"
            assert _dispatch._auto("expert_ffn", "cuda") == (choice if fits else "reference")


def test_cuda_library_registers_what_the_table_says():
    import torch

    if _dispatch._extension.cuda_missing_reason() is not None:
        pytest.skip(_dispatch._extension.cuda_missing_reason())
    kernels = {  # where the public name is another
        "apply_": "apply_ternary", "unapply_": "unapply_ternary", "decompress": "unpack_ternary",
        "merge": "merge_experts",
    }  # fmt: skip
    for op in _dispatch.CUDA_OPS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"moe_kernels::{kernels.get(op, op)}", "CUDA"), op
