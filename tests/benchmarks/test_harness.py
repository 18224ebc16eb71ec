"""The benchmarks run, refuse what is wrong, and say what they could not do. Toy shapes: no time is looked at."""

import csv
import math
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("tqdm")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import bars, harness, inputs, limits, report, run, timing
from benchmarks.ops import OPS
from benchmarks.ops.bench_expert_ffn import Oracle
from benchmarks.providers import PROVIDERS
from benchmarks.providers.base import module_missing
from benchmarks.shapes import SHAPES

TOY = SHAPES["toy"]


@pytest.fixture(autouse=True)
def _same_environment(monkeypatch):
    # run.main sets these for the process
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, str(torch.get_num_threads()))


def _context(**settings) -> harness.Context:
    return harness.Context(["toy"], [torch.float32], [4], threads=1, repeats=1, budget_s=0.05, **settings)


def _cell(candidates, **settings) -> harness.Cell:
    return harness.Cell("op", "toy", torch.float32, 4, candidates, **settings)


def _row(**values) -> harness.Row:
    number = dict.fromkeys(("p20_ms", "p80_ms", "floor_ms", "ratio", "gflops", "gbs", "max_error"), 1.0)
    text = dict.fromkeys(("date", "commit", "device", "torch", "version"), "")
    usual = dict(threads=2, op="expert_ffn", shape="A", dtype="bf16", num_tokens=1, clean=9, samples=9, status="ok")
    return harness.Row(**(number | text | usual | values))


# every op that computes; "build" is left out: it takes minutes
@pytest.mark.parametrize("op", [op for op in OPS if op not in ("build", "call_overhead")])
def test_run_appends_rows(op, tmp_path, capsys):
    history = tmp_path / "history.csv"
    command = ["--op", op, "--shape", "toy", "--dtype", "fp32", "--tokens", "3", "--threads", "1", "--repeats", "1"]
    # the probe of the machine's limits would take most of the time here; it has its own test
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits.Probe, "__init__", _no_compiler)
        assert run.main([*command, "--budget", "0.02", "--csv", str(history)]) == 0
    printed = capsys.readouterr().out
    assert "no floors: no compiler" in printed
    with history.open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == harness.Row.columns()
    ours = [row for row in rows if row["provider"] == "ours"]
    assert ours and all(row["status"] in ("ok", "noisy") and float(row["p50_ms"]) > 0 for row in ours)
    judged = report.read_latest([history])
    assert [row.provider for row in judged] == [row["provider"] for row in rows]
    assert all(row["note"] for row in rows if row["status"] in ("skipped", "failed", "wrong"))


def _no_compiler(self):
    raise RuntimeError("no compiler")


def test_list_names_everything(capsys):
    assert run.main(["--list"]) == 0
    printed = capsys.readouterr().out
    for name in (*OPS, *SHAPES, *PROVIDERS):
        assert name in printed


@pytest.mark.parametrize(
    "wrong", [["--op", "nothing"], ["--shape", "Z"], ["--providers", "nobody"], ["--threads", "0"]]
)
def test_unknown_names_are_refused(wrong, capsys):
    with pytest.raises(SystemExit):
        run.main(wrong)
    assert "must be" in capsys.readouterr().err


def test_a_red_result_gets_no_time():
    expected = torch.ones(4, dtype=torch.float64)

    def wrong_check() -> harness.Check:
        return harness.check(torch.full((4,), 1.5), expected, expected.float())

    calls = []
    candidate = harness.Candidate("ours", calls.append, wrong_check, ours=True)
    (row,) = harness.run_cell(_cell([candidate]), _context())
    assert row.status == "red" and row.samples == 0 and "error" in row.note and not calls
    (row,) = harness.run_cell(_cell([candidate]), _context(refuse_on_red=False))
    assert row.status == "red" and row.samples > 0


def test_a_wrong_peer_is_marked_and_a_failing_one_explained():
    expected = torch.ones(4, dtype=torch.float64)

    def fails(i):
        raise ValueError("not today")

    candidates = [
        harness.Candidate("ours", lambda i: None, lambda: harness.Check(0.0, 1e-6), ours=True),
        harness.Candidate("liar", lambda i: None, lambda: harness.check(-expected, expected, expected)),
        harness.Candidate("nan", lambda i: None, lambda: harness.check(expected * math.nan, expected, expected)),
        harness.Candidate("absent", fails),
    ]
    rows = {row.provider: row for row in harness.run_cell(_cell(candidates), _context())}
    assert rows["liar"].status == rows["nan"].status == "wrong"
    assert rows["absent"].status == "failed" and "not today" in rows["absent"].note
    assert rows["ours"].status in ("ok", "noisy") and rows["ours"].ratio == 1.0


