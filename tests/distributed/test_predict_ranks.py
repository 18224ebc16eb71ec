"""The predictions: bytes as the ranks really send them, and limits that are known without counting."""

import pytest
import torch

from moe_kernels.demo import predict_ranks
from moe_kernels.demo.predict_ranks import MODELS, Machine, Model, draw, predict, traffic
from tests.distributed.test_exchange import WORLD_SIZE, arguments_of, counted_step
from tests.distributed.test_expert_parallel import EXPERTS, FORCED, HIDDEN, TOKENS, share
from tests.distributed.test_tensor_parallel import counted_step as split_step


@pytest.mark.parametrize("forced", FORCED.values(), ids=FORCED)
@pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)
def test_predicted_bytes_are_those_that_ranks_send(ranks, tokens, forced):
    ids = arguments_of(tokens, forced, torch.float32)[1]
    predicted = [
        traffic(ids[share(WORLD_SIZE, tokens, rank)], EXPERTS, WORLD_SIZE, rank, 4 * HIDDEN)
        for rank in range(WORLD_SIZE)
    ]
    for rank, (_, forward, _, _) in enumerate(ranks.run(counted_step, tokens, forced, torch.float32)):
        returned_to_others = sum(int(other.returned[rank]) for other in predicted)
        assert forward == int(predicted[rank].sent.sum()) + returned_to_others


@pytest.mark.parametrize("forced", FORCED.values(), ids=FORCED)
@pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)
def test_predicted_bytes_of_split_experts(ranks, tokens, forced):
    ids = arguments_of(tokens, forced, torch.float32)[1]
    predicted = [
        traffic(ids[share(WORLD_SIZE, tokens, rank)], EXPERTS, WORLD_SIZE, rank, 4 * HIDDEN, 2)
        for rank in range(WORLD_SIZE)
    ]
    for rank, (forward, _) in enumerate(ranks.run(split_step, tokens, forced)):
        returned_to_others = sum(int(other.returned[rank]) for other in predicted)
        assert forward == int(predicted[rank].sent.sum()) + returned_to_others


def test_split_experts():
    mixtral = MODELS["Mixtral-8x7B"]
    whole, split = (predict(mixtral, 64, 128, 0.0, Machine(), count) for count in (1, 8))
    assert (whole.expert_ranks, whole.data_ranks) == (8, 8) and (split.expert_ranks, split.data_ranks) == (8, 1)
    # eight times as many ranks have tokens for an expert, each of which does an eighth of the work
    assert split.experts == pytest.approx(whole.experts)
    assert split.rows_per_token > 7 * whole.rows_per_token
    one = predict(mixtral._replace(num_experts=1, top_k=1), 4, 64, 0.0, Machine(), 4)
    assert one.rows_per_token == 3 and one.exchange > 0


def test_known_limits():
    everybody = Model(hidden_size=8, intermediate_size=8, num_experts=8, top_k=8, num_layers=1)
    for world_size in (1, 2, 8, 32):
        got = predict(everybody, world_size, 64, 0.0, Machine())
        assert got.rows_per_token == min(world_size, 8) - 1  # every token to every other rank
        assert got.imbalance == 1
        assert got.expert_ranks * got.data_ranks == world_size
    assert predict(everybody, 1, 64, 0.0, Machine()).exchange == 0
    # distinct experts, the wanted ones more often
    ids = draw(500, MODELS["OLMoE-1B-7B"], skew=1.0)
    assert (ids.sort(1).values.diff(dim=1) > 0).all()
    assert torch.bincount(ids.flatten()).max() > 2 * 500 * 8 / 64
    fast, slow = (predict(everybody, 8, 64, 0.0, Machine(near=near)).exchange for near in (2e11, 1e11))
    assert slow > fast


def test_command(monkeypatch, capsys):
    monkeypatch.setattr(
        "sys.argv", ["predict_ranks", "--model", "Mixtral-8x7B", "--ranks", "4", "16", "--tokens", "64"]
    )
    predict_ranks.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Assumed, not measured: 64 tokens on every rank")
    assert [line.split()[:4] for line in lines[-2:]] == [["4", "4", "x", "1"], ["16", "8", "x", "2"]]
    arguments = ["--model", "Mixtral-8x7B", "--ranks", "16", "64", "--tokens", "64", "--split", "4"]
    monkeypatch.setattr("sys.argv", ["predict_ranks", *arguments])
    predict_ranks.main()
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("each expert over 4 neighbours") for line in lines)
    assert [line.split()[:6] for line in lines[-2:]] == [
        ["16", "4", "x", "4", "x", "1"],
        ["64", "8", "x", "4", "x", "2"],
    ]
    monkeypatch.setattr("sys.argv", ["predict_ranks", "--model", "Mixtral-8x7B", "--ranks", "16", "--split", "3"])
    with pytest.raises(SystemExit):
        predict_ranks.main()
    assert "--split=3 must divide the Mixtral-8x7B's intermediate size, and the ranks" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["predict_ranks", "--model", "Mixtral-8x7B", "--ranks", "3"])
    with pytest.raises(SystemExit):
        predict_ranks.main()
    assert "--ranks=3 must divide, or be a multiple of, the Mixtral-8x7B's experts" in capsys.readouterr().err
