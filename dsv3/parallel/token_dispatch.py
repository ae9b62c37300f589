"""Token dispatch: send every token's row to the ranks of its experts and bring the weighted sums back.

`AllToAllTokenDispatcher` is the default backend of expert parallelism; deepep.py has the other one. It
sends a row to a rank once, however many of the token's experts live there, together with the router
weights of all of them. The rank adds the experts' weighted results up, so that one row comes back. Where
`ep` spans nodes there are two levels: a row crosses to each node once, to the rank of the same number
there, and is passed on within the node. all_to_all (NCCL's too) needs the row counts as integers: the host
reads those of all levels and of the local experts at once, and waits once per layer.

Rows are permuted into the order of their destinations and unpermuted on the way back. Both directions
only gather, so that no gradient is added up by atomics: results are the same bits every time.

FP8 dispatch quantizes the rows that go to experts: activations in the forward pass, gradients of results in
the backward pass. Weighted sums and gradients of rows come back in the compute dtype (DeepSeek-V3 report,
section 3.3.3).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3.fp8.operands import pack_rows, unpack_rows
from dsv3.model.moe import ExpertsFunction, RowCounts
from dsv3.model.router import Routing
from dsv3.model.transfers import download
from dsv3.parallel.collectives import start_all_to_all, wait


class Permutation(NamedTuple):
    """Copies of rows in the order of their destinations: ranks of a group, or experts of this rank."""

    source: Tensor
    """[copies] the row that each copy is of; the copies for destination 0 come first."""
    destination: Tensor
    """[copies] the destination of each copy."""
    copies_of_row: Tensor
    """[rows, most copies per row] the copies of each row, padded with `copies` (one past the last)."""


def make_permutation(routing_map: Tensor, max_copies: int, copies: int) -> Permutation:
    """Return the permutation for `routing_map` [rows, destinations] bool, which has `copies` true entries.

    A row has at most `max_copies` destinations.
    """
    chosen = routing_map.t().flatten()
    number = chosen.cumsum(0) - 1
    # What nonzero() gives, without the wait for its size: entry n goes to place `number` of the list, and the
    # false ones to a place behind it.
    entries = torch.arange(len(chosen), device=chosen.device)
    places = number.masked_fill(~chosen, copies)
    listed = entries.new_zeros(copies + 1).scatter(0, places, entries)[:copies]
    rows = max(1, len(routing_map))
    number = number.view(routing_map.shape[1], -1).t()
    # A row's own destinations first; the padding points at the row of zeros behind the last copy.
    first = (~routing_map).to(torch.uint8).argsort(dim=1, stable=True)[:, :max_copies]
    copies_of_row = number.gather(1, first).masked_fill(~routing_map.gather(1, first), copies)
    return Permutation(listed % rows, listed // rows, copies_of_row)


def permute(x: Tensor, permutation: Permutation) -> Tensor:
    """Return the copies [copies, dim] of the rows of `x` [rows, dim], sorted by destination."""
    return _Permute.apply(x, permutation.source, permutation.copies_of_row)  # type: ignore[no-any-return, no-untyped-call]


def unpermute(copies: Tensor, permutation: Permutation) -> Tensor:
    """Return for every row the sum [rows, dim] of its `copies` [copies, dim]."""
    return _Unpermute.apply(copies, permutation.source, permutation.copies_of_row)  # type: ignore[no-any-return, no-untyped-call]


def run_local_experts(
    rows: Tensor,
    weights: Tensor,
    routing_map: Tensor,
    top_k: int,
    counts: RowCounts,
    experts: ExpertsFunction,
) -> Tensor:
    """Return for each of `rows` [rows, dim] the weighted sum of its results over this rank's experts.

    `weights` [rows, experts] count where `routing_map` [rows, experts] is true: at most `top_k` per row.
    `counts` are those of the map, known to the host.
    """
    assert counts.on_host is not None
    permutation = make_permutation(routing_map, min(top_k, routing_map.shape[1]), sum(counts.on_host))
    out = experts(permute(rows, permutation), counts)
    weight = weights[permutation.source, permutation.destination].to(out.dtype)
    return unpermute(out * weight.unsqueeze(1), permutation)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, copies_of_row: Tensor) -> Tensor:
        ctx.save_for_backward(copies_of_row)
        return x[source]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _sum_copies(gradients[0], ctx.saved_tensors[0]), None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, copies: Tensor, source: Tensor, copies_of_row: Tensor) -> Tensor:
        ctx.save_for_backward(source)
        return _sum_copies(copies, copies_of_row)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0][ctx.saved_tensors[0]], None, None


def _sum_copies(copies: Tensor, copies_of_row: Tensor) -> Tensor:
    padded = torch.cat([copies, copies.new_zeros(1, copies.shape[1])])
    return padded[copies_of_row].sum(1)


class AllToAllSplits(NamedTuple):
    """Row counts of one all-to-all: from this rank to each rank of `group`, and from each to this rank."""

    input_splits: list[int]
    output_splits: list[int]
    group: dist.ProcessGroup

    def reversed(self) -> "AllToAllSplits":
        """Return the splits of the all-to-all that brings the rows back."""
        return AllToAllSplits(self.output_splits, self.input_splits, self.group)


class DispatchPlan(NamedTuple):
    """All row counts of one dispatch, as the host needs them."""

    levels: list[AllToAllSplits]
    """The splits of each level's all-to-all."""
    counts: RowCounts
    """Rows per expert of this rank."""


