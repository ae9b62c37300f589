"""Collectives that autograd goes through, along the sequence and between experts.

They call PyTorch's functional operators, which run on gloo and NCCL, are traced by torch.compile and seen
by selective recomputation. Each gradient is the transpose of its forward pass: of a gather a sum that is
scattered, of a scattered sum a gather, of an exchange the exchange back.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

OPS = torch.ops._c10d_functional


def all_gather(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """The parts of all ranks of `group` put together along `dim`; their gradients are summed."""
    return x if group.size() == 1 else _AllGather.apply(x, dim, group)  # type: ignore[no-untyped-call]


def reduce_scatter(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """This rank's part along `dim` of the sum of every rank's `x`."""
    return x if group.size() == 1 else _ReduceScatter.apply(x, dim, group)  # type: ignore[no-untyped-call]


def start_exchange(x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    """Rows of `x` [rows, ..] to every rank, `sent[n]` of them to rank n; `received[n]` come from it.

    The result must pass `wait` before it is read: what is computed meanwhile overlaps with the exchange.
    """
    return _Exchange.apply(x, sent, received, group)  # type: ignore[no-any-return, no-untyped-call]


def wait(x: Tensor) -> Tensor:
    """`x`, once it has arrived."""
    OPS.wait_tensor(x.detach())
    return x


def all_reduce(x: Tensor, group: dist.ProcessGroup, operation: str = "sum") -> Tensor:
    """`x` of all ranks of `group` summed (or "max"), without gradient."""
    if group.size() == 1:
        return x
    return OPS.wait_tensor(OPS.all_reduce(x.detach().contiguous(), operation, group.group_name))  # type: ignore[no-any-return]


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _gather(x, dim, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _scatter_sum(gradients[0], ctx.dim, ctx.group), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _scatter_sum(x, dim, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _gather(gradients[0], ctx.dim, ctx.group), None, None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return OPS.all_to_all_single(x.contiguous(), received, sent, group.group_name)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        name = ctx.group.group_name
        back = OPS.all_to_all_single(gradients[0].contiguous(), ctx.sent, ctx.received, name)
        return OPS.wait_tensor(back), None, None, None


def _gather(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    parts = OPS.all_gather_into_tensor(x.contiguous(), group.size(), group.group_name)
    return torch.cat(OPS.wait_tensor(parts).chunk(group.size()), dim)


def _scatter_sum(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    stacked = torch.cat(x.chunk(group.size(), dim))
    return OPS.wait_tensor(OPS.reduce_scatter_tensor(stacked, "sum", group.size(), group.group_name))  # type: ignore[no-any-return]
