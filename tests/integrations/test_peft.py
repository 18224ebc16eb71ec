"""load_peft_adapters: against PEFT itself where it is installed, and what it refuses."""

import json

import pytest
import torch
from torch import nn

from moe_kernels.testing import assert_close_to_reference

safetensors_torch = pytest.importorskip("safetensors.torch")

from moe_kernels.integrations.peft import load_peft_adapters  # noqa: E402


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.up_proj = nn.Linear(12, 12), nn.Linear(12, 20, bias=False)
        self.down_proj = nn.Linear(20, 12, bias=False)

    def forward(self, x):
        return x + self.down_proj(nn.functional.silu(self.up_proj(self.q_proj(x))))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(30, 12)
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(12, 30, bias=False)

    def forward(self, token_ids):
        x = self.embed(token_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def write(path, tensors: dict, **config):
    path.mkdir()
    safetensors_torch.save_file(tensors, str(path / "adapter_model.safetensors"))
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], **config}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def q_proj(layer: int = 0, rank: int = 2, **other) -> dict:
    name = f"base_model.model.layers.{layer}.q_proj"
    return {f"{name}.lora_A.weight": torch.randn(rank, 12), f"{name}.lora_B.weight": torch.randn(12, rank), **other}


# ranks and alphas by pattern, rank-stabilised scaling, DoRA, embedding and head
CONFIGS = {
    "plain": dict(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]),
    "patterns": dict(
        r=4, target_modules=["q_proj", "up_proj"], rank_pattern={"layers.1.q_proj": 2}, alpha_pattern={"up_proj": 3},
        use_rslora=True,
    ),
    "dora": dict(r=3, lora_alpha=6, target_modules=["q_proj", "up_proj"], use_dora=True),
    "vocabulary": dict(r=2, lora_alpha=2, target_modules=["embed", "head"]),
}  # fmt: skip


@pytest.fixture
def adapters(tmp_path):
    peft = pytest.importorskip("peft")
    model = Model()
    folders, outputs = {}, {}
    tokens = torch.randint(0, 30, (5, 7))
    for name, config in CONFIGS.items():
        wrapped = peft.get_peft_model(model, peft.LoraConfig(**config))
        for key, parameter in wrapped.named_parameters():
            if "lora_" in key:
                nn.init.normal_(parameter, std=0.3)
                if "magnitude" in key:
                    parameter.data.abs_().add_(0.5)
        wrapped.save_pretrained(tmp_path / name)
        folders[name] = tmp_path / name
        for dtype in (torch.float64, torch.float32):
            with torch.no_grad():
                outputs[name, dtype] = wrapped.to(dtype)(tokens)
        wrapped.to(torch.float32)
        model = wrapped.unload()
    return model, folders, tokens, outputs


def test_equal_to_peft_in_one_mixed_batch(adapters):
    model, folders, tokens, outputs = adapters
    plain = model(tokens)
    served = load_peft_adapters(model, folders)
    names = [*CONFIGS, None]
    served.use(names)
    with torch.no_grad():
        out = model(tokens)
    for i, name in enumerate(CONFIGS):
        assert_close_to_reference(out[i], outputs[name, torch.float64][i], outputs[name, torch.float32][i], name)
        assert (out[i] - plain[i]).abs().max() > 0.01
    served.use(None)
    assert torch.equal(model(tokens), plain)
    with torch.no_grad():
        served.use([None, "plain"])  # another batch: not to the bit, since PyTorch's own matrix products are not
        assert_close_to_reference(
            model(tokens[[4, 0]])[1], outputs["plain", torch.float64][0], outputs["plain", torch.float32][0]
        )
    assert torch.equal(served.restore()(tokens), plain) and isinstance(model.head, nn.Linear)


def test_export_is_equal_to_the_bit(adapters, tmp_path):
    model, folders, _, _ = adapters
    served = load_peft_adapters(model, folders)
    for name, folder in folders.items():
        served.export(name, tmp_path / "out" / name)
        before = safetensors_torch.load_file(folder / "adapter_model.safetensors")
        after = safetensors_torch.load_file(tmp_path / "out" / name / "adapter_model.safetensors")
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key].view(torch.int32), after[key].view(torch.int32)) for key in before)
        config = [json.loads((path / "adapter_config.json").read_text()) for path in (folder, tmp_path / "out" / name)]
        assert config[0] == config[1]