def test_every_installed_provider_agrees_with_the_reference():
    layer = inputs.make_layer(TOY, torch.float32, threads=1)
    batch = inputs.make_batches(TOY, torch.float32, 5)[0]
    oracle, before = Oracle(layer, batch), inputs.fingerprint(layer)
    checked = 0
    for name, provider in PROVIDERS.items():
        if provider.distribution not in ("torch", "transformers", "moe-kernels-torch") or not provider.default:
            continue  # the other projects' kernels have conditions of their own on sizes
        if "cpu" not in provider.devices or provider.missing() or provider.unsuited(layer, 5):
            continue
        with torch.no_grad():
            assert not oracle.check(provider.prepare(layer)(batch), name).wrong, name
        checked += 1
    assert checked >= 3
    assert inputs.fingerprint(layer) == before


def test_fingerprint_sees_a_changed_expert():
    layer = inputs.make_layer(TOY, torch.bfloat16, threads=1)
    before = inputs.fingerprint(layer)
    with torch.no_grad():
        layer.down_proj.copy_(layer.down_proj.flip(1))
    assert inputs.fingerprint(layer) != before


def test_no_two_experts_are_alike():
    weights = inputs.make_layer(TOY, torch.float32, threads=1).gate_up_proj
    assert len({tuple(expert[0].tolist()) for expert in weights}) == TOY.num_experts


def test_timing_counts_clean_samples_and_keeps_all():
    slow = timing.measure({"a": lambda i: time.sleep(0.003), "b": lambda i: None}, repeats=3, budget_s=1.0)
    assert slow["a"].p50 >= 3.0 and slow["a"].p50 > slow["b"].p50
    for one in slow.values():
        assert len(one.clean) <= len(one.all) and one.percentile(20) <= one.p50 <= one.percentile(80)
    noisy = timing.Timing(clean=[1.0], all=[1.0, 2.0, 3.0])
    assert noisy.noisy and noisy.p50 == 2.0  # too few clean ones: all of them, and it says so


def test_limits_are_measured():
    try:
        probe = limits.Probe()
    except (RuntimeError, OSError) as error:
        pytest.skip(f"no probe: {error}")
    measured = probe.measure(threads=1, repeats=1, buffer_bytes=16 << 20)
    assert 1 < measured.fp32_gflops <= 1.05 * measured.bf16_gflops
    # above what any core can do would mean that the compiler saw through the loop
    assert measured.bf16_gflops < 2000 and 0.1 < measured.read_gbs < 5000
    assert probe.copier(1 << 20, 1)() > 0


def test_floor_is_the_larger_bound_and_follows_a_faster_probe():
    machine = limits.Limits(2, 512, True, 100.0, 200.0, 10.0, 5.0, 0)
    context = _context(limits=machine)
    assert harness.floor_ms(_cell([], flops=1e9, bytes=1.0), context, {}) == pytest.approx(10.0)
    reading = _cell([], flops=1.0, bytes=1e9, probe_bytes=1e9)
    assert harness.floor_ms(reading, context, {}) == pytest.approx(100.0)
    probe = {harness.READ_PROBE: timing.Timing(all=[50.0])}
    assert harness.floor_ms(reading, context, probe) == pytest.approx(50.0)
    assert math.isnan(harness.floor_ms(reading, _context(), {}))


def test_bars_pass_miss_and_stay_open():
    fast, slow = _row(provider="ours", p50_ms=1.0), _row(provider="torch_mm", p50_ms=1.3)
    packed = _row(provider="ours_prepacked", p50_ms=1.0)
    state = {verdict.bar[:20]: verdict.state for verdict in bars.verdicts([fast, slow, packed])}
    assert state == {"forward, plain layou": "pass", "forward, prepacked: ": "MISS"}
    (noisy, *_) = bars.verdicts([fast, _row(provider="torch_mm", p50_ms=9.0, status="noisy")])
    assert noisy.state == "open"
    wrong = bars.verdicts([fast, _row(provider="torch_mm", p50_ms=0.1, status="wrong")])
    assert wrong[0].state == "open"  # a wrong peer is no rival
    (slow_import,) = bars.verdicts([_row(op="call_overhead.import", provider="import_over_torch", p50_ms=400.0)])
    assert slow_import.state == "MISS"


def test_only_the_newest_run_of_a_cell_is_judged(tmp_path):
    history = tmp_path / "history.csv"
    report.append_csv(
        history, [_row(provider="ours", p50_ms=5.0, date="1"), _row(provider="old_peer", date="1", p50_ms=1)]
    )
    report.append_csv(
        history, [_row(provider="ours", p50_ms=1.0, date="2"), _row(provider="ours", dtype="fp32", p50_ms=3)]
    )
    assert [(row.provider, row.dtype, row.p50_ms) for row in report.read_latest([history])] == [
        ("ours", "bf16", 1.0),
        ("ours", "fp32", 3.0),
    ]
    assert run.main(["--bars", str(history)]) == 0


def test_another_csv_is_not_continued(tmp_path):
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="has columns a, b"):
        report.append_csv(other, [])


def test_an_absent_module_says_how_to_install_it():
    assert module_missing("no_such_module", "no-such-package") == (
        "no_such_module is not installed; pip install no-such-package"
    )
    assert module_missing("torch", "torch") is None
