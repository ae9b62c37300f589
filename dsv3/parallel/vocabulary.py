"""Embedding and head split over the vocabulary, and the cross-entropy of logits split so (loss parallel).

Each rank of the tensor axis has a run of ids: it looks up those tokens that are its own and sums are
exchanged; its logits stay where they are, and only three numbers a token travel for the loss.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3.model.loss import IGNORE, WholeVocabulary
from dsv3.parallel.collectives import all_gather, all_reduce, reduce_scatter


def embed_split(embedding: nn.Embedding, tokens: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Vectors of this rank's part of the sequence, from `tokens` [batch, sequence] of all tensor ranks."""
    weight: Tensor = embedding.weight.to_local()  # type: ignore[attr-defined]
    here = tokens - group.rank() * weight.shape[0]
    mine = (here >= 0) & (here < weight.shape[0])
    found = F.embedding(here.clamp(0, weight.shape[0] - 1), weight)
    return reduce_scatter(found.masked_fill(~mine.unsqueeze(-1), 0.0), 1, group)


class SplitVocabulary(WholeVocabulary):
    """Logits [batch, sequence, vocab / ranks] on each of the ranks of `group`."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def cross_entropy_sum(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Sum over valid `targets` [batch, sequence] in fp32 nats; the same number on every rank."""
        flat = logits.float().flatten(0, -2)
        return _SplitCrossEntropy.apply(flat, targets.flatten(), self.group)  # type: ignore[no-any-return, no-untyped-call]

    def whole(self, logits: Tensor) -> Tensor:
        """The logits [..., vocab] of all ids."""
        return all_gather(logits, logits.ndim - 1, self.group)


class _SplitCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, group: dist.ProcessGroup) -> Tensor:
        largest = all_reduce(logits.amax(-1, keepdim=True), group, "max")
        shifted = logits - largest
        log_total = all_reduce(shifted.exp().sum(-1, keepdim=True), group).log()
        here = targets.unsqueeze(-1) - group.rank() * logits.shape[-1]
        mine = (here >= 0) & (here < logits.shape[-1])
        here = here.clamp(0, logits.shape[-1] - 1)
        chosen = all_reduce(shifted.gather(-1, here).masked_fill(~mine, 0.0), group)
        valid = (targets != IGNORE).unsqueeze(-1)
        ctx.save_for_backward(shifted, log_total, here, mine, valid)
        return (log_total - chosen).masked_fill(~valid, 0.0).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        shifted, log_total, here, mine, valid = ctx.saved_tensors
        change = (shifted - log_total).exp()
        change.scatter_add_(-1, here, -mine.to(change.dtype))
        return change * valid * gradients[0], None, None
