"""What a rank says when it cannot go on, and what the ranks that wait for it say: :func:`announcing`, :func:`blame`.

A rank that tells the others by the exchange itself (:func:`.sizes.tell_failure`) ends them at once. Anywhere else they
wait for rows, until the process group's timeout or the end of the rank's process; then they look here for the reason.
It lies in the store that every process group has, and nothing is written or read before that.
"""

import contextlib
import time
from collections.abc import Iterator
from typing import TypeVar

from torch.distributed import ProcessGroup

from moe_kernels.nn.feed_forward import recomputes

#: seconds that a rank whose wait failed gives the others to say that they wait too
_PATIENCE = 2.0
_E = TypeVar("_E", bound=BaseException)


@contextlib.contextmanager
def announcing(group: ProcessGroup, layer: str, *, backward: bool = False) -> Iterator[None]:
    """Leaves what is raised inside for :func:`blame`, unless the other ranks know it.

    Args:
        backward: whether it is a backward pass that runs inside, and no forward.
    """
    try:
        yield
    except Exception as error:
        # activation checkpointing stops its second forward by an exception, as soon as it has what it wants
        if backward or not recomputes():
            announce(error, group, layer)
        raise


def announce(error: BaseException, group: ProcessGroup, layer: str) -> None:
    if not getattr(error, "known_to_all_ranks", False):
        known(error)
        tell(group, f"failed/{group.rank()}", f"{describe(error)} in {layer}")


def known(error: _E) -> _E:
    """Marks an error that all ranks raise, or were told."""
    error.known_to_all_ranks = True
    return error


def describe(error: BaseException) -> str:
    text = str(error)
    return f"{type(error).__name__}: {text if len(text) <= 300 else text[:300] + '…'}"


def blame(group: ProcessGroup, layer: str) -> str:
    """Which ranks have not come where this one waited in vain, and why, as far as they said. Where nobody knows, empty.

    Every rank whose wait fails says so: those which say nothing have ended, hang, or are somewhere else.
    """
    others = [rank for rank in range(group.size()) if rank != group.rank()]
    if not tell(group, f"waits/{group.rank()}", layer):
        return ""
    end = time.monotonic() + _PATIENCE
    while True:
        failed = {rank: text for rank in others if (text := read(group, f"failed/{rank}"))}
        silent = [rank for rank in others if rank not in failed and not read(group, f"waits/{rank}")]
        if failed:
            return "; " + "; ".join(f"rank {rank} met {text}" for rank, text in failed.items())
        if not silent:
            return ""
        if time.monotonic() > end:
            return f"; ranks {silent} did not come"
        time.sleep(0.05)


def tell(group: ProcessGroup, key: str, text: str) -> bool:
    with contextlib.suppress(Exception):  # the process that serves the store may be the one that ended
        group.get_group_store().set(f"moe_kernels/{key}", text)
        return True
    return False


def read(group: ProcessGroup, key: str) -> str:
    """What a rank left, or nothing."""
    with contextlib.suppress(Exception):
        store, name = group.get_group_store(), f"moe_kernels/{key}"
        if store.check([name]):
            return store.get(name).decode()
    return ""