def test_add_evict_and_mix(tmp_path):
    model, tokens = Model(), torch.randint(0, 30, (2, 3))
    first, second = (write(tmp_path / name, q_proj(layer)) for layer, name in enumerate(("one", "two")))
    served = load_peft_adapters(model, {"one": first}, num_slots=2)
    served.use(["one", None])
    before = model(tokens)
    served.add("two", second)  # targets a layer that had no adapters
    assert torch.equal(model(tokens), before)
    served.mix(["one", "two"], torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    mixed = model(tokens)
    assert torch.equal(mixed[0], before[0]) and not torch.equal(mixed[1], before[1])
    with pytest.raises(ValueError, match="adapter 'three' needs one of 2 slots"):
        served.add("three", first)
    served.evict("one")
    with pytest.raises(ValueError, match=r"must be one that is loaded \('two'\), got 'one'"):
        served.use(["one"])
    with pytest.raises(RuntimeError, match="whose slot is empty"):
        model(tokens)  # the batch still names it
    served.add("three", first)
    served.use(["three", None])
    assert torch.equal(model(tokens), before)


def test_a_slot_forgets_the_row_scale_of_the_adapter_before(adapters, tmp_path):
    model, folders, tokens, _ = adapters
    served = load_peft_adapters(model, {"dora": folders["dora"]}, num_slots=1)
    served.evict("dora")
    served.add("head", folders["vocabulary"])  # leaves alone every layer that the other scaled
    served.use(["head"])
    with torch.no_grad():
        actual = model(tokens[:1])
        fresh = served.restore()
        alone = load_peft_adapters(fresh, {"head": folders["vocabulary"]})
        alone.use(["head"])
        torch.testing.assert_close(actual, fresh(tokens[:1]))


def test_what_is_not_understood_is_refused(tmp_path):
    model = Model()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    name = "base_model.model.layers.0.q_proj"
    bad = {
        "a key": (q_proj(**{f"{name}.lora_C.weight": torch.ones(1)}), {}, f"key of adapter 'bad'.*{name}.lora_C"),
        "a module": ({key.replace("q_proj", "v_proj"): t for key, t in q_proj().items()}, {}, "key.*v_proj.lora_A"),
        "a rank": (q_proj(rank=3), {}, r"q_proj.lora_A.weight of adapter 'bad' must be of shape \[rank=2, in=12\]"),
        "a dtype": (
            {key: t.bfloat16() for key, t in q_proj().items()},
            {},
            "must be of the base's dtype torch.float32",
        ),
        "half": (dict(list(q_proj().items())[:1]), {}, "there with both factors"),
        "targets": (q_proj(), dict(target_modules=["q_proj", "k_proj"]), "target_modules.*got 'k_proj'"),
        "saved": (
            q_proj(),
            dict(modules_to_save=["head"]),
            "modules_to_save of adapter 'bad' must be modules that have",
        ),
        "shape": (
            q_proj(**{f"{PREFIX}head.weight": torch.ones(30, 11)}),
            dict(modules_to_save=["head"]),
            r"head.weight of adapter 'bad' must be of shape \[30, 12\] and torch.float32",
        ),
        "parts": (
            q_proj(**{f"{PREFIX}head.bias": torch.ones(30)}),
            dict(modules_to_save=["head"]),
            "module head of adapter 'bad' must be saved with weight, got bias",
        ),
        "both ways": (
            q_proj(
                **{
                    f"{PREFIX}layers.0.q_proj.weight": torch.ones(12, 12),
                    f"{PREFIX}layers.0.q_proj.bias": torch.ones(12),
                }
            ),
            dict(modules_to_save=["q_proj"]),
            r"layers.0.q_proj of adapter 'bad' must be whole \(modules_to_save\) or adapted",
        ),
        "experts": (q_proj(), dict(target_parameters=["experts.w"]), "target_parameters of adapter 'bad' must be None"),
        "corda": (q_proj(), dict(init_lora_weights="corda"), "init_lora_weights.*got 'corda'; name the folder"),
        "changed base": (q_proj(), dict(init_lora_weights="pissa", use_dora=True), "saved with use_dora=True"),
        "kasa": (
            q_proj(),
            dict(kasa_config={"beta": 1}),
            "file of adapter 'bad' must be with a lora_diag for each module",
        ),
        "a diagonal": (q_proj(**{f"{name}.lora_diag": torch.ones(2)}), {}, "must be without lora_diag"),
        "dora": (q_proj(), dict(use_dora=True), "saved with use_dora=True"),
        "type": (q_proj(), dict(peft_type="IA3"), "peft_type of adapter 'bad' must be 'LORA', got 'IA3'"),
    }
    good = write(tmp_path / "good", q_proj())
    for folder, (tensors, config, message) in bad.items():
        write(tmp_path / folder, tensors, **config)
        with pytest.raises(ValueError, match=message):
            load_peft_adapters(model, {"good": good, "bad": tmp_path / folder})
    with pytest.raises(ValueError, match="folder of adapter 'none' must be one with adapter_config.json"):
        load_peft_adapters(model, {"none": tmp_path / "nowhere"})
    assert {key: value for key, value in model.state_dict().items()}.keys() == state.keys()
    assert isinstance(model.layers[0].q_proj, nn.Linear)


def test_adapter_of_another_base(tmp_path):
    model = Model()
    model.config = type("Config", (), {"_name_or_path": "new-base"})()
    folder = write(tmp_path / "old", q_proj(), base_model_name_or_path="old-base")
    with pytest.raises(ValueError, match="base model of adapter 'old' must be new-base, got old-base"):
        load_peft_adapters(model, {"old": folder})
    assert load_peft_adapters(model, {"old": folder}, allow_other_base=True).names == ["old"]


def test_maps_of_layers_in_a_mixed_batch(tmp_path):
    from moe_kernels.nn import LayerMap

    model, tokens = Model(), torch.randint(0, 30, (4, 3))
    both = [q_proj(0) | q_proj(1) for _ in range(2)]
    folders = {name: write(tmp_path / name, tensors) for name, tensors in zip(("one", "two"), both, strict=True)}
    served = load_peft_adapters(model, folders)
    served.define("swap", LayerMap({r"layers\.0": {"one": 1.0}, r"layers\.1": {"one": 0.5, "two": 0.5}}))
    served.define("mean", LayerMap({"": {"one": 0.5, "two": 0.5}}))
    served.use(["swap", "two", None, "mean"])
    with torch.no_grad():
        out = model(tokens)
        for row, shares in enumerate(([(1, 0), (0.5, 0.5)], [(0, 1)] * 2, [(0, 0)] * 2, [(0.5, 0.5)] * 2)):
            results = []
            for cast in (torch.Tensor.double, torch.Tensor.float):
                merged = Model().to(cast(torch.ones(1)).dtype)
                merged.load_state_dict(served_state(served, model))
                for layer, weights in enumerate(shares):
                    for weight, tensors in zip(weights, both, strict=True):
                        a, b = (cast(tensors[f"{PREFIX}layers.{layer}.q_proj.lora_{f}.weight"]) for f in "AB")
                        merged.layers[layer].q_proj.weight += weight * 2 * b @ a
                results.append(merged(tokens[row]))
            assert_close_to_reference(out[row], *results)
        served.use(["two"] * 4)
        assert torch.equal(model(tokens)[1], out[1])
    with pytest.raises(ValueError, match="name must be none of the adapters', got 'one'"):
        served.define("one", LayerMap({}))
    with pytest.raises(ValueError, match="must be one that is loaded.*got 'three'"):
        served.define("x", LayerMap({"": {"three": 1.0}}))
    served.evict("one")
    with pytest.raises(ValueError, match="must be one that is loaded.*got 'one'"):
        served.use(["swap"] * 4)
    assert torch.equal(model(tokens)[1], out[1])  # the batch that was set is still there


PREFIX = "base_model.model."


def served_state(served, model) -> dict:
    """The base model's own weights."""
    own = {key: value for key, value in model.state_dict().items() if "pool" not in key}
    return {key.replace("base_layer.", ""): value for key, value in own.items()}


def test_a_patch_on_a_newer_base_and_how_far_that_is(tmp_path):
    from moe_kernels.integrations.peft import fingerprint

    old, tensors = Model(), q_proj()
    new = Model()
    new.load_state_dict(old.state_dict())
    with torch.no_grad():
        new.layers[0].q_proj.weight += 0.01
    served = load_peft_adapters(new, {"patch": write(tmp_path / "patch", tensors)}, allow_other_base=True)
    (name, change), *others = served.compare_bases("patch", old).items()
    assert name == "layers.0.q_proj" and not others
    before, after = old.layers[0].q_proj.weight.detach(), new.layers[0].q_proj.weight.detach()
    a, b = (tensors[f"{PREFIX}{name}.lora_{f}.weight"].double() for f in "AB")
    matrices = before.double(), after.double() - before.double(), 2 * b @ a
    for found, matrix in zip((change.weight, change.change, change.patch), matrices, strict=True):
        exact = matrix.norm()
        assert_close_to_reference(torch.tensor(found).float(), exact, exact.float())
    assert change.old_fingerprint == fingerprint(before) != change.new_fingerprint == fingerprint(after.clone())
    assert fingerprint(before) != fingerprint(before.T.contiguous().T.reshape(24, 6))
    with pytest.raises(ValueError, match="old_base must be a model with module layers.0.q_proj, got none"):
        served.compare_bases("patch", nn.Linear(2, 2))


def test_modules_to_save_in_a_mixed_batch(tmp_path):
    peft = pytest.importorskip("peft")
    model, tokens, outputs, folders = Model(), torch.randint(0, 30, (5, 3)), {}, {}
    configs = {
        "whole": dict(target_modules=["q_proj"], modules_to_save=["head", "layers.1.down_proj"]),
        "head": dict(target_modules=["up_proj"], modules_to_save=["head"]),
        "plain": dict(target_modules=["q_proj"]),
    }
    for name, config in configs.items():
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, **config))
        with torch.no_grad():
            for key, parameter in wrapped.named_parameters():
                if "lora_" in key or ("modules_to_save" in key and "original" not in key):
                    nn.init.normal_(parameter, std=0.3)
        wrapped.save_pretrained(tmp_path / name)
        folders[name] = tmp_path / name
        for dtype in (torch.float64, torch.float32):
            with torch.no_grad():
                outputs[name, dtype] = wrapped.to(dtype)(tokens)
        model = wrapped.to(torch.float32).unload()
    model = plain_copy(model)
    before = model(tokens)
    served = load_peft_adapters(model, folders)
    names = ["head", None, "whole", "plain", "whole"]
    served.use(names)
    with torch.no_grad():
        out = model(tokens)
    for i, name in enumerate(names):
        if name is None:
            assert torch.equal(out[i], before[i])
            continue
        assert_close_to_reference(out[i], outputs[name, torch.float64][i], outputs[name, torch.float32][i], name)
    assert model.head.weight.shape == (30, 12)  # code that looks at the head still finds it
    for name in ("whole", "head"):
        served.export(name, tmp_path / "out" / name)
        one, two = (
            safetensors_torch.load_file(path / name / "adapter_model.safetensors")
            for path in (tmp_path, tmp_path / "out")
        )
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    with pytest.raises(ValueError, match="adapter 'head' must have no modules_to_save to be mixed"):
        served.mix(["head", "plain"], torch.ones(5, 2))
    served.evict("whole")
    served.use(["plain", "head", None, None, None])
    with torch.no_grad():
        out = model(tokens)
    for i, name in enumerate(("plain", "head")):
        assert_close_to_reference(out[i], outputs[name, torch.float64][i], outputs[name, torch.float32][i], name)
    assert not model.layers[1].down_proj.copies  # what was evicted is gone
    assert isinstance(served.restore().head, nn.Linear) and torch.equal(model(tokens), before)


