"""The threads of several blocks, and the scheduler.

Threads that stand at the same instruction run it together as one numpy operation. Within a warp the lowest program
counter runs first, which is where compilers put the code that divergent paths share; between warps, a seed turns that
order into a random one.
"""

from __future__ import annotations

import numpy as np

from . import bulk
from .compiler import Fault
from .memory import Space
from .races import RaceShadow

RUNNABLE, AT_BARRIER, EXITED, STALLED = 0, 1, 2, 3
_FAR = 1 << 30


class Machine:
    """One chunk of blocks of a launch. ``program`` is the compiled kernel, see :mod:`launch`."""

    def __init__(self, program, launch, blocks: list[tuple[int, int, int]], generator):
        self.program, self.launch, self.blocks = program, launch, blocks
        self.counters = launch.counters
        self.generator = generator
        x, y, z = launch.block
        live = x * y * z
        self.threads_per_block = (live + 31) // 32 * 32
        self.warps_per_block = self.threads_per_block // 32
        self.n = len(blocks) * self.threads_per_block
        self.ids = np.arange(self.n)
        self.block_of = self.ids // self.threads_per_block
        self.warp_of = self.ids >> 5
        in_block = self.ids % self.threads_per_block
        self.pc = np.zeros(self.n, np.int32)
        self.status = np.where(in_block < live, RUNNABLE, EXITED).astype(np.int8)
        self.carry = np.zeros(self.n, np.bool_)
        self.yielded = np.zeros(self.n >> 5, np.bool_)
        self.barrier_of = np.full(self.n, -1, np.int16)
        self.barrier_value = np.zeros(self.n, np.bool_)
        self.arrived_only: dict[tuple[int, int], list] = {}
        self.expected_counts: dict[tuple[int, int], int] = {}
        self.turn = 0
        self.progress = 0  # phases and copies that came to an end
        self._idle_rounds, self._progress_before = 0, 0
        self.registers = [_register(type_, self.n) for type_ in program.types]
        self.global_memory = launch.global_space
        self.parameters = launch.parameter_space
        # of a thread in each warp; at launch at most what the file of 65536 holds for all, in eights
        self.pool = min(65536 // self.threads_per_block // 8 * 8, 255) * self.warps_per_block
        self.warp_registers = np.full(self.n >> 5, self.pool // self.warps_per_block)
        self.shared = Space("shared", program.shared_size(launch.shared_bytes), len(blocks))
        for start, size in program.shared_ranges(launch.shared_bytes):
            self.shared.allow(start, size)
        self.local = Space("local", max(program.local_size, 16), self.n)
        self.local.allow(0, program.local_size)
        self.shadow = RaceShadow(self.shared, self.warps_per_block, program.granule)
        self.copies: list = []  # cp.async that were issued and not waited for
        self.copy_group = np.zeros(self.n, np.int32)  # how many groups each thread has committed
        self.mbarriers: dict = {}  # (block, offset) to its state
        self.bulk_copies: list = []  # copies out of shared memory
        self.bulk_group = np.zeros(self.n, np.int32)
        self.wgmma_queue: list = []
        self.wgmma_group = np.zeros(self.n >> 5, np.int32)
        self.wgmma_fenced = np.zeros(self.n >> 5, np.bool_)
        self.accumulators: dict = {}
        self._specials = self._special_values(in_block, (x, y, z))

    def _special_values(self, in_block, block) -> dict[str, np.ndarray]:
        x, y, _ = block
        index = np.array(self.blocks, np.int64)[self.block_of]
        lane = self.ids & 31
        one = np.uint64(1)
        below = (one << lane.astype(np.uint64)) - one
        bit = one << lane.astype(np.uint64)
        full = np.uint64(0xFFFFFFFF)
        values = {
            "tid.x": in_block % x, "tid.y": in_block // x % y, "tid.z": in_block // (x * y), "laneid": lane,
            "warpid": in_block >> 5, "lanemask_lt": below, "lanemask_le": below | bit, "lanemask_eq": bit,
            "lanemask_gt": full & ~(below | bit), "lanemask_ge": full & ~below,
        }  # fmt: skip
        constants = {"nwarpid": self.warps_per_block, "smid": 0, "nsmid": 1, "gridid": 0, "cluster_ctarank": 0,
                     "cluster_nctarank": 1, "is_explicit_cluster": 0, "dynamic_smem_size": self.launch.shared_bytes,
                     "total_smem_size": self.shared.size}  # fmt: skip
        for axis, name in enumerate("xyz"):
            values[f"ctaid.{name}"] = index[:, axis]
            values[f"clusterid.{name}"] = index[:, axis]
            constants |= {f"ntid.{name}": block[axis], f"nctaid.{name}": self.launch.grid[axis]}
            constants |= {f"nclusterid.{name}": self.launch.grid[axis], f"cluster_ctaid.{name}": 0}
            constants[f"cluster_nctaid.{name}"] = 1
        values |= {name: np.full(self.n, value) for name, value in constants.items()}
        return values

    # --- what closures ask for ----------------------------------------------------------------------------------
    def count(self, i) -> int:
        return i.stop - i.start if isinstance(i, slice) else len(i)

    def special(self, name: str, i) -> np.ndarray:
        if name in ("clock", "clock64", "globaltimer", "clock_hi", "globaltimer_lo", "globaltimer_hi"):
            return np.full(self.count(i), self.launch.steps)
        if name not in self._specials:
            raise Fault("unsupported", f"special register %{name} is not known to this bench")
        return self._specials[name][i]

    def offset_of(self, variable) -> int:
        """Within its state space."""
        return self.program.offsets[variable]

    address_of = offset_of

    @property
    def line(self) -> int:
        return self.program.kernel.instructions[self.at].line

    def flat_shared(self, offsets: np.ndarray, i) -> np.ndarray:
        return offsets + self.block_of[i] * self.shared.stride

    # --- scheduling ---------------------------------------------------------------------------------------------
    def run(self) -> None:
        while True:
            picked = self._pick()
            if picked is None:
                bulk.finish_kernel(self)
                self._check_registers()
                return
            self._straight(*picked)

    def _check_registers(self) -> None:
        """setmaxnreg takes only what a block's other warps gave up: a GPU waits for the rest for ever."""
        wanted = self.warp_registers.reshape(-1, self.warps_per_block).sum(1).max()
        if wanted > self.pool:
            raise Fault(
                "registers",
                f"setmaxnreg asks for {wanted * 32} in a block that is launched with at most {self.pool * 32}",
            )

    def _pick(self):
        runnable = self.status == RUNNABLE
        if not runnable.any():
            if (self.status == EXITED).all():
                return None
            self._deadlock()
        rested = runnable & ~np.repeat(self.yielded, 32) if self.yielded.any() else runnable
        if not rested.any():
            self.yielded[:] = False
            rested = runnable
            self._check_progress(runnable)
        pcs = np.where(rested, self.pc, _FAR)
        if self.generator is None:
            self.turn += 1
            # a loop that waits for other warps must not keep them from running
            target = pcs[rested].max() if self.turn % 1024 == 0 else pcs.min()
            chosen = rested & (pcs == target)
            if self.turn % 1024 == 0:  # within its warp the lowest counter still goes first
                lowest = pcs.reshape(-1, 32).min(1)
                chosen &= np.repeat(lowest == target, 32)
                if not chosen.any():
                    chosen = pcs == pcs.min()
                    target = pcs.min()
        else:
            lowest = pcs.reshape(-1, 32).min(1)
            target = lowest[self.generator.choice(np.flatnonzero(lowest < _FAR))]
            warps = (lowest == target) & (self.generator.random(len(lowest)) < 0.5)
            if not warps.any():
                warps[self.generator.choice(np.flatnonzero(lowest == target))] = True
            chosen = np.repeat(warps, 32) & (pcs == target)
        stalled = (self.status == STALLED) & (self.pc == target)
        if stalled.any():
            warps = np.zeros(self.n >> 5, np.bool_)
            warps[self.warp_of[chosen]] = True
            stalled &= np.repeat(warps, 32)
            chosen = chosen | stalled
            self.status[stalled] = RUNNABLE
        index = np.flatnonzero(chosen)
        alone = len(index) == np.count_nonzero(self.status == RUNNABLE)
        return int(target), index, alone

    def _check_progress(self, polling: np.ndarray) -> None:
        """Every thread that can run waits for an mbarrier: once is normal, on and on is not."""
        self._idle_rounds = self._idle_rounds + 1 if self.progress == self._progress_before else 0
        self._progress_before = self.progress
        if self._idle_rounds > 50:
            threads = np.flatnonzero(polling)
            lines = sorted({self.program.kernel.instructions[pc].line for pc in np.unique(self.pc[threads])})
            fault = Fault(
                "livelock", f"all threads poll mbarriers whose phase does not end, near lines {lines}", threads
            )
            self._fault(fault, int(self.pc[threads[0]]), slice(0, 0))

    def _straight(self, pc: int, index: np.ndarray, alone: bool) -> None:
        """Runs ``index`` from ``pc`` until it branches, waits, or comes to where others may join."""
        code, joins, issues = self.program.code, self.program.joins, self.launch.issues
        threads = _compact(index)
        warps = len(np.unique(index >> 5))
        launch = self.launch
        while True:
            run, guard, negated, control = code[pc]
            issues[pc] += warps
            launch.steps += 1
            self.at = pc
            if launch.steps > launch.max_steps:
                self._fault(Fault("livelock", f"no end after {launch.max_steps} steps"), pc, threads)
            active, active_index = threads, index
            if guard is not None:
                truth = self.registers[guard][threads]
                truth = ~truth if negated else truth
                if not truth.all():
                    active_index = index[truth]
                    active = _compact(active_index) if len(active_index) else None
            try:
                if control is not None:
                    next_pc = control(self, pc, index, active_index)
                    waits = alone and next_pc is not None and next_pc <= pc and self.yielded.any()
                    if next_pc is None or not alone or waits:
                        if next_pc is not None:
                            self.pc[index] = next_pc
                        return
                    pc = next_pc
                    continue
                if active is not None:
                    run(self, active)
            except Fault as fault:
                self._fault(fault, pc, active)
            pc += 1
            if not alone and pc in joins:
                self.pc[index] = pc
                return

    def _fault(self, fault: Fault, pc: int, threads) -> None:
        """Adds the PTX line and the threads to a fault, and raises it."""
        if not fault.located:
            ids = self.ids[threads] if threads is not None else self.ids[:0]
            if fault.threads is not None:
                chosen = np.asarray(fault.threads)
                ids = ids[chosen] if chosen.dtype == np.bool_ else chosen
            instruction = self.program.kernel.instructions[pc]
            fault.line, fault.located = instruction.line, True
            where = f"line {instruction.line}: {instruction.text}\n  by {self.describe(ids)}"
            fault.args = (f"{fault.kind}: {fault.message}\n  {where}",)
        raise fault

    def describe(self, ids: np.ndarray) -> str:
        """``block (1, 0, 0), threads 32-63``"""
        parts = []
        for block in np.unique(self.block_of[ids])[:3]:
            inside = ids[self.block_of[ids] == block] % self.threads_per_block
            breaks = np.flatnonzero(np.diff(inside) != 1)
            firsts, lasts = inside[np.r_[0, breaks + 1]], inside[np.r_[breaks, len(inside) - 1]]
            runs = [f"{a}-{b}" if a != b else f"{a}" for a, b in zip(firsts, lasts, strict=True)]
            more = ", …" if len(runs) > 6 else ""
            parts.append(f"block {self.blocks[block]}, threads {', '.join(runs[:6])}{more}")
        return "; ".join(parts) or "no thread"

    def _deadlock(self) -> None:
        stalled = np.flatnonzero(self.status == STALLED)
        waiting = stalled if len(stalled) else np.flatnonzero(self.status == AT_BARRIER)
        pc = int(self.pc[waiting].min())
        lines = sorted({self.program.kernel.instructions[p].line for p in np.unique(self.pc[waiting])})
        if len(stalled):
            fault = Fault("divergence", f"threads wait for others of their warp that do not come, at lines {lines}")
        else:
            fault = Fault("deadlock", f"every thread waits or has left; threads wait at lines {lines}")
        fault.threads = waiting[self.pc[waiting] == pc]
        self._fault(fault, pc, slice(0, 0))

    # --- leaving, collectives, barriers -------------------------------------------------------------------------
    def leave(self, index: np.ndarray) -> None:
        self.status[index] = EXITED
        warps = np.zeros(self.n >> 5, np.bool_)
        warps[self.warp_of[index]] = True
        again = (self.status == STALLED) & np.repeat(warps, 32)
        self.status[again] = RUNNABLE
        for block in np.unique(self.block_of[index]):
            for barrier in np.unique(self.barrier_of[self._of_block(block)]):
                if barrier >= 0:
                    self.try_release(int(block), int(barrier))

    def _of_block(self, block: int) -> slice:
        return slice(block * self.threads_per_block, (block + 1) * self.threads_per_block)

    def split_complete(self, index: np.ndarray, needed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of threads at a collective: those whose warp has all ``needed`` lanes (bits) here, and the rest."""
        present = np.zeros(self.n, np.uint64)
        present[index] = np.uint64(1) << (index & 31).astype(np.uint64)
        bits = present.reshape(-1, 32).sum(1, dtype=np.uint64)[index >> 5]
        ready = (bits & needed) == needed
        return index[ready], index[~ready]

    def living_lanes(self, index: np.ndarray) -> np.ndarray:
        alive = (self.status != EXITED).reshape(-1, 32)
        bits = (alive.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(1, dtype=np.uint64)
        return bits[index >> 5]

    def stall(self, index: np.ndarray, pc: int) -> None:
        """Threads wait at ``pc`` for others of their warp."""
        self.pc[index] = pc
        self.launch.issues[pc] -= len(np.unique(index >> 5))  # it will be issued again
        waiting = (self.status == STALLED) & (self.pc == pc)
        warps = np.zeros(self.n >> 5, np.bool_)
        warps[self.warp_of[index]] = True
        waiting &= np.repeat(warps, 32)
        # others of the warp already wait here: all of them try again together
        self.status[index] = RUNNABLE if waiting.any() else STALLED
        self.status[waiting] = RUNNABLE

    def stall_group(self, index: np.ndarray, pc: int) -> None:
        """As :meth:`stall`, where the warps of a warpgroup wait for each other."""
        self.pc[index] = pc
        self.launch.issues[pc] -= len(np.unique(index >> 5))
        waiting = (self.status == STALLED) & (self.pc == pc)
        waiting[index] = False
        groups = self.block_of * 32 + self.ids % self.threads_per_block // 128
        waiting &= np.isin(groups, groups[index])
        self.status[index] = RUNNABLE if waiting.any() else STALLED
        self.status[waiting] = RUNNABLE

    def arrive(self, index: np.ndarray, barrier: np.ndarray, expected: np.ndarray | None, waits: bool, on_release=None):
        """Threads of whole warps come to a barrier; ``expected`` counts threads, None means all living ones."""
        if waits and expected is None and (barrier == barrier[0]).all() and self._release_whole_blocks(index):
            return
        for block in np.unique(self.block_of[index]):
            here = index[self.block_of[index] == block]
            names = barrier[self.block_of[index] == block]
            for name in np.unique(names):
                members = here[names == name]
                key = (int(block), int(name))
                if waits:
                    self.status[members] = AT_BARRIER
                    self.barrier_of[members] = name
                else:
                    warps = np.unique(members >> 5)
                    entry = self.arrived_only.setdefault(key, [0, [], []])
                    entry[0] += len(warps) * 32
                    entry[1].append(self.shadow.seen[warps].max(0))
                    entry[2].append(self.shadow.fenced[warps].max(0))
                    self.shadow.tick(warps)
                if expected is not None:
                    count = int(expected[self.block_of[index] == block][names == name][0])
                    self.expected_counts[key] = count
                self.try_release(*key)

    def _release_whole_blocks(self, index: np.ndarray) -> bool:
        """The usual case, for all blocks at once: every thread of every warp of the blocks has come together."""
        counts = np.bincount(self.block_of[index], minlength=len(self.blocks))
        blocks = np.flatnonzero(counts)
        finish = self.program.on_release.get(int(self.pc[index[0]]))
        if finish is not None or (counts[blocks] != self.threads_per_block).any():
            return False
        warps = (blocks[:, None] * self.warps_per_block + np.arange(self.warps_per_block)).ravel()
        self.shadow.join_blocks(blocks)
        self.counters.barriers += len(warps)
        self.pc[index] += 1
        self.yielded[warps] = False
        return True

    def try_release(self, block: int, barrier: int) -> None:
        window = self._of_block(block)
        waiting = (
            np.flatnonzero((self.barrier_of[window] == barrier) & (self.status[window] == AT_BARRIER)) + window.start
        )
        key = (block, barrier)
        arrived = self.arrived_only.get(key)
        expected = self.expected_counts.get(key)
        if expected is None:
            count, goal = len(waiting), int((self.status[window] != EXITED).sum())
        else:  # an explicit count is in whole warps, living lanes or not
            count, goal = 32 * len(np.unique(waiting >> 5)) + (arrived[0] if arrived else 0), expected
        if count > goal:
            raise Fault("barrier", f"barrier {barrier} expects {goal} threads, {count} came", waiting)
        if count < goal or not len(waiting):
            return
        warps = np.unique(waiting >> 5)
        if arrived:
            self.shadow.join(warps, np.max(arrived[1], 0), np.max(arrived[2], 0))
            del self.arrived_only[key]
        else:
            self.shadow.join(warps)
        if expected is not None:
            del self.expected_counts[key]
        self.counters.barriers += len(warps)
        for pc in np.unique(self.pc[waiting]):
            finish = self.program.on_release.get(int(pc))
            if finish is not None:
                finish(self, waiting[self.pc[waiting] == pc], waiting)
        self.barrier_of[waiting] = -1
        self.status[waiting] = RUNNABLE
        self.pc[waiting] += 1
        # a barrier that came before is what somebody spins on
        self.yielded[warps] = False


def _register(type_: str, n: int) -> np.ndarray:
    from .formats import STORAGE
    from .parser import TYPE_SIZE

    if type_ == "pred":
        return np.zeros(n, np.bool_)
    if type_ == "b128":
        return np.full((n, 2), 0xFFFFFFFFFFFFFFFF, np.uint64)
    # NaN as a float, far out of range as an address or an index
    return np.full(n, np.iinfo(STORAGE[TYPE_SIZE[type_]]).max, STORAGE[TYPE_SIZE[type_]])


def _compact(index: np.ndarray):
    """A slice where the threads are neighbours: numpy then makes views instead of copies."""
    first, last = int(index[0]), int(index[-1])
    return slice(first, last + 1) if last - first + 1 == len(index) else index
