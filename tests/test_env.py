"""Settings and the report."""

import pytest

from moe_kernels import _dispatch, env


def test_report_is_plain_and_complete():
    report = env.report()
    assert report["native cpu"] == (_dispatch.missing_reason("native", "cpu") or "available")
    assert set(env.VARIABLES) <= set(report)


def test_variable_defaults(monkeypatch):
    monkeypatch.delenv("MOE_KERNELS_BACKEND", raising=False)
    assert env.variable("MOE_KERNELS_BACKEND") == "auto"
    monkeypatch.setenv("MOE_KERNELS_BACKEND", "native")
    assert env.variable("MOE_KERNELS_BACKEND") == "native"


def test_backends_that_are_not_there_say_why():
    for backend, device, reason in [
        ("native", "cuda", "no native kernels for device type 'cuda' yet"),
        ("triton", "cuda", "no Triton kernels yet"),
    ]:
        with pytest.raises(RuntimeError, match=f"op: backend='{backend}' is unavailable: there are {reason}"):
            _dispatch.resolve("op", backend, device)
    assert _dispatch.resolve("op", "auto", "meta") == "reference"
