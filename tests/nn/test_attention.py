"""MoEAttention: BAM's equation in loops, transformers' own attention, gradients, what it refuses."""

import copy
import math
from functools import partial

import pytest
import torch
from torch import nn

from moe_kernels import route, route_top_p
from moe_kernels.nn import MoEAttention
from moe_kernels.testing import assert_close_to_reference


def bam(module: MoEAttention, x: torch.Tensor) -> torch.Tensor:
    """BAM, section 3: the softmax-weighted sum of the experts' causal attentions, one head and token at a time."""
    group = module.num_heads // module.num_kv_heads
    weights = module.router(x).softmax(-1)
    out = []
    for sequence, shares in zip(x, weights, strict=True):
        rows = []
        for t in range(len(sequence)):
            row = torch.zeros_like(sequence[t])
            for e in range(module.num_experts):
                kv = e if module.k_proj.shape[0] > 1 else 0
                queries = (module.q_proj[e] @ sequence[t]).view(module.num_heads, -1)
                keys = (sequence[: t + 1] @ module.k_proj[kv].T).view(t + 1, module.num_kv_heads, -1)
                values = (sequence[: t + 1] @ module.v_proj[kv].T).view(t + 1, module.num_kv_heads, -1)
                heads = []
                for h in range(module.num_heads):
                    scores = (keys[:, h // group] @ queries[h]) / math.sqrt(module.head_dim)
                    heads.append(scores.softmax(0) @ values[:, h // group])
                row = row + shares[t, e] * (module.o_proj[e] @ torch.cat(heads))
            rows.append(row)
        out.append(torch.stack(rows))
    return torch.stack(out)


@pytest.mark.parametrize("share_kv", [False, True])
# one key head for each query head, one for two, one for all
@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
def test_forward_and_backward(share_kv, num_kv_heads):
    module = MoEAttention(12, 3, 4, num_kv_heads, share_kv=share_kv)
    assert module.k_proj.shape[0] == (1 if share_kv else 3)
    x, grad_out = torch.randn(2, 5, 12), torch.randn(2, 5, 12)
    actual, eager = module(x), bam(module, x)
    parameters = list(module.parameters())
    grads = torch.autograd.grad(actual, parameters, grad_out)
    eager_grads = torch.autograd.grad(eager, parameters, grad_out)
    double = copy.deepcopy(module).double()
    expected = bam(double, x.double())
    expected_grads = torch.autograd.grad(expected, list(double.parameters()), grad_out.double())
    assert_close_to_reference(actual.detach(), expected.detach(), eager.detach())
    for name, *three in zip(dict(module.named_parameters()), grads, expected_grads, eager_grads, strict=True):
        assert_close_to_reference(*three, name)


def test_gradcheck():
    module = MoEAttention(4, 2, 2, 1).double()
    x = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, x)


def test_sparse_routing_leaves_experts_out():
    module = MoEAttention(8, 3, 2, routing=partial(route, top_k=1))
    x = torch.randn(1, 6, 8)
    out = module(x)
    chosen = module.router(x).argmax(-1)
    weights = module.router(x).softmax(-1).amax(-1, keepdim=True)
    for expert in range(3):
        alone = copy.deepcopy(module)
        alone.routing = lambda logits, expert=expert: (
            torch.full((6, 1), expert, dtype=torch.int32),
            torch.ones(6, 1),
        )
        expected, double = alone(x) * weights, copy.deepcopy(alone).double()(x.double()) * weights.double()
        at = chosen == expert
        assert_close_to_reference(out[at].detach(), double[at].detach(), expected[at].detach())
    module.routing = partial(route_top_p, top_p=0.5)
    module(x).sum().backward()
    assert module.router.weight.grad.any()


def llama_attention(seed: int):
    transformers = pytest.importorskip("transformers")
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(hidden_size=16, num_attention_heads=4, num_key_value_heads=2, head_dim=4)
    config._attn_implementation = "sdpa"
    return llama.LlamaAttention(config, layer_idx=0).eval(), llama.LlamaRotaryEmbedding(config)


@pytest.mark.parametrize("share_kv", [False, True])
def test_copies_of_one_attention_compute_it(share_kv):
    attention, rotary = llama_attention(0)
    module = MoEAttention.from_attentions([attention, attention], 4, 2, share_kv=share_kv)
    assert not attention.training and not any(part.training for part in module.modules())
    x = torch.randn(2, 7, 16)
    positions = rotary(x, torch.arange(7)[None])
    double, double_positions = copy.deepcopy(attention).double(), tuple(table.double() for table in positions)
    eager = attention(x, position_embeddings=positions, attention_mask=None)[0].detach()
    expected = double(x.double(), position_embeddings=double_positions, attention_mask=None)[0].detach()
    assert_close_to_reference(module(x, positions).detach(), expected, eager)


def test_several_attentions_and_shared_keys():
    attentions = [llama_attention(seed)[0] for seed in (0, 1)]
    own = MoEAttention.from_attentions(attentions, 4, 2)
    assert torch.equal(own.k_proj[1], attentions[1].k_proj.weight)
    shared = MoEAttention.from_attentions(attentions, 4, 2, share_kv=True)
    mean = (attentions[0].k_proj.weight + attentions[1].k_proj.weight) / 2
    assert torch.equal(shared.k_proj[0], mean) and torch.equal(shared.q_proj, own.q_proj)
    other = MoEAttention(16, 2, 4, 2, share_kv=True)
    other.load_state_dict(shared.state_dict())
    x = torch.randn(1, 3, 16)
    assert torch.equal(other(x), shared(x))


def test_compile_and_mask():
    module = MoEAttention(8, 2, 2)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (4, 6):
        x = torch.randn(2, length, 8)
        assert torch.equal(compiled(x), module(x))
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    double = copy.deepcopy(module).double()(x.double()).detach()
    assert_close_to_reference(module(x, attention_mask=causal).detach(), double, module(x).detach())


def test_refusals_name_what_is_wrong():
    linear = nn.Linear(4, 4)
    for call, message in [
        (lambda: MoEAttention(8, 2, 4, 3), "num_kv_heads must be a divisor of num_heads=4, got 3"),
        (lambda: MoEAttention(9, 2, 4), "num_heads must be a divisor of hidden_size=9, got 4"),
        (lambda: MoEAttention(8, 2, 4)(torch.randn(3, 8)), r"hidden_states must be of shape \[batch, sequence, 8\]"),
        (lambda: MoEAttention.from_attentions([linear], 4, 4), "attention.q_proj must be an nn.Linear without bias"),
        (lambda: MoEAttention.from_attentions([], 4, 4), "attentions must be at least one, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
