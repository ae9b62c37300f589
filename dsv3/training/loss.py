"""The training loss: next token, multi-token prediction and router terms, each summed once and divided once.

Under gradient accumulation and data parallelism a mean of means would weigh short microbatches too much.
Each term is therefore a sum over this rank's microbatch, divided by what the whole global batch holds
(`LossDenominators`); the shares of all microbatches and ranks add up to the loss of the step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dsv3.data.batch import Batch, mtp_targets
from dsv3.model.layers import IGNORE_INDEX, LocalVocabularyShard
from dsv3.model.transformer import LocalSequenceShard, ModelOutput
from dsv3.training.schedule import StepHyperparameters


@dataclass
class LossDenominators:
    """The counts that divide the losses of one optimizer step, over all ranks and microbatches."""

    tokens: Tensor
    """Valid targets; a scalar, at least 1."""
    sequences: int
    """Sequences of the global batch."""


class LossTerms(NamedTuple):
    """One microbatch's share of the loss terms of a step; scalars, without their weights."""

    main: Tensor
    """Cross-entropy of the next token in nats."""
    mtp: Tensor
    """Mean over MTP depths of their cross-entropies in nats, each divided like `main` (eq. 24: 1/T)."""
    balance: Tensor
    """Sequence-wise balance losses, summed over layers, before alpha (eq. 17 to 20)."""
    z: Tensor
    """Router z-losses, summed over layers, before their weight."""

    def total(self, step: StepHyperparameters) -> Tensor:
        """Return the weighted sum of all terms: the total loss that backward starts from."""
        return self.main + step.mtp_weight * self.mtp + self.router_loss(step)

    def router_loss(self, step: StepHyperparameters) -> Tensor:
        """Return the weighted balance and z-loss: all that a pipeline stage without the head minimises."""
        loss = step.balance_weight * self.balance
        return loss + step.z_loss_weight * self.z if step.z_loss_weight else loss


class LossSums(NamedTuple):
    """One rank's sums over the microbatches of a step, without gradient; ranks add them up."""

    main: Tensor
    """See LossTerms; a scalar, like the next two."""
    mtp: Tensor
    balance: Tensor
    nonfinite_routers: Tensor
    """[MoE layers of the whole model] count of forward passes in which a router's logits were not finite."""

    @classmethod
    def zeros(cls, moe_layers: int, device: torch.device) -> "LossSums":
        """Return sums of nothing."""
        return cls.from_flat(torch.zeros(3 + moe_layers, device=device))

    @classmethod
    def from_flat(cls, flat: Tensor) -> "LossSums":
        """Return the sums that `flat()` has put into one tensor [3 + MoE layers]."""
        return cls(flat[0], flat[1], flat[2], flat[3:])

    @classmethod
    def added_up(cls, sums: Sequence["LossSums"]) -> "LossSums":
        """Return the field-wise sum of `sums`, at least one."""
        return cls.from_flat(torch.stack([each.flat() for each in sums]).sum(0))

    def flat(self) -> Tensor:
        """Return all fields in one tensor [3 + MoE layers], so that one all-reduce adds them over ranks."""
        return torch.cat([torch.stack([self.main, self.mtp, self.balance]), self.nonfinite_routers])


def valid_tokens(batch: Batch) -> Tensor:
    """Return the number of targets that count; a scalar on the batch's device."""
    return (batch.targets != IGNORE_INDEX).sum()


def loss_terms(
    output: ModelOutput,
    batch: Batch,
    denominators: LossDenominators,
    vocabulary_shard: LocalVocabularyShard | None = None,
    sequence_shard: LocalSequenceShard | None = None,
    has_logits: bool = True,
) -> LossTerms:
    """Return this microbatch's share of the loss terms.

    `vocabulary_shard` and `sequence_shard` are the model's, where ranks split its logits. A pipeline stage
    without the head `has_logits` False: its cross-entropies are 0.
    """
    take = (sequence_shard or LocalSequenceShard()).take_local
    cross_entropy = (vocabulary_shard or LocalVocabularyShard()).cross_entropy_sum
    main = torch.zeros((), device=output.logits.device)
    mtp = torch.zeros_like(main)
    if has_logits:
        main = cross_entropy(output.logits, take(batch.targets)) / denominators.tokens
        for depth, logits in enumerate(output.mtp_logits, start=1):
            targets = take(mtp_targets(batch.targets, batch.documents, depth))
            mtp = mtp + cross_entropy(logits, targets) / denominators.tokens / len(output.mtp_logits)
    share_of_sequences = batch.tokens.shape[0] / denominators.sequences
    return LossTerms(main, mtp, output.balance_loss * share_of_sequences, output.z_loss * share_of_sequences)
