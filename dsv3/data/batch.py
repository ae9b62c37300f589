"""Microbatches: token ids, next-token targets and document ids, and the targets of multi-token prediction."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dsv3.data.packing import PADDING, PackedRow
from dsv3.model.layers import IGNORE_INDEX


@dataclass(frozen=True)
class Batch:
    """One microbatch of one data-parallel rank.

    Attributes:
        tokens: int64 [batch, sequence].
        targets: int64 [batch, sequence], the next token; IGNORE_INDEX where the next token belongs to
            another document or is padding.
        documents: int32 [batch, sequence], the document of each token, counted 0, 1, 2 .. per row; PADDING
            where there is no token.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    documents: torch.Tensor

    def to(self, device: torch.device | str) -> "Batch":
        """Copy the batch to a device, without waiting for it."""
        moved = (x.to(device, non_blocking=True) for x in (self.tokens, self.targets, self.documents))
        return Batch(*moved)


def collate(rows: Sequence[PackedRow]) -> Batch:
    """Stack rows of [sequence + 1] into a batch of [len(rows), sequence]."""
    tokens = torch.from_numpy(np.stack([row.tokens for row in rows]))
    documents = torch.from_numpy(np.stack([row.documents for row in rows]))
    current, following = documents[:, :-1], documents[:, 1:]
    valid = (current == following) & (following != PADDING)
    targets = tokens[:, 1:].masked_fill(~valid, IGNORE_INDEX)
    return Batch(tokens[:, :-1].contiguous(), targets, current.contiguous())


def mtp_targets(targets: torch.Tensor, documents: torch.Tensor, depth: int) -> torch.Tensor:
    """Return the targets of multi-token prediction at `depth` 1, 2 .. (DeepSeek-V3 report, eq. 24).

    Position i predicts the token depth + 1 places later, which is the next token of position i + depth.
    The target is IGNORE_INDEX where that position lies in another document or past the end of the row.

    Args:
        targets: [batch, sequence], the next tokens, as in a Batch.
        documents: [batch, sequence], as in a Batch.

    Returns:
        int64 [batch, sequence].
    """
    shifted = torch.full_like(targets, IGNORE_INDEX)
    kept = targets.shape[1] - depth
    if kept > 0:
        # targets[i + depth] is already IGNORE_INDEX at the end of a document: equal documents suffice here.
        same = documents[:, :kept] == documents[:, depth:]
        shifted[:, :kept] = targets[:, depth:].masked_fill(~same, IGNORE_INDEX)
    return shifted
