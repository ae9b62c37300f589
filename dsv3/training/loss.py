"""The training loss: next token, multi-token prediction, balance; each summed once, divided once."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv3.data.batch import Batch, mtp_targets
from dsv3.model.layers import IGNORE, LocalVocabularyShard
from dsv3.model.transformer import LocalSequenceShard, ModelOutput


@dataclass
class LossDenominators:
    """What the losses of one optimizer step are divided by, over all ranks and microbatches."""

    tokens: Tensor
    """Valid targets; a scalar."""
    sequences: int


@dataclass
class Losses:
    """One microbatch's share of the step's losses: the shares of a step add up to its losses."""

    main: Tensor
    """Cross-entropy of the next token in nats; a scalar."""
    mtp: Tensor
    """Mean over depths of their cross-entropies; each has the main loss's denominator (eq. 24: 1/T)."""
    balance: Tensor
    """Sequence-wise balance terms summed over layers, without alpha."""
    z: Tensor
    """Router z-losses summed over layers, before their weight."""


def valid_tokens(batch: Batch) -> Tensor:
    """How many targets of the batch count; a scalar on the batch's device."""
    return (batch.targets != IGNORE).sum()


def losses(
    output: ModelOutput,
    batch: Batch,
    whole: LossDenominators,
    vocabulary_shard: LocalVocabularyShard | None = None,
    sequence_shard: LocalSequenceShard | None = None,
) -> Losses:
    """This microbatch's part of the losses over the `whole` global batch.

    `vocabulary_shard` and `sequence_shard` are those of a model whose logits are split over vocabulary or positions.
    """
    take = (sequence_shard or LocalSequenceShard()).take_local
    cross_entropy = (vocabulary_shard or LocalVocabularyShard()).cross_entropy_sum
    main = cross_entropy(output.logits, take(batch.targets)) / whole.tokens
    mtp = torch.zeros_like(main)
    for depth, logits in enumerate(output.mtp_logits, start=1):
        targets = take(mtp_targets(batch.targets, batch.documents, depth))
        mtp = mtp + cross_entropy(logits, targets) / whole.tokens / len(output.mtp_logits)
    share_of_sequences = batch.tokens.shape[0] / whole.sequences
    return Losses(main, mtp, output.balance_loss * share_of_sequences, output.z_loss * share_of_sequences)
