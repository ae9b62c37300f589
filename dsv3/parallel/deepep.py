"""Expert parallelism over DeepEP 1.2.1 (github.com/deepseek-ai/DeepEP): its kernels carry the rows.

A row goes once to every rank that has one of its experts, over both levels where `ep` spans nodes. DeepEP
adds up without weights, so each rank weighs its own results. The gradient of a dispatch is a combine and
that of a combine a dispatch the same way again (docs/legacy.md there). Rows are bf16, and on their way to
experts FP8 where that is chosen: a config with fp32 is refused before the launch (backends.py).
"""

import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsv3.errors import UserError
from dsv3.fp8.operands import decode, encode
from dsv3.model.moe import ExpertsFunction
from dsv3.model.router import Routing
from dsv3.parallel.mesh import ParallelMesh
from dsv3.parallel.token_dispatch import weighted_sums
from dsv3.planning.checks import NODE, missing


class Arrived(NamedTuple):
    """What DeepEP hands out; to be read once `event` has been waited for."""

    rows: Any
    """[received rows, dim], as they travel."""
    weights: Tensor
    """[received rows, top_k] fp32."""
    chosen: Tensor
    """[received rows, top_k]: numbers of experts here, -1 for one that lives elsewhere."""
    handle: Any
    """The way that the rows came, for DeepEP alone."""
    event: Any


class Dispatched(NamedTuple):
    """What was sent, which results are differentiated by, and what arrives."""

    x: Tensor
    weights: Tensor
    arrived: Arrived
    experts: int
    """Experts that live here."""


class BF16Rows:
    """Rows [rows, dim] travel as they are."""

    def leave(self, rows: Tensor) -> Any:
        """What DeepEP is handed."""
        return rows.contiguous()

    def arrive(self, found: Any) -> Tensor:
        """The rows in bf16 from what DeepEP hands out."""
        return found  # type: ignore[no-any-return]


class FP8Rows:
    """Rows travel as a pair, codes and the scales of their 1 x 128 tiles."""

    def __init__(self, power_of_two: bool) -> None:
        self.power_of_two = power_of_two

    def leave(self, rows: Tensor) -> Any:
        """See BF16Rows."""
        return encode(rows, self.power_of_two)

    def arrive(self, found: Any) -> Tensor:
        """See BF16Rows."""
        codes, scales = found
        return decode(codes, scales, torch.bfloat16)


class DeepEPDispatcher:
    """The dispatcher of experts that live on the ranks of a deep_ep.Buffer; expert numbers go as `index`."""

    def __init__(self, buffer: Any, index: torch.dtype) -> None:
        self.buffer = buffer
        self.index = index
        self.form: BF16Rows | FP8Rows = BF16Rows()

    @classmethod
    def over(cls, mesh: ParallelMesh, dim: int) -> "DeepEPDispatcher":
        """One for bf16 rows of `dim` on the `ep` axis; every rank of the axis calls it.

        UserError where the package cannot be imported.
        """
        try:
            deep_ep: Any = importlib.import_module("deep_ep")
        except ImportError as error:  # also where it is installed and CUDA's libraries are not
            raise UserError(missing(str(error))) from None
        return cls(_buffer(deep_ep.Buffer, mesh, dim), deep_ep.topk_idx_t)

    def send_in_fp8(self, power_of_two: bool) -> None:
        """Let rows, and gradients of results, go to experts in FP8; `dim` is a multiple of 128."""
        self.form = FP8Rows(power_of_two)

    def dispatch(self, x: Tensor, routing: Routing) -> Dispatched:
        """Start the exchange of `x` [tokens, dim] bf16, which overlaps with what runs before `combine`."""
        experts: int = routing.stats.load.shape[0]
        arrived = self._send(x.detach(), routing.weights.detach(), routing.experts.to(self.index), experts)
        return Dispatched(x, routing.weights, arrived, experts // self.buffer.group_size)

    def _send(self, x: Tensor, weights: Tensor, chosen: Tensor, experts: int) -> Arrived:
        chosen = chosen.contiguous()
        per_rank, per_node, per_expert, goes, _ = self.buffer.get_dispatch_layout(chosen, experts)
        rows, here, received, _, handle, event = self.buffer.dispatch(
            self.form.leave(x),
            topk_idx=chosen,
            topk_weights=weights.contiguous(),
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=goes,
            num_tokens_per_expert=per_expert,
            async_finish=True,
        )
        return Arrived(rows, received, here, handle, event)

    def combine(self, dispatched: Dispatched, experts: ExpertsFunction) -> Tensor:
        """Let the rows arrive, compute, and bring the weighted sums [tokens, dim] back."""
        x, weights, arrived, here = dispatched
        arrived.event.current_stream_wait()
        rows, weights = _Arrive.apply(x, weights, arrived, self)  # type: ignore[no-untyped-call]
        spread, marks = _by_expert(weights, arrived.chosen, here)
        out = weighted_sums(rows, spread, marks, arrived.chosen.shape[1], experts)
        return _Return.apply(out, arrived.handle, self)  # type: ignore[no-any-return, no-untyped-call]


def _buffer(kind: Any, mesh: ParallelMesh, dim: int) -> Any:
    """The mesh's deep_ep.Buffer (`kind`); all stages of a rank share it, for it takes hundreds of MiB."""
    group = mesh.expert.get_group("ep")
    ranks, row = group.size(), 2 * dim
    configs = [kind.get_dispatch_config(ranks), kind.get_combine_config(ranks)]
    nvl = max(config.get_nvl_buffer_size_hint(row, ranks) for config in configs)
    # A build without NVSHMEM, enough for one node, fails where it is asked for this.
    rdma = max(config.get_rdma_buffer_size_hint(row, ranks) for config in configs) if ranks > NODE else 0
    buffer = mesh.expert_buffer
    if buffer is None or buffer.num_nvl_bytes < nvl or buffer.num_rdma_bytes < rdma:
        mesh.expert_buffer = kind(group, nvl, rdma)
    return mesh.expert_buffer


def _by_expert(weights: Tensor, chosen: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """By expert here [rows, experts]: weights, 0 where not chosen, and whether it was chosen."""
    # The experts of other ranks share a column behind the last one, which is cut off.
    column = chosen.long().masked_fill(chosen < 0, experts)
    table = weights.new_zeros(weights.shape[0], experts + 1)
    marks = torch.zeros_like(table, dtype=torch.bool).scatter(1, column, True)
    return table.scatter(1, column, weights)[:, :experts], marks[:, :experts]


class _Arrive(torch.autograd.Function):
    """The rows and weights that arrived, as a function of those that were sent."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, arrived: Arrived, sender: DeepEPDispatcher
    ) -> tuple[Tensor, Tensor]:
        ctx.handle, ctx.buffer = arrived.handle, sender.buffer
        return sender.form.arrive(arrived.rows), arrived.weights

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor, None, None]:
        rows, weights = gradients
        x, summed, _ = ctx.buffer.combine(rows.contiguous(), ctx.handle, topk_weights=weights.contiguous())
        return x, summed, None, None


class _Return(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, handle: Any, sender: DeepEPDispatcher) -> Tensor:
        ctx.handle, ctx.sender = handle, sender
        return sender.buffer.combine(out.contiguous(), handle)[0]  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None]:
        form = ctx.sender.form
        found = ctx.sender.buffer.dispatch(form.leave(gradients[0]), handle=ctx.handle)[0]
        return form.arrive(found), None, None
