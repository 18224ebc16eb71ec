"""docs/methods.md: every call of its tables runs as printed."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import moe_kernels
import moe_kernels.nn

DOCUMENT = (Path(__file__).parent.parent / "docs" / "methods.md").read_text()
PRELUDE = re.findall(r"^```python\n(.*?)^```", DOCUMENT, flags=re.MULTILINE | re.DOTALL)
ROWS = re.findall(r"^\| (.+?) \| `(.+)` \|$", DOCUMENT, flags=re.MULTILINE)

# what a call is given or leaves behind, no method by itself
HOLDERS = ("AdapterPool", "AdapterRouting", "ModuleStatistics", "QuantizedExperts", "Routed")


@pytest.mark.parametrize(("method", "call"), ROWS, ids=[method for method, _ in ROWS])
def test_call_runs(method, call):
    namespace = {}
    exec(compile(PRELUDE[0], "methods.md", "exec"), namespace)
    result = eval(compile(call, "methods.md", "eval"), namespace)
    if "update_expert_bias(" in call:
        assert namespace["layer"].expert_bias.any()
    elif isinstance(result, list):
        assert result and all(value > 0 for value in result)
    elif isinstance(result, nn.Module):
        assert all(parameter.isfinite().all() for parameter in result.parameters())
    else:
        tensors = result if isinstance(result, tuple) else (result,)
        assert tensors and all(isinstance(tensor, Tensor) and tensor.isfinite().all() for tensor in tensors)
    if len(result if isinstance(result, tuple) else ()) == 2:
        topk_ids, topk_weights = result
        assert topk_ids.dtype == torch.int32 and topk_ids.shape == topk_weights.shape and (topk_weights > 0).any()


def test_every_row_was_found_and_every_method_is_listed():
    assert len(PRELUDE) == 1
    assert len(ROWS) == sum(line.endswith("` |") for line in DOCUMENT.splitlines())
    calls = " ".join(call for _, call in ROWS)
    for name in moe_kernels.ops.route.__all__:
        assert name in calls or name in ("identity_weights",), name
    for name in moe_kernels.nn.__all__:
        assert name in calls or name in HOLDERS, name