def plain_copy(model: nn.Module) -> Model:
    """PEFT leaves its own wrapper around whole modules behind."""
    state = {key.replace("original_module.", ""): value for key, value in model.state_dict().items()}
    copied = Model()
    copied.load_state_dict({key: value for key, value in state.items() if "modules_to_save" not in key})
    return copied


@pytest.mark.parametrize("method", ["pissa", "olora", "kasa", "initial"])
def test_adapters_of_a_changed_base_become_plain_ones_on_the_unchanged_base(tmp_path, method):
    peft = pytest.importorskip("peft")
    model, tokens = Model(), torch.randint(0, 30, (3, 4))
    base = {key: value.clone() for key, value in model.state_dict().items()}
    config = dict(r=2, lora_alpha=6, target_modules=["q_proj", "down_proj"], rank_pattern={"layers.1.q_proj": 3})
    if method == "kasa":
        if not hasattr(peft, "KasaConfig"):
            pytest.skip("this PEFT has no KaSA")
        config["kasa_config"] = peft.KasaConfig()
    else:
        config["init_lora_weights"] = "pissa_niter_4" if method == "initial" else method
    torch.manual_seed(3)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**config))
    wrapped.save_pretrained(tmp_path / "start")
    with torch.no_grad():
        for key, parameter in wrapped.named_parameters():
            if "lora_" in key:
                parameter += 0.2 * torch.randn_like(parameter)
    wrapped.save_pretrained(tmp_path / "trained")
    with torch.no_grad():
        expected, eager = wrapped.double()(tokens), wrapped.float()(tokens)
    fresh = Model()
    fresh.load_state_dict(base)
    plain = fresh(tokens)
    write(tmp_path / "lora", q_proj())
    initial = {"it": tmp_path / "start"} if method == "initial" else None
    if method == "initial":
        with pytest.raises(ValueError, match="init_lora_weights.*got 'pissa_niter_4'; name the folder"):
            load_peft_adapters(fresh, {"it": tmp_path / "trained"})
    served = load_peft_adapters(
        fresh, {"it": tmp_path / "trained", "lora": tmp_path / "lora"}, initial_adapters=initial
    )
    served.use(["it", "lora", None])
    with torch.no_grad():
        out = fresh(tokens)
    assert_close_to_reference(out[0], expected[0], eager[0])
    assert torch.equal(out[2], plain[2]) and (out[0] - plain[0]).abs().max() > 0.01
    # what is exported is a plain adapter, which PEFT itself reads on the unchanged base
    served.export("it", tmp_path / "converted")
    again = Model()
    again.load_state_dict(base)
    with torch.no_grad():
        by_peft = peft.PeftModel.from_pretrained(again, tmp_path / "converted")(tokens)
        assert_close_to_reference(by_peft, expected, eager)


