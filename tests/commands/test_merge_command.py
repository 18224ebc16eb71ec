"""``python -m moe_kernels merge`` on real files."""

import json

import pytest
import torch

pytest.importorskip("safetensors")
from safetensors.torch import load_file, save_file

from moe_kernels import merge
from moe_kernels.integrations.safetensors import Checkpoint, writer
from tests.commands.test_compress_command import refused, run, save_sharded, state, tuned


@pytest.fixture
def folder(tmp_path):
    base = state(0)
    save_file(base, tmp_path / "base.safetensors")
    for seed in (1, 2, 3):
        save_file(tuned(base, seed), tmp_path / f"tuned{seed}.safetensors")
    return tmp_path


def loaded(folder, *names: str) -> list[dict[str, torch.Tensor]]:
    return [load_file(folder / f"{name}.safetensors") for name in names]


@pytest.mark.parametrize(
    "method, semantics", [("ties", "official"), ("dare_ties", "mergekit"), ("task_arithmetic", "peft")]
)
def test_merge_is_the_function(folder, method, semantics):
    files = [folder / f"tuned{seed}.safetensors" for seed in (1, 2, 3)]
    weights = None if semantics == "official" else [0.5, 1.0, 2.0]
    models = files if weights is None else [f"{file}={weight}" for file, weight in zip(files, weights, strict=True)]
    out = folder / "out.safetensors"
    options = ["--method", method, "--semantics", semantics, "--density", "0.4", "--lambda", "0.7", "--seed", "3"]
    run("merge", *models, "--base", folder / "base.safetensors", "-o", out, *options)
    base, *experts = loaded(folder, "base", "tuned1", "tuned2", "tuned3")
    expected = merge(
        base, experts, method=method, semantics=semantics, weights=weights, density=0.4, lambda_=0.7, seed=3
    )
    found = load_file(out)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_without_a_base(folder):
    models = [folder / "tuned1.safetensors", folder / "tuned2.safetensors"]
    run("merge", *models, "--method", "linear", "-o", folder / "out.safetensors")
    expected = merge(None, loaded(folder, "tuned1", "tuned2"), method="linear")
    found = load_file(folder / "out.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_shards_and_a_stopped_run(tmp_path, monkeypatch, capsys):
    base = state(0)
    for name, tensors in (("base", base), ("a", tuned(base, 1)), ("b", tuned(base, 2))):
        save_sharded(tmp_path / name, tensors)
    arguments = ["merge", tmp_path / "a", tmp_path / "b", "--base", tmp_path / "base", "-o", tmp_path / "out"]
    arguments += ["--density", "0.5"]
    write, calls = writer.write_file, []

    def stops_at_the_second(path, *rest):
        calls.append(path.name)
        if len(calls) == 2:
            raise OSError("disk full")
        write(path, *rest)

    monkeypatch.setattr(writer, "write_file", stops_at_the_second)
    run(*arguments, status=1)
    run(*arguments)
    assert len(calls) == 3 and "kept model-00001-of-00002.safetensors" in capsys.readouterr().out
    found, expected = Checkpoint(tmp_path / "out"), merge(base, [tuned(base, 1), tuned(base, 2)], density=0.5)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert (tmp_path / "out" / "config.json").exists()


def test_a_config_of_mergekit(folder):
    pytest.importorskip("yaml")
    models = [{"model": str(folder / "base.safetensors")}]
    for seed, weight in ((1, 0.5), (2, 0.25)):
        models.append(
            {"model": str(folder / f"tuned{seed}.safetensors"), "parameters": {"weight": weight, "density": 0.3}}
        )
    config = {"merge_method": "ties", "base_model": models[0]["model"], "models": models}
    config["parameters"] = {"normalize": False, "lambda": 0.5, "int8_mask": False}
    (folder / "merge.yml").write_text(json.dumps(config))  # JSON is YAML
    run("merge", "--config", folder / "merge.yml", "-o", folder / "out.safetensors")
    base, *experts = loaded(folder, "base", "tuned1", "tuned2")
    expected = merge(
        base, experts, semantics="mergekit", weights=[0.5, 0.25], density=0.3, normalize=False, lambda_=0.5
    )
    found = load_file(folder / "out.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"slices": []}, "has keys that are not understood: slices"),
        ({"parameters": {"frobnicate": 1}}, "parameter frobnicate=1 is not understood"),
        ({"parameters": {"density": [0, 1]}}, r"parameter density=\[0, 1\] is not understood"),
        ({"merge_method": "soup"}, "method must be one of"),
        ({"dtype": "float64"}, "dtype must be that of the models"),
    ],
)
def test_configs_that_are_not_understood(folder, capsys, change, message):
    pytest.importorskip("yaml")
    config = {"merge_method": "ties", "base_model": str(folder / "base.safetensors")}
    config |= {"models": [{"model": str(folder / "tuned1.safetensors")}], **change}
    (folder / "merge.yml").write_text(json.dumps(config))
    error = refused(capsys, "merge", "--config", folder / "merge.yml", "-o", folder / "out.safetensors")
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(error)
    assert not (folder / "out.safetensors").exists()


def test_models_that_differ(folder, capsys):
    base, other = loaded(folder, "base", "tuned1")
    del other["embed.weight"]
    save_file(other, folder / "other.safetensors")
    arguments = [
        "merge",
        folder / "other.safetensors",
        "--base",
        folder / "base.safetensors",
        "-o",
        folder / "out.safetensors",
    ]
    assert "got in one alone: embed.weight; name them with --leave-out" in refused(capsys, *arguments)
    run(*arguments, "--leave-out", "embed.weight")
    found = load_file(folder / "out.safetensors")
    assert torch.equal(found["embed.weight"], base["embed.weight"])
    assert torch.equal(found["layers.0.proj.weight"], other["layers.0.proj.weight"])
    assert "there must be a model" in refused(capsys, "merge", "-o", folder / "out.safetensors")
    bad = refused(capsys, "merge", f"{folder / 'tuned1.safetensors'}=much", "-o", folder / "out.safetensors")
    assert "must end in a number after the =" in bad
