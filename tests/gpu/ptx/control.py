"""Branches, exits, barriers, and what all lanes of a warp do together.

A control operation is ``control(machine, pc, index, active)``: ``index`` are the threads that came, ``active`` those
whose guard holds. It returns the next program counter when all of them go there, or None after having set theirs.

Source: PTX ISA 9.0, chapters 9.7.12 (control flow), 9.7.13 (barriers) and 9.7.9.x (shfl, vote, match, redux, elect).
"""

from __future__ import annotations

import numpy as np

from .compiler import Fault, operation
from .formats import DTYPE, U32, U64
from .parser import Imm, Pair, PtxError

#: builders of control operations: ``CONTROL[name](instruction, compiler)``
CONTROL = {}
FULL = np.uint64(0xFFFFFFFF)


def control(*names):
    def register(builder):
        for name in names:
            CONTROL[name] = builder
        return builder

    return register


@control("bra")
def build_branch(ins, c):
    target = c.kernel.labels[ins.operands[0].name]

    def run(m, pc, index, active):
        if len(active) == len(index):
            return target
        if len(active) == 0:
            return pc + 1
        m.pc[index] = pc + 1
        m.pc[active] = target
        return None

    return run


@control("brx")
def build_branch_table(ins, c):
    selector = c.read(ins.operands[0], "u32")
    table = np.array([c.kernel.labels[label] for label in c.kernel.branch_tables[ins.operands[1].name]], np.int32)

    def run(m, pc, index, active):
        m.pc[index] = pc + 1
        choice = selector(m, active)
        if (choice >= len(table)).any():
            raise Fault("branch", f"a table of {len(table)} has no such entry", choice >= len(table))
        m.pc[active] = table[choice]
        return None

    return run


@control("exit")
def build_exit(ins, c):
    def run(m, pc, index, active):
        m.pc[index] = pc + 1
        m.leave(active)
        return None

    return run


@operation("trap")
def build_trap(ins, c):
    def run(m, i):
        raise Fault("trap", "the kernel stopped itself")

    return run


@operation("brkpt", "pmevent", "nanosleep", "griddepcontrol")
def build_nothing(ins, c):
    return lambda m, i: None


@operation("setmaxnreg")
def build_setmaxnreg(ins, c):
    count = ins.operands[0].value

    def run(m, i):
        m.warp_registers[np.unique(m.warp_of[i])] = count

    return run


@operation("extern")
def build_extern(ins, c):
    """Device run-time functions: a failed assert is a fault, printing is not done."""
    name = ins.parts[1]
    if name == "__assertfail":

        def run(m, i):
            raise Fault("assert", "a device assert failed")

        return run
    if name == "vprintf":
        return lambda m, i: None
    raise PtxError(f"line {ins.line}: the external function {name} is not known to this bench")


# --- barriers ---------------------------------------------------------------------------------------------------
@control("bar", "barrier")
def build_barrier(ins, c):
    if ins.has("warp"):
        return collective(ins, c, ins.operands[0], lambda m, i: m.shadow.tick(np.unique(m.warp_of[i])))
    if ins.has("cluster"):
        raise PtxError(f"line {ins.line}: clusters are not read by this bench")
    kind = next(flag for flag in ("sync", "red", "arrive") if flag in ins.flags)
    operands = list(ins.operands)
    if kind == "red":
        result, *operands, truth = operands
        value = c.read(truth, "pred")
        _red_release(ins, c, result)
    barrier = c.read(operands[0], "u32")
    expected = c.read(operands[1], "u32") if len(operands) > 1 else None
    aligned = ins.name == "bar" or ins.has("aligned")

    def run(m, pc, index, active):
        passing = index[~np.isin(index, active)]
        m.pc[passing] = pc + 1
        if aligned and len(active):
            active, early = m.split_complete(active, m.living_lanes(active))
            m.stall(early, pc)
        if len(active) == 0:
            return None
        names = np.broadcast_to(barrier(m, active), len(active))
        counts = np.broadcast_to(expected(m, active), len(active)) if expected else None
        if counts is not None and (counts % 32 != 0).any():
            raise Fault("barrier", "the number of threads must be a multiple of 32", counts % 32 != 0)
        if kind == "red":
            m.barrier_value[active] = value(m, active)
        m.pc[active] = pc if kind != "arrive" else pc + 1
        m.arrive(active, names, counts, kind != "arrive")
        return None

    return run


