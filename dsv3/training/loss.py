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
from dsv3.model.head import IGNORE_INDEX, HeadTargets
from dsv3.model.transformer import ModelOutput
from dsv3.training.schedule import StepHyperparameters


@dataclass
class LossDenominators:
    """The counts that divide the losses of one optimizer step, over all ranks and microbatches."""

    tokens: Tensor
    """Valid targets; a scalar, at least 1."""
    sequences: Tensor | int
    """Sequences of the global batch, without those of padding alone; a scalar, at least 1."""
    routed: Tensor | int | None = None
    """Positions of the global batch with a token; a scalar, at least 1. None: no sequence has padding."""


class LossTerms(NamedTuple):
    """One microbatch's share of the loss terms of a step; scalars."""

    head: Tensor
    """`main` and `mtp` with their weights, added up by the head; the gradient of both is here."""
    main: Tensor
    """Cross-entropy of the next token in nats, without gradient."""
    mtp: Tensor
    """Mean over MTP depths of their cross-entropies in nats, each divided like `main` (eq. 24: 1/T); without
    weight and gradient."""
    balance: Tensor
    """Sequence-wise balance losses, summed over layers, before alpha (eq. 17 to 20)."""
    z: Tensor
    """Router z-losses, summed over layers, before their weight."""

    def total(self, step: StepHyperparameters) -> Tensor:
        """Return the weighted sum of all terms: the total loss that backward starts from."""
        return self.head + self.router_loss(step)

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


def head_targets(
    batch: Batch, denominators: LossDenominators, step: StepHyperparameters, mtp_depths: int
) -> HeadTargets:
    """Return what a training step scores the head against: the next token, and the tokens of all MTP depths.

    A factor is the term's weight over its denominator; MTP is a mean over depths.
    """
    depths = range(1, mtp_depths + 1)
    ids = [batch.targets, *(mtp_targets(batch.targets, batch.documents, depth) for depth in depths)]
    factors = [1 / denominators.tokens, *(step.mtp_weight / mtp_depths / denominators.tokens for _ in depths)]
    return HeadTargets(ids, factors)


def loss_terms(output: ModelOutput, batch: Batch, denominators: LossDenominators) -> LossTerms:
    """Return this microbatch's share of the loss terms; a pipeline stage without the head has 0 for its."""
    head = main = mtp = torch.zeros((), device=output.balance_loss.device)
    if output.head_loss is not None:
        head, (main, *of_depths) = output.head_loss
        main = main / denominators.tokens
        mtp = sum(of_depths, mtp) / denominators.tokens / max(1, len(of_depths))
    # The router's losses are means over this microbatch's sequences and positions.
    share_of_sequences = _share(batch.num_sequences, denominators.sequences)
    share_of_positions = share_of_sequences
    if denominators.routed is not None:
        share_of_positions = _share(batch.num_tokens, denominators.routed)
    balance, z = output.balance_loss * share_of_sequences, output.z_loss * share_of_positions
    return LossTerms(head, main, mtp, balance, z)


def _share(part: int, whole: Tensor | int) -> Tensor | float:
    """Return part / whole rounded once: fp32 on the device of `whole`, where that is a tensor."""
    return part / whole if isinstance(whole, int) else (part / whole.double()).float()
