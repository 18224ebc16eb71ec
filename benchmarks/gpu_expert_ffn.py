"""Times the expert FFN on a GPU: ``PYTHONPATH=. python -m benchmarks.gpu_expert_ffn --tokens 16 1024 8192``.

Ours (``backend="auto"`` and ``"triton"``) beside PyTorch's own grouped GEMM, composed as transformers' ``grouped_mm``
experts are: sort, gather, two ``torch._grouped_mm``, weigh, add. A forward pass is replayed as a CUDA graph where it
can be captured; its inputs are pushed out of L2 before; the providers take turns and the median is printed. The floor
is the larger of FLOPs over the rate of an 8192^3 matrix product and bytes over the bandwidth of a copy, both measured
first in the same run. A result further from float64 than the tests allow gets no time; the exit status is then 1.
"""

import argparse
import statistics
import sys
import time

import torch
import torch.nn.functional as F

from moe_kernels import expert_ffn
from moe_kernels.testing import assert_close_to_reference

#: hidden_size, intermediate_size, num_experts, top_k
SHAPES = {
    "qwen3-30b-a3b": (2048, 768, 128, 8),
    "gpt-oss-20b": (2880, 2880, 32, 4),
    "mixtral-8x7b": (4096, 14336, 8, 2),
    "deepseek-v3": (7168, 2048, 256, 8),
}


