"""Differentiable collectives: all-gather, reduce-scatter and all-to-all, and an all-reduce without gradient.

They call PyTorch's functional ops, which run on gloo and NCCL, are traced by torch.compile and are seen by
selective recomputation. The backward pass of each is its transpose: a reduce-scatter for an all-gather, an
all-gather for a reduce-scatter, and the reverse all-to-all for an all-to-all.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3.distributed.torch_private import COLLECTIVES


def all_gather(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """Concatenate `x` of all ranks of `group` along `dim`; the backward pass sums the gradients."""
    return x if group.size() == 1 else _AllGather.apply(x, dim, group)  # type: ignore[no-untyped-call]


def reduce_scatter(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """Return this rank's shard along `dim` of the sum of `x` over the ranks of `group`."""
    return x if group.size() == 1 else _ReduceScatter.apply(x, dim, group)  # type: ignore[no-untyped-call]


def start_all_to_all(
    x: Tensor, input_splits: list[int], output_splits: list[int], group: dist.ProcessGroup
) -> Tensor:
    """Start an all-to-all: send `input_splits[n]` rows of `x` [rows, ..] to rank n, get `output_splits[n]`.

    Pass the result through `wait` before reading it; computation in between overlaps with the all-to-all.
    """
    return _AllToAll.apply(x, input_splits, output_splits, group)  # type: ignore[no-any-return, no-untyped-call]


def wait(x: Tensor) -> Tensor:
    """Wait until the started collective behind `x` is done, and return `x`."""
    COLLECTIVES.wait_tensor(x.detach())
    return x


def all_reduce(x: Tensor, group: dist.ProcessGroup, operation: str = "sum") -> Tensor:
    """Reduce `x` over the ranks of `group` ("sum" or "max"), without gradient."""
    if group.size() == 1:
        return x
    reduced = COLLECTIVES.all_reduce(x.detach().contiguous(), operation, group.group_name)
    return COLLECTIVES.wait_tensor(reduced)  # type: ignore[no-any-return]


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _all_gather(x, dim, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _reduce_scatter(gradients[0], ctx.dim, ctx.group), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _reduce_scatter(x, dim, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _all_gather(gradients[0], ctx.dim, ctx.group), None, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, input_splits: list[int], output_splits: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.input_splits, ctx.output_splits, ctx.group = input_splits, output_splits, group
        sent: Tensor = COLLECTIVES.all_to_all_single(
            x.contiguous(), output_splits, input_splits, group.group_name
        )
        return sent

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        gradient, name = gradients[0].contiguous(), ctx.group.group_name
        received = COLLECTIVES.all_to_all_single(gradient, ctx.input_splits, ctx.output_splits, name)
        return COLLECTIVES.wait_tensor(received), None, None, None


def _all_gather(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    gathered = COLLECTIVES.all_gather_into_tensor(x.contiguous(), group.size(), group.group_name)
    return torch.cat(COLLECTIVES.wait_tensor(gathered).chunk(group.size()), dim)


def _reduce_scatter(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    # The op scatters dim 0 only.
    stacked = torch.cat(x.chunk(group.size(), dim))
    scattered = COLLECTIVES.reduce_scatter_tensor(stacked, "sum", group.size(), group.group_name)
    return COLLECTIVES.wait_tensor(scattered)  # type: ignore[no-any-return]
