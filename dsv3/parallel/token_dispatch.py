"""Rows to several places at once, and their sums back: the data movement of expert parallelism.

A route is made of a table [rows, places] that says where each row goes. Both directions only gather, so
that no gradient is added up by atomics: results are the same bits every time.


How rows travel to their experts and back: as they are, or there in FP8 and back as they are.

In FP8 what goes to the experts is quantised, rows in the forward pass and the gradients of their results in
the backward pass; weighted sums and the gradients of rows come back in the compute dtype (DeepSeek-V3's
report, section 3.3.3).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3.fp8.operands import pack, unpack
from dsv3.model.moe import ExpertsFunction
from dsv3.parallel.collectives import start_exchange, wait


class Route(NamedTuple):
    """Which rows go where, sorted by place."""

    source: Tensor
    """[copies] the row that each copy is of; all of place 0 first."""
    place: Tensor
    """[copies] where it goes."""
    slots: Tensor
    """[rows, most places a row] the copies of a row; `copies` (one past the last) where it has fewer."""
    counts: Tensor
    """[places] copies that go to each."""


def make_route(goes: Tensor, most: int) -> Route:
    """The route of `goes` [rows, places] bool, with at most `most` places a row."""
    by_place = goes.t()
    place, source = by_place.nonzero(as_tuple=True)
    number = (by_place.flatten().cumsum(0) - 1).view_as(by_place).t()
    # A row's own places first; the others point at the row of zeros behind the last copy.
    first = (~goes).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
    slots = number.gather(1, first).masked_fill(~goes.gather(1, first), len(source))
    return Route(source, place, slots, goes.sum(0))


def send(x: Tensor, route: Route) -> Tensor:
    """The copies [copies, dim] of the rows of `x` [rows, dim], in the order of the route."""
    return _Send.apply(x, route.source, route.slots)  # type: ignore[no-any-return, no-untyped-call]


def bring_back(copies: Tensor, route: Route) -> Tensor:
    """For every row the sum [rows, dim] of its `copies` [copies, dim]."""
    return _BringBack.apply(copies, route.source, route.slots)  # type: ignore[no-any-return, no-untyped-call]


def weighted_sums(
    rows: Tensor, weights: Tensor, chosen: Tensor, top_k: int, experts: ExpertsFunction
) -> Tensor:
    """For each of `rows` [rows, dim] the weighted sum of its results over the experts here.

    `weights` [rows, experts] count where `chosen` [rows, experts] says so, at most `top_k` times a row.
    """
    route = make_route(chosen, min(top_k, chosen.shape[1]))
    out = experts(send(rows, route), route.counts)
    taken = weights[route.source, route.place].to(out.dtype)
    return bring_back(out * taken.unsqueeze(1), route)


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        return x[source]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _sum_slots(gradients[0], ctx.saved_tensors[0]), None, None


class _BringBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, copies: Tensor, source: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(source)
        return _sum_slots(copies, slots)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0][ctx.saved_tensors[0]], None, None


def _sum_slots(copies: Tensor, slots: Tensor) -> Tensor:
    padded = torch.cat([copies, copies.new_zeros(1, copies.shape[1])])
    return padded[slots].sum(1)


class Exchange(NamedTuple):
    """Rows from this rank to each rank of `group`, and to this rank from each."""

    sent: list[int]
    received: list[int]
    group: dist.ProcessGroup


class Transport(Protocol):
    """Carries rows."""

    def go(self, rows: Tensor, exchange: Exchange) -> Callable[[], Tensor]:
        """Start to send `rows` [sent rows, dim]; what comes out waits for the [received rows, dim]."""

    def back(self, rows: Tensor, exchange: Exchange) -> Tensor:
        """Send results [received rows, dim] the way back: [sent rows, dim]."""


class PlainTransport:
    """Rows travel in the dtype they have."""

    def go(self, rows: Tensor, exchange: Exchange) -> Callable[[], Tensor]:
        """See Transport."""
        return partial(wait, start_exchange(rows, *exchange))

    def back(self, rows: Tensor, exchange: Exchange) -> Tensor:
        """See Transport."""
        return wait(start_exchange(rows, *_reversed(exchange)))


class FP8Transport:
    """Rows and gradients of results travel to experts in FP8."""

    def __init__(self, power_of_two: bool) -> None:
        self.power_of_two = power_of_two

    def go(self, rows: Tensor, exchange: Exchange) -> Callable[[], Tensor]:
        """See Transport."""
        begun = start_exchange(pack(rows, self.power_of_two), *exchange)
        # Bytes have no gradient: `rows` go along to be what the result is differentiated by.
        return partial(_Arrive.apply, rows, begun, exchange)

    def back(self, rows: Tensor, exchange: Exchange) -> Tensor:
        """See Transport."""
        return _Return.apply(rows, exchange, self.power_of_two)  # type: ignore[no-any-return, no-untyped-call]


def _reversed(exchange: Exchange) -> Exchange:
    return Exchange(exchange.received, exchange.sent, exchange.group)


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, begun: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return unpack(wait(begun), rows.shape[1], rows.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return wait(start_exchange(gradients[0], *_reversed(ctx.exchange))), None, None


class _Return(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: Exchange, power_of_two: bool) -> Tensor:
        ctx.exchange, ctx.power_of_two = exchange, power_of_two
        return wait(start_exchange(rows, *_reversed(exchange)))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        gradient = gradients[0]
        packed = wait(start_exchange(pack(gradient, ctx.power_of_two), *ctx.exchange))
        return unpack(packed, gradient.shape[1], gradient.dtype), None, None
