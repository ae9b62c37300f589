"""Token dispatch over DeepEP 1.2.1 (github.com/deepseek-ai/DeepEP), whose kernels carry the rows.

A row goes once to every rank that has one of its experts, over both levels where `ep` spans nodes. DeepEP
sums without weights, so each rank weighs its own results. The gradient of a dispatch is a combine, and
that of a combine is a dispatch along the same handle (docs/legacy.md there). Rows are bf16, and on their
way to experts FP8 where `precision.fp8.dispatch` is set. planning/checks.py refuses an fp32 config before
the launch.
"""

import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsv3.errors import UserError
from dsv3.fp8.operands import dequantize_rows, quantize_rows
from dsv3.model.moe import ExpertsFunction, RowCounts
from dsv3.model.router import Routing
from dsv3.parallel.mesh import ParallelMesh
from dsv3.parallel.token_dispatch import run_local_experts
from dsv3.planning.checks import DEEPEP_NODE_RANKS, deepep_missing


class ReceivedRows(NamedTuple):
    """The results of DeepEP's dispatch; read them only after waiting for `event`."""

    rows: Any
    """[received rows, dim], in the wire format."""
    weights: Tensor
    """[received rows, top_k] fp32."""
    experts: Tensor
    """[received rows, top_k]: numbers among this rank's experts, -1 for an expert of another rank."""
    rows_per_expert: list[int]
    """Of this rank's experts; DeepEP waits for them on the host to allocate the received rows."""
    handle: Any
    """DeepEP's record of the dispatch, for `combine`."""
    event: Any


class Dispatched(NamedTuple):
    """The sent tensors, by which autograd differentiates the results, and the received ones."""

    x: Tensor
    weights: Tensor
    received: ReceivedRows
    num_local_experts: int


class BF16Format:
    """Wire format in which rows [rows, dim] travel as they are."""

    def encode(self, rows: Tensor) -> Any:
        """Return what DeepEP sends for `rows`."""
        return rows.contiguous()

    def decode(self, received: Any) -> Tensor:
        """Return the bf16 rows of what DeepEP received."""
        return received  # type: ignore[no-any-return]


class FP8Format:
    """Wire format in which rows travel as a pair: codes, and the scales of their 1 x 128 tiles."""

    def __init__(self, power_of_two: bool) -> None:
        self.power_of_two = power_of_two

    def encode(self, rows: Tensor) -> Any:
        """See BF16Format."""
        return quantize_rows(rows, self.power_of_two)

    def decode(self, received: Any) -> Tensor:
        """See BF16Format."""
        codes, scales = received
        return dequantize_rows(codes, scales, torch.bfloat16)


