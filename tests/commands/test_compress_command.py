"""``python -m moe_kernels compress | apply | inspect`` on real files."""

import errno
import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("safetensors")
from safetensors.torch import load_file, save_file

from moe_kernels import TernaryDelta, apply_, compare, compress, decompress
from moe_kernels.__main__ import main
from moe_kernels.integrations.safetensors import Checkpoint, load_task_vectors, save_task_vectors, writer
from moe_kernels.integrations.safetensors.checkpoint import INDEX


def state(seed: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.02 * scale

    return {
        "embed.weight": random(50, 64).bfloat16(),
        "layers.0.proj.weight": random(90, 64).bfloat16(),
        "layers.0.norm.weight": 1 + random(64),  # mixed dtypes
        "layers.1.proj.weight": random(30, 90).half(),
        "positions": torch.arange(10),
    }


def tuned(base: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    change = state(seed, 0.1)
    return {
        name: (w.float() + change[name].float()).to(w.dtype) if w.is_floating_point() else w for name, w in base.items()
    }


def save_sharded(folder, tensors: dict[str, torch.Tensor]) -> None:
    folder.mkdir()
    names = list(tensors)
    shards = {"model-00001-of-00002.safetensors": names[:2], "model-00002-of-00002.safetensors": names[2:]}
    for shard, keys in shards.items():
        save_file({key: tensors[key] for key in keys}, folder / shard, {"format": "pt"})
    index = {
        "metadata": {"total_size": 1},
        "weight_map": {key: shard for shard, keys in shards.items() for key in keys},
    }
    (folder / INDEX).write_text(json.dumps(index))
    (folder / "config.json").write_text('{"model_type": "made"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"old")


@pytest.fixture
def files(tmp_path):
    base = state(0)
    save_file(base, tmp_path / "base.safetensors")
    for seed in (1, 2):
        save_file(tuned(base, seed), tmp_path / f"tuned{seed}.safetensors")
    return tmp_path, base


def run(*arguments, status: int = 0) -> None:
    assert main([str(argument) for argument in arguments]) == status


def made(files, seed: int, *options) -> str:
    folder, _ = files
    out = folder / f"delta{seed}.safetensors"
    run("compress", folder / "base.safetensors", folder / f"tuned{seed}.safetensors", "-o", out, *options)
    return out


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_compress_is_the_function(files, scope, capsys):
    folder, base = files
    out = made(files, 1, "--density", "0.2", "--scope", scope)
    floating = {name: w for name, w in base.items() if w.is_floating_point()}
    other = {name: w for name, w in tuned(base, 1).items() if w.is_floating_point()}
    expected = compress(other, 0.2, base=floating, scope=scope)
    found = load_task_vectors(out)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].data, expected[name].data) for name in expected)
    assert "density 0.2000" in capsys.readouterr().out
    # aligned in a mapped file, as are the parts inside
    with open(out, "rb") as file:
        assert (8 + int.from_bytes(file.read(8), "little")) % 64 == 0


def test_apply_to_a_file(files):
    folder, base = files
    deltas = [made(files, seed, "--density", "0.1") for seed in (1, 2)]
    run("apply", folder / "base.safetensors", f"{deltas[0]}=0.5", deltas[1], "-o", folder / "out.safetensors")
    found, vectors = load_file(folder / "out.safetensors"), [load_task_vectors(path) for path in deltas]
    for name, weight in base.items():
        if weight.is_floating_point():
            apply_(weight, [vector[name] for vector in vectors], [0.5, 1.0])
        assert torch.equal(found[name], weight) and found[name].dtype == weight.dtype


def test_apply_to_a_folder_of_shards(tmp_path):
    base = state(0)
    save_sharded(tmp_path / "base", base)
    save_sharded(tmp_path / "tuned", tuned(base, 1))
    run("compress", tmp_path / "base", tmp_path / "tuned", "-o", tmp_path / "delta.safetensors")
    run("apply", tmp_path / "base", tmp_path / "delta.safetensors", "-o", tmp_path / "out")
    out = Checkpoint(tmp_path / "out")
    assert out.shards == Checkpoint(tmp_path / "base").shards
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        *out.shards, INDEX, "config.json", "tokenizer.json",
    }  # fmt: skip
    size = json.loads((tmp_path / "out" / INDEX).read_text())["metadata"]["total_size"]
    assert size == sum(weight.nbytes for weight in base.values())
    vectors = load_task_vectors(tmp_path / "delta.safetensors")
    for name, weight in base.items():
        if name in vectors:
            apply_(weight, vectors[name])
        assert torch.equal(out[name], weight)