def exchange_counts(routing_map: Tensor, groups: list[dist.ProcessGroup]) -> DispatchPlan:
    """Return the plan of dispatching `routing_map` [tokens, experts] bool over the levels `groups`.

    A rank tells each rank of the first group how many rows it will get, and how many of these it is to pass
    on to each rank of the next level and to each expert: all counts are known before a row moves.
    """
    sizes = [group.size() for group in groups]
    by_place = routing_map.unflatten(1, (*sizes, -1))
    # counts[n] [R_1, .., R_n]: rows with an expert behind each place of level n; the last are the experts.
    counts = [by_place.flatten(n + 2).any(-1).sum(0) for n in range(len(sizes))] + [by_place.sum(0)]
    splits: list[Tensor] = []
    for size, group in zip(sizes, groups, strict=True):
        ones, shapes = [1] * size, [one.shape[1:] for one in counts]
        told = torch.cat([one.reshape(size, -1) for one in counts], dim=1)
        received = wait(start_all_to_all(told, ones, ones, group))
        splits += [told[:, 0], received[:, 0]]
        # What arrives from all ranks of the group is passed on together.
        _, *rest = received.sum(0).split([shape.numel() for shape in shapes])
        counts = [one.view(shape) for one, shape in zip(rest, shapes[1:], strict=True)]
    # The one time that the host waits for the device.
    known = download(torch.cat([*splits, counts[0]])).split([*(len(one) for one in splits), len(counts[0])])
    *integers, per_expert = [one.tolist() for one in known]
    pairs = zip(integers[0::2], integers[1::2], groups, strict=True)
    return DispatchPlan([AllToAllSplits(*level) for level in pairs], RowCounts(counts[0], per_expert))


class Transport(Protocol):
    """The form in which rows travel between ranks."""

    def dispatch(self, rows: Tensor, splits: AllToAllSplits) -> Callable[[], Tensor]:
        """Start to send `rows` [sent rows, dim]; return a function that waits for [received rows, dim]."""

    def combine(self, rows: Tensor, splits: AllToAllSplits) -> Tensor:
        """Send results [received rows, dim] back to where their rows came from: [sent rows, dim]."""


class PlainTransport:
    """Rows travel in their own dtype."""

    def dispatch(self, rows: Tensor, splits: AllToAllSplits) -> Callable[[], Tensor]:
        """See Transport."""
        return partial(wait, start_all_to_all(rows, *splits))

    def combine(self, rows: Tensor, splits: AllToAllSplits) -> Tensor:
        """See Transport."""
        return wait(start_all_to_all(rows, *splits.reversed()))


class FP8Transport:
    """Rows, and gradients of results, travel to experts in FP8."""

    def __init__(self, power_of_two: bool) -> None:
        self.power_of_two = power_of_two

    def dispatch(self, rows: Tensor, splits: AllToAllSplits) -> Callable[[], Tensor]:
        """See Transport."""
        in_flight = start_all_to_all(pack_rows(rows, self.power_of_two), *splits)
        # Bytes have no gradient: `rows` come along so that the result has something to be differentiated by.
        return partial(_FP8Dispatch.apply, rows, in_flight, splits)

    def combine(self, rows: Tensor, splits: AllToAllSplits) -> Tensor:
        """See Transport."""
        return _FP8Combine.apply(rows, splits, self.power_of_two)  # type: ignore[no-any-return, no-untyped-call]


