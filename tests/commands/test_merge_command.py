"""``python -m moe_kernels merge`` on real files."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("safetensors")
from safetensors.torch import load_file, save_file

from moe_kernels import merge
from moe_kernels.integrations.safetensors import Checkpoint, load_task_vectors, writer
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


@pytest.mark.parametrize("method", ["ties", "task_arithmetic"])
def test_task_vectors_are_merged_as_they_lie(folder, method):
    """Compressed files beside a whole checkpoint; the tensor that was left out of one was not changed by it."""
    base_file, out = folder / "base.safetensors", folder / "out.safetensors"
    deltas = [folder / f"delta{seed}.safetensors" for seed in (1, 2)]
    for seed, delta in zip((1, 2), deltas, strict=True):
        left = ["--leave-out", "layers.1.*"] if seed == 2 else []
        run("compress", base_file, folder / f"tuned{seed}.safetensors", "-o", delta, "--density", "0.3", *left)
    run("merge", *deltas, folder / "tuned3.safetensors", "--base", base_file, "-o", out, "--method", method)
    base, third = loaded(folder, "base", "tuned3")
    vectors = [load_task_vectors(delta) for delta in deltas]
    assert "layers.1.proj.weight" not in vectors[1]
    expected = merge(base, [*vectors, third], method=method)
    found = load_file(out)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_task_vectors_that_cannot_be_merged(folder, capsys):
    base, out = folder / "base.safetensors", folder / "out.safetensors"
    delta, patch = folder / "delta.safetensors", folder / "patch.safetensors"
    run("compress", base, folder / "tuned1.safetensors", "-o", delta)
    run("compress", base, folder / "tuned1.safetensors", "-o", patch, "--lossless")
    assert "patches cannot be merged" in refused(capsys, "merge", patch, "--base", base, "-o", out)
    assert "--base must be given" in refused(capsys, "merge", delta, "-o", out)
    assert "density must be 1 for task vectors" in refused(
        capsys, "merge", delta, "--base", base, "--density", "0.2", "-o", out
    )


MEBIBYTE = 2**20


@pytest.fixture
def limited():
    """Runs Python in a memory cgroup of some mebibytes: what it allocates and the pages of files that it reads."""
    root = Path("/sys/fs/cgroup")
    v1, v2 = root / "memory" / "memory.limit_in_bytes", root / "cgroup.subtree_control"
    parent, limit = (v1.parent, v1.name) if v1.exists() else (root, "memory.max")
    group = parent / f"moe_kernels_{os.getpid()}"
    try:
        group.mkdir()
        if not (group / limit).exists():
            raise OSError(f"{v2} does not give memory to groups")
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made: {error}")

    def run_limited(mebibytes: int, program: str, *arguments) -> subprocess.CompletedProcess:
        (group / limit).write_text(str(mebibytes * MEBIBYTE))
        join = f"import os; open({str(group / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))\n"
        command = [sys.executable, "-c", join + program, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True)

    yield run_limited
    group.rmdir()


MERGE = """
import sys
from moe_kernels.__main__ import main
sys.exit(main(sys.argv[1:]))
"""
ALL_AT_ONCE = """
import pathlib, sys
from safetensors.torch import load_file
models = [[load_file(file) for file in pathlib.Path(path).iterdir()] for path in sys.argv[1:]]
held = [[w.clone() for w in part.values()] for model in models for part in model]
"""


def test_a_merge_larger_than_memory(tmp_path, limited):
    """A base and eight fine-tunes, 1152 MiB together, by official TIES in a memory of 640 MiB, of which PyTorch takes
    300: a program that holds them all is killed in it."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(1024, 4096, generator=generator) for _ in range(16)]
    for model in range(9):
        tuned = {f"layers.{i}": (w + 0.01 * w.roll(model + 1)).bfloat16() for i, w in enumerate(weights)}
        (tmp_path / f"model{model}").mkdir()
        for half in (0, 1):
            part = {name: tuned[name] for name in list(tuned)[8 * half : 8 * half + 8]}
            save_file(part, tmp_path / f"model{model}" / f"model-{half}.safetensors")
    folders = [tmp_path / f"model{model}" for model in range(9)]
    options = ["--base", folders[0], "--density", "0.2", "-o", tmp_path / "out"]
    done = limited(640, MERGE, "merge", *folders[1:], *options)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(Checkpoint(tmp_path / "out")) == 16
    assert limited(640, ALL_AT_ONCE, *folders).returncode == -signal.SIGKILL


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
