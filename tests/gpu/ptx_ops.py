"""The CUDA ops on CPU tensors with their shipped PTX: the library's own host code decides what is launched and how,
and each launch goes to the PTX interpreter instead of the shim's fibers.

:func:`redirect` puts the rooms' handles on it; :func:`counting` collects what the launches counted.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from . import shipped
from .ptx import Counters, execute
from .shim import library

NAMESPACE = "moe_kernels_ptx"


class _Parameter(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("bytes", ctypes.c_size_t)]


_LAUNCHER = ctypes.CFUNCTYPE(
    ctypes.c_bool, ctypes.POINTER(ctypes.c_uint), ctypes.c_size_t, ctypes.c_void_p, ctypes.POINTER(_Parameter),
    ctypes.c_size_t,
)  # fmt: skip


def missing_reason() -> str | None:
    """Why the shipped PTX cannot be executed here, or None."""
    return library.missing_reason() or shipped.missing_reason()


@dataclass(frozen=True)
class Launched:
    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    counters: Counters


#: what collects launches, innermost last
_collectors: list[list[Launched]] = []


@contextlib.contextmanager
def counting() -> Iterator[list[Launched]]:
    """A list that every launch of the PTX interpreter's backends joins while the context lasts."""
    launches: list[Launched] = []
    _collectors.append(launches)
    try:
        yield launches
    finally:
        _collectors.remove(launches)


def collect(launched: Launched) -> None:
    for launches in _collectors:
        launches.append(launched)


def _tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class _Allocations(TorchDispatchMode):
    """Every tensor that appears while one op runs: what its kernels may touch."""

    def __init__(self, arguments):
        super().__init__()
        self.tensors = _tensors(arguments)
        self.unwritten: list[torch.Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.tensors += _tensors(result)
        if func is torch.ops.aten.new_empty.default:
            self.unwritten.append(result)
        return result


class _Host:
    """The library of the shim with its launches sent here."""

    def __init__(self):
        self.library = library.load()
        symbols = subprocess.run(["nm", self.library._name], check=True, capture_output=True, text=True).stdout
        lines = (line.split() for line in symbols.splitlines() if not line.startswith(" "))
        addresses = {name: int(at, 16) for at, kind, name in lines if kind in "tTW"}
        here = ctypes.cast(self.library.simt_set_launcher, ctypes.c_void_p).value
        base = here - addresses["simt_set_launcher"]
        self.names = {base + at: shipped.plain_name(name) for name, at in addresses.items() if "_kernel" in name}
        self.callback = _LAUNCHER(self._launch)
        self.allocations: _Allocations | None = None
        self.error: BaseException | None = None
        self.seed: int | None = None

    def _launch(self, sizes, shared_bytes, kernel, parameters, num_parameters) -> bool:
        try:
            text, name = shipped.ptx()[self.names[kernel]]
            raw = [ctypes.string_at(parameters[i].data, parameters[i].bytes) for i in range(num_parameters)]
            known = self.allocations
            grid, block = tuple(sizes[0:3]), tuple(sizes[3:6])
            launch = execute(
                text, name, grid, block, raw, shared_bytes, self.seed, pointed_to=known.tensors,
                uninitialized=known.unwritten,
            )  # fmt: skip
            known.unwritten = [tensor for tensor in known.unwritten if not launch.memory.is_written(tensor)]
            collect(Launched(name, grid, block, launch.counters))
        except BaseException as error:  # it may not pass through the C++ frames: call() raises it
            self.error = error
            return False
        return True

    def call(self, name: str, *arguments):
        op = getattr(getattr(torch.ops, library.NAMESPACE), name).default
        self.library.simt_set_launcher(self.callback)
        self.allocations, self.error = _Allocations(arguments), None
        try:
            with self.allocations:
                # below the dispatch mode, which then sees what the kernel's host code allocates
                return op._op_dk(torch._C.DispatchKey.CPU, *arguments)
        except RuntimeError as error:
            raise (self.error or error) from None
        finally:
            self.library.simt_set_launcher(None)


@functools.cache
def host() -> _Host:
    """Defines the ops once more, in a namespace of their own that runs the shipped PTX."""
    found = _Host()
    for name in library.op_names():
        schema = str(getattr(torch.ops.moe_kernels, name).default._schema).split("(", 1)[1]
        torch.library.define(f"{NAMESPACE}::{name}", "(" + schema)
        torch.library.register_fake(f"{NAMESPACE}::{name}", getattr(torch.ops.moe_kernels, name).default)
        torch.library.impl(f"{NAMESPACE}::{name}", "CPU")(functools.partial(found.call, name))
    return found


def redirect(monkeypatch) -> None:
    """Makes the handles in the rooms' native.py those of the shipped PTX."""
    host()
    library.redirect(monkeypatch, NAMESPACE)
