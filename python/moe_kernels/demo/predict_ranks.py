"""What expert parallelism would cost on 8 to 1024 GPUs, predicted for named models from counted bytes.

::

    python -m moe_kernels.demo.predict_ranks
    python -m moe_kernels.demo.predict_ranks --model DeepSeek-V3 --tokens 4096 --skew 0.5
    python -m moe_kernels.demo.predict_ranks --model Mixtral-8x7B --split 8 --ranks 64      # each expert over 8 ranks

The bytes are counted, not estimated: the plan that :mod:`moe_kernels.distributed` makes of a drawn routing says what a
rank would send to each other rank. Times follow from them by the printed assumptions. Nothing is measured here.
"""

import argparse
from typing import NamedTuple

import torch
from torch import Tensor

from moe_kernels.distributed.rank_plan import plan_ranks
from moe_kernels.distributed.sizes import NUMBERS


class Model(NamedTuple):
    """Sizes from a model's published configuration."""

    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    num_layers: int  # with experts


MODELS = {
    "Mixtral-8x7B": Model(4096, 14336, 8, 2, 32),
    "OLMoE-1B-7B": Model(2048, 1024, 64, 8, 16),
    "Qwen3-30B-A3B": Model(2048, 768, 128, 8, 48),
    "Qwen3-235B-A22B": Model(4096, 1536, 128, 8, 94),
    "GPT-OSS-120B": Model(2880, 2880, 128, 4, 36),
    "DeepSeek-V3": Model(7168, 2048, 256, 8, 58),
}


class Machine(NamedTuple):
    """What a rank can do; the defaults are an H100's data sheet and a usual cluster, halved where it says so."""

    flops: float = 989e12 * 0.5  # dense bfloat16, half of the peak
    near: float = 450e9 * 0.7  # bytes a second each way inside a node (NVLink 4)
    far: float = 50e9 * 0.7  # bytes a second each way between nodes (400 Gbit/s for each GPU)
    ranks_per_node: int = 8
    latency: float = 30e-6  # seconds of one all-to-all, whatever its size


class Traffic(NamedTuple):
    """Bytes of one layer's forward on one rank, to (or from) each rank of the expert group; backward has the same rows.

    Attributes:
        sent: [world_size], rows there, with their ids, weights and sizes.
        returned: [world_size], rows back.
        undivided: bytes there of an exchange that sends a row for each (token, expert), in all.
    """

    sent: Tensor
    returned: Tensor
    undivided: int


def traffic(topk_ids: Tensor, num_experts: int, world_size: int, rank: int, row_bytes: int, split: int = 1) -> Traffic:
    """Counts what ``rank``, which has these tokens, sends and gets back; its own rows do not count.

    Args:
        split: ranks that share each expert.
    """
    plan = plan_ranks(topk_ids, torch.zeros(topk_ids.shape), num_experts, world_size, split)
    rows, pairs = plan.tokens.expert_offsets.diff().long(), plan.pairs.expert_offsets.diff().long()
    away = torch.arange(world_size) != rank
    return Traffic(
        sent=(rows * row_bytes + pairs * 8 + NUMBERS * 8) * away,
        returned=rows * row_bytes * away,
        undivided=int((pairs * away).sum()) * row_bytes,
    )


def draw(num_tokens: int, model: Model, skew: float, seed: int = 0) -> Tensor:
    """topk_ids [num_tokens, top_k]: distinct experts, the i-th most wanted with weight ``1 / i**skew``."""
    generator = torch.Generator().manual_seed(seed)
    wanted = torch.arange(1, model.num_experts + 1, dtype=torch.float64).pow(-skew)
    wanted = wanted[torch.randperm(model.num_experts, generator=generator)]
    return torch.multinomial(wanted.expand(num_tokens, -1), model.top_k, generator=generator)


class Prediction(NamedTuple):
    """One layer, forward, on the rank with most to do; seconds and bytes."""

    expert_ranks: int
    split: int  # ranks that share each expert
    data_ranks: int
    rows_per_token: float  # copies of a token that leave its rank
    sent: int
    saved: float  # of the bytes of one row for each (token, expert)
    imbalance: float  # most rows of a rank, over the mean
    exchange: float
    experts: float


