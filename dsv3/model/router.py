"""The router: choose each token's experts and their weights; report section 2.1.2, equations 12 to 20.

Load balance has two parts. The first is the expert bias of auxiliary-loss-free load balancing
(`selection_bias`): it is added to the scores when experts are chosen, and never to their weights. It receives
no gradient; training/expert_bias.py moves it after each optimizer step by the load counted here. The second
is a small sequence-wise balance loss. Group-limited routing bounds the nodes that a token is sent to.

Positions without a token (padding.py) count nowhere: statistics are those of the rows cut to their tokens.

Shapes: B batch, T sequence, D dim, N = B x T tokens, E experts, K = top_k.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from dsv3.config.model import MoEConfig, ScoreFunction
from dsv3.model.exact_linear import exact_linear
from dsv3.model.padding import PaddingMask


class RouterStats(NamedTuple):
    """One MoE layer's routing statistics for the training step."""

    load: Tensor
    """[E] int64: tokens per expert."""
    balance_loss: Tensor
    """Sequence-wise balance loss without alpha (eq. 17 to 20), mean over sequences; a scalar.

    With sequences sharded over ranks, `balance_loss` and `z_loss` are partial sums; add them over ranks."""
    z_loss: Tensor
    """Mean over tokens of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906, eq. 5); a scalar, 0 if off."""
    finite: Tensor
    """Scalar bool, true if every logit is finite; it stays on the device, so nothing waits for it."""


class LocalRouterReduction:
    """Sum over the one rank of a whole sequence; parallel/context_parallel.py sums over several."""

    shards = 1
    """Ranks that a sequence is sharded over."""

    def sum(self, counts: Tensor) -> Tensor:
        """Sum `counts` over the ranks of a sequence, without gradient; same shape."""
        return counts


class Routing(NamedTuple):
    """The experts that one layer's N tokens go to."""

    experts: Tensor
    """[N, K] int64 expert numbers."""
    weights: Tensor
    """[N, K] fp32 weights of the experts' outputs."""
    stats: RouterStats
    padding: PaddingMask | None = None
    """The positions that are not routed, whose experts and weights mean nothing; None: there are none."""


