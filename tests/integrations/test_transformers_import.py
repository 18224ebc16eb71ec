"""What importing the integration does, and how code is recognised."""

import subprocess
import sys

import pytest

from moe_kernels.integrations.transformers.gates import fingerprint


def run_fresh(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_moe_kernels_does_not_import_transformers():
    code = "import sys, moe_kernels, moe_kernels.integrations; sys.exit('transformers' in sys.modules)"
    assert run_fresh(code).returncode == 0


# absent, and too old to have the interface
@pytest.mark.parametrize("missing", ["transformers", "transformers.integrations.moe"])
def test_missing_transformers_is_named(missing):
    result = run_fresh(f"import sys; sys.modules[{missing!r}] = None; import moe_kernels.integrations.transformers")
    assert result.returncode == 1
    assert "moe_kernels.integrations.transformers: transformers must be installed" in result.stderr
    assert "pip install 'transformers>=5.23'" in result.stderr


def test_fingerprint_ignores_comments_and_layout(tmp_path, monkeypatch):
    (tmp_path / "bare_code.py").write_text("def f(x):\n    return x + 1\n")
    (tmp_path / "commented_code.py").write_text('def f(x):\n    """Doc."""\n\n    # why\n    return x  +  1  # what\n')
    (tmp_path / "changed_code.py").write_text("def f(x):\n    return x - 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    import bare_code
    import changed_code
    import commented_code

    assert fingerprint(bare_code.f) == fingerprint(commented_code.f) != fingerprint(changed_code.f)
    assert fingerprint(len) == ""  # no source, which equals no known one
