"""ggml, the library under llama.cpp: its mixture-of-experts graph on weights in its own quantised formats.

``GGML_LIB_DIR`` names the folder of a native build (``libggml-base.so``, ``libggml-cpu.so``). Sources come with
llama-cpp-python's source distribution, in ``vendor/llama.cpp/ggml``.
"""

import ctypes
import functools
import os
from ctypes import POINTER, c_bool, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.providers.base import Batch, Layer, Provider, Run

_F32, _I32 = 0, 26
#: enum ggml_type, and bytes of a block of 32 weights
_TYPES = {"q8_0": (8, 34), "q4_0": (2, 18)}
_OVERHEAD = 16 << 20


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


@functools.cache
def _library() -> ctypes.CDLL:
    folder = Path(os.environ["GGML_LIB_DIR"])
    ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(folder / "libggml-cpu.so"), mode=ctypes.RTLD_GLOBAL)
    pointer, size, integer = c_void_p, c_size_t, c_int64
    signatures = {
        "ggml_init": (pointer, [_InitParams]),
        "ggml_free": (None, [pointer]),
        "ggml_new_tensor_2d": (pointer, [pointer, c_int, integer, integer]),
        "ggml_new_tensor_3d": (pointer, [pointer, c_int, integer, integer, integer]),
        "ggml_mul_mat_id": (pointer, [pointer] * 4),
        "ggml_swiglu": (pointer, [pointer] * 2),
        "ggml_mul": (pointer, [pointer] * 3),
        "ggml_add": (pointer, [pointer] * 3),
        "ggml_view_2d": (pointer, [pointer, pointer, integer, integer, size, size]),
        "ggml_new_graph": (pointer, [pointer]),
        "ggml_build_forward_expand": (None, [pointer] * 2),
        "ggml_get_data": (pointer, [pointer]),
        "ggml_quantize_chunk": (size, [c_int, pointer, pointer, integer, integer, integer, pointer]),
        "ggml_backend_cpu_init": (pointer, []),
        "ggml_backend_cpu_set_n_threads": (None, [pointer, c_int]),
        "ggml_backend_graph_compute": (c_int, [pointer] * 2),
        "ggml_backend_cpu_reg": (pointer, []),
        "ggml_backend_reg_dev_get": (pointer, [pointer, size]),
        "ggml_backend_reg_get_proc_address": (pointer, [pointer, ctypes.c_char_p]),
        "ggml_backend_cpu_buffer_type": (pointer, []),
        "ggml_backend_buft_name": (ctypes.c_char_p, [pointer]),
        "ggml_backend_alloc_ctx_tensors_from_buft": (pointer, [pointer] * 2),
        "ggml_backend_tensor_set": (None, [pointer, pointer, size, size]),
        "ggml_version": (ctypes.c_char_p, []),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def _buffer_type(repacked: bool) -> int:
    """Where weights lie: as they are stored, or in the order that llama.cpp turns them into when it loads a model."""
    library = _library()
    if not repacked:
        return library.ggml_backend_cpu_buffer_type()
    registry = library.ggml_backend_cpu_reg()
    address = library.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    extra = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(library.ggml_backend_reg_dev_get(registry, 0))
    index = 0
    while extra[index]:
        if b"REPACK" in library.ggml_backend_buft_name(extra[index]):
            return extra[index]
        index += 1
    raise RuntimeError("this build of ggml repacks nothing")


class _Experts:
    """One stack of expert weights in ggml's memory, quantised by ggml."""

    def __init__(self, weights: Tensor, format: str, repacked: bool):
        library = _library()
        number, block_bytes = _TYPES[format]
        num_experts, out, in_features = weights.shape
        self.context = library.ggml_init(_InitParams(1 << 20, None, True))
        self.tensor = library.ggml_new_tensor_3d(self.context, number, in_features, out, num_experts)
        buffer = library.ggml_backend_alloc_ctx_tensors_from_buft(self.context, _buffer_type(repacked))
        if not buffer:
            raise MemoryError("ggml could not allocate the weights")
        codes = torch.empty(num_experts, out * in_features // 32 * block_bytes, dtype=torch.uint8)
        for expert in range(num_experts):
            source = weights[expert].float().contiguous()
            arguments = (number, source.data_ptr(), codes[expert].data_ptr(), 0, out, in_features, None)
            library.ggml_quantize_chunk(*arguments)
        library.ggml_backend_tensor_set(self.tensor, codes.data_ptr(), 0, codes.numel())


class _Graph:
    """llama.cpp's graph of one layer for so many tokens: gate and up in one mul_mat_id, swiglu, down, weighted sum."""

    def __init__(self, gate_up: _Experts, down: _Experts, hidden_size: int, num_tokens: int, top_k: int, width: int):
        library = _library()
        memory = _OVERHEAD + 4 * num_tokens * (3 * hidden_size + top_k * (4 * width + (top_k + 3) * hidden_size))
        self.context = context = library.ggml_init(_InitParams(memory, None, False))
        self.x = library.ggml_new_tensor_3d(context, _F32, hidden_size, 1, num_tokens)
        self.ids = library.ggml_new_tensor_2d(context, _I32, top_k, num_tokens)
        self.weights = library.ggml_new_tensor_3d(context, _F32, 1, top_k, num_tokens)
        rows = library.ggml_mul_mat_id(context, gate_up.tensor, self.x, self.ids)
        rows = library.ggml_mul_mat_id(context, down.tensor, library.ggml_swiglu(context, rows), self.ids)
        rows = library.ggml_mul(context, rows, self.weights)
        stride = 4 * hidden_size
        views = [
            library.ggml_view_2d(context, rows, hidden_size, num_tokens, top_k * stride, k * stride)
            for k in range(top_k)
        ]
        self.out = functools.reduce(lambda total, view: library.ggml_add(context, total, view), views)
        self.graph = library.ggml_new_graph(context)
        library.ggml_build_forward_expand(self.graph, self.out)
        self.shape = (num_tokens, hidden_size)

    def __del__(self):
        _library().ggml_free(self.context)

    def write(self, tensor: int, values: Tensor) -> None:
        ctypes.memmove(_library().ggml_get_data(tensor), values.data_ptr(), values.numel() * values.element_size())

    def read(self) -> Tensor:
        out = torch.empty(self.shape)
        ctypes.memmove(out.data_ptr(), _library().ggml_get_data(self.out), out.numel() * 4)
        return out


class Ggml(Provider):
    """Inputs are written and the result is read inside the timed call: 16 KiB a token."""

    distribution = "llama-cpp-python"

    def __init__(self, format: str, repacked: bool):
        self.name = f"ggml_{format}" + ("_repacked" if repacked else "")
        self.what = f"ggml's mul_mat_id graph on {format} weights" + (", repacked" if repacked else "")
        self.format, self.repacked = format, repacked
        self.copies = _TYPES[format][1] / 64

    def missing(self) -> str | None:
        folder = os.environ.get("GGML_LIB_DIR")
        if not folder or not (Path(folder) / "libggml-cpu.so").exists():
            return "GGML_LIB_DIR does not name a folder with libggml-base.so and libggml-cpu.so"
        return None

    def unsuited(self, layer: Layer, num_tokens: int | None = None) -> str | None:
        sizes = layer.shape.hidden_size, layer.shape.intermediate_size
        return f"blocks of 32 do not divide {sizes}" if any(size % 32 for size in sizes) else None

    def prepare(self, layer: Layer) -> Run:
        library = _library()
        gate_up = _Experts(layer.gate_up_proj.detach(), self.format, self.repacked)
        down = _Experts(layer.down_proj.detach(), self.format, self.repacked)
        backend = library.ggml_backend_cpu_init()
        library.ggml_backend_cpu_set_n_threads(backend, layer.threads)
        graphs: dict[int, _Graph] = {}

        def run(batch: Batch) -> Tensor:
            num_tokens, top_k = batch.topk_ids.shape
            graph = graphs.get(num_tokens)
            if graph is None:
                graphs.clear()  # one graph's activations at a time
                sizes = layer.shape.hidden_size, num_tokens, top_k, layer.shape.intermediate_size
                graph = graphs[num_tokens] = _Graph(gate_up, down, *sizes)
            graph.write(graph.x, batch.hidden_states.float().contiguous())
            graph.write(graph.ids, batch.topk_ids_int32)
            graph.write(graph.weights, batch.topk_weights_fp32)
            if library.ggml_backend_graph_compute(backend, graph.graph) != 0:
                raise RuntimeError("ggml failed to compute the graph")
            return graph.read().to(batch.hidden_states.dtype)

        return run

    def version(self) -> str:
        return _library().ggml_version().decode()
