"""Expert parallelism: tokens travel to the ranks that hold their experts, and weighted sums come back.

A token is sent to a rank once, however many of its experts live there, with its weights for all of
them; the rank adds the results up, so that one row comes back. Where `ep` spans nodes there are two
levels: a token crosses to a node once, to the rank of the same number there, and is passed on within it.
The number of rows is read on the host, once a layer and level: all_to_all needs it (NCCL's too).
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import Shard, distribute_tensor

from dsv3.config.parallel import ExchangeBackend
from dsv3.model.moe import Dispatcher, Experts, ExpertsFunction, MoE, apply_experts
from dsv3.model.router import Routing
from dsv3.model.transformer import Transformer
from dsv3.parallel.collectives import start_exchange, wait
from dsv3.parallel.deepep import DeepEPDispatcher
from dsv3.parallel.mesh import ParallelMesh
from dsv3.parallel.token_dispatch import (
    Exchange,
    FP8Transport,
    PlainTransport,
    Route,
    Transport,
    bring_back,
    make_route,
    send,
    weighted_sums,
)


class ExpertParallel:
    """Places experts on the ranks of the `ep` axis and gives every MoE layer a dispatcher between them."""

    def __init__(self, backend: ExchangeBackend, ranks_per_node: int | None) -> None:
        self.backend = backend
        self.ranks_per_node = ranks_per_node

    def __call__(self, model: Transformer, mesh: ParallelMesh) -> None:
        """Wrap `model` in place where `ep` is above 1."""
        if mesh.degrees.ep == 1:
            return
        dispatcher = self._dispatcher(model, mesh)
        for module in model.modules():
            if isinstance(module, MoE):
                _place(module.experts, mesh)
                module.dispatcher = dispatcher

    def _dispatcher(self, model: Transformer, mesh: ParallelMesh) -> Dispatcher:
        if self.backend is ExchangeBackend.all_to_all:
            return ExchangeDispatcher(mesh.exchange)
        return DeepEPDispatcher.over(mesh, model.config.dim)


def _place(experts: Experts, mesh: ParallelMesh) -> None:
    for name, weight in list(experts.named_parameters()):
        split = distribute_tensor(weight, mesh.expert["ep"], [Shard(0)], src_data_rank=None)
        experts.register_parameter(name, nn.Parameter(split))
    experts.forward = partial(_apply_own, experts)  # type: ignore[method-assign]


def _apply_own(experts: Experts, rows: Tensor, counts: Tensor) -> Tensor:
    weights = (experts.gate_up_proj.to_local(), experts.down_proj.to_local())  # type: ignore[attr-defined]
    return apply_experts(rows, counts, *weights, experts.product)


def send_in_fp8(model: Transformer, power_of_two: bool) -> None:
    """Let rows travel to experts in FP8, where they travel."""
    for module in model.modules():
        if isinstance(module, MoE) and isinstance(module.dispatcher, ExchangeDispatcher | DeepEPDispatcher):
            module.dispatcher.send_in_fp8(power_of_two)


class Leg(NamedTuple):
    """One exchange that rows have made, for the way back."""

    route: Route
    exchange: Exchange


class Arriving(NamedTuple):
    """Rows that are under way to this rank, with what it is to do with them."""

    rows: Callable[[], Tensor]
    """Waits for them: [received rows, dim]."""
    weights: Tensor
    """[received rows, experts behind this rank] fp32, 0 for experts not chosen."""
    chosen: Tensor
    """[received rows, experts behind this rank] bool."""
    leg: Leg


class ExchangeDispatcher:
    """The dispatcher of experts that live on several ranks; `transport` carries the rows."""

    def __init__(self, levels: list[dist.ProcessGroup]) -> None:
        self.levels = levels
        self.transport: Transport = PlainTransport()

    def send_in_fp8(self, power_of_two: bool) -> None:
        """Let rows, and gradients of results, go to experts in FP8."""
        self.transport = FP8Transport(power_of_two)

    def dispatch(self, x: Tensor, routing: Routing) -> tuple[Arriving, int]:
        """Start the first exchange of `x` [tokens, dim]; the experts' turn comes in `combine`."""
        experts, top_k = routing.stats.load.shape[0], routing.experts.shape[1]
        weights = x.new_zeros(x.shape[0], experts, dtype=torch.float32)
        chosen = torch.zeros_like(weights, dtype=torch.bool).scatter(1, routing.experts, True)
        weights = weights.scatter(1, routing.experts, routing.weights)
        return self._start(x, weights, chosen, top_k, self.levels[0]), top_k

    def combine(self, dispatched: tuple[Arriving, int], experts: ExpertsFunction) -> Tensor:
        """Let the rows arrive, compute, and bring the weighted sums [tokens, dim] back."""
        arriving, top_k = dispatched
        legs = [arriving.leg]
        for group in self.levels[1:]:
            arriving = self._start(arriving.rows(), arriving.weights, arriving.chosen, top_k, group)
            legs.append(arriving.leg)
        out = weighted_sums(arriving.rows(), arriving.weights, arriving.chosen, top_k, experts)
        for leg in reversed(legs):
            out = bring_back(self.transport.back(out, leg.exchange), leg.route)
        return out

    def _start(
        self, x: Tensor, weights: Tensor, chosen: Tensor, top_k: int, group: dist.ProcessGroup
    ) -> Arriving:
        """Send each row of `x` once to every rank of `group` behind which it has an expert."""
        ranks = group.size()
        goes = chosen.unflatten(1, (ranks, -1)).any(-1)
        route = make_route(goes, min(top_k, ranks))
        exchange = Exchange(*_exchange_counts(route.counts, group), group)
        rows = self.transport.go(send(x, route), exchange)
        # A copy takes the weights of the experts behind its own place along.
        taken = (route.source, route.place)
        weights = weights.unflatten(1, (ranks, -1))[taken]
        marks = chosen.unflatten(1, (ranks, -1))[taken].to(weights.dtype)
        both = wait(start_exchange(torch.cat([weights, marks], dim=1), *exchange))
        weights, marks = both.chunk(2, dim=1)
        return Arriving(rows, weights, marks > 0, Leg(route, exchange))


def _exchange_counts(counts: Tensor, group: dist.ProcessGroup) -> tuple[list[int], list[int]]:
    """How many rows go to each rank and come from each: the one time the host waits for the device."""
    ones = [1] * group.size()
    received = wait(start_exchange(counts, ones, ones, group))
    sent_list, received_list = torch.stack([counts, received]).tolist()
    return sent_list, received_list
