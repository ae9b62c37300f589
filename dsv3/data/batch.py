"""What the model and the loss receive: tokens, targets and the document each position belongs to."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dsv3.data.packing import PADDING, Row
from dsv3.model.layers import IGNORE


@dataclass(frozen=True)
class Batch:
    """One microbatch of one data-parallel rank.

    Attributes:
        tokens: int64 [batch, sequence].
        targets: int64 [batch, sequence], the next token; IGNORE where that belongs to another
            document or is padding.
        documents: int32 [batch, sequence], 0, 1, 2 .. within a row; PADDING where there is no token.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    documents: torch.Tensor

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on a device."""
        moved = (x.to(device, non_blocking=True) for x in (self.tokens, self.targets, self.documents))
        return Batch(*moved)


def collate(rows: Sequence[Row]) -> Batch:
    """Stack rows of [sequence + 1] into a batch of [len(rows), sequence]."""
    tokens = torch.from_numpy(np.stack([row.tokens for row in rows]))
    documents = torch.from_numpy(np.stack([row.documents for row in rows]))
    here, following = documents[:, :-1], documents[:, 1:]
    valid = (here == following) & (following != PADDING)
    targets = tokens[:, 1:].masked_fill(~valid, IGNORE)
    return Batch(tokens[:, :-1].contiguous(), targets, here.contiguous())


def mtp_targets(targets: torch.Tensor, documents: torch.Tensor, depth: int) -> torch.Tensor:
    """The targets of multi-token prediction at `depth` 1, 2 .. (DeepSeek-V3 report, eq. 24).

    Position i predicts the token depth + 1 places on, which is the next token of position i + depth;
    IGNORE unless that lies in the same document and in the row.

    Args:
        targets: [batch, sequence] the next tokens, `documents` [batch, sequence], both as in a Batch.

    Returns:
        int64 [batch, sequence].
    """
    shifted = torch.full_like(targets, IGNORE)
    kept = targets.shape[1] - depth
    if kept > 0:
        # targets[i + depth] is IGNORE where a document ends there, so equal numbers here suffice
        same = documents[:, :kept] == documents[:, depth:]
        shifted[:, :kept] = targets[:, depth:].masked_fill(~same, IGNORE)
    return shifted
