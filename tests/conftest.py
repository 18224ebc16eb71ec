"""What every test file shares."""

import pytest
import torch

from moe_kernels import _dispatch

# fills memory that PyTorch hands out uninitialised, also to C++ ops, with NaN (integers: the largest): a result that
# was never written cannot pass
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True

#: backend ids of the parametrised op tests; each is compared with the reference in float64
KERNELS = ["native-cpu"]


@pytest.fixture(params=KERNELS)
def backend(request) -> str:
    name, device = request.param.split("-")
    reason = _dispatch.missing_reason(name, device)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return name


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
