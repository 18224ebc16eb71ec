"""A small mixture-of-experts language model trained on Python's own documentation, its experts spread over processes.

::

    torchrun --nproc-per-node 4 -m moe_kernels.demo.over_ranks              # one expert dimension of 4 ranks
    torchrun --nproc-per-node 4 -m moe_kernels.demo.over_ranks --experts-over 2      # 2 ranks of data x 2 of experts
    torchrun --nproc-per-node 4 -m moe_kernels.demo.over_ranks --split-over 2        # 2 of experts x 2 of each expert
    python -m moe_kernels.demo.over_ranks                                   # the same curve in one process

Every run reads the same batches and starts from the same weights: the curves are equal to rounding (float32: until a
near tie between experts falls the other way; ``--dtype float64``: to the last digits). Two runs on the same ranks have
the same bits. gloo on CPUs; NCCL on GPUs, on which it has never run.
"""

import argparse
import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from moe_kernels import balance_loss
from moe_kernels.demo.text import reference_texts
from moe_kernels.nn import MoEFeedForward, Routed

VOCAB, HIDDEN, LAYERS, HEADS, EXPERTS, TOP_K = 256, 64, 2, 4, 8, 2
WINDOW, BATCH = 64, 16  # bytes of a window; windows of all ranks


class Block(nn.Module):
    """Causal attention, then experts: two that the router chooses, and one for everybody."""

    def __init__(self):
        super().__init__()
        self.attention_norm, self.experts_norm = nn.RMSNorm(HIDDEN), nn.RMSNorm(HIDDEN)
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False), nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.mlp = MoEFeedForward(HIDDEN, HIDDEN, EXPERTS, TOP_K, shared_intermediate_size=HIDDEN)

    def forward(self, x: Tensor) -> tuple[Tensor, Routed]:
        heads = self.qkv(self.attention_norm(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        out, routed = self.mlp(self.experts_norm(x), return_routed=True)
        return x + out, routed


class LanguageModel(nn.Module):
    """Predicts the next byte."""

    def __init__(self):
        super().__init__()
        self.embedding, self.positions = nn.Embedding(VOCAB, HIDDEN), nn.Embedding(WINDOW, HIDDEN)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.RMSNorm(HIDDEN), nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, windows: Tensor) -> tuple[Tensor, list[Routed]]:
        """[batch, WINDOW + 1] bytes -> the mean loss, and each layer's routing."""
        x = self.embedding(windows[:, :-1]) + self.positions.weight
        routings = []
        for block in self.blocks:
            x, routed = block(x)
            routings.append(routed)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()), routings


def batches(steps: int, seed: int) -> Tensor:
    """[steps, BATCH, WINDOW + 1] bytes of the language reference, drawn at random."""
    text = torch.frombuffer(bytearray(reference_texts().calibration.encode()), dtype=torch.uint8).long()
    starts = torch.randint(len(text) - WINDOW, (steps, BATCH, 1), generator=torch.Generator().manual_seed(seed))
    return text[starts + torch.arange(WINDOW + 1)]


def train(steps: int, experts_over: int, split_over: int, dtype: torch.dtype, seed: int) -> list[float]:
    """The loss of each step over all ranks."""
    torch.manual_seed(seed)
    model = LanguageModel().to(dtype)
    rank, world_size, balance = 0, 1, balance_loss
    device = torch.device("cpu")
    if dist.is_initialized():
        from torch.distributed.device_mesh import init_device_mesh

        from moe_kernels.distributed import balance_loss as balance
        from moe_kernels.distributed import data_parallel, shard_experts

        rank, world_size = dist.get_rank(), dist.get_world_size()
        if torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        shape = (world_size // (experts_over * split_over), experts_over, split_over)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("data", "expert", "tensor"))
        shard_experts(model.to(device), mesh["expert", "tensor"], tensor_dim="tensor")
        model = data_parallel(model, mesh["data"])
    # experts are DTensors and the rest is not: one by one
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, foreach=False)
    curve = []
    for batch in batches(steps, seed).to(device):
        loss, routings = model(batch[rank::world_size])
        balances = [balance(routed.logits, routed.topk_ids) for routed in routings]
        (loss + 0.01 * sum(balances)).backward()
        optimizer.step()
        optimizer.zero_grad()
        whole = loss.detach() / world_size
        if dist.is_initialized():
            dist.all_reduce(whole)
        curve.append(whole.item())
        if rank == 0 and (len(curve) % 10 == 0 or len(curve) == steps):
            print(f"step {len(curve):4d}  loss {curve[-1]:.4f}", flush=True)
    return curve


def main() -> None:
    parser = argparse.ArgumentParser(prog="moe_kernels.demo.over_ranks", description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps (default: %(default)s)")
    parser.add_argument(
        "--experts-over", type=int, help="ranks among which the experts are spread (default: all others)"
    )
    parser.add_argument("--split-over", type=int, default=1, help="ranks that share each expert (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "float64", "bfloat16"), default="float32")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="a file for the curve, as JSON")
    arguments = parser.parse_args()
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    split_over = arguments.split_over
    experts_over = arguments.experts_over or max(world_size // split_over, 1)
    if world_size % (experts_over * split_over) or BATCH % world_size:
        sizes = f"--experts-over={experts_over} times --split-over={split_over} must divide the {world_size} ranks"
        parser.error(f"{sizes}, and these the {BATCH} windows of a batch")
    if "RANK" in os.environ:  # started by torchrun
        dist.init_process_group()
    curve = train(arguments.steps, experts_over, split_over, getattr(torch, arguments.dtype), arguments.seed)
    if arguments.out and int(os.environ.get("RANK", 0)) == 0:
        arguments.out.write_text(json.dumps(curve))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
