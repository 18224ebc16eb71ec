"""``demo quantize`` on a tiny Llama: the formats are used, measured, and the model is left as it was."""

import pytest

pytest.importorskip("transformers", reason="the demo runs a model of transformers")

from moe_kernels.demo import quantize, report_tuning
from moe_kernels.demo.model import feed_forward_layers
from moe_kernels.demo.settings import QuantizeSettings
from moe_kernels.demo.text import Texts
from tests.demo.test_perplexity import _silent, language_model  # noqa: F401  a fixture


def test_run_reads_with_every_format(language_model, tmp_path, capsys):  # noqa: F811
    dense = feed_forward_layers(language_model.model)
    text = "the quick brown fox jumps over the lazy dog. " * 5
    settings = QuantizeSettings(("int8", "fp8"), num_experts=2, window_size=32, windows=2, timing_repeats=1)
    result = quantize.run(language_model, Texts(text, text.upper()), settings, _silent)
    assert feed_forward_layers(language_model.model) == dense
    exact, *rows = result["rows"]
    assert [row["format"] for row in rows] == ["int8", "fp8"]
    assert exact["bits"] == 32 and exact["weight_error"] == 0
    for row in rows:
        assert 8 < row["bits"] and 1e-4 < row["weight_error"] < 0.05
        assert 0 < abs(row["loss"] - exact["loss"]) < 0.1
    assert rows[0]["weight_error"] < rows[1]["weight_error"]
    report_tuning.print_formats(result)
    assert "fp8" in capsys.readouterr().out
    report_tuning.plot_formats(result, tmp_path / "quantize.png")
    assert (tmp_path / "quantize.png").read_bytes().startswith(b"\x89PNG")
