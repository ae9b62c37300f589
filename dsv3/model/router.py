"""The router: which experts a token goes to and with what weight; report section 2.1.2.

The selection bias decides who is chosen and never how much it counts; it is moved after each
optimizer step by training/balance.py and receives no gradient.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3.config.model import MoEConfig, ScoreFunction


class RouterStats(NamedTuple):
    """What a layer's router tells the training step."""

    load: Tensor
    """[experts] fp32: how many tokens chose each."""
    balance_loss: Tensor
    """Sequence-wise balance term without alpha (eq. 17 to 20), mean over sequences; a scalar.

    Of a sequence split over ranks this and the next are a rank's part."""
    z_loss: Tensor
    """Mean over tokens of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906, eq. 5), 0 where off; a scalar."""
    finite: Tensor
    """Whether every logit is a finite number; a scalar bool that nothing has waited for."""


class LocalRouterReduction:
    """The router sees whole sequences; parallel/sequence.py has one for sequences split over ranks."""

    shards = 1
    """Ranks that a sequence is split over."""

    def sum(self, counts: Tensor) -> Tensor:
        """`counts` added up over the ranks of a sequence, without gradient."""
        return counts


class Routing(NamedTuple):
    """One layer's decision for `tokens` = batch x sequence tokens."""

    experts: Tensor
    """[tokens, top_k] expert numbers."""
    weights: Tensor
    """[tokens, top_k] fp32 weights of their outputs."""
    stats: RouterStats


class Router(nn.Module):
    """Affinities by sigmoid or softmax, group-limited top-k, always in fp32 (HF: mlp.gate)."""

    load: Tensor

    def __init__(self, dim: int, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.z_loss = False
        """Whether the z-loss is computed, which keeps the logits; training/step.py says when."""
        self.reduction = LocalRouterReduction()
        self.weight = nn.Parameter(torch.empty(config.num_experts, dim))
        bias = torch.zeros(config.num_experts, dtype=torch.float32) if config.selection_bias else None
        self.selection_bias: Tensor | None
        self.register_buffer("selection_bias", bias)
        # Tokens an expert since the last bias update. Filled outside this module (transformer.py), so
        # that a forward pass repeated by activation recomputation is not counted twice.
        self.register_buffer("load", torch.zeros(config.num_experts), persistent=False)

    def forward(self, x: Tensor) -> Routing:
        """Route `x` [batch, sequence, dim]."""
        # Autocast would turn this matmul into bf16 behind our back.
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.weight.float())
        sigmoid = self.config.score_function is ScoreFunction.sigmoid
        scores = logits.sigmoid() if sigmoid else logits.softmax(dim=-1)
        flat = scores.flatten(0, 1)
        experts = self.force_balance(flat) if self.config.forced_balance else self.select(flat.detach())
        load = torch.bincount(experts.flatten(), minlength=flat.shape[-1]).float()
        z_loss = logits.new_zeros(())
        if self.z_loss:
            z_loss = logits.logsumexp(dim=-1).square().mean() / self.reduction.shards
        stats = RouterStats(load, self.balance_loss(scores), z_loss, logits.detach().isfinite().all())
        return Routing(experts, self.weigh(flat, experts), stats)

    def select(self, scores: Tensor) -> Tensor:
        """Expert numbers [..., top_k] from `scores` [..., experts], bias and group limit applied."""
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

    def force_balance(self, scores: Tensor) -> Tensor:
        """Expert numbers [tokens, top_k] that follow one another round and round (`forced_balance`)."""
        tokens, experts = scores.shape
        slots = torch.arange(tokens * self.config.top_k, device=scores.device)
        return (slots % experts).view(tokens, self.config.top_k)

    def weigh(self, scores: Tensor, experts: Tensor) -> Tensor:
        """Weights [..., top_k] of the chosen experts from the unbiased `scores` [..., experts]."""
        weights = scores.gather(-1, experts)
        if self.config.normalize_top_k:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * self.config.route_scale

    def balance_loss(self, scores: Tensor) -> Tensor:
        """Mean over sequences of sum_i f_i P_i (eq. 17 to 20); `scores` is [batch, sequence, experts].

        f counts the top-k of the raw scores (eq. 18 has neither bias nor group limit) and carries no
        gradient; P averages the scores normalised over experts. Where a sequence is split over ranks f is
        that of the whole, P the rank's part, and so is the result: the ranks' results add up.
        """
        top_k, num_experts = self.config.top_k, self.config.num_experts
        raw = scores.detach().topk(top_k, dim=-1, sorted=False).indices
        counts = torch.zeros_like(scores[:, 0]).scatter_add(
            -1, raw.flatten(1), torch.ones_like(raw.flatten(1), dtype=scores.dtype)
        )
        shards = self.reduction.shards
        frequency = self.reduction.sum(counts) * num_experts / (top_k * scores.shape[1] * shards)
        share = (scores / (scores.sum(-1, keepdim=True) + 1e-20)).mean(dim=1) / shards
        return (frequency * share).sum(-1).mean()
