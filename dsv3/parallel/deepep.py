"""Expert parallelism over DeepEP 1.2.1 (github.com/deepseek-ai/DeepEP): its kernels carry the rows.

A row goes once to every rank that has one of its experts, over both levels where `ep` spans nodes. DeepEP
adds up without weights, so each rank weighs its own results. The gradient of a dispatch is a combine and
that of a combine a dispatch the same way again (docs/legacy.md there). Rows are bf16: a config with fp32
is refused before the launch (backends.py).
"""

import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsv3.model.moe import ExpertsFunction
from dsv3.model.router import Routing
from dsv3.parallel.backends import NODE, missing
from dsv3.parallel.mesh import ParallelMesh
from dsv3.parallel.routes import weighted_sums
from dsv3.runtime.errors import UserError


class Arriving(NamedTuple):
    """Rows that are under way to this rank; to be read once `event` has been waited for."""

    rows: Tensor
    """[received rows, dim] bf16."""
    weights: Tensor
    """[received rows, top_k] fp32."""
    chosen: Tensor
    """[received rows, top_k]: numbers of experts here, -1 for one that lives elsewhere."""
    handle: Any
    """The way that the rows came, for DeepEP alone."""
    event: Any
    experts: int
    """Experts that live here."""


class DeepEPDispatcher:
    """The dispatcher of experts that live on the ranks of a deep_ep.Buffer; expert numbers go as `index`."""

    def __init__(self, buffer: Any, index: torch.dtype) -> None:
        self.buffer = buffer
        self.index = index

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

    def dispatch(self, x: Tensor, routing: Routing) -> Arriving:
        """Start the exchange of `x` [tokens, dim] bf16, which overlaps with what runs before `combine`."""
        experts: int = routing.stats.load.shape[0]
        chosen = routing.experts.to(self.index)
        found = _Dispatch.apply(x, routing.weights, chosen, experts, self.buffer)  # type: ignore[no-untyped-call]
        rows, weights, numbers, handle, event = found
        return Arriving(rows, weights, numbers, handle, event, experts // self.buffer.group_size)

    def combine(self, dispatched: Arriving, experts: ExpertsFunction) -> Tensor:
        """Let the rows arrive, compute, and bring the weighted sums [tokens, dim] back."""
        rows, weights, chosen, handle, event, here = dispatched
        event.current_stream_wait()
        spread, marks = _by_expert(weights, chosen, here)
        out = weighted_sums(rows, spread, marks, chosen.shape[1], experts)
        return _Combine.apply(out, handle, self.buffer)  # type: ignore[no-any-return, no-untyped-call]


def _buffer(kind: Any, mesh: ParallelMesh, dim: int) -> Any:
    """The mesh's deep_ep.Buffer (`kind`); all stages of a rank share it, for it takes hundreds of MiB."""
    group = mesh.sparse.get_group("ep")
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


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, chosen: Tensor, experts: int, buffer: Any
    ) -> tuple[Tensor, Tensor, Tensor, Any, Any]:
        chosen = chosen.contiguous()
        per_rank, per_node, per_expert, goes, _ = buffer.get_dispatch_layout(chosen, experts)
        rows, here, received, _, handle, event = buffer.dispatch(
            x.contiguous(),
            topk_idx=chosen,
            topk_weights=weights.contiguous(),
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=goes,
            num_tokens_per_expert=per_expert,
            async_finish=True,
        )
        ctx.handle, ctx.buffer = handle, buffer
        ctx.mark_non_differentiable(here)
        return rows, received, here, handle, event

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor, None, None, None]:
        rows, weights = gradients[:2]
        x, summed, _ = ctx.buffer.combine(rows.contiguous(), ctx.handle, topk_weights=weights.contiguous())
        return x, summed, None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, handle: Any, buffer: Any) -> Tensor:
        ctx.handle, ctx.buffer = handle, buffer
        return buffer.combine(out.contiguous(), handle)[0]  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None]:
        return ctx.buffer.dispatch(gradients[0].contiguous(), handle=ctx.handle)[0], None, None
