"""The output head: logits for whoever asks for them, and the loss, which never has all logits at once.

A vocabulary of 129,280 ids makes the fp32 logits of 4,096 tokens 2.1 GB, their softmax and its gradient as
much again, and each depth of multi-token prediction (MTP) repeats them. A loss needs the logits of only a
chunk of tokens at a time. In training the gradients of a chunk are computed with it, so that its logits are
neither kept nor computed again. The backward pass finds the gradients ready and scales them by its own:

- of the hidden states, [B, T, D] per prediction in the compute dtype. It takes the place of the hidden states
  that a matmul would keep for its backward pass.
- of the weight, one [V, D] in fp32 for all predictions, as their factors in the loss are known beforehand. On
  one process it becomes the weight's `.grad`, or is added to it. FSDP takes the gradient of a gathered weight
  in that weight's dtype and reduces it in fp32, so under bf16 it is rounded once, after its last chunk.

Shapes: B batch, T sequence, D dim, V ids of this rank (all, or a shard under TP), N tokens of a chunk,
P predictions: the next token, then one per MTP depth in training.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE_INDEX = -100
"""The target of positions that do not count in the loss."""

CHUNK_BYTES = 2**28
"""Most bytes of a chunk's fp32 logits (a chunk has at least one token): 519 tokens of 129,280 ids."""


class HeadTargets(NamedTuple):
    """Targets of the predictions of the head, and their part in the loss."""

    ids: Sequence[Tensor]
    """Per prediction [B, T] int64, IGNORE_INDEX where a position does not count."""
    factors: Sequence[Tensor | float]
    """Per prediction the scalar by which its cross-entropy counts in the loss."""


class HeadLoss(NamedTuple):
    """The cross-entropies of the head's predictions, in fp32 nats."""

    loss: Tensor
    """Sum over predictions of cross-entropy times factor; a scalar, the only field with a gradient."""
    cross_entropies: Tensor
    """[P] sums of -log softmax(logits)[target] over the targets that count."""


class Softmax(NamedTuple):
    """Statistics of the softmax of N tokens' logits, [N, 1] fp32 each."""

    largest: Tensor
    """The largest logit."""
    total: Tensor
    """The sum of exp(logit - largest)."""
    target: Tensor
    """The target's logit, 0 if it is not among the ids."""


class LocalVocabularyShard:
    """All ids on one rank; parallel/tensor_parallel.py has the form for ids sharded over ranks."""

    first_id = 0
    """The first id of this rank; the others follow it."""

    def local_weight(self, weight: Tensor) -> Tensor:
        """Return this rank's rows [V, D] of the head's weight."""
        return weight

    def gather_tokens(self, x: Tensor) -> Tensor:
        """Return the hidden states [B, T, D] that this rank predicts from, given its own."""
        return x

    def gather(self, logits: Tensor) -> Tensor:
        """Return the logits of all ids, given this rank's [.., V]."""
        return logits

    def reduce(self, softmax: Softmax) -> Softmax:
        """Return the statistics over all ids, given those over this rank's."""
        return softmax


class Head(nn.Module):
    """Maps hidden states to logits, or to the loss of what they predict (HF: lm_head).

    Matmuls run in the dtype of the hidden states, also in FP8 training; logits and losses are fp32.
    """

    def __init__(self, dim: int, vocab_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, dim))
        self.vocabulary_shard = LocalVocabularyShard()

    def forward(
        self, hidden: Sequence[Tensor], targets: HeadTargets | None = None
    ) -> list[Tensor] | HeadLoss:
        """Return the logits [B, T, V] fp32 of each of `hidden` [B, T, D]; with `targets` only their loss.

        Both are one method because FSDP gathers the weight where the module is called.
        """
        weight = self.vocabulary_shard.local_weight(self.weight)
        if targets is None:
            return [F.linear(x, weight.to(x.dtype)).float() for x in hidden]
        return head_loss(hidden, weight, targets, self.vocabulary_shard)


def head_loss(
    hidden: Sequence[Tensor], weight: Tensor, targets: HeadTargets, shard: LocalVocabularyShard
) -> HeadLoss:
    """Return the loss of predicting `targets` from `hidden`, P of [B, T, D]; `weight` is [V, D].

    Where autograd records, the gradients of those that require one are computed here and now.
    """
    records = torch.is_grad_enabled()
    with torch.no_grad():
        matrix = weight.to(hidden[0].dtype)
        of_weight = (
            torch.zeros_like(weight, dtype=torch.float32) if records and weight.requires_grad else None
        )
        of_hidden = [x.new_empty(x.shape) if records and x.requires_grad else None for x in hidden]
        sums = [
            _score_in_chunks(x, matrix, ids, factor, shard, of_x, of_weight)
            for x, ids, factor, of_x in zip(hidden, *targets, of_hidden, strict=True)
        ]
        loss = torch.stack([one * factor for one, factor in zip(sums, targets.factors, strict=True)]).sum()
    terms = [_known_gradient(x, of_x) for x, of_x in zip(hidden, of_hidden, strict=True) if of_x is not None]
    if of_weight is not None:
        # Autograd runs the latest node first. FSDP reduces a module's gradients when those of its inputs are
        # there, so the weight's must come before them.
        terms.append(_known_gradient(weight, of_weight.to(weight.dtype)))
    return HeadLoss(torch.stack([loss, *terms]).sum(), torch.stack(sums))


