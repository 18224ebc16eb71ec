"""Times functions on a GPU: CUDA events around a replayed graph, out of a cold L2, in turns.

A function is captured as a CUDA graph, as serving engines run a model, so that a short kernel is not measured by how
fast Python launches it. What waits for the GPU (``.item()``) cannot be captured: it is timed as it is launched, and its
row says so. So is a training step.
"""

import functools
import time
from collections.abc import Callable

import torch

from benchmarks.timing import Timing, describe

#: read before each sample; five times an H200's L2
_FLUSH_BYTES = 1 << 28
NOT_CAPTURED = "timed as launched from Python: it waits for the GPU"


@functools.cache
def _flushed() -> torch.Tensor:
    return torch.zeros(_FLUSH_BYTES // 4, device="cuda")


def flush_l2() -> None:
    """Reads, since lines that were written would go back to memory while the timed kernel runs."""
    _flushed().amax()


def extra_bytes(function: Callable[[int], object]) -> int:
    """Most memory that a call held beside what was there before it; its result counts."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    function(0)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - held


def waits_for_gpu(function: Callable[[int], object]) -> bool:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        function(0)
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return False


def capture(function: Callable[[int], object], stream: torch.cuda.Stream, pool) -> torch.cuda.CUDAGraph:
    """``function(0)`` as a graph. All graphs of a cell share a pool: no result of a replay is read."""
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        function(0)  # cuBLAS keeps a workspace a stream; it is not to come from the graph's pool
        stream.synchronize()
        torch.cuda.empty_cache()  # nothing can be freed to make room during a capture
        graph.capture_begin(pool=pool)
        try:
            function(0)
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph


def measure(
    functions: dict[str, Callable[[int], object]],
    *,
    repeats: int = 50,
    budget_s: float = 0.25,
    progress: Callable[[], object] = lambda: None,
) -> dict[str, Timing]:
    """As :func:`benchmarks.timing.measure`; a sample is one call, and every sample counts as clean."""
    timings = {name: Timing() for name in functions}
    calls: dict[str, Callable[[], object]] = {}
    stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
    for name, function in functions.items():
        timing = timings[name]
        try:
            function(0)  # compiles, tunes
            timing.extra_bytes = extra_bytes(function)
            calls[name] = lambda function=function: function(0)
            if torch.is_grad_enabled():
                continue
            if waits_for_gpu(function):
                timing.note = NOT_CAPTURED
            else:
                calls[name] = capture(function, stream, pool).replay
        except Exception as error:  # a peer may fail in any way; the others still get their row
            calls.pop(name, None)
            timing.error = describe(error)

    spent = dict.fromkeys(calls, 0.0)
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    pending, turn = list(calls), 0
    while pending:
        # rotated, so that nobody always runs in the wake of the same neighbour
        start = turn % len(pending)
        for name in pending[start:] + pending[:start]:
            begin = time.perf_counter()
            try:
                flush_l2()
                before.record()
                calls[name]()
                after.record()
                after.synchronize()
            except Exception as error:
                timings[name].error = describe(error)
                continue
            timings[name].all.append(before.elapsed_time(after))
            timings[name].clean = timings[name].all
            spent[name] += time.perf_counter() - begin
            progress()
        turn += 1
        pending = [
            name
            for name in pending
            if len(timings[name].all) < repeats and spent[name] < budget_s and not timings[name].error
        ]
    calls.clear()  # the graphs and with them their pool
    torch.cuda.empty_cache()
    return timings
