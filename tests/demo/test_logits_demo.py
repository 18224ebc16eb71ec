"""``demo logits`` on a tiny Llama."""

import json
import math

import pytest

pytest.importorskip("transformers", reason="the demo runs a model of transformers")

from moe_kernels.demo import logits, report_logits
from moe_kernels.demo.settings import LogitSettings
from moe_kernels.demo.text import Texts
from tests.demo.test_perplexity import Bytes, _silent, language_model  # noqa: F401  a fixture

SETTINGS = LogitSettings(
    num_prompts=2,
    new_tokens=5,
    beam_tokens=3,
    hidden_size=16,
    base_steps=20,
    tuning_steps=40,
    batch_size=2,
    window_size=24,
    learning_rate=2e-2,
    scales=(0.5, 1.0),
    evaluation_windows=2,
    evaluation_size=24,
    prompt="the",
)
LOWER, DIGITS = "the quick brown fox jumps over the lazy dog. " * 5, "3141592653589793238462643383279 " * 5


def test_run(language_model, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(Bytes, "decode", lambda self, ids: bytes(ids).decode(errors="replace"), raising=False)
    kinds = {"lower": Texts(LOWER, LOWER), "digits": Texts(DIGITS, DIGITS)}
    result = logits.run(language_model, kinds, SETTINGS, 0, _silent)
    assert len(result["context"]) == len(result["guidance"]) == len(result["beams"]) == 2
    for row in result["guidance"]:
        guided = row["guided"]
        assert 0 < guided["fusion_seconds"] < guided["seconds"]
        assert len(guided["moved"]) == guided["tokens"] and all(moved >= 0 for moved in guided["moved"])
    tuning = result["tuning"]
    assert all(losses[-1] < losses[0] for losses in tuning["training"].values())
    # what tuning taught the small model the large one, which knows nothing, has too
    digits = tuning["losses"]["digits"]
    assert digits["tuned"] < digits["untuned"] and digits["scale 1"] < digits["large"]
    assert tuning["best"] in SETTINGS.scales and tuning["drafted"]["is_the_same"]
    weights = tuning["texts"]["solved"]["weights"]
    assert len(weights) == tuning["texts"]["solved"]["tokens"] and all(0 <= weight <= 2 for weight in weights)
    assert math.ceil(5 / (SETTINGS.num_draft + 1)) <= tuning["drafted"]["calls"] <= 5
    json.dumps(result)
    report_logits.print_logits(result)
    out = capsys.readouterr().out
    assert "Of 2 answers" in out and "The solved weights move" in out and "the text is the same" in out
    report_logits.plot_logits(result, tmp_path / "logits.png")
    assert (tmp_path / "logits.png").read_bytes().startswith(b"\x89PNG")
