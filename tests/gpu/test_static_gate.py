"""Each shipped configuration against its limits, and the gate against kernels that break them."""

import pytest

from . import build
from .configurations import CONFIGURATIONS
from .static_gate import DEVICES, Configuration, Limits, blocks_per_sm, breaches, measure, sass, table

if not CONFIGURATIONS:
    pytest.skip(f"{build.missing_nvcc()}; {build.missing_triton()}", allow_module_level=True)
try:
    build.find_tool("cuobjdump")
except RuntimeError as missing:
    pytest.skip(str(missing), allow_module_level=True)

needs_nvcc = pytest.mark.skipif(build.missing_nvcc() is not None, reason=str(build.missing_nvcc()))
SHIPPED = [(configuration, arch) for configuration in CONFIGURATIONS for arch in configuration.architectures]


@pytest.mark.parametrize("configuration, arch", SHIPPED, ids=[f"{c.name} {arch}" for c, arch in SHIPPED])
def test_configuration_keeps_its_limits(configuration, arch):
    assert breaches(measure(configuration, arch)) == []


DEFAULT = Limits()


def broken(body: str, limits: Limits = DEFAULT, threads: int = 128, shared: int = 0, arch: str = "sm_80") -> str:
    source = f'extern "C" __global__ void __launch_bounds__({min(threads, 1024)}) kernel(float* x, int n) {{ {body} }}'
    configuration = Configuration("k", "kernel", threads, lambda a: (build.nvcc(source, a, "cubin"), shared), limits)
    return " ".join(breaches(measure(configuration, arch)))


A_HUNDRED_VALUES = """
  float v[100];
  for (int j = 0; j < 100; ++j) v[j] = x[threadIdx.x + j * n];
  __syncthreads();
  for (int j = 0; j < 100; ++j) x[threadIdx.x * n + j] = v[j] * v[(j + 37) % 100];
"""


@needs_nvcc
@pytest.mark.parametrize("arch", build.ARCHITECTURES)
def test_spills_are_refused(arch):
    """100 values and 64 registers a thread."""
    message = broken(A_HUNDRED_VALUES, threads=1024, arch=arch)
    assert "spilled bytes must be at most 0" in message and "local instructions must be at most 0" in message


@needs_nvcc
@pytest.mark.parametrize(
    "what, report",
    [
        (dict(body="double s = x[0]; for (int i = 0; i < n; ++i) s = s * x[i] + 1; x[1] = s;"), "fp64"),
        (dict(body="float v[64] = {}; for (int i = 0; i < 64; ++i) v[i * n & 63] += x[i]; x[n] = v[n & 63];"), "local"),
        (dict(body="atomicAdd(x + n, 1.0f);"), "float atomic"),
        (dict(body="x[threadIdx.x] = n;", shared=164 * 1024), "shared memory"),
        (dict(body="x[threadIdx.x] = n;", threads=2048), "threads"),
        (dict(body="x[threadIdx.x] = n;", limits=Limits(registers=1)), "registers"),
        (dict(body="x[threadIdx.x] = n;", limits=Limits(at_least={"tensor": 1})), "tensor"),
        (dict(body="x[threadIdx.x] = n;", limits=Limits(at_least={"128-bit global": 1})), "128-bit global"),
        (dict(body="x[threadIdx.x] = n;", limits=Limits(min_occupancy=0.5), shared=100 * 1024), "occupancy"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_breach_is_reported(what, report):
    assert report in broken(**what)


@needs_nvcc
def test_sass_is_read_whole():
    source = 'extern "C" __global__ void kernel(float4* x) { float4 v = x[threadIdx.x]; v.x += 1; x[threadIdx.x] = v; }'
    instructions = sass(build.nvcc(source, "sm_80", "cubin"), "kernel")
    assert any(text.startswith("LDG.E.128") for text in instructions)
    assert any(text.startswith("STG.E.128") for text in instructions)
    assert any(text.startswith("EXIT") for text in instructions)


# registers, threads, shared, blocks: published examples of sm_80 (64 warps, 65536 registers, 164 KiB)
@pytest.mark.parametrize(
    "registers, threads, shared, blocks",
    [(32, 1024, 0, 2), (33, 1024, 0, 1), (255, 256, 0, 1), (64, 128, 0, 8), (16, 32, 0, 32), (32, 128, 81 * 1024, 2),
     (32, 128, 82 * 1024, 1), (32, 128, 163 * 1024, 1), (32, 128, 164 * 1024, 0)],
)  # fmt: skip
def test_occupancy(registers, threads, shared, blocks):
    assert blocks_per_sm(DEVICES["sm_80"], registers, threads, shared) == blocks


def test_table_has_a_row_for_each():
    rows = [measure(configuration, arch) for configuration, arch in SHIPPED[:2]]
    lines = table(rows).splitlines()
    assert len(lines) == 3 and lines[1].startswith(SHIPPED[0][0].name)
