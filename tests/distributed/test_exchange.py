"""What ranks send each other, counted as it leaves, against the least that an exchange can send."""

import pytest
import torch
from torch import distributed
from torch.utils._python_dispatch import TorchDispatchMode

from moe_kernels.distributed import expert_parallel_ffn
from moe_kernels.distributed.sizes import NUMBERS
from tests.distributed.test_expert_parallel import EXPERTS, FORCED, HIDDEN, TOKENS, ffn_arguments, ffn_step, share

WORLD_SIZE = 4


class Sent(TorchDispatchMode):
    """Counts the collectives of a block and the bytes that leave this rank in them."""

    def __enter__(self):
        self.calls, self.bytes = 0, 0
        return super().__enter__()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function is torch.ops._c10d_functional.all_to_all_single.default:
            rows, _, splits, _ = arguments
            leaving = rows.shape[0] - splits[distributed.get_rank()]
            self.calls += 1
            self.bytes += leaving * rows[:1].numel() * rows.element_size() if rows.shape[0] else 0
        elif "c10d" in str(function) and "wait_tensor" not in str(function):
            raise AssertionError(f"another collective: {function}")
        return function(*arguments, **(options or {}))


def arguments_of(tokens: list[int], forced: list[int] | None, dtype: torch.dtype) -> list:
    x, ids, weights, *rest = ffn_arguments(sum(tokens), dtype)
    return [x, ids if forced is None else torch.tensor(forced).expand_as(ids).int(), weights, *rest]


def counted_step(tokens: list[int], forced: list[int] | None, dtype: torch.dtype) -> tuple[int, ...]:
    rank = distributed.get_rank()
    mine, experts = share(WORLD_SIZE, tokens, rank), slice(2 * rank, 2 * rank + 2)
    x, ids, weights, gate_up, down, grad = arguments_of(tokens, forced, dtype)
    forward = Sent()

    def ffn(*arguments):
        with forward:
            return expert_parallel_ffn(*arguments, group=distributed.group.WORLD)

    with Sent() as both:
        ffn_step(ffn, x[mine], ids[mine], weights[mine], gate_up[experts], down[experts], grad[mine])
    return forward.calls, forward.bytes, both.calls - forward.calls, both.bytes - forward.bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("forced", FORCED.values(), ids=FORCED)
@pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)
def test_each_token_goes_to_each_rank_once(ranks, tokens, forced, dtype):
    counted = ranks.run(counted_step, tokens, forced, dtype)
    ids = arguments_of(tokens, forced, dtype)[1].tolist()
    row, weight = HIDDEN * dtype.itemsize, 4
    for rank, (calls, forward, backward_calls, backward) in enumerate(counted):
        # (token, from, to) and (token, expert, from, to), by hand
        routes, pairs = set(), []
        for source in range(WORLD_SIZE):
            for token in range(*share(WORLD_SIZE, tokens, source).indices(len(ids))):
                for expert in ids[token]:
                    target = expert // (EXPERTS // WORLD_SIZE)
                    if 0 <= expert < EXPERTS and target != source:
                        routes.add((token, source, target))
                        pairs.append((source, target))
        rows_out, rows_in = (sum(route[at] == rank for route in routes) for at in (1, 2))
        pairs_out, pairs_in = (sum(pair[at] == rank for pair in pairs) for at in (0, 1))
        sizes = (WORLD_SIZE - 1) * NUMBERS * 8
        assert forward == (rows_out + rows_in) * row + pairs_out * (4 + weight) + sizes
        assert backward == (rows_in + rows_out) * row + pairs_in * weight
        assert (calls, backward_calls) == (5, 3)


def test_the_count_is_not_of_nothing(ranks):
    (_, forward, _, backward), *_ = ranks.run(counted_step, TOKENS["even"], None, torch.float32)
    assert min(forward, backward) > 6 * HIDDEN * 4