class _FP8Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, in_flight: Tensor, splits: AllToAllSplits) -> Tensor:
        ctx.splits = splits
        return unpack_rows(wait(in_flight), rows.shape[1], rows.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return wait(start_all_to_all(gradients[0], *ctx.splits.reversed())), None, None


class _FP8Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, splits: AllToAllSplits, power_of_two: bool) -> Tensor:
        ctx.splits, ctx.power_of_two = splits, power_of_two
        return wait(start_all_to_all(rows, *splits.reversed()))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        gradient = gradients[0]
        packed = wait(start_all_to_all(pack_rows(gradient, ctx.power_of_two), *ctx.splits))
        return unpack_rows(packed, gradient.shape[1], gradient.dtype), None, None


class CombineHandle(NamedTuple):
    """One dispatched all-to-all, kept for the way back."""

    permutation: Permutation
    splits: AllToAllSplits


class DispatchedRows(NamedTuple):
    """Rows on their way to this rank, with what this rank needs to process them."""

    wait: Callable[[], Tensor]
    """Waits for the rows and returns them: [received rows, dim]."""
    weights: Tensor
    """[received rows, experts behind this rank] fp32, 0 for experts not chosen."""
    routing_map: Tensor
    """[received rows, experts behind this rank] bool: true for the experts that the token chose."""
    top_k: int
    """Experts per token."""
    plan: DispatchPlan
    handle: CombineHandle


class AllToAllTokenDispatcher:
    """The TokenDispatcher of experts that live on several ranks, by all-to-all over each of `groups`."""

    def __init__(self, groups: list[dist.ProcessGroup]) -> None:
        self.groups = groups
        self.transport: Transport = PlainTransport()

    def dispatch_in_fp8(self, power_of_two: bool) -> None:
        """Send rows, and gradients of results, to experts in FP8."""
        self.transport = FP8Transport(power_of_two)

    def dispatch(self, x: Tensor, routing: Routing) -> DispatchedRows:
        """Start the first all-to-all of `x` [tokens, dim]; what runs before `combine` overlaps with it."""
        num_experts, top_k = routing.stats.load.shape[0], routing.experts.shape[1]
        weights = x.new_zeros(x.shape[0], num_experts, dtype=torch.float32)
        routing_map = torch.zeros_like(weights, dtype=torch.bool).scatter(1, routing.experts, True)
        if routing.padding is not None:
            routing_map = routing_map & routing.padding.is_token.view(-1, 1)  # rows without a destination
        weights = weights.scatter(1, routing.experts, routing.weights)
        plan = exchange_counts(routing_map, self.groups)
        return self._dispatch_level(x, weights, routing_map, top_k, plan, level=0)

    def combine(self, dispatched: DispatchedRows, experts: ExpertsFunction) -> Tensor:
        """Wait for the rows, run `experts` on them, and return the weighted sums [tokens, dim]."""
        handles = [dispatched.handle]
        plan, top_k = dispatched.plan, dispatched.top_k
        for level in range(1, len(plan.levels)):
            dispatched = self._dispatch_level(
                dispatched.wait(), dispatched.weights, dispatched.routing_map, top_k, plan, level
            )
            handles.append(dispatched.handle)
        out = run_local_experts(
            dispatched.wait(), dispatched.weights, dispatched.routing_map, top_k, plan.counts, experts
        )
        for handle in reversed(handles):
            out = unpermute(self.transport.combine(out, handle.splits), handle.permutation)
        return out

    def _dispatch_level(
        self, x: Tensor, weights: Tensor, routing_map: Tensor, top_k: int, plan: DispatchPlan, level: int
    ) -> DispatchedRows:
        """Send each row of `x` once to every rank of the level's group behind which it has an expert."""
        splits = plan.levels[level]
        ranks = splits.group.size()
        to_rank = routing_map.unflatten(1, (ranks, -1)).any(-1)
        permutation = make_permutation(to_rank, min(top_k, ranks), sum(splits.input_splits))
        wait_for_rows = self.transport.dispatch(permute(x, permutation), splits)
        # Each copy takes along the weights of the experts behind its own destination.
        copies = (permutation.source, permutation.destination)
        weights = weights.unflatten(1, (ranks, -1))[copies]
        marks = routing_map.unflatten(1, (ranks, -1))[copies].to(weights.dtype)
        both = wait(start_all_to_all(torch.cat([weights, marks], dim=1), *splits))
        weights, marks = both.chunk(2, dim=1)
        handle = CombineHandle(permutation, splits)
        return DispatchedRows(wait_for_rows, weights, marks > 0, top_k, plan, handle)
