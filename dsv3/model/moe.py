"""Mixture of experts (DeepSeekMoE): routed experts by grouped matmul, shared experts for every token.

Report section 2.1.2, equation 12. A layer's forward pass is: route, dispatch tokens to their experts, compute
the experts' SwiGLU on rows sorted by expert, combine the weighted results. The token dispatch is an object
that expert parallelism replaces by one with all-to-all exchanges (parallel/expert_parallel.py). Padding goes
to no expert, and gets zeros from this sum (padding.py).

Shapes: B batch, T sequence, D dim, N tokens or rows, E experts, K = top_k.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3.config.model import MoEConfig
from dsv3.model.layers import FeedForward
from dsv3.model.padding import PaddingMask, put_tokens, take_tokens
from dsv3.model.router import Router, RouterStats, Routing


class RowCounts(NamedTuple):
    """Rows per expert, where they lie sorted by expert."""

    on_device: Tensor
    """[E] int64."""
    on_host: list[int] | None = None
    """The same numbers, where token dispatch has read them anyway."""

    def ends(self, on_host: bool) -> Tensor:
        """Return [E] int32: the row number at which each expert's rows end (exclusive).

        They are on the host or on the device. The host waits for the device where dispatch has not read them.
        """
        if not on_host:
            return self.on_device.cumsum(0, dtype=torch.int32)
        counts = self.on_device.cpu() if self.on_host is None else torch.tensor(self.on_host)
        return counts.cumsum(0, dtype=torch.int32)


ExpertsFunction = Callable[[Tensor, RowCounts], Tensor]
"""(rows [N, D] sorted by expert, rows per expert) -> results [N, D]."""


class GroupedMatmul(Protocol):
    """Grouped GEMM: each expert's weight times its own rows."""

    ends_on_host: bool
    """Where it reads the ends of the experts' rows: on the host, or on the rows' device."""

    def __call__(self, rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        """(rows [N, in], weight [E, out, in], ends [E] int32, exclusive) -> [N, out] in the rows' dtype."""


class TokenDispatcher(Protocol):
    """Token dispatch: send tokens to the experts that they chose, and bring the weighted results back."""

    def dispatch(self, x: Tensor, routing: Routing) -> Any:
        """Start to send `x` [N, D] to its experts; the result is only for `combine`."""

    def combine(self, dispatched: Any, experts: ExpertsFunction) -> Tensor:
        """Run `experts` on the dispatched rows and return the weighted sums [N, D] of their results.

        The sums of `routing.padding` are zeros.
        """


class Experts(nn.Module):
    """The SwiGLU weights of all routed experts in two stacks, applied by two grouped matmuls.

    gate_up_proj is [E, 2 x hidden, D] with the gate's rows first, down_proj is [E, D, hidden]. A released
    checkpoint holds the same rows expert by expert.
    """

    def __init__(self, dim: int, config: MoEConfig) -> None:
        super().__init__()
        experts, hidden = config.num_experts, config.hidden_dim
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * hidden, dim))
        self.down_proj = nn.Parameter(torch.empty(experts, dim, hidden))
        self.matmul: GroupedMatmul = grouped_linear

    def forward(self, rows: Tensor, counts: RowCounts) -> Tensor:
        """Map `rows` [N, D], sorted by expert with `counts` rows each, to [N, D]."""
        return apply_experts(rows, counts, self.gate_up_proj, self.down_proj, self.matmul)


def apply_experts(
    rows: Tensor, counts: RowCounts, gate_up_proj: Tensor, down_proj: Tensor, matmul: GroupedMatmul
) -> Tensor:
    """Apply each expert's SwiGLU to its own rows; shapes as in Experts."""
    ends = counts.ends(matmul.ends_on_host)
    gate, up = matmul(rows, gate_up_proj, ends).chunk(2, dim=-1)
    return matmul(F.silu(gate) * up, down_proj, ends)


