"""Microbatches: token ids, next-token targets and document ids, and the targets of multi-token prediction."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from dsv3.data.packing import PADDING, PackedRow
from dsv3.model.attention_kernels import Segments, document_segments
from dsv3.model.head import IGNORE_INDEX
from dsv3.model.transfers import upload


@dataclass(frozen=True)
class Batch:
    """One microbatch of one data-parallel rank.

    Attributes:
        tokens: int64 [batch, sequence].
        targets: int64 [batch, sequence], the next token; IGNORE_INDEX where the next token belongs to
            another document or is padding.
        documents: int32 [batch, sequence], the document of each token, counted 0, 1, 2 .. per row; PADDING
            where there is no token.
        host_documents: the same numbers on the host, wherever the batch is. What must be read of them is read
            there, so that the host need not wait for the device.
    """

    tokens: Tensor
    targets: Tensor
    documents: Tensor
    host_documents: Tensor | None = None

    def __post_init__(self) -> None:
        if self.host_documents is None:
            object.__setattr__(self, "host_documents", self.documents)

    def to(self, device: torch.device | str) -> "Batch":
        """Copy the batch to a device, without waiting for it."""
        tokens, targets, documents = (upload(x, device) for x in (self.tokens, self.targets, self.documents))
        return Batch(tokens, targets, documents, self.host_documents)

    @cached_property
    def segments(self) -> Segments:
        """Return the documents as attention kernels ask for them, on the batch's device."""
        segments = document_segments(self.host_documents)
        assert segments is not None
        return segments.to(self.documents.device)


def collate(rows: Sequence[PackedRow]) -> Batch:
    """Stack rows of [sequence + 1] into a batch of [len(rows), sequence]."""
    tokens = torch.from_numpy(np.stack([row.tokens for row in rows]))
    documents = torch.from_numpy(np.stack([row.documents for row in rows]))
    current, following = documents[:, :-1], documents[:, 1:]
    valid = (current == following) & (following != PADDING)
    targets = tokens[:, 1:].masked_fill(~valid, IGNORE_INDEX)
    return Batch(tokens[:, :-1].contiguous(), targets, current.contiguous())


def mtp_targets(targets: Tensor, documents: Tensor, depth: int) -> Tensor:
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
