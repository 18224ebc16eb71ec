"""What runs while rows travel: the order of starts and waits, forward and backward."""

from unittest import mock

import pytest
import torch
from torch import Tensor

from moe_kernels.distributed import all_to_all, ffn, shard_experts
from moe_kernels.nn import MoEFeedForward
from tests.distributed.test_bad_ranks import Model
from tests.distributed.test_expert_parallel import mesh_of


def events(chunk_tokens: int | None) -> tuple[list[str], list[str]]:
    """The order of what a rank does, forward and backward."""
    layer = shard_experts(Model(shared_intermediate_size=4), mesh_of(4)["expert"], chunk_tokens=chunk_tokens).mlp
    layer.shared_down_proj.register_post_accumulate_grad_hook(lambda _: found.append("shared"))
    found: list[str] = []
    launch, finish = all_to_all.launch, all_to_all.Exchange.finish
    shared, experts = MoEFeedForward._shared_expert, ffn.expert_ffn

    def note(event: str, function):
        def noted(*arguments, **options):
            found.append(event)
            return function(*arguments, **options)

        return noted

    def noted_launch(rows: Tensor, *arguments) -> Tensor:
        if rows.dim() == 2 and rows.shape[1] == 8:
            found.append("start")
        return launch(rows, *arguments)

    def noted_finish(exchange) -> Tensor:
        if exchange.pending.dim() == 2 and exchange.pending.shape[1] == 8:
            found.append("wait")
        return finish(exchange)

    x = torch.randn(4, 8, requires_grad=True)
    with (
        mock.patch.object(all_to_all, "launch", noted_launch),
        mock.patch.object(all_to_all.Exchange, "finish", noted_finish),
        mock.patch.object(MoEFeedForward, "_shared_expert", note("shared", shared)),
        mock.patch.object(ffn, "expert_ffn", note("experts", experts)),
    ):
        out = layer(x)
        forward, found[:] = list(found), []
        out.sum().backward()
    return forward, found


def test_the_shared_expert_runs_while_rows_travel(ranks):
    for forward, backward in ranks.run(events, None):
        assert forward == ["start", "shared", "wait", "experts", "start", "wait"]
        # the gradient of the output travels to the experts, that of the rows comes back
        assert backward == ["start", "wait", "start", "shared", "wait"]


def test_the_next_and_the_last_chunk_travel_while_one_runs(ranks):
    for forward, _ in ranks.run(events, 2):
        # two chunks: both start before the first runs; the first is back after the second has run
        assert forward == [
            "start",
            "start",
            "wait",
            "experts",
            "start",
            "wait",
            "experts",
            "start",
            "wait",
            "wait",
            "shared",
        ]


@pytest.mark.parametrize("chunk_tokens", [None, 2])
def test_nothing_else_waits(ranks, chunk_tokens):
    for _, backward in ranks.run(events, chunk_tokens):
        assert backward.count("start") == backward.count("wait")
