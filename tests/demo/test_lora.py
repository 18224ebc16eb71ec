"""``demo lora`` on a tiny Llama: adapters learn their own text, and one batch gives what each gives alone."""

import copy

import pytest
import torch

pytest.importorskip("transformers", reason="the demo runs a model of transformers")
pytest.importorskip("safetensors", reason="adapters are safetensors files")

from moe_kernels.demo import lora, report_lora
from moe_kernels.demo.settings import LoraSettings
from moe_kernels.demo.text import Texts, help_texts
from moe_kernels.integrations.peft import load_peft_adapters, new_peft_adapter
from moe_kernels.testing import assert_close_to_reference
from tests.demo.test_perplexity import Bytes, _silent, language_model  # noqa: F401  a fixture

SETTINGS = LoraSettings(
    adapters=((4, ("q_proj", "down_proj")), (2, ("up_proj",))),
    window_size=24,
    batch_size=2,
    num_steps=30,
    learning_rate=2e-2,
    evaluation_windows=2,
    repeats=1,
    prompt="the",
    new_tokens=3,
)
LOWER, DIGITS = "the quick brown fox jumps over the lazy dog. " * 5, "3141592653589793238462643383279 " * 5
KINDS = {"lower": Texts(LOWER, LOWER), "digits": Texts(DIGITS, DIGITS)}


@pytest.fixture
def tokenizer(monkeypatch):
    monkeypatch.setattr(Bytes, "decode", lambda self, ids: bytes(ids).decode(errors="replace"), raising=False)


def test_run(language_model, tokenizer, tmp_path, capsys):  # noqa: F811
    state = {key: value.clone() for key, value in language_model.model.state_dict().items()}
    result = lora.run(language_model, KINDS, SETTINGS, 0, tmp_path / "adapters", _silent)
    assert all(torch.equal(value, state[key]) for key, value in language_model.model.state_dict().items())
    for text in KINDS:
        found = result["perplexity"][text]
        assert found[text] < min(found[other] for other in found if other != text), text  # its own adapter is the best
        losses = result["adapters"][text]["losses"]
        assert len(losses) == 30 and losses[-1] < losses[0]
    rounding = torch.finfo(torch.float32).eps ** 0.5
    for name, difference in result["difference"].items():
        assert difference > rounding if name == "mixed batch to no adapters" else difference < rounding, name
    assert all(value > 0 for found in result["milliseconds"].values() for value in found.values())
    assert list(result["continuations"]) == ["", "lower", "digits"]
    report_lora.print_lora(result)
    out = capsys.readouterr().out
    assert "q down" in out and "moe_kernels, one adapter after the other" in out
    report_lora.plot_lora(result, tmp_path / "lora.png")
    assert (tmp_path / "lora.png").read_bytes().startswith(b"\x89PNG")


def test_peft_is_beside_where_it_is_installed(language_model, tokenizer, tmp_path):  # noqa: F811
    pytest.importorskip("peft")
    result = lora.run(language_model, KINDS, SETTINGS, 0, tmp_path, _silent)
    assert {"mixed batch to PEFT's", "mixed batch to PEFT, each adapter alone"} <= result["difference"].keys()
    for part in ("prefill", "decode"):
        assert "PEFT, mixed batch" in result["milliseconds"][part]
    assert "PEFT, one adapter after the other" in result["milliseconds"]["training step"]


def test_adapters_trained_together_get_the_gradients_of_each_alone(language_model, tmp_path):  # noqa: F811
    model = language_model.model.requires_grad_(False)
    for seed, name in enumerate(("one", "two")):
        new_peft_adapter(model, tmp_path / name, ["v_proj", "gate_proj"], rank=2 + seed, seed=seed)
    ids = torch.randint(256, (2, 12))

    def gradients(dtype: torch.dtype, batches: list[list[int]]) -> list[torch.Tensor]:
        copied = copy.deepcopy(model)
        served = load_peft_adapters(copied, {name: tmp_path / name for name in ("one", "two")}).requires_grad_()
        copied.to(dtype)
        for rows in batches:
            served.use([("one", "two")[row] for row in rows])
            lora.sequence_losses(copied(ids[rows]).logits, ids[rows]).sum().backward()
        return [parameter.grad for parameter in served.parameters()]

    # the losses are taken in float32: the double run differs by that
    runs = ((torch.float32, [[0, 1]]), (torch.float64, [[0], [1]]), (torch.float32, [[0], [1]]))
    for together, expected, alone in zip(*(gradients(*run) for run in runs), strict=True):
        assert_close_to_reference(together, expected, alone)


def test_a_new_adapter_changes_nothing_and_unknown_targets_are_refused(language_model, tmp_path):  # noqa: F811
    model = language_model.model
    new_peft_adapter(model, tmp_path / "new", ["q_proj"], rank=3)
    ids = torch.randint(256, (2, 12))
    with torch.no_grad():
        before = model(ids).logits
        served = load_peft_adapters(model, {"new": tmp_path / "new"})
        served.use(["new", None])
        assert torch.equal(model(ids).logits, before)
    assert served.names == ["new"]
    with pytest.raises(ValueError, match="target_modules must be names of linear layers, got w_proj"):
        new_peft_adapter(model, tmp_path / "bad", ["w_proj"])


def test_help_texts_are_two_parts():
    texts = help_texts()
    assert all("FUNCTIONS" in text and len(text) > 20_000 for text in texts) and texts.calibration != texts.evaluation