def _red_release(ins, c, result):
    is_count = ins.has("popc")
    target = c.write(result, "u32" if is_count else "pred")

    def finish(m, here, everyone):
        values = m.barrier_value[everyone]
        total = U32(values.sum()) if is_count else (values.all() if ins.has("and") else values.any())
        target(m, here, np.full(len(here), total))

    c.on_release[ins.index] = finish


def collective(ins, c, mask, action, whole_warp: bool = False):
    """A control operation that runs ``action(machine, threads)`` once every lane of its member mask has come."""
    members = c.read(mask, "b32") if mask is not None else None
    if isinstance(mask, Imm) and mask.value in (-1, 0xFFFFFFFF):
        whole_warp = True

    def run(m, pc, index, active):
        if len(active) == 0:
            return pc + 1
        if whole_warp:
            needed = np.broadcast_to(FULL, len(active))
            complete = len(active) % 32 == 0 and not (np.diff(active[::32] >> 5) != 1).any() and (
                active[-1] - active[0] + 1 == len(active)
            )  # fmt: skip
        else:
            needed, complete = np.broadcast_to(members(m, active).astype(U64), len(active)), False
            outside = (needed >> (active & 31).astype(U64)) & U64(1) == 0
            if outside.any():
                raise Fault("collective", "a thread calls with a member mask that leaves it out", active[outside])
        if complete and active[0] & 31 == 0:
            ready, early = active, active[:0]
        else:
            ready, early = m.split_complete(active, needed)
        if len(ready):
            masks = needed[:1] if whole_warp else np.unique(needed[np.isin(active, ready)])
            for mask_value in masks:  # lanes that name each other are one call
                part = ready if len(masks) == 1 else ready[needed[np.isin(active, ready)] == mask_value]
                first, last = int(part[0]), int(part[-1])
                action(m, slice(first, last + 1) if last - first + 1 == len(part) else part)
        if len(early) == 0:
            return pc + 1
        m.pc[index] = pc + 1
        m.stall(early, pc)
        return None

    return run


@control("shfl")
def build_shuffle(ins, c):
    mode = next(flag for flag in ("up", "down", "bfly", "idx") if flag in ins.flags)
    source, by, clamp = (c.read(operand, "b32") for operand in ins.operands[1:4])
    write, write_predicate = c.pair(ins.operands[0], "b32")

    def action(m, i):
        ids = m.ids[i]
        lane = (ids & 31).astype(np.int64)
        value, amount, control_ = source(m, i), by(m, i).astype(np.int64), clamp(m, i).astype(np.int64)
        amount, bound, segment = amount & 31, control_ & 31, (control_ >> 8) & 31
        highest = (lane & segment) | (bound & ~segment)
        lowest = lane & segment
        other = {
            "up": lambda: lane - amount, "down": lambda: lane + amount, "bfly": lambda: lane ^ amount,
            "idx": lambda: lowest | (amount & ~segment),
        }[mode]()  # fmt: skip
        inside = other >= highest if mode == "up" else other <= highest
        other = np.where(inside, other, lane)
        table = np.full(m.n, 0xFFFFFFFF, np.uint32)
        table[i] = value
        here = np.zeros(m.n, np.bool_)
        here[i] = True
        chosen = (ids - lane) + other
        if not here[chosen].all():
            raise Fault("collective", "a shuffle reads a lane that takes no part", ~here[chosen])
        write(m, i, table[chosen])
        write_predicate(m, i, inside)

    return collective(ins, c, ins.operands[4], action)


