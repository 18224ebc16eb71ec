"""Triton's own interpreter with bfloat16 put right and every address checked.

Run a process with ``TRITON_INTERPRET=1`` and call :func:`install` before any kernel runs; kernels then take CPU
tensors and run as numpy. Unmended, the interpreter adds, compares and multiplies the bit patterns of bfloat16,
truncates when it rounds to it, and an address outside the tensors ends the process without a word.

After :func:`install` bfloat16 is computed in float32 and rounded to nearest even after each operation (a dot product
or a sum once, at its end), ``tl.fma`` rounds once, a comparison of two numbers stays one when it meets a tensor, and a
load, store or atomic outside the tensors that the launch was given, or misaligned, raises :class:`AddressError` with
the program and the lanes. It proves a kernel's source, not its layouts, barriers or shared memory: those are for the
PTX interpreter.
"""

from __future__ import annotations

import os
from types import SimpleNamespace

import numpy as np

from .ptx.formats import bf16_to_f32, f32_to_bf16, odd32

_BITWISE = {np.bitwise_and, np.bitwise_or, np.bitwise_xor, np.left_shift, np.right_shift}


class AddressError(RuntimeError):
    """A kernel touched memory that no argument of its launch owns."""


def install() -> None:
    """Mends the interpreter of this process; calling it again does nothing."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("install: TRITON_INTERPRET must be 1 before triton is imported; set it for the process")
    from triton.runtime import interpreter

    if getattr(interpreter, "_mended", False):
        return
    interpreter._mended = True
    _mend_bfloat16(interpreter)
    _mend_splats(interpreter)
    _check_addresses(interpreter)


# --- bfloat16 -------------------------------------------------------------------------------------------------------
def _mend_bfloat16(interpreter) -> None:
    import triton.language as tl

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle

    def is_bf16(dtype) -> bool:
        return dtype.scalar == tl.bfloat16

    def widened(tensor):
        return bf16_to_f32(tensor.data) if is_bf16(tensor.dtype) else tensor.data

    def rounded(values):
        """float32 or wider to bfloat16; what is no float (a comparison) stays."""
        values = np.asarray(values)
        if values.dtype.kind != "f":
            return values
        return f32_to_bf16(odd32(values) if values.dtype == np.float64 else values)

    def mend_operation(name, is_exempt=lambda operation: False):
        original = getattr(builder, name)

        def mended(self, *arguments):
            *tensors, operation = arguments
            if is_exempt(operation) or not is_bf16(tensors[-1].dtype):
                return original(self, *arguments)
            with np.errstate(all="ignore"):
                result = operation(*(widened(tensor) for tensor in tensors))
            return handle(rounded(result), tl.bfloat16)

        setattr(builder, name, mended)

    mend_operation("binary_op", lambda operation: operation in _BITWISE)
    mend_operation("unary_op")
    mend_operation("ternary_op", lambda operation: operation is np.where)

    original_fma = builder.create_fma

    def create_fma(self, x, y, z):
        if z.dtype.scalar == tl.float32:
            exact = x.data.astype(np.float64) * y.data
            return handle((exact + z.data).astype(np.float32), tl.float32)
        if not is_bf16(z.dtype):
            return original_fma(self, x, y, z)
        wide = [widened(tensor).astype(np.float64) for tensor in (x, y, z)]
        return handle(rounded(wide[0] * wide[1] + wide[2]), tl.bfloat16)

    builder.create_fma = create_fma

    original_dot = builder.create_dot

    def create_dot(self, a, b, d, *options):
        if not (is_bf16(a.dtype) or is_bf16(b.dtype)):
            return original_dot(self, a, b, d, *options)
        total = np.matmul(widened(a).astype(np.float32), widened(b).astype(np.float32)) + widened(d)
        if is_bf16(d.dtype):
            return handle(rounded(total), tl.bfloat16)
        return handle(total.astype(d.data.dtype), d.dtype.scalar)

    builder.create_dot = create_dot

    def mend_cast(name):
        original = getattr(builder, name)

        def mended(self, source, target, *options):
            to, is_source = target.scalar, is_bf16(source.dtype)
            if to == source.dtype.scalar or not (is_source or to == tl.bfloat16):
                return original(self, source, target, *options)
            if to.is_floating() and to.primitive_bitwidth == 8:
                wide = handle(widened(source), tl.float32)
                return original_fp_to_fp(self, wide, target, *(options or (None,)))
            values = widened(source)
            if to == tl.bfloat16:
                if source.dtype.scalar.is_floating() and source.dtype.scalar.primitive_bitwidth == 8:
                    values = original_fp_to_fp(self, source, tl.float32, None).data
                mode = "rz" if options and options[0] == interpreter._ir.ROUNDING_MODE.RTZ else "rn"
                values = np.asarray(values)
                wide = values if values.dtype == np.float32 else odd32(values.astype(np.float64))
                return handle(f32_to_bf16(wide, mode), tl.bfloat16)
            return handle(values.astype(interpreter._get_np_dtype(target)), to)

        setattr(builder, name, mended)

    original_fp_to_fp = builder.create_fp_to_fp
    mend_cast("cast_impl")
    mend_cast("create_fp_to_fp")

    def mend_reduction(owner):
        original = owner.apply_impl

        def apply_impl(self, inputs):
            if not any(is_bf16(tensor.dtype) for tensor in inputs):
                return original(self, inputs)
            wide = tuple(
                self.to_tensor(widened(tensor.handle), tl.float32) if is_bf16(tensor.dtype) else tensor
                for tensor in inputs
            )
            results = original(self, wide)
            several = isinstance(results, (list, tuple))
            mended = [
                self.to_tensor(rounded(result.handle.data), tl.bfloat16)
                if at < len(inputs) and is_bf16(inputs[at].dtype) and result.dtype.scalar == tl.float32
                else result
                for at, result in enumerate(results if several else [results])
            ]
            return type(results)(mended) if several else mended[0]

        owner.apply_impl = apply_impl

    mend_reduction(interpreter.ReduceOps)
    mend_reduction(interpreter.ScanOps)


# --- comparisons ----------------------------------------------------------------------------------------------------
def _mend_splats(interpreter) -> None:
    """What compares two numbers is labelled as they are: spread over a tensor it would turn into a float."""
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    original = builder.create_splat

    def create_splat(self, to, argument):
        if argument.data.dtype != np.bool_:
            return original(self, to, argument)
        return handle(np.full(to.shape, argument.data), to.scalar)

    builder.create_splat = create_splat


# --- addresses ------------------------------------------------------------------------------------------------------
class _Allowed:
    """The bytes of the tensors of the running launch, as disjoint sorted intervals."""

    def __init__(self, tensors):
        spans = []
        for tensor in tensors:
            if tensor.numel():
                last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
                spans.append((tensor.data_ptr(), tensor.data_ptr() + last * tensor.element_size()))
        merged: list[list[int]] = []
        for start, end in sorted(spans):
            if merged and start <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], end)
            else:
                merged.append([start, end])
        self.starts = np.array([start for start, _ in merged], np.uint64)
        self.ends = np.array([end for _, end in merged], np.uint64)

    def outside(self, addresses: np.ndarray, size: int) -> np.ndarray:
        if not len(self.starts):
            return np.ones(addresses.shape, np.bool_)
        at = np.searchsorted(self.starts, addresses, side="right").astype(np.int64) - 1
        held = np.maximum(at, 0)
        return (at < 0) | (addresses + np.uint64(size) > self.ends[held])


def _tensors_of(values):
    from triton.tools.tensor_descriptor import TensorDescriptor

    for value in values:
        if isinstance(value, tuple):
            yield from _tensors_of(value)
        elif isinstance(value, TensorDescriptor):
            yield from _tensors_of([value.base])
        elif hasattr(value, "untyped_storage"):
            yield value
        elif hasattr(value, "base") and hasattr(value.base, "untyped_storage"):  # a reinterpreted tensor
            yield value.base


def _check_addresses(interpreter) -> None:
    native, state = interpreter._interpreter, SimpleNamespace(allowed=_Allowed([]))
    original = interpreter.GridExecutor._init_args_hst

    def init_args(self, arguments, keywords):
        host, host_keywords = original(self, arguments, keywords)
        state.allowed = _Allowed(_tensors_of([*host, *host_keywords.values()]))
        return host, host_keywords

    interpreter.GridExecutor._init_args_hst = init_args

    def check(what: str, pointers, mask, size: int) -> None:
        addresses = np.asarray(pointers).astype(np.uint64)
        active = np.broadcast_to(np.asarray(mask, np.bool_), addresses.shape)
        problems = {
            "outside the launch's tensors": state.allowed.outside(addresses, size) & active,
            f"not aligned to {size} bytes": (addresses % np.uint64(size) != 0) & active,
        }
        for problem, bad in problems.items():
            if bad.any():
                lanes = [tuple(int(part) for part in lane) for lane in np.argwhere(bad)[:3]]
                program = tuple(interpreter.interpreter_builder.grid_idx)
                raise AddressError(
                    f"{what} of {size} bytes {problem}: program {program}, {int(bad.sum())} lanes, first {lanes}"
                )

    def load(pointers, mask, other, dtype):
        check("load", pointers, mask, np.dtype(dtype).itemsize)
        return native.load(pointers, mask, other, dtype)

    def store(pointers, values, mask):
        check("store", pointers, mask, values.dtype.itemsize)
        return native.store(pointers, values, mask)

    def atomic_rmw(operation, pointers, values, mask, semantics):
        check("atomic", pointers, mask, values.dtype.itemsize)
        return native.atomic_rmw(operation, pointers, values, mask, semantics)

    def atomic_cas(pointers, compare, values, semantics):
        check("atomic", pointers, True, values.dtype.itemsize)
        return native.atomic_cas(pointers, compare, values, semantics)

    replaced = dict(load=load, store=store, atomic_rmw=atomic_rmw, atomic_cas=atomic_cas)
    others = {name: getattr(native, name) for name in dir(native) if not name.startswith("_") and name not in replaced}
    interpreter._interpreter = SimpleNamespace(**others, **replaced)