def test_corda_as_its_authors_write_it(tmp_path):
    """``C = X X'``, ``W C = U S V'``, the last r parts: ``B = U sqrt(S / s)``, ``A = sqrt(S / s) V' C^-1``."""
    model, x = Model(), torch.randn(40, 12).double()
    weight = model.layers[0].q_proj.weight.detach().double()
    c = x.T @ x / 40 + 0.1 * torch.eye(12).double()
    u, s, v = torch.linalg.svd(weight @ c)
    root = (s[-2:] / 2).sqrt()  # alpha / rank = 4 / 2
    start_a, start_b = root[:, None] * v[-2:] @ torch.linalg.inv(c), u[:, -2:] * root
    a, b = start_a + 0.1 * torch.randn(2, 12).double(), start_b + 0.1 * torch.randn(12, 2).double()
    for name, factors in (("start", (start_a, start_b)), ("trained", (a, b))):
        tensors = {
            f"{PREFIX}layers.0.q_proj.lora_{f}.weight": tensor.float().contiguous()
            for f, tensor in zip("AB", factors, strict=True)
        }
        write(tmp_path / name, tensors, init_lora_weights="corda")
    served = load_peft_adapters(model, {"it": tmp_path / "trained"}, initial_adapters={"it": tmp_path / "start"})
    layer, inputs = model.layers[0].q_proj, torch.randn(3, 12)
    served.use(["it"] * 3)
    results = []
    for cast in (torch.Tensor.double, torch.Tensor.float):
        w, a0, b0, a1, b1 = (cast(tensor.float()) for tensor in (weight, start_a, start_b, a, b))
        results.append(cast(inputs) @ (w - 2 * b0 @ a0 + 2 * b1 @ a1).T + cast(layer.bias.detach()))
    with torch.no_grad():
        assert_close_to_reference(layer(inputs), *results)
    with pytest.raises(ValueError, match="initial_adapters must be of names in adapters, got 'other'"):
        load_peft_adapters(Model(), {"it": tmp_path / "trained"}, initial_adapters={"other": tmp_path / "start"})
    with pytest.raises(ValueError, match="initial adapter of adapter 'plain' must be given for a start that changes"):
        write(tmp_path / "plain", q_proj())
        load_peft_adapters(Model(), {"plain": tmp_path / "plain"}, initial_adapters={"plain": tmp_path / "start"})


