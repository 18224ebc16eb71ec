"""The only wording of argument errors: ``<op>: <argument> must be <expected>, got <actual>; <remedy>``.

The callers write the condition (a tuple comparison costs 0.1 us, a helper call 0.5 us) and raise what these build.
"""

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ID_DTYPES = (torch.int32, torch.int64)


def _message(op: str, argument: str, expected: str, actual: object, remedy: str) -> str:
    return f"{op}: {argument} must be {expected}, got {actual}" + (f"; {remedy}" if remedy else "")


def value_error(op: str, argument: str, expected: str, actual: object, remedy: str = "") -> ValueError:
    """For a value or a device that an op does not accept."""
    return ValueError(_message(op, argument, expected, actual, remedy))


def shape_error(op: str, argument: str, expected: str, tensor: Tensor, remedy: str = "") -> ValueError:
    """For a shape; ``expected`` names the dimensions, e.g. ``[num_tokens, hidden_size]``."""
    return ValueError(_message(op, argument, f"of shape {expected}", list(tensor.shape), remedy))


def dtype_error(op: str, argument: str, expected: object, tensor: Tensor, remedy: str = "") -> TypeError:
    """For a dtype; ``expected`` is one dtype or several."""
    if isinstance(expected, tuple):
        expected = "one of " + ", ".join(str(dtype) for dtype in expected)
    return TypeError(_message(op, argument, str(expected), tensor.dtype, remedy))


def check_tensor(op: str, argument: str, value: object) -> None:
    """Raises where ``value`` is no tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(_message(op, argument, "a torch.Tensor", type(value).__name__, ""))


def check_same_device(op: str, **tensors: Tensor | None) -> None:
    """Raises where the given tensors do not all live on one device."""
    first = None
    for argument, tensor in tensors.items():
        if tensor is None:
            continue
        if first is None:
            first = (argument, tensor.device)
        elif tensor.device != first[1]:
            raise value_error(op, argument, f"on {first[1]} like {first[0]}", tensor.device, "move it with .to()")
