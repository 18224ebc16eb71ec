"""``demo taskvector`` on a tiny Llama."""

import json

import pytest
import torch

pytest.importorskip("transformers", reason="the demo runs a model of transformers")
pytest.importorskip("safetensors", reason="task vectors are safetensors files")

from moe_kernels.demo import report_task_vectors, task_vectors
from moe_kernels.demo.settings import TaskVectorSettings
from moe_kernels.demo.text import Texts
from tests.demo.test_perplexity import _silent, language_model  # noqa: F401  a fixture

SETTINGS = TaskVectorSettings(
    densities=(0.2, 0.5),
    alphas=(0.5, 1.0, 2.0),
    window_size=24,
    batch_size=2,
    num_steps=30,
    learning_rate=3e-3,
    evaluation_windows=2,
    repeats=1,
)
LOWER, DIGITS = "the quick brown fox jumps over the lazy dog. " * 5, "3141592653589793238462643383279 " * 5
KINDS = {"lower": Texts(LOWER, LOWER), "digits": Texts(DIGITS, DIGITS)}


def test_run(language_model, tmp_path, capsys):  # noqa: F811
    before = {name: tensor.bfloat16() for name, tensor in language_model.model.state_dict().items()}
    result = task_vectors.run(language_model, KINDS, SETTINGS, 0, tmp_path, _silent)
    after = language_model.model.state_dict()
    assert result["restored"] and all(torch.equal(after[name], before[name]) for name in before)
    for kind in KINDS:
        assert result["loss"][kind][kind] < result["loss"]["base"][kind]
        rows = [row for row in result["rows"] if row["kind"] == kind]
        assert [row["density"] for row in rows] == [0.2, 0.5] and rows[0]["bytes"] < rows[1]["bytes"]
        for row in rows:
            assert (tmp_path / f"{kind}-{row['density']:g}.safetensors").stat().st_size >= row["bytes"]
            # the signs alone learn the text, at the best alpha
            assert min(row["losses"].values()) < result["loss"]["base"][kind]
            assert row["losses"][row["alpha"]] == min(row["losses"].values())
    merged = result["merged"]["loss"]
    assert all(merged[kind] < result["loss"]["base"][kind] for kind in KINDS)
    assert 0 < result["agreement"]["both"] <= 1 and 0 <= result["agreement"]["opposite"] <= 1
    json.dumps(result)
    report_task_vectors.print_task_vectors(result)
    assert "Every bit of the base came back: yes" in capsys.readouterr().out
    report_task_vectors.plot_task_vectors(result, tmp_path / "taskvector.png")
    assert (tmp_path / "taskvector.png").read_bytes().startswith(b"\x89PNG")
