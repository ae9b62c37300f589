"""One stage of a pipeline: some layers, with the embedding or the head and the losses at its ends."""

from typing import Any

import torch
from torch import Tensor, nn

from dsv3.data.batch import Batch
from dsv3.model.transformer import ModelOutput, Transformer, sum_stats
from dsv3.training.loss import GlobalBatch, losses
from dsv3.training.passes import LossWeights, placed_routers


class Stage(nn.Module):
    """What one pipeline stage computes on every microbatch.

    The first takes tokens, the others hidden states [batch, sequence, dim]; the last gives the loss to be
    minimised [1] - in evaluation mode logits, this rank's part - and the others hidden states. Rows of
    tokens, targets and documents reach every stage whole: positions, masks and MTP need them.
    """

    def __init__(self, part: Transformer, first: bool, last: bool, document_mask: bool) -> None:
        super().__init__()
        self.part = part
        self.first = first
        self.last = last
        self.document_mask = document_mask
        self.places = list(placed_routers([part]))
        self.whole: GlobalBatch | None = None
        self.weights: LossWeights | None = None
        self.figures = torch.zeros(0)

    def begin(self, whole: GlobalBatch, weights: LossWeights) -> None:
        """What the next step's microbatches are measured with; figures start again from 0."""
        self.whole, self.weights = whole, weights
        self.figures = torch.zeros(3 + self.part.config.num_moe_layers, device=whole.tokens.device)

    def forward(
        self, x: Tensor, tokens: Tensor, targets: Tensor | None = None, documents: Tensor | None = None
    ) -> Tensor:
        """See the class; `tokens`, `targets` and `documents` are [batch, sequence]."""
        part = self.part
        surroundings = part.surroundings(tokens, documents if self.document_mask else None)
        x = part.embed(part.part.take(tokens)) if self.first else x
        x, stats = part.run_layers(x, surroundings)
        output = ModelOutput(x, [], *sum_stats(stats, x))
        if self.last:
            logits, mtp_logits, more = part.predict(part.norm(x), tokens, surroundings)
            output = ModelOutput(logits, mtp_logits, *sum_stats(stats + more, x))
        if not part.training:
            return output.logits
        assert targets is not None
        assert documents is not None
        return self._weighed(output, Batch(tokens, targets, documents))

    def _weighed(self, output: ModelOutput, batch: Batch) -> Tensor:
        """The loss of the last stage, or the hidden states with the gradient of the stage's own terms."""
        assert self.whole is not None
        assert self.weights is not None
        share = batch.tokens.shape[0] / self.whole.sequences
        own = share * (self.weights.balance * output.balance_loss + self.weights.z * output.z_loss)
        self.figures[2] += output.balance_loss.detach() * share
        self.figures[[3 + place for place in self.places]] += output.broken.float()
        if not self.last:
            return _WithGradientOf.apply(output.logits, own)  # type: ignore[no-any-return, no-untyped-call]
        terms = losses(output, batch, self.whole, self.part.vocabulary, self.part.part)
        self.figures[:2] += torch.stack([terms.main, terms.mtp]).detach()
        return torch.stack([terms.main + self.weights.mtp * terms.mtp + own])


class _WithGradientOf(torch.autograd.Function):
    """x as it is; going backward, `term` is minimised too, as if it had been added to the loss."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, term: Tensor) -> Tensor:
        ctx.save_for_backward(term)
        # A copy, for FSDP registers hooks on what a stage gives out and wants no view there.
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return gradients[0], torch.ones_like(ctx.saved_tensors[0])


def prune(model: Transformer, layers: range, first: bool, last: bool) -> None:
    """Take out of a whole `model` what its stage does not have; names stay those of the whole.

    The last stage keeps the embedding for its MTP depths: a copy, whose gradient is added to the first's.
    """
    for name in list(model.layers):
        if int(name) not in layers:
            del model.layers[name]
    if not last:
        model.norm = model.head = None  # type: ignore[assignment]
        model.mtp = nn.ModuleList()
    if not first and not model.mtp:
        model.embedding = None  # type: ignore[assignment]
