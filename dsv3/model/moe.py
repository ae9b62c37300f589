"""Mixture of experts: routed experts by grouped matmul, plus shared experts that see every token."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3.config.model import MoEConfig
from dsv3.model.layers import FeedForward
from dsv3.model.router import Router, RouterStats, Routing

ExpertsFunction = Callable[[Tensor, Tensor], Tensor]
"""From `rows` [rows, dim] sorted by expert and `counts` [experts] of them to results [rows, dim]."""

GroupedProduct = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From rows [rows, in], weights [experts, out, in] and the row numbers [experts] int32 at which each
expert's rows end to rows W_e^T [rows, out], in the dtype of the rows."""


class Dispatcher(Protocol):
    """Brings tokens to the experts that they chose, and the results back."""

    def dispatch(self, x: Tensor, routing: Routing) -> Any:
        """Send `x` [tokens, dim] off; what comes out is for `combine` alone."""

    def combine(self, dispatched: Any, experts: ExpertsFunction) -> Tensor:
        """Let `experts` compute and bring the weighted sums [tokens, dim] of their results back."""


class Experts(nn.Module):
    """All routed experts' SwiGLU weights in two stacks, applied by two grouped matmuls.

    gate_up_proj is [experts, 2 x hidden, dim] with the gate's rows first, down_proj is [experts, dim,
    hidden]; a released checkpoint holds the same rows one expert at a time.
    """

    def __init__(self, dim: int, config: MoEConfig) -> None:
        super().__init__()
        experts, hidden = config.num_experts, config.hidden_dim
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * hidden, dim))
        self.down_proj = nn.Parameter(torch.empty(experts, dim, hidden))
        self.product: GroupedProduct = grouped_linear

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Map `rows` [rows, dim], sorted by expert with `counts` [experts] rows each, to [rows, dim]."""
        return apply_experts(rows, counts, self.gate_up_proj, self.down_proj, self.product)


def apply_experts(
    rows: Tensor, counts: Tensor, gate_up_proj: Tensor, down_proj: Tensor, product: GroupedProduct
) -> Tensor:
    """SwiGLU of each expert on its own rows; shapes as in Experts."""
    ends = counts.cumsum(0).to(torch.int32)
    gate, up = product(rows, gate_up_proj, ends).chunk(2, dim=-1)
    return product(F.silu(gate) * up, down_proj, ends)


def grouped_linear(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """The product of `Experts` in the dtype of the rows."""
    return F.grouped_mm(rows, weight.to(rows.dtype).transpose(-2, -1), offs=ends)


class Spread(torch.autograd.Function):
    """Row `order[n] // copies` of x at place n: `copies` of every row, in the order of a permutation.

    Its gradient gathers through the inverse permutation and sums the copies. PyTorch's own gradient
    of indexing adds with atomics, which is slower and, on CPU too, not the same bits every time.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, place: Tensor, copies: int) -> Tensor:
        """`x` [rows, dim] and a permutation `order` [rows x copies] with its inverse `place`."""
        ctx.save_for_backward(place)
        ctx.copies = copies
        return x[order // copies]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        """The gradient of x: each row's copies added up."""
        (place,) = ctx.saved_tensors
        gathered = gradients[0][place]
        if ctx.copies > 1:
            gathered = gathered.unflatten(0, (-1, ctx.copies)).sum(1)
        return gathered, None, None, None


class LocalDispatcher:
    """Brings tokens to experts that all live here: sort by expert, compute, weigh, add up.

    parallel/expert.py puts one with an all-to-all exchange in its place.
    """

    def dispatch(self, x: Tensor, routing: Routing) -> tuple[Tensor, Routing]:
        """Nothing has to travel."""
        return x, routing

    def combine(self, dispatched: tuple[Tensor, Routing], experts: ExpertsFunction) -> Tensor:
        """Each token's row once for every expert it chose, and their weighted sum."""
        x, routing = dispatched
        top_k = routing.experts.shape[-1]
        order = routing.experts.flatten().argsort(stable=True)
        place = order.argsort()
        rows = experts(_spread(x, order, place, top_k), routing.stats.load)
        # Back in token order: summing a token's top_k rows is a matmul, so no scattered adds.
        rows = _spread(rows, place, order, 1).unflatten(0, (-1, top_k))
        return torch.bmm(routing.weights.to(x.dtype).unsqueeze(1), rows).squeeze(1)


class MoE(nn.Module):
    """Router, routed experts and shared experts of one layer (HF: mlp)."""

    def __init__(self, dim: int, config: MoEConfig) -> None:
        super().__init__()
        self.router = Router(dim, config)
        self.experts = Experts(dim, config)
        shared_dim = config.num_shared_experts * config.hidden_dim
        self.shared_experts = FeedForward(dim, shared_dim) if shared_dim else None
        self.dispatcher: Dispatcher = LocalDispatcher()

    def forward(self, x: Tensor) -> tuple[Tensor, RouterStats]:
        """Map `x` [batch, sequence, dim] to the same shape; also how the router spread it."""
        routing: Routing = self.router(x)
        dispatched = self.dispatcher.dispatch(x.flatten(0, 1), routing)
        # Between the two, so that they compute while rows travel.
        shared = None if self.shared_experts is None else self.shared_experts(x)
        out = self.dispatcher.combine(dispatched, self.experts).view_as(x)
        return out if shared is None else out + shared, routing.stats


def _spread(x: Tensor, order: Tensor, place: Tensor, copies: int) -> Tensor:
    return Spread.apply(x, order, place, copies)  # type: ignore[no-any-return, no-untyped-call]