def test_a_stopped_run_goes_on(tmp_path, monkeypatch, capsys):
    base = state(0)
    save_sharded(tmp_path / "base", base)
    save_sharded(tmp_path / "tuned", tuned(base, 1))
    delta = tmp_path / "delta.safetensors"
    run("compress", tmp_path / "base", tmp_path / "tuned", "-o", delta)
    write = writer.write_file
    calls = []

    def stops_at_the_second(path, *arguments):
        calls.append(path.name)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, *arguments)

    monkeypatch.setattr(writer, "write_file", stops_at_the_second)
    run("apply", tmp_path / "base", delta, "-o", tmp_path / "out", status=1)
    assert "No space left" in capsys.readouterr().err
    run("apply", tmp_path / "base", delta, "-o", tmp_path / "out")
    assert calls == ["model-00001-of-00002.safetensors", *["model-00002-of-00002.safetensors"] * 2]
    assert "kept model-00001-of-00002.safetensors" in capsys.readouterr().out
    # another coefficient is another run
    run("apply", tmp_path / "base", f"{delta}=2", "-o", tmp_path / "out")
    assert len(calls) == 5


def test_a_full_disk_loses_nothing(files):
    """The real thing: the process may write no more than 4 KiB into any file."""
    folder, _ = files
    delta = made(files, 1)
    out = folder / "out.safetensors"
    out.write_bytes(b"what was there")
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); from moe_kernels.__main__ import main; "
        f"sys.exit(main(['apply', {str(folder / 'base.safetensors')!r}, {str(delta)!r}, '-o', {str(out)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "apply: [Errno 27] File too large" in done.stderr, done.stderr
    assert out.read_bytes() == b"what was there"
    assert not [file for file in folder.iterdir() if file.name.endswith(".tmp")]


#: most memory of its own (not mapped from files) that a command had beyond what importing took, in MiB
PEAK = """
import sys, threading, time, torch
import moe_kernels.integrations.safetensors
from moe_kernels.__main__ import main

def own():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1024

def watch():
    while True:
        seen.append(own())
        time.sleep(0.002)

start, seen = own(), [0]
threading.Thread(target=watch, daemon=True).start()
assert main(sys.argv[1:]) == 0
print("peak", max(seen) - start)
"""


