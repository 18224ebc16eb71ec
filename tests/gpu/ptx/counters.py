"""What a kernel did, counted: the part of its speed that needs no clock."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

SECTOR = 32

#: opcode's first word to the class that the issue slots are counted in
CLASSES = {
    "tensor": {"mma", "wgmma", "tcgen05"},
    "matrix move": {"ldmatrix", "stmatrix", "movmatrix"},
    "async copy": {"cp", "mbarrier", "fence"},
    "memory": {"ld", "st", "ldu", "atom", "red", "prefetch", "discard"},
    "warp": {"shfl", "vote", "match", "redux", "activemask", "elect"},
    "barrier": {"bar", "barrier"},
    "control": {"bra", "brx", "exit", "call"},
    "move": {"mov", "cvt", "cvta", "selp", "prmt"},
}


@dataclass
class Counters:
    """Sums over a launch. ``*_sectors`` counts 32-byte sectors for each warp instruction; ``*_unique_sectors`` counts
    each sector of memory once, which is what DRAM must move when the caches are perfect.
    """

    read_bytes: int = 0
    write_bytes: int = 0
    read_sectors: int = 0
    write_sectors: int = 0
    read_unique_sectors: int = 0
    write_unique_sectors: int = 0
    shared_wavefronts: int = 0
    shared_ideal_wavefronts: int = 0
    tensor_flops: int = 0
    barriers: int = 0
    instructions: int = 0
    by_class: Counter = field(default_factory=Counter)
    by_opcode: Counter = field(default_factory=Counter)
    conflicts_by_line: Counter = field(default_factory=Counter)

    @property
    def bank_conflicts(self) -> int:
        """Shared-memory wavefronts beyond one for each phase of an access."""
        return self.shared_wavefronts - self.shared_ideal_wavefronts

    @property
    def sectors(self) -> int:
        return self.read_sectors + self.write_sectors

    @property
    def unique_sectors(self) -> int:
        return self.read_unique_sectors + self.write_unique_sectors


def distinct(keys: np.ndarray) -> np.ndarray:
    """The sorted distinct keys; several times faster than ``np.unique``, which hashes."""
    keys = np.sort(keys)
    return keys[np.r_[True, keys[1:] != keys[:-1]]] if len(keys) else keys


def count_sectors(addresses: np.ndarray, warps: np.ndarray, total: int) -> np.ndarray:
    """Distinct (warp, sector) pairs of one instruction, as ``warp << 40 | sector``."""
    first = addresses // SECTOR
    last = (addresses + total - 1) // SECTOR
    keys = (warps.astype(np.int64) << 40) | first
    if (first != last).any():
        keys = np.concatenate([keys, (warps.astype(np.int64) << 40) | last])
    return distinct(keys)


def wavefronts(offsets: np.ndarray, phases: np.ndarray, total: int) -> tuple[int, int]:
    """Passes through the 32 banks of shared memory, and how many phases there were.

    Lanes of one phase (a warp for up to 4 bytes a lane, a half for 8, a quarter for 16) are served together; each
    pass serves one 4-byte word of each bank. Lanes that ask for the same word share it.
    """
    words = max(1, total // 4)
    word = (offsets[:, None] // 4 + np.arange(words)).ravel()
    keys = distinct((np.repeat(phases, words).astype(np.int64) << 32) | word)
    phase, bank = keys >> 32, keys & 31
    dense = np.cumsum(np.r_[False, phase[1:] != phase[:-1]])
    depth = np.bincount(dense * 32 + bank, minlength=(dense[-1] + 1) * 32).reshape(-1, 32).max(1)
    return int(depth.sum()), len(depth)


def classify(opcode: str) -> str:
    name = opcode.split(".")[0]
    for label, names in CLASSES.items():
        if name in names:
            return label
    if ".f16" in opcode or ".bf16" in opcode or ".f32" in opcode or ".f64" in opcode:
        return "float"
    return "integer"


def report(title: str, counters: Counters, *, floor_bytes: int, needed_flops: int = 0) -> str:
    """One page for one launch: the floor, what was done, and the ratio.

    ``floor_bytes`` are the bytes that the operation must move whatever the kernel, ``needed_flops`` those of its
    matrix products.
    """
    moved, asked = counters.unique_sectors * SECTOR, counters.sectors * SECTOR
    rows = [
        ("DRAM floor, bytes", f"{floor_bytes:,}", ""),
        ("distinct sectors, bytes", f"{moved:,}", f"{moved / floor_bytes:.3f} of the floor"),
        ("sectors asked for, bytes", f"{asked:,}", f"{asked / floor_bytes:.3f} of the floor"),
        ("bytes asked for", f"{counters.read_bytes + counters.write_bytes:,}", ""),
        ("shared wavefronts", f"{counters.shared_wavefronts:,}", f"{counters.bank_conflicts:,} from bank conflicts"),
        ("barriers", f"{counters.barriers:,}", ""),
        ("instructions issued", f"{counters.instructions:,}", ""),
    ]
    if needed_flops:
        ratio = counters.tensor_flops / needed_flops
        rows.insert(5, ("tensor FLOPs", f"{counters.tensor_flops:,}", f"{ratio:.3f} of what is needed"))
    rows += [(f"  {label}", f"{count:,}", "") for label, count in counters.by_class.most_common()]
    width = max(len(row[0]) for row in rows)
    return "\n".join([title] + [f"  {name:<{width}}  {value:>15}  {note}".rstrip() for name, value, note in rows])
