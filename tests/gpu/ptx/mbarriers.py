"""mbarrier objects: phases, arrivals, bytes still to come, and what a waiter may see afterwards.

The opaque 64 bits in shared memory are not modelled; an object is known by its block and offset. What a copy brings
lands as late as it may: when somebody has asked for the phase in vain.

Source: PTX ISA 9.0, chapter 9.7.13.15.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .compiler import SHARED_BASE, Fault, naming, operation
from .parser import Addr, PtxError, Sink


@dataclass
class Mbarrier:
    expected: int
    pending: int
    seen: np.ndarray  # clocks of those who arrived in this phase
    fenced: np.ndarray
    done_seen: np.ndarray  # and in the phases before
    done_fenced: np.ndarray
    phase: int = 0
    bytes_left: int = 0
    landing: list = field(default_factory=list)  # what lands at the next poll


def shared_offset(addresses: np.ndarray) -> np.ndarray:
    return np.where(addresses >= SHARED_BASE, addresses - SHARED_BASE, addresses)


def find(m, thread: int, offset: int) -> Mbarrier:
    found = m.mbarriers.get((int(m.block_of[thread]), int(offset)))
    if found is None:
        raise Fault("mbarrier", f"no mbarrier was initialised at shared offset {int(offset):#x}", np.array([thread]))
    flat = np.array([offset + m.block_of[thread] * m.shared.stride])
    # the initialisation is a plain write, which must be synchronised with; all else is atomic
    m.shadow.read(flat, 8, np.array([thread]), m.warp_of[[thread]], atomic=True)
    return found


def advance(m, barrier: Mbarrier) -> None:
    if barrier.pending == 0 and barrier.bytes_left == 0:
        barrier.phase += 1
        m.progress += 1
        barrier.pending = barrier.expected
        np.maximum(barrier.done_seen, barrier.seen, out=barrier.done_seen)
        np.maximum(barrier.done_fenced, barrier.fenced, out=barrier.done_fenced)


def arrive(m, barrier: Mbarrier, thread: int, count: int, drop: bool = False) -> None:
    if count > barrier.pending:
        raise Fault("mbarrier", f"{count} arrive where {barrier.pending} are expected", np.array([thread]))
    warp = m.warp_of[thread]
    np.maximum(barrier.seen, m.shadow.seen[warp], out=barrier.seen)
    np.maximum(barrier.fenced, m.shadow.fenced[warp], out=barrier.fenced)
    barrier.pending -= count
    if drop:
        barrier.expected -= count
    advance(m, barrier)


def complete_bytes(m, barrier: Mbarrier, count: int, engine_clock: int) -> None:
    barrier.bytes_left -= count
    agent = m.shadow.copy_engine
    barrier.seen[agent] = max(barrier.seen[agent], engine_clock)
    advance(m, barrier)


@operation("mbarrier")
def build_mbarrier(ins, c):
    kind = ins.parts[1]
    if kind in ("try_wait", "test_wait"):
        return _build_wait(ins, c)
    operands = list(ins.operands)
    target = None
    if not isinstance(operands[0], Addr) and kind != "pending_count":
        result = operands.pop(0)
        target = None if isinstance(result, Sink) else c.write(result, "b64")
    if kind not in ("init", "inval", "arrive", "arrive_drop", "expect_tx", "complete_tx"):
        raise PtxError(f"line {ins.line}: {ins.opcode} is not read by this bench")
    address = c.address(operands[0])
    value = c.read(operands[1], "u32") if len(operands) > 1 else None
    expects = "expect_tx" in ins.flags

    def run(m, i):
        ids, offsets = m.ids[i], shared_offset(address(m, i))
        values = np.broadcast_to(value(m, i), len(ids)) if value is not None else np.ones(len(ids), np.int64)
        states = np.zeros(len(ids), np.uint64)
        with naming(ids):
            m.shared.locate(offsets, None, 8, 1)
        for at, (thread, offset, number) in enumerate(
            zip(ids.tolist(), offsets.tolist(), values.tolist(), strict=True)
        ):
            if kind == "init":
                _initialise(m, thread, offset, number)
            elif kind == "inval":
                find(m, thread, offset)
                del m.mbarriers[int(m.block_of[thread]), offset]
            else:
                barrier = find(m, thread, offset)
                states[at] = barrier.phase
                if kind == "expect_tx":
                    barrier.bytes_left += number
                elif kind == "complete_tx":
                    complete_bytes(m, barrier, number, 0)
                else:
                    if expects:
                        barrier.bytes_left += number
                    arrive(m, barrier, thread, 1 if expects else number, kind == "arrive_drop")
        if kind.startswith("arrive"):
            m.shadow.tick(np.unique(m.warp_of[ids]))
        if target is not None:
            target(m, i, states)

    return run


def _initialise(m, thread: int, offset: int, count: int) -> None:
    block = int(m.block_of[thread])
    one, window = np.array([thread]), np.array([block])
    m.shared.store(np.array([offset]), window, np.zeros((1, 1), np.uint64), 8)
    m.shadow.write(np.array([offset + block * m.shared.stride]), 8, one, m.warp_of[one])
    if (block, offset) in m.mbarriers:
        raise Fault("mbarrier", "initialised again without having been made invalid", one)
    clocks = [np.zeros(m.shadow.warps + 1, np.int32) for _ in range(4)]
    m.mbarriers[block, offset] = Mbarrier(count, count, *clocks)


def _build_wait(ins, c):
    address, parity = c.address(ins.operands[1]), "parity" in ins.flags
    wanted = c.read(ins.operands[2], "u32" if parity else "u64")
    target = c.write(ins.operands[0], "pred")

    def run(m, i):
        ids, offsets = m.ids[i], shared_offset(address(m, i))
        values = np.broadcast_to(wanted(m, i), len(ids))
        failed, acquired = {}, {}
        # threads of a warp that ask for the same phase of the same object get one answer
        keys = np.stack([m.warp_of[ids], offsets, values.astype(np.int64)], 1)
        askers, first, answer = np.unique(keys, axis=0, return_index=True, return_inverse=True)
        done = np.zeros(len(askers), np.bool_)
        for at, (warp, offset, value) in enumerate(askers.tolist()):
            barrier = find(m, int(ids[first[at]]), offset)
            done[at] = (barrier.phase & 1) != value if parity else barrier.phase != value
            if done[at]:
                acquired[warp, offset] = barrier
            else:
                failed[id(barrier)] = barrier
                m.yielded[warp] = True
        result = done[answer.ravel()]
        for (warp, _), barrier in acquired.items():
            np.maximum(m.shadow.seen[warp], barrier.done_seen, out=m.shadow.seen[warp])
            np.maximum(m.shadow.fenced[warp], barrier.done_fenced, out=m.shadow.fenced[warp])
        for barrier in failed.values():
            landing, barrier.landing = barrier.landing, []
            m.progress += len(landing)
            for land in landing:
                land()
        target(m, i, result)

    return run


def copy_arrive(ins, c):
    """``cp.async.mbarrier.arrive``: this thread arrives once its cp.async so far have landed."""
    from .memory_ops import finish_copies

    address, counted = c.address(ins.operands[0]), "noinc" in ins.flags

    def run(m, i):
        for thread, offset in zip(m.ids[i].tolist(), shared_offset(address(m, i)).tolist(), strict=True):
            barrier = find(m, thread, offset)
            if not counted:
                barrier.pending += 1

            def land(thread=thread, barrier=barrier):
                finish_copies(m, np.array([thread]), 0, include_open=True)
                m.shadow.tick(m.warp_of[[thread]])
                arrive(m, barrier, thread, 1)

            barrier.landing.append(land)

    return run