def grouped_mm(x, ids, weights, gate_up, down):
    """The experts' layer of PyTorch's own operations, gate and up in halves, silu."""
    top_k, flat = ids.shape[1], ids.reshape(-1)
    order = flat.argsort()
    offsets = torch.histc(flat.float(), gate_up.shape[0], 0, gate_up.shape[0] - 1).cumsum(0).int()
    gate, up = torch._grouped_mm(x[order // top_k], gate_up.transpose(1, 2), offsets).chunk(2, 1)
    y = torch._grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offsets)
    y = y * weights.reshape(-1)[order, None].to(y.dtype)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return y[back].view(*ids.shape, -1).sum(1)


PROVIDERS = {
    "ours": lambda *tensors: expert_ffn(*tensors),
    "ours_triton": lambda *tensors: expert_ffn(*tensors, backend="triton"),
    "grouped_mm": grouped_mm,
}


def captured(call):
    """A replay of the call as a CUDA graph, or the call where it cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        torch.cuda.synchronize()
        return call
    return graph.replay


def times(calls: dict, seconds: float) -> dict[str, float]:
    """Median milliseconds of each, in turns."""
    flush = torch.empty(2**28, dtype=torch.int8, device="cuda")  # five times an H200's L2
    samples = {name: [] for name in calls}
    for call in calls.values():
        call()
    torch.cuda.synchronize()
    start = time.monotonic()
    for turn in range(50):
        if turn >= 5 and time.monotonic() - start > seconds:
            break
        for name, call in calls.items():
            flush.zero_()
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            call()
            after.record()
            torch.cuda.synchronize()
            samples[name].append(before.elapsed_time(after))
    return {name: statistics.median(values) for name, values in samples.items()}


def limits() -> tuple[float, float]:
    """FLOP/s of a bf16 matrix product and bytes/s of a copy, read and written."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(2**30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    took = times({"product": lambda: a @ b, "copy": lambda: target.copy_(source)}, 0.3)
    return 2 * 8192**3 / took["product"] * 1e3, 2 * 2**30 / took["copy"] * 1e3


def inputs(shape: str, num_tokens: int, dtype: torch.dtype):
    hidden_size, intermediate_size, num_experts, top_k = SHAPES[shape]
    with torch.device("cuda"):
        ids = torch.rand(num_tokens, num_experts).topk(top_k).indices.int()
        gate_up = torch.empty(num_experts, 2 * intermediate_size, hidden_size, dtype=dtype).normal_(
            0, hidden_size**-0.5
        )
        down = torch.empty(num_experts, hidden_size, intermediate_size, dtype=dtype).normal_(0, intermediate_size**-0.5)
        return torch.randn(num_tokens, hidden_size, dtype=dtype), ids, torch.rand(num_tokens, top_k), gate_up, down


def check(call, tensors) -> str | None:
    """What is wrong with a result on 4 of the tokens, or None."""
    x, ids, weights, gate_up, down = tensors
    pick = torch.randint(0, len(x), (4,), device="cuda")
    used = ids[pick].unique()
    local = torch.searchsorted(used, ids[pick].contiguous()).int()
    few = (x[pick], local, weights[pick], gate_up[used.long()], down[used.long()])
    eager = expert_ffn(*few, backend="reference")
    doubles = [tensor.double() if tensor.is_floating_point() else tensor for tensor in few]
    try:
        assert_close_to_reference(call(*tensors)[pick], expert_ffn(*doubles, backend="reference"), eager)
    except AssertionError as error:
        return str(error)


def cell(step: str, shape: str, num_tokens: int, rates: tuple[float, float], seconds: float) -> int:
    """Prints one row; returns how many of our own results were wrong."""
    hidden_size, intermediate_size, _, top_k = SHAPES[shape]
    tensors = inputs(shape, num_tokens, torch.bfloat16)
    wrong = {name: check(call, tensors) for name, call in PROVIDERS.items()}
    for name, error in wrong.items():
        if error:
            print(f"{shape} {num_tokens}: {name} is wrong: {error}")
    calls = {name: call for name, call in PROVIDERS.items() if not wrong[name]}
    num_wrong = sum(name.startswith("ours") for name in wrong if wrong[name])
    if num_wrong:
        return num_wrong
    if step == "train":
        leaves = [tensor.requires_grad_() for tensor in tensors if tensor.is_floating_point()]
        grad_out = torch.randn_like(tensors[0])
        del calls["ours_triton"]  # what trains is Triton's already

        def ready(call):
            return lambda: torch.autograd.grad(call(*tensors), leaves, grad_out)
    else:

        def ready(call):
            return captured(lambda: call(*tensors))

    took = times({name: ready(call) for name, call in calls.items()}, seconds)
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    expert_ffn(*tensors)
    extra = (torch.cuda.max_memory_allocated() - held) / 2**20
    flops = 6 * num_tokens * top_k * hidden_size * intermediate_size * (3 if step == "train" else 1)
    touched = 3 * len(tensors[1].unique()) * hidden_size * intermediate_size
    floor = max(flops / rates[0], 2 * (touched + 2 * num_tokens * hidden_size) / rates[1]) * 1e3
    ours = took.pop("ours")
    others = ", ".join(f"{name} {ms:.3f} ({ms / ours:.2f})" for name, ms in took.items())
    speed = f"{ours:8.3f} ms {flops / ours / 1e9:5.0f} TFLOP/s {100 * floor / ours:3.0f} %"
    print(f"{shape:14} {step:7} {num_tokens:6} {speed} {extra:6.0f} MiB  {others}", flush=True)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES)[:3])
    parser.add_argument("--tokens", nargs="*", type=int, default=[1, 16, 128, 1024, 8192], help="of a forward pass")
    parser.add_argument("--train", nargs="*", type=int, default=[8192], help="tokens of a training step")
    parser.add_argument("--seconds", type=float, default=0.3, help="of each cell")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU here; python benchmarks/run.py times the CPU kernels")
    rates = limits()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(f"matrix product {rates[0] / 1e12:.0f} TFLOP/s, copy {rates[1] / 1e9:.0f} GB/s")
    print("ours: ms, TFLOP/s, of the floor, memory beside inputs; the others: ms (times ours)")
    wrong = 0
    for shape in options.shapes:
        for step, tokens in [("forward", n) for n in options.tokens] + [("train", n) for n in options.train]:
            wrong += cell(step, shape, tokens, rates, options.seconds)
            torch.cuda.empty_cache()
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
