"""Ranks for tests: processes that stay, as starting one costs seconds, and run what they are sent."""

import faulthandler
import os
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.tensor import DTensor

from moe_kernels.distributed.checkpoint import Blocks


def full(value: Tensor) -> Tensor:
    """A tensor whole, where it is a DTensor. All ranks must call.

    PyTorch's ``full_tensor`` does not know every order of cuts (2.11 none where a shard is several blocks).
    """
    if not isinstance(value, DTensor):
        return value
    blocks: list = [None] * dist.get_world_size()
    dist.all_gather_object(blocks, Blocks(value.detach()).blocks)
    whole = torch.empty(value.shape, dtype=value.dtype)
    for rank in value.device_mesh.mesh.flatten().tolist():
        for offsets, block in blocks[rank].items():
            whole[region(offsets, block)] = block
    return whole


def region(offsets: torch.Size, block: Tensor) -> tuple[slice, ...]:
    """Where in the whole a block lies."""
    return tuple(slice(first, first + size) for first, size in zip(offsets, block.shape, strict=True))


#: how long a rank waits for another in a collective: on a busy machine one may import for a long time yet
TIMEOUT = timedelta(seconds=120)
WORLD_SIZE = 4


class Ranks:
    """``run(function, *arguments)`` calls a function of a test module on every rank and returns the results by rank."""

    def __init__(self, world_size: int = WORLD_SIZE):
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        context = mp.get_context("spawn")
        self._pipes, self._processes = [], []
        for rank in range(world_size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world_size, port, there), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def run(self, function: Callable, *arguments) -> list:
        outcomes = self.outcomes(function, *arguments)
        for rank, (_, failure) in enumerate(outcomes):
            if failure is not None:
                raise AssertionError(f"rank {rank} failed:\n{failure}")
        return [result for result, _ in outcomes]

    def outcomes(self, function: Callable, *arguments) -> list[tuple[object, str | None]]:
        """For each rank its result and None, or None and its traceback; a rank that died has "died"."""
        for pipe in self._pipes:
            pipe.send((function, arguments))
        outcomes = []
        for pipe in self._pipes:
            if not pipe.poll(2 * TIMEOUT.total_seconds()):
                raise AssertionError("a rank hangs")
            try:
                outcomes.append(pipe.recv())
            except EOFError:
                outcomes.append((None, "died"))
        return outcomes

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def _serve(rank: int, world_size: int, port: int, pipe) -> None:
    faulthandler.enable()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    dist.init_process_group("gloo", timeout=TIMEOUT)
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        torch.manual_seed(0)
        try:
            outcome = (function(*arguments), None)
        except Exception:
            outcome = (None, traceback.format_exc())
        pipe.send(outcome)
