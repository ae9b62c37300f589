"""Rows to several places at once, and their sums back: the data movement of expert parallelism.

A route is made of a table [rows, places] that says where each row goes. Both directions only gather, so
that no gradient is added up by atomics: results are the same bits every time.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsv3.model.moe import ExpertsFunction


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
