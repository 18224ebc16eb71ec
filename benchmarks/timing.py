"""Interleaved medians of competing functions in one process, on a machine that may be shared.

Two runs of one program on a shared host differ by tens of percent, so only functions that took turns within one process
are comparable. Each round calls every function once, in an order that rotates.

A sample is *clean* only if, while it ran, no thread of this process waited for a core (/proc/self/task/*/schedstat,
second field, nanoseconds) and the hypervisor took no tick away (/proc/stat, field "steal"). Percentiles are over the
clean samples where there are at least :data:`MIN_CLEAN`, else over all of them and the timing says it is noisy. No
sample is thrown away unseen: both counts are reported.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

#: a median of fewer clean samples is not called clean
MIN_CLEAN = 3
#: share of a sample that our threads may wait for a core; two cores and a kernel thread waking up cost about 1 %
MAX_DELAY_SHARE = 0.015
#: a sample lasts at least this long (short functions are called repeatedly), so that reading the clock does not count
MIN_SAMPLE_S = 0.002
#: a function that takes longer than this starts from cold caches anyhow: no untimed call before each sample
REWARM_BELOW_S = 0.1
#: how long a sample waits for other threads (a peer's idle workers still spinning, say) to leave the cores
MAX_QUIET_WAIT_S = 0.25


class Gate:
    """Tells whether something else had our cores between :meth:`start` and :meth:`clean`.

    ``available`` is False where the kernel does not say (other systems, some sandboxes); then every sample counts as
    clean and the report says that nothing was gated.
    """

    def __init__(self):
        self.available = self._run_delay_ns() is not None and self._steal_ticks() is not None

    @staticmethod
    def _run_delay_ns() -> int | None:
        total, seen = 0, False
        for task in Path("/proc/self/task").glob("*/schedstat"):
            try:
                total += int(task.read_text().split()[1])
            except (OSError, IndexError, ValueError):
                continue  # a thread that ended meanwhile
            seen = True
        return total if seen else None

    @staticmethod
    def _steal_ticks() -> int | None:
        try:
            with open("/proc/stat") as stat:
                return int(stat.readline().split()[8])
        except (OSError, IndexError, ValueError):
            return None

    @staticmethod
    def _running() -> int | None:
        try:
            return int(Path("/proc/loadavg").read_text().split()[3].split("/")[0])
        except (OSError, IndexError, ValueError):
            return None

    def wait_until_quiet(self, longest_s: float = MAX_QUIET_WAIT_S) -> None:
        """Returns when nobody but this thread has run for three looks in a row, or after the longest wait."""
        deadline = time.perf_counter() + longest_s
        quiet = 0
        while self.available and quiet < 3 and time.perf_counter() < deadline:
            running = self._running()
            quiet = quiet + 1 if running is not None and running <= 1 else 0
            time.sleep(0.002)

    def start(self) -> None:
        if self.available:
            self._delay, self._steal = self._run_delay_ns(), self._steal_ticks()

    def clean(self, elapsed_s: float) -> bool:
        if not self.available:
            return True
        delayed_s = (self._run_delay_ns() - self._delay) * 1e-9
        # a tick is 10 ms: a long sample may lose one without being wrong by more than the delay share
        stolen_allowed = 1 if elapsed_s > 0.01 / MAX_DELAY_SHARE else 0
        within = delayed_s <= MAX_DELAY_SHARE * elapsed_s + 2e-5  # reading the files itself takes a slice
        return within and self._steal_ticks() - self._steal <= stolen_allowed


def describe(error: Exception) -> str:
    """One line for a table."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


@dataclass
class Timing:
    """Samples of one function, in milliseconds a call."""

    clean: list[float] = field(default_factory=list)
    all: list[float] = field(default_factory=list)
    error: str = ""  # why there is no sample
    note: str = ""  # what is to be said of the samples
    extra_bytes: float = float("nan")  # memory a call took beside its inputs; unknown on a CPU

    @property
    def noisy(self) -> bool:
        return len(self.clean) < MIN_CLEAN

    def percentile(self, percent: float) -> float:
        """Linear interpolation between the two nearest samples."""
        samples = sorted(self.all if self.noisy else self.clean)
        if not samples:
            return float("nan")
        place = percent / 100 * (len(samples) - 1)
        below = int(place)
        above = min(below + 1, len(samples) - 1)
        return samples[below] + (place - below) * (samples[above] - samples[below])

    @property
    def p50(self) -> float:
        return self.percentile(50)

    @property
    def as_limit(self) -> float:
        """For a floor: the median where it is clean, else the fastest sample, since disturbances only slow down."""
        return min(self.all, default=float("nan")) if self.noisy else self.p50


def measure(
    functions: dict[str, Callable[[int], object]],
    *,
    repeats: int = 9,
    budget_s: float = 4.0,
    progress: Callable[[], object] = lambda: None,
) -> dict[str, Timing]:
    """Times the functions in turns.

    Args:
        functions: name -> function of a counter, which it uses to cycle through its inputs.
        repeats: clean samples wanted of each function.
        budget_s: seconds that one function may take in all; at least one sample is taken.
        progress: called after each sample.

    Returns:
        name -> :class:`Timing`, in the order given. A function that raises has no samples and says why.
    """
    gate = Gate()
    timings = {name: Timing() for name in functions}
    calls, spent = {}, {}
    for name, function in functions.items():
        begin = time.perf_counter()
        try:
            function(0)
            seconds = []
            for i in range(1, 3):
                t = time.perf_counter()
                function(i)
                seconds.append(time.perf_counter() - t)
                if time.perf_counter() - begin > budget_s:
                    break
        except Exception as error:  # a peer may fail in any way; the others still get their row
            timings[name].error = describe(error)
            continue
        fastest = max(min(seconds), 1e-8)
        calls[name] = max(1, -(-int(MIN_SAMPLE_S * 1e9) // int(fastest * 1e9 + 1)))
        spent[name] = 0.0

    counter, round_number = 3, 0
    pending = list(calls)
    while pending:
        # rotated, so that nobody always runs in the wake of the same neighbour
        turn = round_number % len(pending)
        for name in pending[turn:] + pending[:turn]:
            begin = time.perf_counter()
            function, timing, number = functions[name], timings[name], calls[name]
            gate.wait_until_quiet(min(MAX_QUIET_WAIT_S, budget_s / 16))  # waiting is paid from the budget
            if not timing.all or timing.all[-1] < REWARM_BELOW_S * 1e3:
                function(counter)  # untimed: the neighbour's code and threads leave the caches
            gate.start()
            t = time.perf_counter()
            for i in range(counter + 1, counter + 1 + number):
                function(i)
            elapsed = time.perf_counter() - t
            clean = gate.clean(elapsed)
            counter += number + 1
            timing.all.append(elapsed / number * 1e3)
            if clean:
                timing.clean.append(timing.all[-1])
            spent[name] += time.perf_counter() - begin
            progress()
        round_number += 1
        pending = [name for name in pending if len(timings[name].clean) < repeats and spent[name] < budget_s]
    return timings
