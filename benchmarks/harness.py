"""What every benchmark shares: a cell of candidates is checked, timed in turns, and becomes rows.

A *cell* is one op on one shape, dtype and number of tokens. Its candidates compute the same thing on the same inputs.
"""

import functools
import math
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import limits_cuda, timing, timing_cuda
from benchmarks.limits import Limits, Probe, cpu_model
from moe_kernels.testing import assert_close_to_reference

#: device type -> how functions are timed there
_MEASURE = {"cpu": timing.measure, "cuda": timing_cuda.measure}
#: a peer whose error is beyond this many times what plain torch is allowed did not compute the same thing
WRONG_FACTOR = 8
#: the row that only reads what a kernel has to read
READ_PROBE = "read_probe"
#: the row that only copies as many bytes as a kernel has to read and write
MEMCPY = "memcpy"


@dataclass(frozen=True)
class Check:
    """Largest error against the float64 reference, and what plain PyTorch in the same dtype may have at most.

    Both relative to the largest reference value. ``red`` says what :func:`assert_close_to_reference` said, if it did.
    """

    error: float
    allowed: float
    red: str = ""

    @property
    def wrong(self) -> bool:
        return not self.error <= WRONG_FACTOR * self.allowed  # written so that NaN is wrong


def check(actual: Tensor, reference64: Tensor, eager: Tensor, name: str = "result") -> Check:
    """Compares by the rule of the tests: twice (the error of plain PyTorch plus one rounding unit)."""
    try:
        assert_close_to_reference(actual, reference64, eager, name)
        red = ""
    except AssertionError as error:
        red = str(error)
    if actual.shape != reference64.shape:
        return Check(math.inf, 0.0, red)
    if actual.numel() == 0:
        return Check(0.0, 0.0, red)
    largest = reference64.abs().max().item() or 1.0
    error = (actual.double() - reference64).abs().max().item() / largest
    eager_error = (eager.double() - reference64).abs().max().item() / largest
    return Check(error, 2 * (eager_error + torch.finfo(eager.dtype).eps), red)


def worst(checks: list[Check]) -> Check:
    """The check to show for an op with several results."""
    red = "; ".join(one.red for one in checks if one.red)
    shown = max(checks, key=lambda one: one.error / one.allowed if one.allowed else math.inf)
    return Check(shown.error, shown.allowed, red)


@dataclass
class Candidate:
    """One provider in one cell.

    Attributes:
        call: computes the cell's i-th input (candidates cycle through the same inputs).
        check: compares the result on input 0; None where there is nothing to compare.
        ours: must be right before it is timed.
    """

    name: str
    call: Callable[[int], object]
    check: Callable[[], Check] | None = None
    ours: bool = False
    version: str = ""


@dataclass
class Cell:
    """One table.

    Attributes:
        flops: multiplications and additions that any implementation has to do.
        bytes: what it has to read and write if each thing moves once.
        copies: bound the bytes by memcpy instead of by reading.
        training: run with autograd recording.
        probe_bytes: what the candidate named :data:`READ_PROBE` or :data:`MEMCPY` moves, 0 where there is none.
        baseline: the candidate whose time the others are divided by.
        skipped: provider -> why it is not here.
        measured: name -> function that returns milliseconds it measured itself, in other processes; not gated.
    """

    op: str
    shape: str
    dtype: torch.dtype
    num_tokens: int
    candidates: list[Candidate]
    flops: float = 0.0
    bytes: float = 0.0
    copies: bool = False
    training: bool = False
    probe_bytes: float = 0.0
    baseline: str = "ours"
    skipped: dict[str, str] = field(default_factory=dict)
    measured: dict[str, Callable[[], list[float]]] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return f"{self.op}  {self.shape}  {dtype_name(self.dtype)}  T={self.num_tokens}"


#: what each op's ``cells(context)`` returns: made one after the other, since a layer's weights fill the memory
Cells = Iterator[Cell]


@dataclass(frozen=True)
class Row:
    """One line of the CSV history, and of the table.

    Attributes:
        clean: samples that nothing disturbed; where they are too few (timing.MIN_CLEAN), percentiles are over all.
        ratio: p50 over the baseline's (above 1: slower than ours).
        device: model of the CPU or of the GPU.
        threads: of the CPU, also where a GPU is timed.
        floor_ms: no machine with the limits measured in this run can be faster.
        extra_mib: on a GPU, memory that a call took beside its inputs, its result included.
        status: "ok", "noisy", "ungated" (measured in other processes), "wrong" (a peer's result), "red" (ours is wrong:
            not timed), "failed" or "skipped".
    """

    date: str
    commit: str
    device: str
    torch: str
    threads: int
    op: str
    shape: str
    dtype: str
    num_tokens: int
    provider: str
    version: str
    p20_ms: float
    p50_ms: float
    p80_ms: float
    clean: int
    samples: int
    floor_ms: float
    ratio: float
    gflops: float
    gbs: float
    max_error: float
    status: str
    note: str = ""
    fma_gflops: float = math.nan
    read_gbs: float = math.nan
    extra_mib: float = math.nan

    @classmethod
    def columns(cls) -> list[str]:
        return [column.name for column in fields(cls)]


