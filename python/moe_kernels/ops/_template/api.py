"""Public function of the template room: :func:`scale_rows`."""

from torch import Tensor

from moe_kernels._checks import FLOAT_DTYPES, check_same_device, check_tensor, dtype_error, shape_error
from moe_kernels._dispatch import Backend, resolve
from moe_kernels.ops._template import autograd, reference


def scale_rows(rows: Tensor, weights: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Multiplies each row by its weight.

    ``out[r] = weights[r] * rows[r]``

    Args:
        rows: [num_rows, hidden_size], float32, bfloat16, float16 or float64, any strides.
        weights: [num_rows], any of the same dtypes.
        backend: see :mod:`moe_kernels`.

    Returns:
        [num_rows, hidden_size], dtype of ``rows``. Differentiable in ``rows``; ``weights`` gets no gradient.
    """
    check_tensor("scale_rows", "rows", rows)
    check_tensor("scale_rows", "weights", weights)
    if rows.dim() != 2:
        raise shape_error("scale_rows", "rows", "[num_rows, hidden_size]", rows)
    if rows.dtype not in FLOAT_DTYPES:
        raise dtype_error("scale_rows", "rows", FLOAT_DTYPES, rows)
    if weights.shape != rows.shape[:1]:
        raise shape_error("scale_rows", "weights", f"[num_rows={rows.shape[0]}]", weights)
    if weights.dtype not in FLOAT_DTYPES:
        raise dtype_error("scale_rows", "weights", FLOAT_DTYPES, weights)
    check_same_device("scale_rows", rows=rows, weights=weights)
    if resolve("scale_rows", backend, rows.device.type) == "reference":
        return reference.scale_rows(rows, weights.detach())
    return autograd.ScaleRows.apply(rows, weights)
