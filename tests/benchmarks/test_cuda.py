"""Timing on a GPU: its order of events with a stand-in for the GPU, and the whole of it where there is one."""

import contextlib
import csv
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("tqdm")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import harness, run, timing_cuda

ON_GPU = ["expert_ffn", "expert_ffn_train", "grouped_gemm", "permute", "route"]


class FakeEvent:
    """An event, and a stream: it reads the clock."""

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, after):
        return 1e3 * (after.at - self.at)

    def synchronize(self):
        pass

    def wait_stream(self, other):
        pass


class FakeGpu:
    """As much of torch.cuda as timing_cuda uses; a replayed graph calls nothing."""

    def __init__(self):
        self.sync_mode, self.captures, self.replays = 0, 0, 0
        self.Stream = self.Event = self.current_stream = lambda **settings: FakeEvent()
        self.graph_pool_handle = self.get_sync_debug_mode = lambda: 0
        self.synchronize = self.reset_peak_memory_stats = self.empty_cache = lambda: None
        self.memory_allocated, self.max_memory_allocated = lambda: 1 << 20, lambda: 3 << 20
        self.stream = lambda stream: contextlib.nullcontext()

    def set_sync_debug_mode(self, mode):
        self.sync_mode = mode

    def CUDAGraph(self):
        return self

    def capture_begin(self, pool):
        self.captures += 1

    def capture_end(self):
        pass

    def replay(self):
        self.replays += 1


@pytest.fixture
def gpu(monkeypatch):
    fake = FakeGpu()
    monkeypatch.setattr(timing_cuda.torch, "cuda", fake)
    monkeypatch.setattr(timing_cuda, "flush_l2", lambda: None)
    return fake


def test_what_waits_is_timed_as_launched_and_what_fails_is_explained(gpu):
    def waits(i):
        if gpu.sync_mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    def fails(i):
        raise ValueError("not today")

    with torch.no_grad():
        timings = timing_cuda.measure({"a": lambda i: None, "waits": waits, "fails": fails}, repeats=5)
    assert gpu.captures == 1 and gpu.replays == 5 and gpu.sync_mode == 0
    assert len(timings["a"].clean) == len(timings["waits"].clean) == 5
    assert not timings["a"].note and timings["waits"].note == timing_cuda.NOT_CAPTURED
    assert timings["fails"].error == "ValueError: not today" and not timings["fails"].all
    assert timings["a"].extra_bytes == 2 << 20


def test_training_is_not_captured_and_the_budget_ends_it(gpu):
    timings = timing_cuda.measure({"a": lambda i: time.sleep(0.01)}, repeats=1000, budget_s=0.05)
    assert gpu.captures == 0 and 1 <= len(timings["a"].all) <= 6 and timings["a"].p50 >= 10


def test_one_that_fails_later_leaves_the_others(gpu):
    calls = iter(range(100))

    def fails_later(i):
        if next(calls) > 4:
            raise RuntimeError("out of memory")

    timings = timing_cuda.measure({"late": fails_later, "a": lambda i: None}, repeats=9)
    assert timings["late"].error and len(timings["a"].all) == 9


def test_cells_are_made_on_the_device_and_timed_outside_of_it():
    def cells():
        yield torch.get_default_device().type
        yield torch.get_default_device().type

    before = torch.get_default_device().type
    for made_on in harness.cells_on(torch.device("meta"), cells()):
        assert made_on == "meta" and torch.get_default_device().type == before


def test_no_gpu_and_ops_without_gpu_kernels_are_refused(capsys):
    for arguments, message in [
        (["--op", "quantized_ffn", "--device", "cuda"], "--op must be of expert_ffn, expert_ffn_train, route"),
        (["--device", "cuda"], "--device must be cpu where torch finds no GPU; got cuda"),
    ]:
        if "no GPU" in message and torch.cuda.is_available():
            continue
        with pytest.raises(SystemExit):
            run.main(arguments)
        assert message in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("op", ON_GPU)
def test_run_appends_rows(op, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_limits", lambda *arguments: (None, None, "not measured"))
    history = tmp_path / "history.csv"
    command = ["--op", op, "--device", "cuda", "--shape", "toy", "--tokens", "5", "--repeats", "3"]
    assert run.main([*command, "--csv", str(history)]) == 0
    rows = list(csv.DictReader(history.open()))
    ours = [row for row in rows if row["provider"] == "ours"]
    assert ours and all(row["status"] == "ok" and float(row["extra_mib"]) >= 0 for row in ours)
    assert all(row["device"] == torch.cuda.get_device_name() for row in rows)
