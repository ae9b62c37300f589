"""Forward and backward passes over the microbatches of a step, by a model that this rank has as a whole."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dsv3.data.batch import Batch
from dsv3.model.router import Router
from dsv3.model.transformer import Transformer
from dsv3.training.loss import LossDenominators, losses


@dataclass(frozen=True)
class LossWeights:
    """What the terms beside the next-token loss are weighed with."""

    mtp: float
    balance: float
    z: float = 0.0


class ForwardBackward(Protocol):
    """How a step's microbatches go through the model; parallel/pipeline.py has one for stages."""

    parts: list[Transformer]
    """What this rank has of the model."""

    def train(self, microbatches: list[Batch], whole: LossDenominators, weights: LossWeights) -> Tensor:
        """Add the gradients of this rank's `microbatches` up; [3 + MoE layers] figures that ranks add up.

        Next-token loss, MTP loss and balance term without its weight, and a count for every router of
        the whole model of the passes in which it met numbers that are none.
        """

    def evaluate(self, batch: Batch) -> Tensor:
        """The sum of next-token cross-entropies over the batch, 0 where another rank has them; a scalar."""

    def logits(self, tokens: Tensor) -> Tensor:
        """Logits [batch, sequence, vocab] of whole rows of `tokens` [batch, sequence], on every rank."""


class LocalForwardBackward:
    """ForwardBackward of a model that is not cut into stages."""

    def __init__(self, model: Transformer, document_mask: bool) -> None:
        self.model = model
        self.parts = [model]
        self.document_mask = document_mask

    def train(self, microbatches: list[Batch], whole: LossDenominators, weights: LossWeights) -> Tensor:
        """See ForwardBackward."""
        return torch.stack([self._pass(batch, whole, weights) for batch in microbatches]).sum(0)

    def evaluate(self, batch: Batch) -> Tensor:
        """See ForwardBackward."""
        logits = self.model(batch.tokens, batch.documents if self.document_mask else None).logits
        return self.model.vocabulary_shard.cross_entropy_sum(
            logits, self.model.sequence_shard.take_local(batch.targets)
        )

    def logits(self, tokens: Tensor) -> Tensor:
        """See ForwardBackward."""
        return self.model.sequence_shard.gather(self.model.vocabulary_shard.gather(self.model(tokens).logits))

    def _pass(self, batch: Batch, whole: LossDenominators, weights: LossWeights) -> Tensor:
        output = self.model(batch.tokens, batch.documents if self.document_mask else None)
        terms = losses(output, batch, whole, self.model.vocabulary_shard, self.model.sequence_shard)
        total = terms.main + weights.mtp * terms.mtp + weights.balance * terms.balance
        if weights.z:
            total = total + weights.z * terms.z
        total.backward()
        # Which layers' routers met numbers that are none travels with the losses: one reduction for all.
        return torch.cat(
            [torch.stack([terms.main, terms.mtp, terms.balance]).detach(), output.broken.float()]
        )


def placed_routers(parts: list[Transformer]) -> dict[int, Router]:
    """The routers of `parts` by their place among all MoE layers of the whole model, MTP's last."""
    return {
        part.config.moe_layers().index(name): router
        for part in parts
        for name, router in zip(part.moe_layers(), part.routers(), strict=True)
    }