def predict(
    model: Model, world_size: int, num_tokens: int, skew: float, machine: Machine, split: int = 1
) -> Prediction:
    """Predicts a layer in which every rank has ``num_tokens`` tokens and routes as :func:`draw` does."""
    expert_ranks = min(world_size // split, model.num_experts)
    group = expert_ranks * split
    ids, row_bytes = draw(num_tokens, model, skew), 2 * model.hidden_size
    counted = traffic(ids, model.num_experts, group, 0, row_bytes, split)
    # every rank routes alike: what this one sends to a rank, all others send there too
    pairs = torch.bincount(ids.flatten() // (model.num_experts // expert_ranks), minlength=expert_ranks)
    node = torch.arange(group) // machine.ranks_per_node
    inside = node == 0

    def seconds(away: Tensor) -> float:
        out = max(away[inside].sum() / machine.near, away[~inside].sum() / machine.far)
        # the rank that most rows go to receives them from all others
        most = int(away.argmax())
        neighbours = min(machine.ranks_per_node, group) - 1
        into = away[most] * max(neighbours / machine.near, (group - 1 - neighbours) / machine.far)
        return float(max(out, into))

    exchange = seconds(counted.sent) + seconds(counted.returned) + 5 * machine.latency
    work = 6 * model.hidden_size * model.intermediate_size  # three projections, a multiplication and an addition each
    sent = int(counted.sent.sum())
    return Prediction(
        expert_ranks,
        split,
        world_size // group,
        rows_per_token=int(counted.returned.sum()) / row_bytes / num_tokens,
        sent=sent,
        saved=1 - sent / max(counted.undivided, 1),
        imbalance=float(pairs.max() / pairs.double().mean()),
        exchange=exchange if group > 1 else 0.0,
        experts=float(pairs.max()) * group * (work / split) / machine.flops,
    )


def report(
    names: list[str], ranks: list[int], num_tokens: int, skew: float, machine: Machine, split: int = 1
) -> list[str]:
    """The lines that the command prints."""
    lines = [
        f"Assumed, not measured: {num_tokens} tokens on every rank in bfloat16; experts wanted as 1 / i^{skew:g}",
        f"{machine.flops / 1e12:.0f} TFLOP/s of matrix products; {machine.near / 1e9:.0f} GB/s each way among "
        f"{machine.ranks_per_node} ranks of a node, {machine.far / 1e9:.0f} GB/s between nodes",
        f"{machine.latency * 1e6:.0f} us for each of five all-to-alls, nothing else for launches or waits",
        "experts over min(ranks, experts) ranks, data over the rest; all ranks route alike; the slowest rank counts"
        if split == 1
        else f"each expert over {split} neighbours, experts over min(ranks / {split}, experts) of them, data over the "
        "rest; all ranks route alike; the slowest rank counts",
        "hidden: share of the exchange that chunks or a shared expert of equal length could cover at most",
    ]
    head = (
        "ranks",
        "experts x data" if split == 1 else "e x split x d",
        "copies",
        "sent",
        "saved",
        "busiest",
        "exchange",
        "experts",
        "hidden",
        "step",
    )
    for name in names:
        model = MODELS[name]
        lines += ["", f"{name}: {model.num_layers} layers, one layer forward:"]
        lines.append("{:>6} {:>14} {:>7} {:>9} {:>6} {:>8} {:>10} {:>10} {:>7} {:>10}".format(*head))
        for world_size in ranks:
            got = predict(model, world_size, num_tokens, skew, machine, split)
            layout = " x ".join(map(str, (got.expert_ranks, *([split] if split > 1 else []), got.data_ranks)))
            hidden = min(1.0, got.experts / got.exchange) if got.exchange else 1.0
            # backward: twice the products, and the same rows
            step = model.num_layers * (3 * got.experts + 2 * got.exchange)
            lines.append(
                f"{world_size:6d} {layout:>14} {got.rows_per_token:7.2f} "
                f"{got.sent / 1e6:6.1f} MB {got.saved:6.1%} {got.imbalance:7.2f}x {got.exchange * 1e3:7.2f} ms "
                f"{got.experts * 1e3:7.2f} ms {hidden:7.0%} {step * 1e3:7.0f} ms"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="moe_kernels.demo.predict_ranks", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=tuple(MODELS), nargs="+", default=list(MODELS))
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 64, 256, 1024])
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of each rank (default: %(default)s)")
    parser.add_argument("--split", type=int, default=1, help="ranks that share each expert (default: %(default)s)")
    parser.add_argument("--skew", type=float, default=0.0, help="0: all experts alike (default: %(default)s)")
    arguments = parser.parse_args()
    for name in arguments.model:
        for world_size in arguments.ranks:
            if arguments.split < 1 or MODELS[name].intermediate_size % arguments.split or world_size % arguments.split:
                parser.error(f"--split={arguments.split} must divide the {name}'s intermediate size, and the ranks")
            blocks = world_size // arguments.split
            expert_ranks = min(blocks, MODELS[name].num_experts)
            if expert_ranks < 1 or MODELS[name].num_experts % expert_ranks or blocks % expert_ranks:
                parser.error(f"--ranks={world_size} must divide, or be a multiple of, the {name}'s experts")
    how = (arguments.tokens, arguments.skew, Machine(), arguments.split)
    print("\n".join(report(arguments.model, arguments.ranks, *how)))


if __name__ == "__main__":
    main()