def test_memory_does_not_grow_with_the_checkpoint(tmp_path):
    """256 MiB of weights in 32 tensors: what is held is a few of them and the packed vectors, 64 MiB when measured."""
    generator = torch.Generator().manual_seed(0)
    for path, change in (("base", 0.0), ("tuned", 0.01)):
        (tmp_path / path).mkdir()
        generator.manual_seed(0)
        for shard in range(8):
            weights = {f"layers.{4 * shard + i}": torch.randn(1024, 4096, generator=generator) for i in range(4)}
            save_file(
                {name: (w + change * w.sign()).bfloat16() for name, w in weights.items()},
                tmp_path / path / f"model-{shard:05d}.safetensors",
            )
    for arguments in (
        ["compress", tmp_path / "base", tmp_path / "tuned", "-o", tmp_path / "delta.safetensors"],
        ["apply", tmp_path / "base", tmp_path / "delta.safetensors", "-o", tmp_path / "out"],
    ):
        done = subprocess.run([sys.executable, "-c", PEAK, *map(str, arguments)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert float(done.stdout.split()[-1]) < 100, done.stdout
    assert len(Checkpoint(tmp_path / "out")) == 32


def test_a_lossless_patch(files, capsys):
    folder, base = files
    patch, out = made(files, 1, "--lossless"), folder / "out.safetensors"
    assert "patches of 11,724 parameters" in capsys.readouterr().out
    run("apply", folder / "base.safetensors", patch, "-o", out)
    expected = load_file(folder / "tuned1.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_file(out).items())
    capsys.readouterr()
    run("inspect", patch, made(files, 2), "--tensors")
    assert "patch of bfloat16" in (said := capsys.readouterr().out) and "0 parameters in both" in said
    assert "has a patch, which leads from its own base to one tensor" in refused(
        capsys, "apply", folder / "base.safetensors", f"{patch}=0.5", "-o", out
    )
    assert "has a patch" in refused(capsys, "apply", folder / "base.safetensors", patch, made(files, 2), "-o", out)
    assert "is the difference from another base" in refused(
        capsys, "apply", folder / "tuned1.safetensors", patch, "-o", out
    )


def test_values_are_kept(files, capsys):
    folder, base = files
    out = folder / "out.safetensors"
    run("apply", folder / "base.safetensors", made(files, 1, "--values", "float32", "--density", "1"), "-o", out)
    expected = load_file(folder / "tuned1.safetensors")
    for name, tensor in load_file(out).items():
        assert torch.allclose(tensor.double(), expected[name].double(), rtol=1e-6)
    run("inspect", folder / "delta1.safetensors", "--tensors")
    assert "values in float32" in capsys.readouterr().out


def test_inspect(files, capsys):
    folder, base = files
    deltas = [made(files, seed, "--density", "0.3") for seed in (1, 2)]
    capsys.readouterr()
    run("inspect", *deltas, folder / "base.safetensors", "--base", folder / "base.safetensors", "--tensors")
    out = capsys.readouterr().out
    assert "task vectors of 4 tensors" in out and "density 0.3000" in out and "all are differences from it" in out
    assert "base.safetensors: checkpoint of 5 tensors in 1 files; 8,960 bfloat16, 2,700 float16, 64 float32" in out
    assert "layers.0.proj.weight [90, 64] density" in out and "positions [10] int64" in out
    first, second = (load_task_vectors(path) for path in deltas)
    found = [compare(decompress(first[name]), decompress(second[name])) for name in first]
    assert f"{sum(one.both for one in found):,} parameters in both, opposite signs in" in out
    run("inspect", deltas[0], "--base", folder / "tuned1.safetensors")
    assert "of another base: embed.weight" in capsys.readouterr().out


def test_compare():
    one = torch.tensor([1.0, -1, 1, 0, 0, 1, -1] * 30)
    other = torch.tensor([1.0, 1, 0, 0, -1, 1, -1] * 30)
    found = compare(TernaryDelta.from_signs(one, 3.0), TernaryDelta.from_signs(other))
    assert (found.both, found.agree) == (120, 90)
    assert found.cosine == pytest.approx(torch.cosine_similarity(one, other, 0).item())
    assert compare(TernaryDelta.from_signs(one), TernaryDelta.from_signs(one * 0)).cosine == 0
    whole = compress({"a": one.double(), "b": other.double(), "c": one.double()}, 1.0)
    tuned = compress({"a": other.double(), "b": other.double(), "d": one.double()}, 1.0)
    parts = [compare(whole[name], decompress(tuned[name])) for name in "ab"]
    assert compare(whole, tuned)[:2] == (sum(part.both for part in parts), sum(part.agree for part in parts))
    with pytest.raises(TypeError, match="must be task vectors, or two state dicts of them, got Tensor"):
        compare(one, other)
    with pytest.raises(ValueError, match="compare: second must be of shape"):
        compare(TernaryDelta.from_signs(one), TernaryDelta.from_signs(one[:5]))


def refused(capsys, *arguments) -> str:
    run(*arguments, status=1)
    return capsys.readouterr().err


def test_checkpoints_that_differ(files, capsys):
    folder, base = files
    out = folder / "out.safetensors"
    arguments = ["compress", folder / "base.safetensors", folder / "other.safetensors", "-o", out]

    def other(**changes) -> None:
        changed = {name: weight for name, weight in {**base, **changes}.items() if weight is not None}
        save_file(changed, folder / "other.safetensors")

    other(**{"embed.weight": None})
    assert "got in one alone: embed.weight; name them with --leave-out" in refused(capsys, *arguments)
    run(*arguments, "--leave-out", "embed.*")
    assert "embed.weight" not in load_task_vectors(out)
    other(lm_head=torch.zeros(3))
    assert "got in one alone: lm_head" in refused(capsys, *arguments)
    other(**{"embed.weight": torch.zeros(51, 64).bfloat16()})
    assert "one shape in both checkpoints, got embed.weight" in refused(capsys, *arguments)
    other(**{"embed.weight": base["embed.weight"].float()})
    assert "one dtype in both checkpoints, got embed.weight" in refused(capsys, *arguments)
    other(positions=torch.zeros(10, dtype=torch.int64))
    assert "tensors of integers must be equal in both checkpoints, got others in positions" in refused(
        capsys, *arguments
    )
    other(**{"layers.0.norm.weight": torch.full((64,), float("nan"))})
    assert "layers.0.norm.weight must be finite" in refused(capsys, *arguments)


def test_another_base(files, capsys):
    folder, base = files
    delta = made(files, 1)
    arguments = ["apply", folder / "tuned2.safetensors", delta, "-o", folder / "out.safetensors"]
    assert "is the difference from another base, got" in refused(capsys, *arguments)
    assert not (folder / "out.safetensors").exists()
    run(*arguments, "--any-base")
    small = {name: weight for name, weight in base.items() if name != "embed.weight"}
    save_file(small, folder / "small.safetensors")
    arguments = ["apply", folder / "small.safetensors", delta, "-o", folder / "out.safetensors"]
    assert "the base has no embed.weight; name them with --leave-out" in refused(capsys, *arguments)
    run(*arguments, "--leave-out", "embed.weight")


def test_damaged_files(files, capsys):
    folder, _ = files
    delta = made(files, 1)
    whole = delta.read_bytes()
    arguments = ["apply", folder / "base.safetensors", delta, "-o", folder / "out.safetensors"]
    delta.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    assert "checksum does not match" in refused(capsys, *arguments)
    delta.write_bytes(whole[: len(whole) // 2])
    assert "not a whole safetensors file" in refused(capsys, *arguments)
    assert "no such file or folder" in refused(capsys, "inspect", folder / "nothing")
    assert "holds no task vectors" in refused(
        capsys, "apply", folder / "base.safetensors", folder / "tuned1.safetensors", "-o", folder / "out.safetensors"
    )
    (folder / "empty").mkdir()
    assert "holds no safetensors file" in refused(capsys, "inspect", folder / "empty")
    save_sharded(folder / "sharded", state(0))
    index = json.loads((folder / "sharded" / INDEX).read_text())
    index["weight_map"]["lost"] = "model-00001-of-00002.safetensors"
    (folder / "sharded" / INDEX).write_text(json.dumps(index))
    assert "names tensors that are not there: lost" in refused(capsys, "inspect", folder / "sharded")
    assert not (folder / "out.safetensors").exists()


def test_metadata_and_odd_tensors(tmp_path):
    deltas = compress({"scalar": torch.tensor(2.0), "empty": torch.empty(0, 3), "one": torch.ones(1)}, 1.0)
    save_task_vectors(tmp_path / "odd.safetensors", deltas, {"note": "ünïcode"})
    found = load_task_vectors(tmp_path / "odd.safetensors")
    assert {name: delta.shape for name, delta in found.items()} == {"scalar": (), "empty": (0, 3), "one": (1,)}
    assert Checkpoint(tmp_path / "odd.safetensors").metadata["note"] == "ünïcode"


def test_writer_refuses_other_tensors(tmp_path):
    layout = {"a": (torch.float32, torch.Size([2])), "b": (torch.float32, torch.Size([1]))}
    for tensors in (
        [("b", torch.zeros(1))],
        [("a", torch.zeros(3))],
        [("a", torch.zeros(2))],
        [("a", torch.zeros(2).half())],
    ):
        with pytest.raises(ValueError, match="write_file: "):
            writer.write_file(tmp_path / "out.safetensors", layout, tensors)
    assert list(tmp_path.iterdir()) == []


def test_safetensors_is_named_where_it_is_missing(monkeypatch, capsys):
    from moe_kernels.commands import arguments

    monkeypatch.setattr(arguments, "PACKAGES", ("no_such_package",))
    assert main(["inspect", "x"]) == 1
    assert "pip install 'moe-kernels-torch[checkpoints]'" in capsys.readouterr().err
