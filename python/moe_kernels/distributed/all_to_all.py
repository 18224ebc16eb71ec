"""The exchange in two halves, so that work can be done while rows travel, forward and backward: :class:`Exchange`.

It runs on PyTorch's functional collectives, so on gloo, NCCL and every backend that has an all-to-all.
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from moe_kernels.distributed.faults import blame, known


def launch(rows: Tensor, send: list[int], receive: list[int], group: ProcessGroup) -> Tensor:
    """Starts an all-to-all; every byte that this package sends from rank to rank in a layer goes through here."""
    return torch.ops._c10d_functional.all_to_all_single(rows.contiguous(), receive, send, group.group_name)


def finish(pending: Tensor, group: ProcessGroup, layer: str) -> Tensor:
    """The rows of :func:`launch`, once they are there. On a GPU its stream waits, not the host.

    Raises:
        RuntimeError: a rank ended, or did not answer within the process group's timeout (gloo; NCCL's watchdog ends the
            process itself). It names the layer, and the ranks that did not come.
    """
    try:
        return torch.ops._c10d_functional.wait_tensor(pending)
    except RuntimeError as error:
        raise known(
            RuntimeError(
                f"ExpertParallel: {layer}: all ranks of the expert group must reach this exchange, but one ended or "
                f"did not answer within the process group's timeout{blame(group, layer)}; see its own error, then "
                "restart all ranks from a checkpoint"
            )
        ) from error


class Exchange:
    """Sends the first ``send[0]`` rows to rank 0 of the group, the next ``send[1]`` to rank 1, and so on.

    ::

        exchange = Exchange(send, receive, group, layer)
        ticket = exchange.start(rows)        # [sum(send), ...]
        ...                                  # work that does not need them
        rows = exchange.wait(ticket)         # [sum(receive), ...], by rank

    Differentiable in ``rows``. The gradient starts to travel in the backward of ``wait`` and is waited for in that of
    ``start``, so what ran between the two forward overlaps with the exchange in backward too. One use for each object;
    every rank of the group must start as many, in the same order.
    """

    def __init__(self, send: list[int], receive: list[int], group: ProcessGroup, layer: str):
        self.send, self.receive, self.group, self.layer = send, receive, group, layer
        self.pending: Tensor | None = None  # rows on their way, forward or backward

    def start(self, rows: Tensor) -> Tensor:
        return _Start.apply(rows, self)

    def wait(self, ticket: Tensor) -> Tensor:
        return _Wait.apply(ticket, self)

    def finish(self) -> Tensor:
        pending, self.pending = self.pending, None
        return finish(pending, self.group, self.layer)


# the rows themselves cannot pass from one to the other: a gradient must have the shape of its tensor, and as many rows
# come as were received forward, but as many go as were sent
class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.pending = launch(rows, exchange.send, exchange.receive, exchange.group)
        return rows.new_empty(0)

    @staticmethod
    def backward(ctx, ticket: Tensor):
        return ctx.exchange.finish(), None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ticket: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.finish()

    @staticmethod
    def backward(ctx, grad: Tensor):
        exchange = ctx.exchange
        exchange.pending = launch(grad, exchange.receive, exchange.send, exchange.group)
        return grad.new_empty(0), None
