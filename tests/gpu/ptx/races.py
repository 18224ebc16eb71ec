"""Races on shared memory, found by vector clocks rather than by luck of the schedule.

Each warp has a clock that advances when it synchronises, and knows how far it has seen every other warp's. Each
granule of shared memory remembers its last write and, for each warp, its last read. An access to a granule whose last
write (or, for a write, last read) lies beyond what the warp has seen is a race, whatever the values. Barriers,
mbarriers and warp barriers are the only things that let a warp see another. One more agent for each block stands for
the copy engine, and a copy or a wgmma in flight has clock ``IN_FLIGHT``, which nobody has seen. Between lanes of one
warp, a read of what another lane wrote needs a warp barrier between them; a write after another lane's read is not
looked for.

Two writes of the same bits are no race: Triton has all warps write what all of them hold. A reader is then held to the
last of them alone.

The async proxy (wgmma, TMA) sees what the generic proxy wrote only after ``fence.proxy.async``: a second clock for each
warp holds how far such fences have covered.

Source: C. Flanagan and S. Freund, "FastTrack: efficient and precise dynamic race detection" (2009); PTX ISA 9.0,
chapter 8.
"""

from __future__ import annotations

import numpy as np

from .compiler import Fault

IN_FLIGHT = 1 << 30


class RaceShadow:
    def __init__(self, space, warps_per_block: int, granule: int):
        blocks, self.space, self.granule = space.windows, space, granule
        self.shift = granule.bit_length() - 1
        self.warps = warps_per_block
        agents = warps_per_block + 1
        self.copy_engine = warps_per_block
        granules = len(space.data) >> self.shift
        self.seen = np.zeros((blocks * warps_per_block, agents), np.int32)
        warp = np.arange(blocks * warps_per_block)
        self.own = warp % warps_per_block
        self.seen[warp, self.own] = 1
        self.fenced = np.zeros_like(self.seen)
        self.engine_clock = np.zeros(blocks, np.int32)
        self.write_clock = np.zeros(granules, np.int32)
        self.write_agent = np.zeros(granules, np.int16)
        self.write_thread = np.full(granules, -1, np.int32)
        self.write_atomic = np.zeros(granules, np.bool_)
        self.read_clock = np.zeros((granules, agents), np.int32)
        self.flights = 0

    def granules(self, flat: np.ndarray, total: int) -> np.ndarray:
        first = flat >> self.shift
        count = max(1, total >> self.shift)
        return first[:, None] + np.arange(count)

    def _race(self, kind, bad, granules, threads):
        at = np.argwhere(bad)[0]
        other = int(self.write_thread[granules[tuple(at)]])
        offset = int(granules[tuple(at)] << self.shift) % self.space.stride
        return Fault("race", f"{kind} at shared offset {offset:#x}; last writer: thread {other}", threads[bad.any(1)])

    def _check_write_seen(self, granules, threads, warps, atomic, what, exempt=None) -> None:
        clock, agent = self.write_clock[granules], self.write_agent[granules]
        seen = self.seen[warps[:, None], agent]
        own = self.own[warps][:, None]
        writer = self.write_thread[granules]
        unseen = clock > seen
        same_warp = (agent == own) & (clock == seen) & (writer != threads[:, None]) & (clock > 0)
        bad = unseen | same_warp
        if atomic:
            bad &= ~self.write_atomic[granules]
        if exempt is not None:
            bad &= ~exempt[:, None] | (clock >= IN_FLIGHT)
        if bad.any():
            in_flight = clock[bad].max() >= IN_FLIGHT
            raise self._race(
                f"{what} {'a copy in flight' if in_flight else 'an unsynchronised write'}", bad, granules, threads
            )

    def read(self, flat, total: int, threads, warps, atomic: bool = False) -> None:
        granules = self.granules(flat, total)
        self._check_write_seen(granules, threads, warps, atomic, "a read of")
        if not atomic:
            self._record_read(granules, warps)

    def _record_read(self, granules, warps) -> None:
        own = self.own[warps]
        clock = self.seen[warps, own][:, None]
        columns = np.broadcast_to(own[:, None], granules.shape)
        if self.flights:
            clock = np.maximum(clock, np.where(self.read_clock[granules, columns] >= IN_FLIGHT, IN_FLIGHT, 0))
        self.read_clock[granules, columns] = clock

    def _check_reads_seen(self, granules, threads, warps) -> None:
        unseen = (self.read_clock[granules] > self.seen[warps][:, None, :]).any(-1)
        if unseen.any():
            raise self._race("a write over an unsynchronised read", unseen, granules, threads)

    def write(
        self, flat, total: int, threads, warps, atomic: bool = False, repeated: np.ndarray | None = None,
        agrees: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        """``repeated``: the bits stood there before; ``agrees``: they stand there when all threads have written."""
        granules = self.granules(flat, total)
        self._check_write_seen(granules, threads, warps, atomic, "a write over", repeated)
        self._check_reads_seen(granules, threads, warps)
        self._record_write(granules, threads, warps, self.seen[warps, self.own[warps]][:, None], atomic, agrees)

    def _record_write(self, granules, threads, warps, clock, atomic=False, agrees=None) -> None:
        self.write_agent[granules] = self.own[warps][:, None]
        self.write_clock[granules] = clock
        self.write_thread[granules] = threads[:, None]
        self.write_atomic[granules] = atomic
        if not atomic:
            bad = self.write_thread[granules] >> 5 != threads[:, None] >> 5
            if agrees is not None:
                bad &= ~agrees[:, None]
            if bad.any():
                raise self._race("writes of two warps in one instruction", bad, granules, threads)

    # --- synchronisation --------------------------------------------------------------------------------------------
    def tick(self, warps: np.ndarray) -> None:
        """A warp barrier: what the warp did before is now behind all its lanes."""
        self.seen[warps, self.own[warps]] += 1

    def join(self, warps: np.ndarray, extra: np.ndarray | None = None, extra_fenced: np.ndarray | None = None) -> None:
        """A barrier: every warp sees what any of them had seen."""
        seen, fenced = self.seen[warps].max(0), self.fenced[warps].max(0)
        if extra is not None:
            seen, fenced = np.maximum(seen, extra), np.maximum(fenced, extra_fenced)
        self.seen[warps], self.fenced[warps] = seen, fenced
        self.tick(warps)

    def join_blocks(self, blocks: np.ndarray) -> None:
        """:meth:`join` of all warps of each block."""
        for clocks in (self.seen, self.fenced):
            by_block = clocks.reshape(-1, self.warps, self.warps + 1)
            by_block[blocks] = by_block[blocks].max(1, keepdims=True)
        self.tick((blocks[:, None] * self.warps + np.arange(self.warps)).ravel())

    def fence_proxy(self, warps: np.ndarray) -> None:
        self.fenced[warps] = np.maximum(self.fenced[warps], self.seen[warps])
        self.tick(warps)

    # --- asynchronous accesses ----------------------------------------------------------------------------------------
    def start_copy(self, flat_bytes, thread: np.ndarray, warps: np.ndarray, total: int, by_engine: bool = False):
        """A copy to shared memory begins; the bytes belong to nobody until :meth:`finish_copy`."""
        granules = self.granules(flat_bytes, total)
        self._check_write_seen(granules, thread, warps, False, "a copy over")
        self._check_reads_seen(granules, thread, warps)
        if by_engine:
            self.check_proxy(granules, thread, warps)
        self._record_write(granules, thread, warps, np.int32(IN_FLIGHT))
        if by_engine:
            self.write_agent[granules] = self.copy_engine
        return granules

    def finish_copy(self, granules, warps: np.ndarray) -> None:
        self.write_clock[granules] = self.seen[warps, self.own[warps]][:, None]

    def finish_engine_copy(self, granules, block: int) -> int:
        self.engine_clock[block] += 1
        self.write_clock[granules] = self.engine_clock[block]
        return int(self.engine_clock[block])

    def check_proxy(self, granules, threads, warps) -> None:
        """What the async proxy touches must have been fenced, unless the copy engine wrote it."""
        agent, clock = self.write_agent[granules], self.write_clock[granules]
        bad = (clock > self.fenced[warps[:, None], agent]) & (agent != self.copy_engine)
        if bad.any():
            raise self._race("an async-proxy access without fence.proxy.async to", bad, granules, threads)

    def start_async_read(self, granules, threads, warps) -> None:
        """wgmma or a copy out of shared memory begins to read."""
        clock, agent = self.write_clock[granules], self.write_agent[granules]
        unseen = clock > self.seen[warps[:, None], agent]
        if unseen.any():
            raise self._race("an async read of an unsynchronised write", unseen, granules, threads)
        self.check_proxy(granules, threads, warps)
        self.read_clock[granules, self.own[warps][:, None]] = IN_FLIGHT
        self.flights += 1

    def finish_async_read(self, granules, warps, still_in_flight) -> None:
        own = self.own[warps][:, None]
        self.read_clock[granules, own] = self.seen[warps, own[:, 0]][:, None]
        self.flights -= 1
        for other_granules, other_warps in still_in_flight:
            self.read_clock[other_granules, self.own[other_warps][:, None]] = IN_FLIGHT