def test_an_adapter_that_does_not_fit_leaves_the_others_to_the_bit(tmp_path):
    model, tokens = Model(), torch.randint(0, 30, (2, 3))
    served = load_peft_adapters(model, {"good": write(tmp_path / "good", q_proj())}, num_slots=2, rows_per_layer=3)
    served.use(["good", None])
    before = model(tokens), {key: value.clone() for key, value in model.state_dict().items()}
    wide = {"r": 3, "rank_pattern": {}}
    both = q_proj(1) | q_proj(0)
    double = {key: tensor.double() for key, tensor in q_proj().items()}
    bad = {
        "rank": (q_proj(1, rank=3), wide, r"adapter 'rank'.*at most max_rank=2.*key .*layers.1.q_proj.lora_A.weight"),
        "rows": (both, {}, r"adapter 'rows'.*longest run of free rows.*key .*layers.0.q_proj.lora_A.weight"),
        "type": (double, {}, "layers.0.q_proj.lora_A.*adapter 'type'.*float64"),
    }
    for name, (tensors, config, message) in bad.items():
        with pytest.raises(ValueError, match=message):
            served.add(name, write(tmp_path / name, tensors, **config))
        assert served.names == ["good"] and torch.equal(model(tokens), before[0])
        state = model.state_dict()
        assert state.keys() == before[1].keys()
        assert all(torch.equal(value, before[1][key]) for key, value in state.items())