class GroupedLinear:
    """The default matmul of `Experts`: in the dtype of the rows."""

    ends_on_host = False

    def __call__(self, rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        """See GroupedMatmul."""
        if not len(rows):  # padding alone; grouped_mm refuses some forms of no rows (pytorch/pull/192497)
            return F.linear(rows, weight[0].to(rows.dtype))
        return F.grouped_mm(rows, weight.to(rows.dtype).transpose(-2, -1), offs=ends)


grouped_linear = GroupedLinear()


class PermuteRows(torch.autograd.Function):
    """Repeat every row of x `copies` times and permute the result: row `order[n] // copies` of x at place n.

    Its gradient gathers through the inverse permutation and sums the copies. PyTorch's own gradient
    of indexing adds with atomics, which is slower and, on CPU too, not deterministic.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, place: Tensor, copies: int) -> Tensor:
        """Permute `x` [N, D] by `order` [N x copies], whose inverse is `place`; returns [N x copies, D]."""
        ctx.save_for_backward(place)
        ctx.copies = copies
        return x[order // copies]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        """Return the gradient of x [N, D]: the sum over each row's copies."""
        (place,) = ctx.saved_tensors
        gathered = gradients[0][place]
        if ctx.copies > 1:
            gathered = gathered.unflatten(0, (-1, ctx.copies)).sum(1)
        return gathered, None, None, None


def permute_rows(x: Tensor, order: Tensor, place: Tensor, copies: int) -> Tensor:
    """Return x[order // copies] [N x copies, D] by PermuteRows."""
    return PermuteRows.apply(x, order, place, copies)  # type: ignore[no-any-return, no-untyped-call]


class LocalTokenDispatcher:
    """Token dispatch among local experts: permute, compute, unpermute, weighted sum; no communication."""

    def dispatch(self, x: Tensor, routing: Routing) -> tuple[Tensor, Routing]:
        """Return the inputs: no row has to be sent."""
        return x, routing

    def combine(self, dispatched: tuple[Tensor, Routing], experts: ExpertsFunction) -> Tensor:
        """Run the experts on K rows per token, sorted by expert; return the weighted sums [N, D]."""
        x, (chosen, weights, stats, padding) = dispatched
        top_k = chosen.shape[-1]
        if padding is not None:
            weights, chosen = take_tokens(weights, padding), chosen[padding.places]
        order = chosen.flatten().argsort(stable=True)
        place = order.argsort()
        # No name for the tokens' rows: they would live as long as the experts compute.
        rows = experts(
            permute_rows(x if padding is None else take_tokens(x, padding), order, place, top_k),
            RowCounts(stats.load),
        )
        # Unpermute to token order: summing a token's top_k rows is then a matmul, without scattered adds.
        rows = permute_rows(rows, place, order, 1).unflatten(0, (-1, top_k))
        out = torch.bmm(weights.to(x.dtype).unsqueeze(1), rows).squeeze(1)
        return out if padding is None else put_tokens(out, padding)


class MoE(nn.Module):
    """The feed-forward of an MoE layer: router, routed experts and shared experts (HF: mlp)."""

    def __init__(self, dim: int, config: MoEConfig) -> None:
        super().__init__()
        self.router = Router(dim, config)
        self.experts = Experts(dim, config)
        shared_dim = config.num_shared_experts * config.hidden_dim
        self.shared_experts = FeedForward(dim, shared_dim) if shared_dim else None
        self.dispatcher: TokenDispatcher = LocalTokenDispatcher()

    def forward(self, x: Tensor, padding: PaddingMask | None = None) -> tuple[Tensor, RouterStats]:
        """Map `x` [B, T, D] to the same shape; also return the router's statistics."""
        routing: Routing = self.router(x, padding)
        dispatched = self.dispatcher.dispatch(x.flatten(0, 1), routing)
        # The shared experts run between dispatch and combine, so that they compute while rows are sent.
        shared = None if self.shared_experts is None else self.shared_experts(x)
        out = self.dispatcher.combine(dispatched, self.experts).view_as(x)
        return out if shared is None else out + shared, routing.stats
