"""ExpertSwitcher: task vectors on a live model."""

import copy

import pytest
import torch
from torch import nn

from moe_kernels import Patch, TernaryDelta, apply_, compress, decompress, make_patch
from moe_kernels.nn import ExpertSwitcher, expert_switcher


def model(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(70, 90), nn.LayerNorm(90), nn.Linear(90, 5)).to(dtype)


def tuned(base: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (p.float() + 0.01 * torch.randn(p.shape, generator=generator)).to(p.dtype)
        for name, p in base.state_dict().items()
    }


def bits(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.view(torch.int16).clone() for name, tensor in module.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def switched():
    base = model()
    switcher = ExpertSwitcher(base)
    experts = {name: compress(tuned(base, seed), 0.2, base=base.state_dict()) for seed, name in enumerate("abc")}
    for name, deltas in experts.items():
        switcher.add(name, deltas)
    return base, switcher, experts


def expected(base_state, experts, coefficients) -> dict[str, torch.Tensor]:
    state = copy.deepcopy(base_state)
    for name, weight in state.items():
        apply_(weight, [experts[e][name] for e in coefficients], list(coefficients.values()), backend="reference")
    return {name: weight.view(torch.int16) for name, weight in state.items()}


def test_any_order_of_switches_ends_in_the_same_bits(switched):
    base, switcher, experts = switched
    start, state = bits(base), copy.deepcopy(base.state_dict())
    for wanted in ("a", {"b": 0.5, "c": -2.0}, {"a": 1.0, "b": 1.0, "c": 1.0}, "c", None, "a"):
        switcher.switch(wanted)
        coefficients = {} if wanted is None else {wanted: 1.0} if isinstance(wanted, str) else wanted
        assert same(bits(base), expected(state, experts, coefficients))
        assert switcher.active == coefficients
    assert switcher.generation == 6
    switcher.restore()
    assert same(bits(base), start) and switcher.active == {} and switcher.undo_bytes == 0


def test_parameters_stay_the_same_objects(switched):
    base, switcher, _ = switched
    before = {name: (id(p), p.data_ptr()) for name, p in base.named_parameters()}
    switcher.switch("a")
    assert {name: (id(p), p.data_ptr()) for name, p in base.named_parameters()} == before
    assert all(p.requires_grad for p in base.parameters())


def test_using(switched):
    base, switcher, _ = switched
    start = bits(base)
    switcher.switch("a")
    with_a = bits(base)
    with pytest.raises(KeyError), switcher.using({"b": 2.0}):
        assert not same(bits(base), with_a)
        raise KeyError
    assert same(bits(base), with_a) and switcher.active == {"a": 1.0}
    with switcher.using(None):
        assert same(bits(base), start)


def test_coefficients_by_layer(switched):
    base, switcher, experts = switched
    state = copy.deepcopy(base.state_dict())
    switcher.switch({"a": lambda name: float(name.startswith("0.")), "b": lambda name: float(name.startswith("2."))})
    first, last = expected(state, experts, {"a": 1.0}), expected(state, experts, {"b": 1.0})
    untouched = {name: weight.view(torch.int16) for name, weight in state.items()}
    for name, weight in bits(base).items():
        assert torch.equal(weight, {"0": first, "1": untouched, "2": last}[name[0]][name])


def test_half_of_the_tensors():
    base = model()
    deltas = compress(tuned(base, 0), 0.5, base=base.state_dict())
    switcher, start = ExpertSwitcher(base), bits(base)
    switcher.add("half", {name: delta for name, delta in deltas.items() if name.startswith("0.")})
    switcher.switch("half")
    assert {name for name, weight in bits(base).items() if not torch.equal(weight, start[name])} == {
        "0.weight", "0.bias",
    }  # fmt: skip


def test_tied_parameters_change_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
            self.head.weight = self.embed.weight

    tied = Tied()
    before = tied.head.weight.detach().clone()
    deltas = compress({"embed.weight": torch.randn(20, 8)}, 0.5)
    switcher = ExpertSwitcher(tied)
    switcher.add("once", {"embed.weight": deltas["embed.weight"], "head.weight": deltas["embed.weight"]})
    switcher.add("head", {"head.weight": deltas["embed.weight"]})
    changed = before.clone()
    apply_(changed, deltas["embed.weight"])
    for expert in ("once", "head"):
        switcher.switch(expert)
        assert torch.equal(tied.embed.weight, changed) and tied.head.weight is tied.embed.weight
    # both at once, each by another name: one pass over the one parameter
    switcher.switch({"once": 1.0, "head": 1.0})
    twice = before.clone()
    apply_(twice, [deltas["embed.weight"]] * 2)
    assert torch.equal(tied.embed.weight, twice)
    switcher.restore()
    assert torch.equal(tied.embed.weight, before)
    with pytest.raises(ValueError, match="head.weight must be the task vector of embed.weight"):
        switcher.add("two", {**deltas, "head.weight": compress(torch.randn(20, 8), 0.5)})


def test_a_failure_leaves_everything_as_it_was(switched, monkeypatch):
    base, switcher, _ = switched
    switcher.switch("a")
    with_a, calls = bits(base), []

    def fails_at_the_third(weight, *arguments, **options):
        calls.append(weight)
        if len(calls) == 3:
            raise MemoryError
        return apply_(weight, *arguments, **options)

    monkeypatch.setattr(expert_switcher, "apply_", fails_at_the_third)
    with pytest.raises(MemoryError):
        switcher.switch("b")
    assert same(bits(base), with_a) and switcher.active == {"a": 1.0} and switcher.generation == 1
    monkeypatch.undo()
    with pytest.raises(ValueError, match="coefficient of .* must be finite"):
        switcher.switch({"b": float("nan")})
    assert same(bits(base), with_a)


def test_changes_by_others_are_found(switched):
    base, switcher, _ = switched
    switcher.switch("a")
    with torch.no_grad():
        base[0].bias.add_(1)
    state = bits(base)
    with pytest.raises(RuntimeError, match="ExpertSwitcher: 0.bias was changed since the last switch; nothing was"):
        switcher.switch("b")
    assert same(bits(base), state)


def test_bytes_and_planes(switched):
    base, _, experts = switched
    state = copy.deepcopy(base.state_dict())
    switcher = ExpertSwitcher(base)
    switcher.add("bytes", {name: delta.data for name, delta in experts["a"].items()})
    switcher.add("planes", decompress(experts["a"]))
    for expert in switcher.experts:
        switcher.switch(expert)
        assert same(bits(base), expected(state, experts, {"a": 1.0}))


def test_another_base_is_refused(switched):
    base, switcher, experts = switched
    with torch.no_grad():
        base[2].weight[0, 0] += 1
    with pytest.raises(ValueError, match=r"add\('d'\): 2.weight must be of this base, got a task vector of another"):
        switcher.add("d", experts["a"])
    assert "d" not in switcher.experts
    switcher.add("d", experts["a"], any_base=True)


def test_bad_input(switched):
    base, switcher, experts = switched
    with pytest.raises(ValueError, match="deltas must be of the model's parameters, got others: lost"):
        switcher.add("d", {"lost": experts["a"]["0.bias"]})
    with pytest.raises(ValueError, match=r"0.bias must be of shape \[5\], got \[90\]"):
        switcher.add("d", {"0.bias": experts["a"]["2.bias"]})
    with pytest.raises(TypeError, match="0.bias must be a task vector, got float"):
        switcher.add("d", {"0.bias": 1.0})
    with pytest.raises(ValueError, match="expert must be a new name"):
        switcher.add("a", {})
    with pytest.raises(ValueError, match=r"expert must be one that was added \(a, b, c\), got 'z'"):
        switcher.switch("z")
    switcher.switch("a")
    with pytest.raises(ValueError, match="call restore first"):
        switcher.add("d", {})
    with pytest.raises(ValueError, match="call restore first"):
        switcher.remove("a")
    switcher.remove("b")
    assert switcher.experts == ("a", "c")
    assert isinstance(decompress(experts["a"]["0.bias"]), TernaryDelta)


def test_a_patch_is_the_tuned_model_to_the_last_bit(switched):
    base, switcher, experts = switched
    start, goal = bits(base), tuned(base, 7)
    goal["1.weight"] = base.state_dict()["1.weight"].clone()  # half fine-tuning: some tensors stay
    patches = make_patch(goal, base.state_dict())
    del patches["1.weight"]
    switcher.add("tuned", {name: patch.data for name, patch in patches.items()})
    switcher.switch("tuned")
    assert same(bits(base), {name: tensor.view(torch.int16) for name, tensor in goal.items()})
    assert switcher.undo_bytes == 0
    switcher.switch({"tuned": lambda name: float(name == "0.weight"), "a": lambda name: float(name != "0.weight")})
    switcher.restore()
    assert same(bits(base), start)
    with pytest.raises(ValueError, match="coefficient of .* must be 1 or 0: 'tuned' has a patch of it, got 0.5"):
        switcher.switch({"tuned": 0.5})
    for wanted in ({"tuned": 1.0, "a": 1.0}, {"a": 1.0, "tuned": 1.0}):
        with pytest.raises(ValueError, match="changed by one expert where one has a patch of it, got another and"):
            switcher.switch(wanted)
    assert same(bits(base), start) and switcher.active == {}


def test_a_patch_of_another_base_is_refused():
    base = model()
    switcher = ExpertSwitcher(base)
    patch = make_patch(tuned(base, 1)["0.weight"], tuned(base, 2)["0.weight"])
    with pytest.raises(ValueError, match="must be of this base, got a patch of another"):
        switcher.add("other", {"0.weight": patch}, any_base=True)
    half = make_patch(base[0].weight.detach().half() + 1, base[0].weight.detach().half())
    with pytest.raises(TypeError, match="0.weight must be torch.float16, got torch.bfloat16"):
        switcher.add("half", {"0.weight": half})
    assert isinstance(half, Patch) and switcher.experts == ()


def test_sparse_fine_tunes_add_up():
    """LT-SFT: base + task + language, each a sparse difference with its values, with one rounding."""
    base = model()
    start, state = bits(base), copy.deepcopy(base.state_dict())
    switcher = ExpertSwitcher(base)
    experts = {
        name: compress(tuned(base, seed), 0.05, base=state, values=torch.float32)
        for seed, name in enumerate(("task", "language"))
    }
    for name, deltas in experts.items():
        switcher.add(name, deltas)
    switcher.switch({"task": 1.0, "language": 1.0})
    for name, weight in base.state_dict().items():
        total = experts["task"][name].dense() + experts["language"][name].dense()
        assert torch.equal(weight, torch.where(total != 0, (state[name].float() + total).bfloat16(), state[name]))
    switcher.restore()
    assert same(bits(base), start)