@dataclass
class Context:
    """Settings of one run, which the ops read.

    Attributes:
        device: where everything is made and runs.
        providers: names asked for, or None for each op's defaults.
        refuse_on_red: do not time one of our own that is wrong.
        limits, probe: None where they could not be built; ``limits_missing`` says why.
    """

    shapes: list[str]
    dtypes: list[torch.dtype]
    tokens: list[int]
    threads: int
    providers: list[str] | None = None
    repeats: int = 9
    budget_s: float = 4.0
    refuse_on_red: bool = True
    limits: Limits | limits_cuda.Limits | None = None
    probe: Probe | None = None
    limits_missing: str = ""
    device: torch.device = torch.device("cpu")

    def wants(self, name: str, default: bool = True) -> bool:
        return default if self.providers is None else name in self.providers


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()


def cells_on(device: torch.device, cells: Cells) -> Cells:
    """The cells, made while ``device`` is the default: an op's inputs are where they are to be used."""
    while True:
        with device:
            cell = next(cells, None)
        if cell is None:
            return
        yield cell


def dtype_name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


@functools.cache
def commit() -> str:
    """Short hash of this checkout, "+" where tracked files differ from it."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(("git", "-C", str(here), *arguments), capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+" if git("diff", "--stat", "HEAD") else "")
    except OSError:
        return "unknown"


def floor_ms(cell: Cell, context: Context, timings: dict[str, timing.Timing]) -> float:
    """The longer of the arithmetic and the memory traffic at this machine's limits; NaN where they are unknown.

    The bandwidth is the better of the one measured at the start and that of this cell's own read probe: a floor is
    not to rise because the host was busier when it was measured than when the kernels ran.
    """
    limits = context.limits
    if limits is None or not (cell.flops or cell.bytes):
        return math.nan
    gbs = limits.copy_gbs if cell.copies else limits.read_gbs
    probe = timings.get(MEMCPY if cell.copies else READ_PROBE)
    if probe is not None and probe.all and cell.probe_bytes:
        gbs = max(gbs, cell.probe_bytes / probe.as_limit / 1e6)
    return max(cell.flops / limits.peak_gflops(cell.dtype), cell.bytes / gbs) / 1e6


def run_cell(cell: Cell, context: Context, progress: Callable[[], object] = lambda: None) -> list[Row]:
    """Checks, times and describes every candidate; the slowest last."""
    with torch.set_grad_enabled(cell.training):
        return _run_cell(cell, context, progress)


def _run_cell(cell: Cell, context: Context, progress: Callable[[], object]) -> list[Row]:
    checks: dict[str, Check] = {}
    failed: dict[str, str] = {}
    for candidate in cell.candidates:
        if candidate.check is None:
            continue
        try:
            with context.device:
                checks[candidate.name] = candidate.check()
        except Exception as error:  # a peer may fail in any way; the others still get their row
            failed[candidate.name] = timing.describe(error)
    red = {c.name: checks[c.name].red for c in cell.candidates if c.ours and c.name in checks and checks[c.name].red}
    timed = {
        candidate.name: candidate.call
        for candidate in cell.candidates
        if candidate.name not in failed and not (context.refuse_on_red and candidate.name in red)
    }
    measure = _MEASURE[context.device.type]
    timings = measure(timed, repeats=context.repeats, budget_s=context.budget_s, progress=progress)
    for name, samples in cell.measured.items():
        timings[name] = timing.Timing()
        try:
            timings[name].all = samples()
        except Exception as error:
            failed[name] = timing.describe(error)
    floor = floor_ms(cell, context, timings)
    baseline = timings.get(cell.baseline)

    common = dict(
        date=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        commit=commit(),
        device=device_name(context.device),
        torch=torch.__version__,
        threads=context.threads,
        op=cell.op,
        shape=cell.shape,
        dtype=dtype_name(cell.dtype),
        num_tokens=cell.num_tokens,
        floor_ms=floor,
    )
    if context.limits is not None:
        common |= dict(fma_gflops=context.limits.peak_gflops(cell.dtype), read_gbs=context.limits.read_gbs)

    def row(name: str, version: str, status: str, note: str = "") -> Row:
        one = timings.get(name, timing.Timing())
        p50 = one.p50
        is_probe = name in (READ_PROBE, MEMCPY)
        return Row(
            **common,
            provider=name,
            version=version,
            p20_ms=one.percentile(20),
            p50_ms=p50,
            p80_ms=one.percentile(80),
            clean=len(one.clean),
            samples=len(one.all),
            ratio=p50 / baseline.p50 if baseline is not None and baseline.all else math.nan,
            gflops=math.nan if is_probe or not cell.flops else cell.flops / p50 / 1e6,
            gbs=(cell.probe_bytes if is_probe else cell.bytes or math.nan) / p50 / 1e6,
            max_error=checks[name].error if name in checks else math.nan,
            status=status,
            note=note or one.note,
            extra_mib=one.extra_bytes / 2**20,
        )

    rows = []
    for candidate in cell.candidates:
        name = candidate.name
        if name in failed or (name in timings and timings[name].error):
            rows.append(row(name, candidate.version, "failed", failed.get(name) or timings[name].error))
        elif name in red:
            rows.append(row(name, candidate.version, "red", red[name]))
        elif not candidate.ours and name in checks and checks[name].wrong:
            note = f"error {checks[name].error:.1e} where plain torch may have {checks[name].allowed:.1e}"
            rows.append(row(name, candidate.version, "wrong", note))
        else:
            rows.append(row(name, candidate.version, "noisy" if timings[name].noisy else "ok"))
    for name in cell.measured:
        rows.append(row(name, "", "failed" if name in failed else "ungated", failed.get(name, "")))
    rows.sort(key=lambda one: (math.isnan(one.p50_ms), one.p50_ms))
    return rows + [row(name, "", "skipped", reason) for name, reason in cell.skipped.items()]