class Router(nn.Module):
    """Scores by sigmoid (V3) or softmax (V2), then group-limited top-k; always in fp32 (HF: mlp.gate)."""

    load: Tensor

    def __init__(self, dim: int, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.z_loss = False
        """Whether the z-loss is computed, which keeps the logits; training/step.py says when."""
        self.bias_moves = True
        """Whether the expert bias moves after a step; training/optimizer.py freezes it."""
        self.reduction = LocalRouterReduction()
        self.weight = nn.Parameter(torch.empty(config.num_experts, dim))
        bias = torch.zeros(config.num_experts, dtype=torch.float32) if config.selection_bias else None
        self.selection_bias: Tensor | None
        self.register_buffer("selection_bias", bias)
        # Tokens per expert since the last bias update. Transformer.record_load fills it, outside the layer,
        # so that a forward pass repeated by activation checkpointing is not counted twice.
        self.register_buffer("load", torch.zeros(config.num_experts), persistent=False)

    def forward(self, x: Tensor, padding: PaddingMask | None = None) -> Routing:
        """Route `x` [B, T, D], all of it but its `padding`."""
        logits: Tensor = exact_linear(x.float(), self.weight.float())
        sigmoid = self.config.score_function is ScoreFunction.sigmoid
        scores = logits.sigmoid() if sigmoid else logits.softmax(dim=-1)
        flat = scores.flatten(0, 1)
        experts = (
            self.force_load_balance(flat)
            if self.config.forced_balance
            else self.select_experts(flat.detach())
        )
        # Not torch.bincount, which asks the device for the largest number and waits. Sums of integers are
        # exact in any order.
        chosen = experts.flatten()
        counted = torch.ones_like(chosen)
        if padding is not None:
            counted = padding.is_token.flatten().unsqueeze(1).expand_as(experts).flatten().to(chosen.dtype)
        load = chosen.new_zeros(flat.shape[-1]).scatter_add(0, chosen, counted)
        z_loss = logits.new_zeros(())
        if self.z_loss:
            squares = logits.logsumexp(dim=-1).square()
            if padding is None:
                z_loss = squares.mean() / self.reduction.shards
            else:
                z_loss = squares.where(padding.is_token, 0).sum() / padding.lengths.sum().clamp(min=1)
        stats = RouterStats(
            load, self.balance_loss(scores, padding), z_loss, logits.detach().isfinite().all()
        )
        return Routing(experts, self.expert_weights(flat, experts), stats, padding)

    def select_experts(self, scores: Tensor) -> Tensor:
        """Return expert numbers [..., K] from `scores` [..., E], with expert bias and group limit.

        A group's score is the sum of its two best biased scores (V3), or its best score without a bias (V2).
        Experts come from the `top_k_groups` best groups only.
        """
        c = self.config
        choice = scores if self.selection_bias is None else scores + self.selection_bias
        if c.top_k_groups < c.num_groups:
            groups = choice.unflatten(-1, (c.num_groups, -1))
            best = 1 if self.selection_bias is None else 2
            group_scores = groups.topk(best, dim=-1).values.sum(-1)
            chosen = group_scores.topk(c.top_k_groups, dim=-1).indices
            closed = torch.ones_like(group_scores, dtype=torch.bool).scatter(-1, chosen, False)
            # -inf, not 0: a negative bias may push every open score below zero.
            choice = groups.masked_fill(closed.unsqueeze(-1), -torch.inf).flatten(-2)
        return choice.topk(c.top_k, dim=-1, sorted=False).indices

    def force_load_balance(self, scores: Tensor) -> Tensor:
        """Deal experts round-robin for benchmarks (`forced_balance`): scores [N, E] -> numbers [N, K].

        Padding has its turn too: a padded row loads the experts evenly to one token, on every layout alike.
        """
        tokens, experts = scores.shape
        slots = torch.arange(tokens * self.config.top_k, device=scores.device)
        return (slots % experts).view(tokens, self.config.top_k)

    def expert_weights(self, scores: Tensor, experts: Tensor) -> Tensor:
        """Return weights [..., K] of the chosen `experts` [..., K] from the unbiased `scores` [..., E]."""
        weights = scores.gather(-1, experts)
        if self.config.normalize_top_k:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * self.config.route_scale

    def balance_loss(self, scores: Tensor, padding: PaddingMask | None = None) -> Tensor:
        """Return the mean over sequences of sum_i f_i P_i (eq. 17 to 20), a scalar; `scores` is [B, T, E].

        f counts the top-k of the raw scores (eq. 18 has neither bias nor group limit) and carries no
        gradient. P averages the scores normalized over experts. With sequences sharded over ranks, f is
        that of the whole sequence and P a partial sum, so the ranks' results add up to the loss. A sequence
        with `padding` is as long as its tokens are many, and one of padding alone is none.
        """
        top_k, num_experts = self.config.top_k, self.config.num_experts
        raw = scores.detach().topk(top_k, dim=-1, sorted=False).indices
        counted = torch.ones_like(raw, dtype=scores.dtype)
        if padding is not None:
            counted = counted * padding.is_token.unsqueeze(-1)
        counts = torch.zeros_like(scores[:, 0]).scatter_add(-1, raw.flatten(1), counted.flatten(1))
        counts = self.reduction.sum(counts)
        normalized = scores / (scores.sum(-1, keepdim=True) + 1e-20)
        if padding is not None:
            length = padding.lengths.clamp(min=1).unsqueeze(-1)
            frequency = counts * num_experts / (top_k * length)
            share = normalized.where(padding.is_token.unsqueeze(-1), 0).sum(dim=1) / length
            return (frequency * share).sum() / padding.num_sequences
        shards = self.reduction.shards
        frequency = counts * num_experts / (top_k * scores.shape[1] * shards)
        share = normalized.mean(dim=1) / shards
        return (frequency * share).sum(-1).mean()