def _by_warp(m, i, values):
    """Values of the active lanes as [warps, 32], which lanes are there, and each thread's row."""
    ids = m.ids[i]
    warps, row = np.unique(ids >> 5, return_inverse=True)
    table = np.zeros((len(warps), 32), values.dtype)
    present = np.zeros((len(warps), 32), np.bool_)
    table[row, ids & 31], present[row, ids & 31] = values, True
    return table, present, row


def _bits(truth: np.ndarray) -> np.ndarray:
    return (truth.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(-1).astype(np.uint32)


@control("vote")
def build_vote(ins, c):
    mode = next(flag for flag in ("all", "any", "uni", "ballot") if flag in ins.flags)
    source = c.read(ins.operands[1], "pred")
    target = c.write(ins.operands[0], "b32" if mode == "ballot" else "pred")

    def action(m, i):
        table, present, row = _by_warp(m, i, np.broadcast_to(source(m, i), m.count(i)))
        if mode == "ballot":
            result = _bits(table & present)
        else:
            every, some = (table | ~present).all(1), (table & present).any(1)
            result = {"all": every, "any": some, "uni": every | ~some}[mode]
        target(m, i, result[row])

    return collective(ins, c, ins.operands[2], action)


@control("activemask")
def build_active(ins, c):
    target = c.write(ins.operands[0], "b32")

    def run(m, pc, index, active):
        if len(active):
            _, present, row = _by_warp(m, active, np.ones(len(active), np.bool_))
            target(m, active, _bits(present)[row])
        return pc + 1

    return run


@control("match")
def build_match(ins, c):
    type_ = ins.types[-1]
    source = c.read(ins.operands[1], type_)
    write, write_predicate = c.pair(ins.operands[0], "b32")

    def action(m, i):
        table, present, row = _by_warp(m, i, np.broadcast_to(source(m, i), m.count(i)))
        lane = m.ids[i] & 31
        same = (table[row] == table[row, lane][:, None]) & present[row]
        if ins.has("any"):
            write(m, i, _bits(same))
        else:
            agree = (same | ~present[row]).all(1)
            write(m, i, np.where(agree, _bits(present[row]), np.uint32(0)))
            write_predicate(m, i, agree)

    return collective(ins, c, ins.operands[2], action)


@control("redux")
def build_redux(ins, c):
    type_ = ins.types[-1]
    source, target = c.read(ins.operands[1], type_), c.write(ins.operands[0], type_)
    mode = next(flag for flag in ("add", "min", "max", "and", "or", "xor") if flag in ins.flags)
    function = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
                "xor": np.bitwise_xor}[mode]  # fmt: skip
    if type_ == "f32":
        function = (
            (np.minimum if mode == "min" else np.maximum) if ins.has("NaN") else {"min": np.fmin, "max": np.fmax}[mode]
        )
        absolute = ins.has("abs")

    def action(m, i):
        values = np.broadcast_to(source(m, i), m.count(i))
        if type_ == "f32" and absolute:
            values = np.abs(values)
        table, present, row = _by_warp(m, i, values)
        # lanes that take no part repeat one that does, or are nothing to a sum
        filler = table[np.arange(len(table)), present.argmax(1)][:, None]
        if mode in ("add", "xor"):
            filler = DTYPE[type_](0)
        with np.errstate(over="ignore"):
            result = function.reduce(np.where(present, table, filler), axis=1).astype(DTYPE[type_])
        target(m, i, result[row])

    return collective(ins, c, ins.operands[2], action)


@control("elect")
def build_elect(ins, c):
    if isinstance(ins.operands[0], Pair):
        write, predicate = c.pair(ins.operands[0], "b32")
    else:
        write, predicate = c.write(ins.operands[0], "b32"), lambda m, i, value: None

    def action(m, i):
        _, present, row = _by_warp(m, i, np.ones(m.count(i), np.bool_))
        leader = present.argmax(1)[row]
        write(m, i, leader.astype(np.uint32))
        predicate(m, i, (m.ids[i] & 31) == leader)

    return collective(ins, c, ins.operands[1], action)