@torch.no_grad()
def test_x_lora_over_loaded_adapters(tmp_path):
    from moe_kernels.nn import XLoRA, XLoRAClassifier

    model, tokens = Model(), torch.randint(0, 30, (2, 3))
    folders = {name: write(tmp_path / name, q_proj(1) | q_proj(0)) for name in ("one", "two")}
    served = load_peft_adapters(model, folders)
    assert list(served.layers) == ["layers.0.q_proj", "layers.1.q_proj"]
    weights = torch.rand(2, 2)
    served.mix(["one", "two"], weights)
    mixed = model(tokens)
    xlora = XLoRA(model, list(served.layers.values()), XLoRAClassifier(12, 2, 2))
    xlora.set_weights(weights[:, None, None].expand(2, 3, 2, 2))
    assert torch.equal(model(tokens), mixed)
    xlora.set_weights(torch.zeros(2, 3, 2, 2))
    assert not torch.equal(model(tokens), mixed)
    served.mix(["one", "two"], weights)
    assert torch.equal(model(tokens), mixed)


def test_training_is_refused_with_dora(tmp_path):
    name = f"{PREFIX}layers.0.q_proj"
    dora = q_proj(**{f"{name}.lora_magnitude_vector": torch.rand(12)})
    folders = {"dora": write(tmp_path / "dora", dora, use_dora=True), "plain": write(tmp_path / "plain", q_proj())}
    served = load_peft_adapters(Model(), folders)
    with pytest.raises(ValueError, match="adapter 'dora' must be without DoRA to be trained"):
        served.requires_grad_()
    assert not any(parameter.requires_grad for parameter in served.parameters())
    served.evict("dora")
    assert all(parameter.requires_grad for parameter in served.requires_grad_().parameters())


def test_a_map_is_refused_once_its_adapter_has_whole_modules(tmp_path):
    from moe_kernels.nn import LayerMap

    served = load_peft_adapters(Model(), {"one": write(tmp_path / "one", q_proj())})
    served.define("all", LayerMap({"": {"one": 1.0}}))
    served.use(["all"])
    whole = q_proj(**{f"{PREFIX}head.weight": torch.ones(30, 12)})
    served.add("one", write(tmp_path / "whole", whole, modules_to_save=["head"]))
    with pytest.raises(ValueError, match="adapter 'one' must have no modules_to_save to be mixed"):
        served.use(["all"])
    with pytest.raises(ValueError, match="adapter's name must be none of the maps', got 'all'"):
        served.add("all", tmp_path / "one")


def test_training_drops_what_the_adapters_say(tmp_path):
    folders = {name: write(tmp_path / name, q_proj(), lora_dropout=0.5) for name in ("one", "two")}
    model = Model().train()
    served = load_peft_adapters(model, folders)
    tokens = torch.randint(0, 30, (2, 7))
    served.use(["one", "two"])
    assert torch.equal(model(tokens), model(tokens))  # not trained: nothing is dropped
    served.requires_grad_()
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))
    served.requires_grad_(False)
    model.train()
    assert torch.equal(model(tokens), model(tokens))
    served.add("two", write(tmp_path / "other", q_proj()))
    with pytest.raises(
        ValueError, match=r"lora_dropout must be the same in all adapters to be trained, got \[0.0, 0.5\]"
    ):
        served.requires_grad_()
    assert not any(parameter.requires_grad for parameter in served.parameters())
    for name in folders:
        served.evict(name)
    served.requires_grad_()
