"""The one tolerance rule."""

import torch
from torch import Tensor


def assert_close_to_reference(actual: Tensor, reference64: Tensor, eager: Tensor, name: str = "result") -> None:
    """Raises unless ``actual`` is as close to the float64 reference as plain PyTorch in the same dtype.

    ``max|actual - reference64| <= 2 * (max|eager - reference64| + one rounding unit at max|reference64|)``

    The bound comes from the data: there is no tolerance to choose, and none to loosen. A float64 result is held to the
    rounding unit of float32: the reference has no digits to spare beyond its own (gradcheck proves the rest).

    Args:
        actual: result of the kernel.
        reference64: the reference's result on the same inputs cast to float64.
        eager: the reference's result in the dtype of ``actual``.
    """
    if actual.shape != reference64.shape:
        raise AssertionError(f"{name}: shape {list(actual.shape)}, expected {list(reference64.shape)}")
    if actual.dtype != eager.dtype:
        raise AssertionError(f"{name}: dtype {actual.dtype}, expected {eager.dtype}")
    if actual.numel() == 0:
        return
    actual64, eager64 = actual.double(), eager.double()
    if not torch.equal(actual64.isfinite(), reference64.isfinite()):
        raise AssertionError(f"{name}: finite in other places than the reference")
    finite = reference64.isfinite()
    if not finite.any():
        return
    error = (actual64 - reference64)[finite].abs()
    largest = reference64[finite].abs().max().item()
    info = torch.finfo(torch.float32 if actual.dtype == torch.float64 else actual.dtype)
    rounding_unit = info.eps * max(largest, info.tiny)
    allowed = 2 * ((eager64 - reference64)[finite].abs().max().item() + rounding_unit)
    if error.max().item() > allowed:
        raise AssertionError(f"{name}: error {error.max().item():.3e} where {allowed:.3e} is allowed")