def _score_in_chunks(
    x: Tensor,
    matrix: Tensor,
    ids: Tensor,
    factor: Tensor | float,
    shard: LocalVocabularyShard,
    of_x: Tensor | None,
    of_weight: Tensor | None,
) -> Tensor:
    """Return the cross-entropy of one prediction, a chunk of tokens at a time; a scalar.

    Times `factor`, its gradient with respect to `x` [B, T, D] is written to `of_x`, and the one with respect
    to `matrix` [V, D] is added to `of_weight`.
    """
    tokens, vocabulary = x.shape[0] * x.shape[1], len(matrix)
    rows = min(tokens, max(1, CHUNK_BYTES // (4 * vocabulary)))
    buffer = torch.empty(rows, vocabulary, device=x.device)
    flat, flat_ids = x.flatten(0, 1), ids.flatten()
    total = torch.zeros((), device=x.device)
    for first in range(0, tokens, rows):
        chunk = slice(first, first + rows)
        logits = buffer[: tokens - first]
        if x.dtype == buffer.dtype:
            torch.mm(flat[chunk], matrix.t(), out=logits)
        else:
            logits.copy_(flat[chunk] @ matrix.t())
        wanted = of_x is not None or of_weight is not None
        total += cross_entropy_(logits, flat_ids[chunk], shard, factor if wanted else None)
        gradient = logits.to(x.dtype) if wanted else logits
        if of_x is not None:
            torch.mm(gradient, matrix, out=of_x.flatten(0, 1)[chunk])
        if of_weight is not None and x.dtype == of_weight.dtype:
            of_weight.addmm_(gradient.t(), flat[chunk])
        elif of_weight is not None:
            of_weight += gradient.t() @ flat[chunk]
        del gradient  # before the next chunk's logits
    return total


def cross_entropy_(
    logits: Tensor, ids: Tensor, shard: LocalVocabularyShard, factor: Tensor | float | None = None
) -> Tensor:
    """Return the sum of -log softmax(logits)[id] over the `ids` [N] that count; a scalar.

    The `logits` [N, V] fp32 are overwritten: by the gradient of the sum times `factor`, if there is one. Each
    loss is log(sum) less a difference of logits, which stays exact where a model is nearly certain;
    F.cross_entropy on CPU loses up to 2e-4 nats per token there at 129,280 ids.
    """
    counts = (ids != IGNORE_INDEX).unsqueeze(-1)
    own_id = ids.unsqueeze(-1) - shard.first_id
    is_own = counts & (own_id >= 0) & (own_id < logits.shape[-1])
    own_id = own_id.clamp(0, logits.shape[-1] - 1)
    largest = logits.amax(-1, keepdim=True)
    target = logits.gather(-1, own_id).masked_fill(~is_own, 0.0)
    total = logits.sub_(largest).exp_().sum(-1, keepdim=True)
    whole = shard.reduce(Softmax(largest, total, target))
    losses = whole.total.log() - (whole.target - whole.largest)
    if factor is not None:
        # Softmax minus the one-hot target; positions that do not count get 0.
        scale = counts * factor
        logits.mul_((largest - whole.largest).exp() / whole.total * scale)
        logits.scatter_add_(-1, own_id, -(is_own * scale))
    return losses.masked_fill(~counts, 0.0).sum()


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the sum of the cross-entropies of whole `logits` [B, T, V], without gradient: fp32, in nats.

    targets: [B, T] int64, IGNORE_INDEX where a position does not count.
    """
    own = logits.detach().float().flatten(0, -2).clone()
    return cross_entropy_(own, targets.flatten(), LocalVocabularyShard())


def _known_gradient(x: Tensor, gradient: Tensor) -> Tensor:
    """Return a scalar 0 whose gradient with respect to `x` is `gradient`; it can be taken once."""
    return _KnownGradient.apply(x, gradient)  # type: ignore[no-any-return, no-untyped-call]


class _KnownGradient(torch.autograd.Function):
    """A node per input: a pipeline may take the gradients of inputs and of weights in two backward passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient
        return torch.zeros((), device=x.device)

    @staticmethod
    def backward(ctx: Any, *arriving: Tensor) -> tuple[Tensor, None]:
        # Scaled in place and given away: the buffer becomes `.grad` without a copy.
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            raise RuntimeError("the gradients of the head's loss can be taken only once")
        return gradient.mul_(arriving[0]), None
