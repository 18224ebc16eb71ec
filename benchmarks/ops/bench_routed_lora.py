"""One LoRA adapter a token beside a 2048 x 2048 linear layer: what the adapters add to the base's time.

Every candidate takes the base's output and adds the adapters' to it, its own sorting included; ``base`` is the linear
layer alone. ``E8`` has 8 adapters of rank 16, ``E64`` 64 of them, ``mixed`` 16 of ranks 8 to 128; a model's shape
has as many adapters as experts, of rank 16. PEFT's layer call computes the base too: its overhead is its time less
``base``'s.
"""

from importlib.util import find_spec

import torch
from torch import Tensor, nn

from benchmarks.harness import Candidate, Cell, Cells, Check, Context, check
from benchmarks.shapes import SHAPES
from moe_kernels import _dispatch, routed_lora

SUMMARY = "routed_lora beside torch's ways to add adapters, and PEFT"
DEFAULTS = dict(shapes=["E8", "E64", "mixed"], dtypes=["fp32", "bf16"], tokens=[1, 8, 64, 512])
PROVIDER_NAMES = ["ours", "base", "torch_segments", "torch_concat", "torch_index_add", "torch_gather_bmm", "peft"]

_RANKS = {"E8": [16] * 8, "E64": [16] * 64, "mixed": [8, 16, 32, 64, 128, 16, 8, 32] * 2}
_SCALING = 0.5


class _Inputs:
    def __init__(self, shape: str, dtype: torch.dtype, num_tokens: int):
        generator = torch.Generator().manual_seed(0)

        def random(*size: int) -> Tensor:
            return (torch.randn(*size, generator=generator) * size[-1] ** -0.5).to(dtype)

        self.ranks = _RANKS.get(shape) or [16] * SHAPES[shape].num_experts
        self.size = 2048 if shape in _RANKS else SHAPES[shape].hidden_size
        self.x = random(num_tokens, self.size)
        self.weight = random(self.size, self.size)
        self.a = [random(rank, self.size) for rank in self.ranks]
        self.b = [random(self.size, rank) for rank in self.ranks]
        self.ids = torch.randint(0, len(self.ranks), (num_tokens,), generator=generator)
        self.base = self.x @ self.weight.T
        # ours keeps them packed at their true ranks
        self.packed_a = torch.cat(self.a)
        self.packed_b = torch.cat([b.T for b in self.b])
        self.table = torch.tensor(self.ranks, dtype=torch.int32)
        self.starts = (self.table.cumsum(0) - self.table).int()
        # what the other ways keep ready
        self.row_adapter = torch.repeat_interleave(torch.arange(len(self.ranks)), self.table)
        most = max(self.ranks)
        self.padded_a = torch.stack([nn.functional.pad(a, (0, 0, 0, most - len(a))) for a in self.a])
        self.padded_b = torch.stack([nn.functional.pad(b, (0, most - b.shape[1])) for b in self.b])


def _ours(i: _Inputs) -> Tensor:
    return routed_lora(
        i.x, i.packed_a, i.packed_b, i.ids, scaling=_SCALING, ranks=i.table, rank_starts=i.starts,
        max_rank=max(i.ranks), base=i.base,
    )  # fmt: skip


def _segments(i: _Inputs) -> Tensor:
    order = i.ids.argsort(stable=True)
    rows, counts = i.x[order], torch.bincount(i.ids, minlength=len(i.ranks)).tolist()
    deltas, at = [], 0
    for adapter, count in enumerate(counts):
        if count:
            deltas.append((rows[at : at + count] @ i.a[adapter].T) @ i.b[adapter].T)
            at += count
    return i.base.index_add(0, order, torch.cat(deltas), alpha=_SCALING)


def _concat(i: _Inputs) -> Tensor:
    mask = (i.row_adapter == i.ids[:, None]).to(i.x.dtype)
    return torch.addmm(i.base, (i.x @ i.packed_a.T) * mask, i.packed_b, alpha=_SCALING)


