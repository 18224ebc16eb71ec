"""From dense differences to packed task vectors: :func:`compress`."""

import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from moe_kernels._checks import FLOAT_DTYPES, check_tensor, dtype_error, shape_error, value_error
from moe_kernels._dispatch import Backend, resolve
from moe_kernels.ops.task_vector import native, reference
from moe_kernels.ops.task_vector.magnitudes import INFINITY, LOW_BITS, rank
from moe_kernels.ops.task_vector.packed import DTYPES, MAX_DIMS, PackedDelta, fingerprint, signed
from moe_kernels.ops.task_vector.ternary import TernaryDelta

Scale = Literal["std", "mean"]
Scope = Literal["global", "tensor"]
VALUE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def compress(
    delta: Tensor | Mapping[str, Tensor],
    density: float,
    *,
    base: Tensor | Mapping[str, Tensor] | None = None,
    scale: Scale = "std",
    scope: Scope = "global",
    values: torch.dtype | None = None,
    progress: Callable[[str], object] | None = None,
    backend: Backend = "auto",
) -> PackedDelta | dict[str, PackedDelta]:
    """Keeps the signs of the largest entries of a task vector, and one scale; or their values.

    ``t = sign(delta)`` at the ``round(density * n)`` entries of largest magnitude and 0 elsewhere;
    ``scale = std(delta)``, unbiased and taken before anything is dropped (ComPEFT). ComPEFT's alpha is a number that is
    tried out on validation data, so it is no part of the result: give it to :func:`moe_kernels.apply_` as coefficient.

    Exactly that many are kept: of equal magnitudes at the threshold those that come first, by name and then by
    position. Zeros are never kept. Magnitudes are compared in float32.

    Args:
        delta: the differences, any shape of up to 7 dimensions, float32, bfloat16, float16 or float64; or a state dict.
            With ``base``: the fine-tuned weights. Names that share one tensor (tied weights) count once.
        density: the part that is kept, from 0 to 1.
        base: what to take the differences from, of the same names, shapes and dtypes; they are then made block by
            block, and each result knows its base (:meth:`PackedDelta.fits`; the hash costs 1 s a GB). Tensors of
            integers must be equal in both, and have no task vector.
        scale: "std", or "mean" for the mean magnitude of what is kept, with which a coefficient of 1 is nearest to
            ``delta`` in the squares (ComPEFT notes that this is not the best for the loss).
        scope: of a state dict: one threshold and one scale for all tensors (ComPEFT), or for each.
        values: float32, bfloat16 or float16 keeps what the largest entries are, rounded to that, and not their signs
            alone: a graft (arXiv 2302.06600), a sparse fine-tune (LT-SFT, arXiv 2110.07560; with density 1 all that is
            not zero), ComPEFT's pruning. ``scale`` is then a power of two above the tensor's largest magnitude, so
            that float16 does not run out of exponents, and t a number from -1 to 1.
        progress: is called with a tensor's name when a pass over it ends; there are four.
        backend: see :mod:`moe_kernels`.

    Returns:
        The packed task vector, or one for each name. On the device of ``delta``.

    Raises:
        ValueError: NaN or infinities, other shapes or names in ``base``; the message names the tensor.

    Source: ComPEFT (arXiv 2311.13171). Its code keeps one entry more, and those that tie with it.
    """
    op = "compress"
    progress = progress or (lambda name: None)
    if isinstance(density, bool) or not isinstance(density, (int, float)) or not 0 <= density <= 1:
        raise value_error(op, "density", "a number from 0 to 1", density)
    if scale not in ("std", "mean"):
        raise value_error(op, "scale", "'std' or 'mean'", repr(scale))
    if scope not in ("global", "tensor"):
        raise value_error(op, "scope", "'global' or 'tensor'", repr(scope))
    if values is not None and values not in VALUE_DTYPES:
        raise value_error(op, "values", "None, float32, bfloat16 or float16", values)
    if values is not None and scale != "std":
        raise value_error(op, "scale", "left out where values are kept", repr(scale))
    if isinstance(delta, Mapping):
        pairs = _pairs(op, delta, base)
        groups = [pairs] if scope == "global" else [{name: pair} for name, pair in pairs.items()]
        packed = {}
        for group in groups:
            packed |= _compress(op, group, density, scale, values, progress, backend)
        return {name: packed[first] for name, first in _first_names(pairs).items()}
    check_tensor(op, "delta", delta)
    _check_pair(op, "delta", delta, base)
    if not delta.is_floating_point():
        raise dtype_error(op, "delta", FLOAT_DTYPES, delta)
    return _compress(op, {"delta": (delta, base)}, density, scale, values, progress, backend)["delta"]


