"""What every test file shares."""

import pytest
import torch

from moe_kernels import _dispatch

# fills memory that PyTorch hands out uninitialised, also to C++ ops, with NaN (integers: the largest): a result that
# was never written cannot pass
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True

#: what a test file runs its kernels on, unless it has a KERNELS of its own; each is compared with the float64
#: reference. Tests marked on_gpus run on the file's GPU_KERNELS too
KERNELS = ["native-cpu"]


def pytest_generate_tests(metafunc):
    if "kernel_id" in metafunc.fixturenames:
        kernels = getattr(metafunc.module, "KERNELS", KERNELS)
        if metafunc.definition.get_closest_marker("on_gpus"):
            kernels = [*kernels, *metafunc.module.GPU_KERNELS]
        if metafunc.definition.get_closest_marker("with_reference"):
            kernels = ["reference-cpu", *kernels]
        metafunc.parametrize("kernel_id", kernels)


@pytest.fixture
def backend(kernel_id, request, monkeypatch):
    """Name of the backend, ready for use: kernels are there, new tensors are made where they run.

    ids: native-cpu, native-cuda, triton-cuda; triton-cpu is Triton's interpreter (TRITON_INTERPRET=1); native-simt is
    the CUDA source on the CPU (tests/gpu/shim); native-ptx and triton-ptx are the compiled kernels in the PTX
    interpreter.
    """
    name, device = kernel_id.split("-")
    if device == "simt":
        from tests.gpu.shim import library

        reason = library.missing_reason()
    elif kernel_id == "native-ptx":
        from tests.gpu import ptx_ops

        reason = ptx_ops.missing_reason()
    elif kernel_id == "triton-ptx":
        from tests.gpu import triton_on_ptx

        reason = triton_on_ptx.missing_reason()
    else:
        reason = _dispatch.missing_reason(getattr(request.module, "OP", ""), name, device)
    if device == "cuda" and not torch.cuda.is_available():
        reason = "no GPU"
    if reason is not None:
        pytest.skip(f"{kernel_id}: {reason}")
    if device == "simt":
        library.redirect(monkeypatch)
    elif kernel_id == "native-ptx":
        ptx_ops.redirect(monkeypatch)
    elif kernel_id == "triton-ptx":
        triton_on_ptx.redirect(monkeypatch)
    elif kernel_id == "triton-cpu":
        from tests.gpu import triton_interpreter

        triton_interpreter.install()
    with torch.device("cuda" if device == "cuda" else "cpu"):
        yield name


@pytest.fixture
def raises_in_kernel(kernel_id) -> bool:
    """Whether kernels can refuse values: on the CPU they can; a GPU has nobody to tell and gives zero."""
    return kernel_id in ("native-cpu",)


@pytest.fixture(autouse=True)
def _seed_and_threads():
    """Every test starts from one seed and leaves the number of threads as it found it."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=[1, 2])
def threads(request):
    torch.set_num_threads(request.param)
    return request.param