def _index_add(i: _Inputs) -> Tensor:
    out = i.base.clone()
    for adapter in i.ids.unique().tolist():
        tokens = (i.ids == adapter).nonzero()[:, 0]
        out.index_add_(0, tokens, (i.x[tokens] @ i.a[adapter].T) @ i.b[adapter].T, alpha=_SCALING)
    return out


def _gather_bmm(i: _Inputs) -> Tensor:
    v = torch.bmm(i.padded_a[i.ids], i.x[:, :, None])
    return i.base + _SCALING * torch.bmm(i.padded_b[i.ids], v)[:, :, 0]


def _peft_layer(i: _Inputs):
    from peft.tuners.lora import LoraConfig
    from peft.tuners.lora.layer import Linear as LoraLinear

    base = nn.Linear(i.size, i.size, bias=False, dtype=i.weight.dtype)
    base.weight.data.copy_(i.weight)
    layer = None
    for adapter, rank in enumerate(i.ranks):
        name, config = str(adapter), LoraConfig(r=rank, lora_alpha=_SCALING * rank)
        if layer is None:
            layer = LoraLinear(base, name, config, r=rank, lora_alpha=_SCALING * rank)
        else:
            layer.update_layer(name, rank, lora_alpha=_SCALING * rank, config=config)
        layer.lora_A[name].to(i.weight.dtype).weight.data.copy_(i.a[adapter])
        layer.lora_B[name].to(i.weight.dtype).weight.data.copy_(i.b[adapter])
    layer.eval()
    names = [str(adapter) for adapter in i.ids.tolist()]
    return lambda: layer(i.x[:, None], adapter_names=names)[:, 0]


def cells(context: Context) -> Cells:
    for shape in context.shapes:
        for num_tokens in context.tokens:
            for dtype in context.dtypes:
                yield _cell(context, shape, dtype, num_tokens)


def _cell(context: Context, shape: str, dtype: torch.dtype, num_tokens: int) -> Cell:
    inputs = _Inputs(shape, dtype, num_tokens)
    used = inputs.ids.unique().tolist()
    pair_ranks = sum(inputs.ranks[adapter] for adapter in inputs.ids.tolist())
    reference64 = torch.stack(
        [
            row.double() + _SCALING * (inputs.b[e].double() @ (inputs.a[e].double() @ x.double()))
            for row, x, e in zip(inputs.base, inputs.x, inputs.ids.tolist(), strict=True)
        ]
    )
    eager = _index_add(inputs)

    def checked(call) -> Check:
        return check(call(), reference64, eager, "out")

    ways = {
        "torch_segments": _segments, "torch_concat": _concat, "torch_index_add": _index_add,
        "torch_gather_bmm": _gather_bmm,
    }  # fmt: skip
    candidates = [
        Candidate(
            "ours", lambda _: _ours(inputs), lambda: checked(lambda: _ours(inputs)), True,
            _dispatch.resolve("routed_lora", "auto", "cpu"),
        ),
        Candidate("base", lambda _: nn.functional.linear(inputs.x, inputs.weight), version=torch.__version__),
    ]  # fmt: skip
    for name, way in ways.items():
        candidates.append(
            Candidate(name, lambda _, way=way: way(inputs), lambda way=way: checked(lambda: way(inputs)),
                      version=torch.__version__)
        )  # fmt: skip
    skipped = {}
    if find_spec("peft") is None:
        skipped["peft"] = "peft is not installed"
    elif context.wants("peft"):
        import peft

        layer = torch.no_grad()(_peft_layer(inputs))
        candidates.append(Candidate("peft", lambda _: layer(), lambda: checked(layer), version=peft.__version__))
    return Cell(
        "routed_lora", shape, dtype, num_tokens,
        [candidate for candidate in candidates if context.wants(candidate.name)],
        flops=4 * pair_ranks * inputs.size,
        bytes=dtype.itemsize * inputs.size * (2 * sum(inputs.ranks[e] for e in used) + 3 * num_tokens),
        skipped=skipped,
    )  # fmt: skip