def _pairs(op: str, delta: Mapping[str, Tensor], base) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Sorted by name: the tensors of which there are task vectors."""
    if base is not None:
        if not isinstance(base, Mapping):
            raise TypeError(f"{op}: base must be a state dict like delta, got {type(base).__name__}")
        differing = sorted(set(delta) ^ set(base))
        if differing:
            raise value_error(op, "base", "of the same names as delta", f"in one alone: {', '.join(differing[:8])}")
    pairs = {}
    for name in sorted(delta):
        tensor, other = delta[name], None if base is None else base[name]
        check_tensor(op, name, tensor)
        _check_pair(op, name, tensor, other)
        if tensor.is_floating_point():
            pairs[name] = (tensor, other)
        elif other is None or not torch.equal(tensor, other):
            remedy = "a task vector is of floating tensors; leave it out"
            raise value_error(op, name, "equal in delta and base", f"other values of {tensor.dtype}", remedy)
    return pairs


def _check_pair(op: str, name: str, tensor: Tensor, base: Tensor | None) -> None:
    if tensor.is_floating_point() and tensor.dtype not in FLOAT_DTYPES:
        raise dtype_error(op, name, FLOAT_DTYPES, tensor)
    if tensor.dim() > MAX_DIMS:
        raise shape_error(op, name, f"at most {MAX_DIMS} dimensions", tensor)
    if base is None:
        return
    check_tensor(op, f"base of {name}", base)
    if base.shape != tensor.shape:
        raise shape_error(op, f"base of {name}", str(list(tensor.shape)), base)
    if base.dtype != tensor.dtype:
        raise dtype_error(op, f"base of {name}", tensor.dtype, base)


def _first_names(pairs: dict[str, tuple[Tensor, Tensor | None]]) -> dict[str, str]:
    """Each name's first one that is the same tensor."""
    seen: dict[tuple, str] = {}

    def place(tensor: Tensor | None):
        return (
            None if tensor is None else (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        )

    return {
        name: name if tensor.numel() == 0 else seen.setdefault((place(tensor), place(base)), name)
        for name, (tensor, base) in pairs.items()
    }


def _compress(
    op: str,
    pairs: dict,
    density: float,
    scale: Scale,
    values: torch.dtype | None,
    progress: Callable,
    backend: Backend,
) -> dict[str, PackedDelta]:
    """Of tensors that share one threshold and one scale."""
    firsts = _first_names(pairs)
    tensors = {
        name: tuple(None if part is None else part.detach().contiguous() for part in pair)
        for name, pair in pairs.items()
        if firsts[name] == name
    }
    kernels = {name: _kernels(op, backend, pair[0]) for name, pair in tensors.items()}

    def each(function: Callable[[str, tuple], Tensor]) -> dict[str, Tensor]:
        found = {}
        for name, pair in tensors.items():
            found[name] = function(name, pair)
            progress(name)
        return found

    high = each(lambda name, pair: kernels[name].count_magnitudes(*pair, -1).cpu())
    for name, counts in high.items():
        if counts[INFINITY >> LOW_BITS :].any():
            raise value_error(op, name, "finite", "NaN or an infinity", "a difference beyond float32 counts as one")
    numel = sum(tensor.numel() for tensor, _ in tensors.values())
    moments = each(lambda name, pair: kernels[name].delta_moments(*pair).cpu())
    sigma = _std(list(moments.values()), numel)
    threshold, ties = _threshold(each, kernels, high, round(density * numel))

    # made again where they are needed twice: planes of a whole model at once would be an eighth of it
    def select(name: str) -> TernaryDelta:
        tensor, base = tensors[name]
        return TernaryDelta(kernels[name].select_ternary(tensor, base, threshold, ties[name]), tensor.shape)

    step = _mean_magnitude(tensors, select) if scale == "mean" and values is None else sigma
    packer = reference if resolve(op, backend, "cpu") == "reference" else native

    def pack(name: str, pair: tuple[Tensor, Tensor | None]) -> Tensor:
        base_hash = signed(0 if pair[1] is None else fingerprint(pair[1]))
        planes, shape = select(name).planes.cpu(), list(pair[0].shape)
        if values is None:
            packed = packer.pack_ternary(planes, shape, step, sigma, base_hash)
        else:
            held = [None if part is None else part.cpu() for part in pair]
            above = _power_of_two_above(op, name, high[name])
            packed = packer.pack_values(planes, *held, shape, above, sigma, base_hash, DTYPES[values])
        return packed.to(pair[0].device)

    return {name: PackedDelta.from_header(data) for name, data in each(pack).items()}


def _kernels(op: str, backend: Backend, tensor: Tensor):
    return reference if resolve(op, backend, tensor.device.type) == "reference" else native


def _power_of_two_above(op: str, name: str, counts: Tensor) -> float:
    """Above all magnitudes, of which ``counts`` has how often each high half of their bits occurs."""
    exponent = int(counts.nonzero()[-1]) >> 8 if len(counts.nonzero()) else 0  # 8 bits of it, 8 of the fraction
    if exponent >= 254:
        raise value_error(op, name, "below 2^127", "a larger difference")
    return 2.0 ** (exponent - 126)


def _threshold(each: Callable, kernels: dict, high: dict[str, Tensor], keep: int) -> tuple[int, dict[str, int]]:
    """The bits of the ``keep``-th largest magnitude, and how many that are just that each tensor may keep."""
    if keep == 0 or not high:
        return INFINITY, dict.fromkeys(high, 0)
    prefix, above = rank(sum(high.values()), keep)
    low = each(lambda name, pair: kernels[name].count_magnitudes(*pair, prefix).cpu())
    suffix, above_low = rank(sum(low.values()), keep - above)
    threshold = prefix << LOW_BITS | suffix
    if threshold == 0:
        return 0, dict.fromkeys(high, 0)
    left, ties = keep - above - above_low, {}
    for name in high:
        ties[name] = min(left, int(low[name][suffix]))
        left -= ties[name]
    return threshold, ties


def _std(moments: list[Tensor], numel: int) -> float:
    if numel < 2:
        return 0.0 if not moments else abs(float(moments[0][0]))  # of one element: itself, so that it is not lost
    total, squares = (math.fsum(float(moment[i]) for moment in moments) for i in (0, 1))
    return math.sqrt(max(squares - total * total / numel, 0.0) / (numel - 1))


def _mean_magnitude(tensors: dict, select: Callable[[str], TernaryDelta]) -> float:
    """Over blocks, so that no copy of a whole tensor is made."""
    total, count = 0.0, 0
    for name, (tensor, base) in tensors.items():
        delta = select(name)
        signs = delta.signs().view(-1)
        for begin in range(0, tensor.numel(), 1 << 20):
            part = slice(begin, begin + (1 << 20))
            t = reference.differences(tensor.view(-1)[part], None if base is None else base.view(-1)[part])
            total += float((t.double() * signs[part]).sum())
        count += delta.nnz
    return total / count if count else 0.0
