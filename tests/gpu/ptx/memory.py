"""State spaces as byte arrays that know which bytes exist and which were written.

A space holds ``windows`` copies of the same layout: one for each block (shared), each thread (local), or one (global,
parameters). Every access is checked for bounds, alignment and, when reading, for bytes that nobody has written.
"""

from __future__ import annotations

import numpy as np

from .compiler import Fault
from .formats import STORAGE

EXISTS, WRITTEN = 1, 2
_REPEAT = {1: 0x01, 2: 0x0101, 4: 0x01010101, 8: 0x0101010101010101}


class Space:
    def __init__(self, name: str, size: int, windows: int = 1):
        self.name, self.size, self.windows = name, size, windows
        self.stride = (size + 127) // 128 * 128 + 128
        self.data = np.full(self.stride * windows, 0xFF, np.uint8)
        self.state = np.zeros(self.stride * windows, np.uint8)
        self._data = {size: self.data.view(dtype) for size, dtype in STORAGE.items()}
        self._state = {size: self.state.view(dtype) for size, dtype in STORAGE.items()}

    def allow(self, start: int, size: int, written: bool = False) -> None:
        """Makes the bytes exist in every window."""
        mark = EXISTS | (WRITTEN if written else 0)
        self.state.reshape(self.windows, self.stride)[:, start : start + size] |= mark

    def locate(self, offsets: np.ndarray, window, width: int, count: int) -> np.ndarray:
        """Element indices [threads, count] after the checks for alignment and range."""
        total = width * count
        bad = (offsets & (total - 1 if total & (total - 1) == 0 else width - 1)) != 0
        if bad.any():
            raise Fault("misaligned", f"a {total}-byte access to {self.name} memory is not aligned", bad)
        bad = (offsets < 0) | (offsets + total > self.size)
        if bad.any():
            raise self._outside(offsets, bad, total)
        flat = offsets if window is None else offsets + window * self.stride
        first = flat >> (width.bit_length() - 1)
        return first[:, None] + np.arange(count) if count > 1 else first[:, None]

    def _outside(self, offsets, bad, total):
        where = ", ".join(f"{int(offset):#x}" for offset in np.unique(offsets[bad])[:3])
        return Fault("out of bounds", f"a {total}-byte access to {self.name} memory at offset {where}", bad)

    def load(self, offsets: np.ndarray, window, width: int, count: int = 1) -> np.ndarray:
        elements = self.locate(offsets, window, width, count)
        ones = STORAGE[width](_REPEAT[width])
        state = self._state[width][elements]
        full = ones * STORAGE[width](EXISTS | WRITTEN)
        if not (state == full).all():
            self._check(state, ones, offsets, width * count)
            bad = (state & full != full).any(1)
            if bad.any():
                raise Fault("uninitialised", f"a read of {self.name} memory that nobody has written", bad)
        return self._data[width][elements]

    def store(self, offsets: np.ndarray, window, values: np.ndarray, width: int) -> None:
        count = values.shape[1]
        elements = self.locate(offsets, window, width, count)
        ones = STORAGE[width](_REPEAT[width])
        state = self._state[width][elements]
        self._check(state, ones, offsets, width * count)
        self._state[width][elements] = state | ones * STORAGE[width](WRITTEN)
        self._data[width][elements] = values

    def _check(self, state, ones, offsets, total) -> None:
        bad = (state & ones != ones).any(1)
        if bad.any():
            raise self._outside(offsets, bad, total)

    def poison(self, flat: np.ndarray) -> None:
        """Marks flat bytes as in flight: whatever stood there is gone, reading gives NaN."""
        self.data[flat] = 0xFF


class GlobalMemory:
    """Torch tensors and module variables behind one range of device addresses, with gaps between them.

    Tensors are copied in, and back by :meth:`write_back`. An address is valid where a given tensor has bytes: a view
    does not make the rest of its storage valid.
    """

    GAP = 512

    def __init__(self, base: int):
        self.base = base
        self.end = self.GAP
        self.tensors: list[tuple[object, int]] = []
        self.storages: dict[int, int] = {}
        self.space: Space | None = None
        self._written: list[tuple[int, int, bool]] = []
        self._initial: list[tuple[int, bytes]] = []

    def reserve(self, size: int, align: int = 512) -> int:
        start = (self.end + align - 1) // align * align
        self.end = start + size + self.GAP
        return start

    def add(self, tensor, written: bool = True) -> int:
        """The device address of ``tensor``."""
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key not in self.storages:
            self.storages[key] = self.reserve(storage.nbytes())
            self.tensors.append((tensor, self.storages[key]))
        item = tensor.element_size()
        start = self.storages[key] + tensor.storage_offset() * item
        if tensor.numel():
            extent = (sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1) * item
            self._written.append((start, extent, written))
        return self.base + start

    def translate(self, raw: bytes) -> bytes:
        """``raw`` with device addresses for the host addresses, at multiples of 8, of tensors that were added."""
        words = bytearray(raw)
        for at in range(0, len(raw) - 7, 8):
            host = int.from_bytes(raw[at : at + 8], "little")
            for tensor, start in self.tensors:
                storage = tensor.untyped_storage()
                if storage.data_ptr() <= host < storage.data_ptr() + storage.nbytes():
                    words[at : at + 8] = (self.base + start + host - storage.data_ptr()).to_bytes(8, "little")
        return bytes(words)

    def is_written(self, tensor) -> bool:
        """Whether every byte of a contiguous tensor was written, by the host or by the kernel."""
        start = self.storages[tensor.untyped_storage().data_ptr()] + tensor.storage_offset() * tensor.element_size()
        state = self.space.state[start : start + tensor.numel() * tensor.element_size()]
        return bool((state & WRITTEN).all())

    def add_bytes(self, size: int, initial: bytes, align: int) -> int:
        start = self.reserve(size, max(align, 16))
        self._written.append((start, size, True))
        self._initial.append((start, initial + bytes(size - len(initial))))
        return self.base + start

    def freeze(self) -> Space:
        self.space = Space("global", self.end)
        for start, size, written in self._written:
            self.space.allow(start, size, written)
        for tensor, start in self.tensors:
            raw = _bytes_of(tensor)
            self.space.data[start : start + len(raw)] = raw
        for start, initial in self._initial:
            self.space.data[start : start + len(initial)] = np.frombuffer(initial, np.uint8)
        return self.space

    def write_back(self) -> None:
        for tensor, start in self.tensors:
            raw = _bytes_of(tensor)
            raw[:] = self.space.data[start : start + len(raw)]


def _bytes_of(tensor) -> np.ndarray:
    """The whole storage, shared with the tensor."""
    import torch

    flat = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    return flat.numpy()