class DeepEPTokenDispatcher:
    """The TokenDispatcher of experts on the ranks of a deep_ep.Buffer.

    `index_dtype` is the dtype in which that build of DeepEP takes expert numbers.
    """

    def __init__(self, buffer: Any, index_dtype: torch.dtype) -> None:
        self.buffer = buffer
        self.index_dtype = index_dtype
        self.wire_format: BF16Format | FP8Format = BF16Format()

    @classmethod
    def from_mesh(cls, mesh: ParallelMesh, dim: int) -> "DeepEPTokenDispatcher":
        """Build one for bf16 rows of `dim` on the `ep` axis; every rank of the axis calls it.

        Raise UserError where the package cannot be imported.
        """
        try:
            deep_ep: Any = importlib.import_module("deep_ep")
        except ImportError as error:  # also where it is installed and CUDA's libraries are not
            raise UserError(deepep_missing(str(error))) from None
        return cls(_shared_buffer(deep_ep.Buffer, mesh, dim), deep_ep.topk_idx_t)

    def dispatch_in_fp8(self, power_of_two: bool) -> None:
        """Send rows, and gradients of results, to experts in FP8; `dim` is a multiple of 128."""
        self.wire_format = FP8Format(power_of_two)

    def dispatch(self, x: Tensor, routing: Routing) -> Dispatched:
        """Start to send `x` [tokens, dim] bf16; what runs before `combine` overlaps with it."""
        num_experts: int = routing.stats.load.shape[0]
        chosen = routing.experts.to(self.index_dtype).contiguous()
        if routing.padding is not None:  # DeepEP's -1 is no expert
            chosen = chosen.masked_fill(~routing.padding.is_token.view(-1, 1), -1)
        per_rank, per_node, per_expert, in_rank, _ = self.buffer.get_dispatch_layout(chosen, num_experts)
        rows, experts, weights, counts, handle, event = self.buffer.dispatch(
            self.wire_format.encode(x.detach()),
            topk_idx=chosen,
            topk_weights=routing.weights.detach().contiguous(),
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            async_finish=True,
        )
        received = ReceivedRows(rows, weights, experts, counts, handle, event)
        return Dispatched(x, routing.weights, received, num_experts // self.buffer.group_size)

    def combine(self, dispatched: Dispatched, experts: ExpertsFunction) -> Tensor:
        """Wait for the rows, run `experts` on them, and return the weighted sums [tokens, dim]."""
        received, num_local = dispatched.received, dispatched.num_local_experts
        received.event.current_stream_wait()
        rows, weights = _Dispatch.apply(dispatched.x, dispatched.weights, received, self)  # type: ignore[no-untyped-call]
        # From [rows, top_k] to [rows, local experts]. The experts of other ranks share a column behind the
        # last one, which is cut off.
        column = received.experts.long().masked_fill(received.experts < 0, num_local)
        table = weights.new_zeros(weights.shape[0], num_local + 1)
        routing_map = torch.zeros_like(table, dtype=torch.bool).scatter(1, column, True)[:, :num_local]
        weights = table.scatter(1, column, weights)[:, :num_local]
        counts = RowCounts(routing_map.sum(0), received.rows_per_expert)
        out = run_local_experts(rows, weights, routing_map, received.experts.shape[1], counts, experts)
        return _Combine.apply(out, received.handle, self)  # type: ignore[no-any-return, no-untyped-call]


def _shared_buffer(buffer_class: Any, mesh: ParallelMesh, dim: int) -> Any:
    """Return the mesh's deep_ep.Buffer; all stages of a rank share it, for it takes hundreds of MiB."""
    group = mesh.expert.get_group("ep")
    ranks, row_bytes = group.size(), 2 * dim
    configs = [buffer_class.get_dispatch_config(ranks), buffer_class.get_combine_config(ranks)]
    nvl = max(config.get_nvl_buffer_size_hint(row_bytes, ranks) for config in configs)
    # A build without NVSHMEM, which is enough for one node, raises when it is asked for the RDMA size.
    rdma = 0
    if ranks > DEEPEP_NODE_RANKS:
        rdma = max(config.get_rdma_buffer_size_hint(row_bytes, ranks) for config in configs)
    buffer = mesh.expert_buffer
    if buffer is None or buffer.num_nvl_bytes < nvl or buffer.num_rdma_bytes < rdma:
        mesh.expert_buffer = buffer_class(group, nvl, rdma)
    return mesh.expert_buffer


class _Dispatch(torch.autograd.Function):
    """The received rows and weights as a function of the sent ones; its gradient is a combine."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, received: ReceivedRows, dispatcher: DeepEPTokenDispatcher
    ) -> tuple[Tensor, Tensor]:
        ctx.handle, ctx.buffer = received.handle, dispatcher.buffer
        return dispatcher.wire_format.decode(received.rows), received.weights

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor, None, None]:
        rows, weights = gradients
        x, summed, _ = ctx.buffer.combine(rows.contiguous(), ctx.handle, topk_weights=weights.contiguous())
        return x, summed, None, None


class _Combine(torch.autograd.Function):
    """The sums of the ranks' results per token; its gradient is a dispatch along the same handle."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, handle: Any, dispatcher: DeepEPTokenDispatcher) -> Tensor:
        ctx.handle, ctx.dispatcher = handle, dispatcher
        return dispatcher.buffer.combine(out.contiguous(), handle)[0]  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        wire_format, buffer = ctx.dispatcher.wire_format, ctx.dispatcher.buffer
        received = buffer.dispatch(wire_format.encode(gradients[0]), handle=ctx.handle)[0]
        return wire_format.decode(received), None, None
