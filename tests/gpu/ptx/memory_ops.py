"""Loads, stores, atomics, address conversion, and cp.async.

Source: PTX ISA 9.0, chapters 9.7.9 (data movement) and 9.7.13 (atomics, fences).
"""

from __future__ import annotations

import numpy as np

from .compiler import GLOBAL_BASE, LOCAL_BASE, PARAM_BASE, SHARED_BASE, WINDOW, Fault, naming, operation
from .counters import count_sectors, wavefronts
from .formats import DTYPE, FLOATS, PACKED, STORAGE, U32, U64, narrow, widen
from .parser import TYPE_SIZE, Addr, Imm, Instruction, PtxError, Reg, Sym, Vec

_SPACES = {
    "global": "global", "shared": "shared", "shared::cta": "shared", "shared::cluster": "shared", "local": "local",
    "param": "param", "param::entry": "param", "param::func": "param", "const": "global",
}  # fmt: skip
_BASES = {"global": GLOBAL_BASE, "shared": SHARED_BASE, "local": LOCAL_BASE, "param": PARAM_BASE}


def space_of(ins: Instruction, address: Addr | None = None) -> str:
    found = next((_SPACES[flag] for flag in ins.parts[1:] if flag in _SPACES), "generic")
    if found == "param" and address is not None and isinstance(address.base, Sym):
        return address.base.variable.space  # a call's argument is local to its thread
    return found


def split_generic(addresses: np.ndarray):
    """Yields (space, offsets, which): the generic addresses of each space that occurs."""
    left = np.ones(len(addresses), np.bool_)
    for space, base in _BASES.items():
        inside = (addresses >= base) & (addresses < base + WINDOW)
        if inside.any():
            yield space, addresses[inside] - base, inside
            left &= ~inside
    if left.any():
        raise Fault("out of bounds", f"address {int(addresses[left][0]):#x} is in no state space", left)


def _window(m, space: str, ids: np.ndarray):
    """The state space, and which of its windows each thread sees."""
    if space == "shared":
        return m.shared, m.block_of[ids]
    if space == "local":
        return m.local, ids
    return (m.global_memory if space == "global" else m.parameters), None


def count_global(m, offsets, ids, total: int, write: bool) -> None:
    keys = count_sectors(offsets, m.warp_of[ids], total)
    counters, sectors = m.counters, keys & ((1 << 40) - 1)
    if write:
        counters.write_bytes += len(offsets) * total
        counters.write_sectors += len(keys)
        m.launch.sectors_written[sectors] = True
    else:
        counters.read_bytes += len(offsets) * total
        counters.read_sectors += len(keys)
        m.launch.sectors_read[sectors] = True


