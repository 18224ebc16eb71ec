"""``demo tune`` on a tiny Llama: switches do what they say, and the statistics choose them."""

import pytest
import torch

pytest.importorskip("transformers", reason="the demo runs a model of transformers")

from moe_kernels.demo import report_tuning, tune
from moe_kernels.demo.model import feed_forward_layers, split_model
from moe_kernels.demo.settings import TuneSettings
from moe_kernels.demo.text import Texts, source_texts
from moe_kernels.nn import ModuleStatistics
from tests.demo.test_perplexity import _silent, language_model  # noqa: F401  a fixture

SETTINGS = TuneSettings(num_experts=8, top_k=4, window_size=32, windows=3, num_switched=(2, 4), num_listed=3)


def test_switched_experts_are_never_or_always_taken(language_model):  # noqa: F811
    layers = split_model(language_model.model, torch.randint(256, (3, 32)), 8, _silent)
    tune.switch(layers, 4, off=[(0, 3), (1, 0)], forced=[(0, 5)])
    with ModuleStatistics(torch.nn.ModuleList(layers)) as statistics:
        for layer in layers:
            layer(torch.randn(50, 32))
    first, second = statistics.counts["0"][0].tolist(), statistics.counts["1"][0].tolist()
    assert first[3] == 0 and first[5] == 50 and second[0] == 0
    assert sum(first) == sum(second) == 50 * 4  # the FLOPs stay


def test_run_switches_what_the_statistics_name(language_model, tmp_path, capsys):  # noqa: F811
    dense = feed_forward_layers(language_model.model)
    lower = "the quick brown fox jumps over the lazy dog. " * 5
    kinds = {"lower": Texts(lower, lower[::-1]), "upper": Texts(lower.upper(), lower[::-1].upper())}
    result = tune.run(language_model, kinds, SETTINGS, 0, _silent)
    assert feed_forward_layers(language_model.model) == dense
    assert [row["switched"] for row in result["rows"]] == [2] * 5 + [4] * 5
    assert len({row["choice"] for row in result["rows"]}) == 5
    assert all(value > 1 for row in result["rows"] for value in row["perplexity"].values())
    for experts in result["distinctive"].values():
        shares = [share for *_, share in experts]
        assert len(shares) == 3 and shares == sorted(shares, reverse=True) and shares[0] > 0
    report_tuning.print_tuning(result)
    assert "off: upper's" in capsys.readouterr().out
    report_tuning.plot_tuning(result, tmp_path / "tune.png")
    assert (tmp_path / "tune.png").read_bytes().startswith(b"\x89PNG")


def test_source_texts_are_two_parts_of_python():
    texts = source_texts()
    assert all("\ndef " in text and len(text) > 20_000 for text in texts) and texts.calibration != texts.evaluation