def count_shared(m, offsets, ids, total: int, phase_lanes: int | None = None) -> None:
    lanes = phase_lanes or 32 // max(1, total // 4)
    passes, phases = wavefronts(offsets, ids // lanes, total)
    m.counters.shared_wavefronts += passes
    m.counters.shared_ideal_wavefronts += phases
    if passes > phases:
        m.launch.conflicts[m.launch.current_line()] += passes - phases


def load(m, space: str, offsets, ids, width: int, count: int, strong: bool = False) -> np.ndarray:
    """[threads, count] elements of ``width`` bytes, checked and counted."""
    memory, window = _window(m, space, ids)
    values = memory.load(offsets, window, width, count)
    if space == "global":
        count_global(m, offsets, ids, width * count, False)
    elif space == "shared":
        flat = offsets + window * memory.stride
        m.shadow.read(flat, width * count, ids, m.warp_of[ids], strong)
        count_shared(m, offsets, ids, width * count)
    return values


def store(m, space: str, offsets, ids, values, width: int, strong: bool = False) -> None:
    if space == "param":
        raise Fault("out of bounds", "a write to the kernel's parameters", np.ones(len(ids), np.bool_))
    memory, window = _window(m, space, ids)
    total = width * values.shape[1]
    if space == "shared":
        elements, data = memory.locate(offsets, window, width, values.shape[1]), memory._data[width]
        repeated = (data[elements] == values).all(1)
    memory.store(offsets, window, values, width)
    if space == "global":
        count_global(m, offsets, ids, total, True)
    elif space == "shared":
        agrees = (data[elements] == values).all(1)
        m.shadow.write(offsets + window * memory.stride, total, ids, m.warp_of[ids], strong, repeated, agrees)
        count_shared(m, offsets, ids, total)


def _access_shape(ins: Instruction) -> tuple[str, int, int]:
    type_ = ins.types[-1]
    count = next((int(flag[1:]) for flag in ins.flags if flag in ("v2", "v4", "v8")), 1)
    width = TYPE_SIZE[type_]
    return type_, (8 if width == 16 else width), count * (2 if width == 16 else 1)


def _is_strong(ins: Instruction) -> bool:
    return ins.has("volatile", "relaxed", "acquire", "release", "mmio")


def is_generic_or(ins: Instruction, space: str) -> bool:
    return space_of(ins) in (space, "generic")


@operation("ld", "ldu")
def build_load(ins, c):
    type_, width, count = _access_shape(ins)
    address, strong = c.address(ins.operands[1]), _is_strong(ins)
    space = space_of(ins, ins.operands[1])
    if type_ == "b128":
        slot = c.slots[ins.operands[0].name]

        def deliver(m, i, values):
            m.registers[slot][i] = values
    else:
        targets = ins.operands[0].items if isinstance(ins.operands[0], Vec) else (ins.operands[0],)
        writes = [c.write(target, type_) for target in targets]
        dtype = DTYPE[type_]

        def deliver(m, i, values):
            for at, write in enumerate(writes):
                write(m, i, values[:, at].view(dtype))

    def run(m, i):
        addresses, ids = address(m, i), m.ids[i]
        if space != "generic":
            base = GLOBAL_BASE if space == "global" else 0
            deliver(m, i, load(m, space, addresses - base, ids, width, count, strong))
            return
        out = np.empty((len(ids), count), STORAGE[width])
        for name, offsets, which in split_generic(addresses):
            with naming(ids[which]):
                out[which] = load(m, name, offsets, ids[which], width, count, strong)
        deliver(m, i, out)

    return run


@operation("st")
def build_store(ins, c):
    type_, width, count = _access_shape(ins)
    address, strong = c.address(ins.operands[0]), _is_strong(ins)
    space, source = space_of(ins, ins.operands[0]), ins.operands[1]
    if type_ == "b128":
        slot = c.slots[source.name]
        collect = lambda m, i: m.registers[slot][i]  # noqa: E731
    else:
        reads = [c.read(item, type_) for item in (source.items if isinstance(source, Vec) else (source,))]

        def collect(m, i):
            out = np.empty((m.count(i), count), STORAGE[width])
            for at, read in enumerate(reads):
                out[:, at] = np.asarray(read(m, i)).view(STORAGE[width])
            return out

    def run(m, i):
        addresses, ids, values = address(m, i), m.ids[i], collect(m, i)
        if space != "generic":
            store(m, space, addresses - (GLOBAL_BASE if space == "global" else 0), ids, values, width, strong)
            return
        for name, offsets, which in split_generic(addresses):
            with naming(ids[which]):
                store(m, name, offsets, ids[which], values[which], width, strong)

    return run


@operation("prefetch", "prefetchu", "discard", "applypriority", "fence", "membar")
def build_hint(ins, c):
    if ins.name == "fence" and ins.has("async", "async::generic") and ins.has("proxy"):
        return lambda m, i: m.shadow.fence_proxy(np.unique(m.warp_of[i]))
    return lambda m, i: None


@operation("createpolicy")
def build_policy(ins, c):
    target = c.write(ins.operands[0], "b64")
    return lambda m, i: target(m, i, U64(0))


@operation("cvta", "mapa")
def build_address(ins, c):
    if ins.name == "mapa":
        raise PtxError(f"line {ins.line}: clusters are not read by this bench")
    space = space_of(ins)
    base = 0 if space == "global" else _BASES[space]
    sign = -1 if "to" in ins.flags else 1
    type_ = ins.types[-1]
    source, target = c.read(ins.operands[1], type_), c.write(ins.operands[0], type_)
    shift = DTYPE[type_](base)
    if sign < 0:
        return lambda m, i: target(m, i, source(m, i) - shift)
    return lambda m, i: target(m, i, np.broadcast_to(source(m, i) + shift, m.count(i)))


@operation("isspacep")
def build_isspacep(ins, c):
    base = _BASES[space_of(ins)]
    source, target = c.read(ins.operands[1], "u64"), c.write(ins.operands[0], "pred")
    return lambda m, i: target(m, i, (source(m, i) >= U64(base)) & (source(m, i) < U64(base + WINDOW)))


# --- atomics ----------------------------------------------------------------------------------------------------
def _atomic_function(ins: Instruction, type_: str):
    mode = next(
        flag for flag in ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec") if flag in ins.flags
    )
    dtype = DTYPE[type_]
    if mode == "cas":
        return lambda old, compare, new: np.where(old == compare, new, old)
    if mode == "exch":
        return lambda old, new: new
    if mode == "inc":
        return lambda old, top: np.where(old >= top, dtype(0), old + dtype(1))
    if mode == "dec":
        return lambda old, top: np.where((old == 0) | (old > top), top, old - dtype(1))
    if mode == "add" and (type_ in PACKED or type_ in ("f16", "bf16")):
        lane = PACKED.get(type_, type_)
        size = TYPE_SIZE[lane]

        def add(old, value):
            a, b = (np.ascontiguousarray(x).view(DTYPE[lane]) for x in (old, value))
            return np.asarray(narrow(widen(a, lane) + widen(b, lane), lane)).view(STORAGE[TYPE_SIZE[type_]]).view(dtype)

        return add if size else None
    if type_ in FLOATS and mode in ("min", "max"):
        return {"min": np.fmin, "max": np.fmax}[mode]
    return {
        "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }[mode]  # fmt: skip


@operation("atom", "red")
def build_atomic(ins, c):
    type_ = ins.types[-1]
    width = TYPE_SIZE[type_]
    if type_ == "b128":
        raise PtxError(f"line {ins.line}: {ins.opcode} is not read by this bench")
    dtype, function = DTYPE[type_], _atomic_function(ins, type_)
    operands = list(ins.operands)
    count = next((int(flag[1:]) for flag in ins.flags if flag in ("v2", "v4", "v8")), 1)
    targets = []
    if ins.name == "atom":
        result = operands.pop(0)
        targets = [c.write(item, type_) for item in (result.items if isinstance(result, Vec) else (result,))]
    address, space = c.address(operands[0]), space_of(ins)
    values = operands[1 : 3 if ins.has("cas") else 2]
    columns = [value.items if isinstance(value, Vec) else (value,) for value in values]
    reads = [[c.read(item, type_) for item in column] for column in columns]

    def one(m, name, offsets, ids, arguments):
        """One element for each thread: lanes that meet at an address take turns."""
        memory, window = _window(m, name, ids)
        elements = memory.locate(offsets, window, width, 1)[:, 0]
        memory.load(offsets, window, width)  # bounds, and that it was written
        data = memory._data[width]
        if name == "shared":
            flat = offsets + window * memory.stride
            m.shadow.read(flat, width, ids, m.warp_of[ids], True)
            m.shadow.write(flat, width, ids, m.warp_of[ids], True)
        turn = m.generator.permutation(len(ids)) if m.generator is not None else np.arange(len(ids))
        order = turn[np.argsort(elements[turn], kind="stable")]
        place = elements[order]
        starts = np.r_[True, place[1:] != place[:-1]]
        rank = np.arange(len(order)) - np.maximum.accumulate(np.where(starts, np.arange(len(order)), 0))
        by_rank = np.argsort(rank, kind="stable")
        bounds = np.searchsorted(rank[by_rank], np.arange(rank.max() + 2))
        old = np.empty(len(ids), STORAGE[width])
        for first, last in zip(bounds[:-1], bounds[1:], strict=True):
            who = order[by_rank[first:last]]
            before = data[elements[who]]
            old[who] = before
            data[elements[who]] = function(before.view(dtype), *[argument[who] for argument in arguments]).view(
                STORAGE[width]
            )
        return old.view(dtype)

    def run(m, i):
        addresses, ids = address(m, i), m.ids[i]
        everywhere = np.ones(len(ids), np.bool_)
        if space == "generic":
            parts = list(split_generic(addresses))
        else:
            parts = [(space, addresses - (GLOBAL_BASE if space == "global" else 0), everywhere)]
        for element in range(count):
            arguments = [np.broadcast_to(column[element](m, i), len(ids)) for column in reads]
            out = np.empty(len(ids), dtype)
            for name, offsets, which in parts:
                with naming(ids[which]):
                    out[which] = one(m, name, offsets + element * width, ids[which], [a[which] for a in arguments])
            if targets:
                targets[element](m, i, out)
        for name, offsets, which in parts:
            if name == "global":
                count_global(m, offsets, ids[which], width * count, False)
                count_global(m, offsets, ids[which], width * count, True)

    return run


# --- cp.async -----------------------------------------------------------------------------------------------------
@operation("cp")
def build_copy(ins, c):
    if "bulk" in ins.flags:
        from .bulk import build_bulk

        return build_bulk(ins, c)
    if ins.has("commit_group"):

        def commit(m, i):
            m.copy_group[i] += 1

        return commit
    if ins.has("wait_group", "wait_all"):
        keep = ins.operands[0].value if ins.has("wait_group") else 0
        return lambda m, i: finish_copies(m, m.ids[i], keep, include_open=ins.has("wait_all"))
    if ins.has("mbarrier"):
        from .mbarriers import copy_arrive

        return copy_arrive(ins, c)
    return _build_async_copy(ins, c)


def _build_async_copy(ins, c):
    to, source = c.address(ins.operands[0]), c.address(ins.operands[1])
    size = ins.operands[2].value
    rest = ins.operands[3:]
    ignore = None
    given = None
    if rest and isinstance(rest[0], (Imm, Reg)):
        if isinstance(rest[0], Reg) and rest[0].type == "pred":
            ignore = c.read(rest[0], "pred")
        elif not (isinstance(rest[0], Reg) and rest[0].type.endswith("64")):  # 64 bits: a cache policy
            given = c.read(rest[0], "u32")

    def run(m, i):
        ids = m.ids[i]
        offsets, sources = to(m, i), source(m, i) - GLOBAL_BASE
        taken = np.full(len(ids), size) if given is None else np.broadcast_to(given(m, i), len(ids)).astype(np.int64)
        if ignore is not None:
            taken = np.where(ignore(m, i), 0, taken)
        if (taken > size).any():
            raise Fault("out of bounds", f"cp.async of {size} bytes is told to read more", taken > size)
        data = np.zeros((len(ids), size), np.uint8)
        whole = taken == size
        if whole.any():
            with naming(ids[whole]):
                data[whole] = m.global_memory.load(sources[whole], None, 4, size // 4).view(np.uint8)
            count_global(m, sources[whole], ids[whole], size, False)
        for at in np.flatnonzero((taken > 0) & ~whole):
            with naming(ids[at : at + 1]):
                part = m.global_memory.load(sources[at : at + 1] + np.arange(taken[at]), None, 1)
            data[at, : taken[at]] = part[:, 0]
            count_global(m, sources[at : at + 1], ids[at : at + 1], int(taken[at]), False)
        window = m.block_of[ids]
        m.shared.store(offsets, window, np.full((len(ids), size // 4), 0xFFFFFFFF, U32), 4)
        count_shared(m, offsets, ids, size)
        flat = offsets + window * m.shared.stride
        granules = m.shadow.start_copy(flat, ids, m.warp_of[ids], size)
        m.copies.append(dict(ids=ids, group=m.copy_group[i].copy(), flat=flat, data=data, granules=granules,
                             done=np.zeros(len(ids), np.bool_)))  # fmt: skip

    return run


def finish_copies(m, ids: np.ndarray, keep: int, include_open: bool = False) -> None:
    """Lands the copies of these threads, but for their last ``keep`` committed groups."""
    waits = np.zeros(m.n, np.bool_)
    waits[ids] = True
    limit = m.copy_group - keep + (1 if include_open else 0)
    for copy in m.copies:
        ready = waits[copy["ids"]] & ~copy["done"] & (copy["group"] < limit[copy["ids"]])
        if not ready.any():
            continue
        size = copy["data"].shape[1]
        m.shared.data[copy["flat"][ready][:, None] + np.arange(size)] = copy["data"][ready]
        m.shadow.finish_copy(copy["granules"][ready], m.warp_of[copy["ids"][ready]])
        copy["done"] |= ready
    m.copies = [copy for copy in m.copies if not copy["done"].all()]
