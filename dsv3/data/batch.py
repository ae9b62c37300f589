"""Microbatches: token ids, next-token targets and document ids, and the targets of multi-token prediction."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

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
            where there is no token, which stands at the end of a row.
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

    @cached_property
    def lengths(self) -> list[int] | None:
        """Return the tokens per row; None where no row has padding, so that full rows need no mask.

        ValueError for padding before a token, which attention would take for one.
        """
        assert self.host_documents is not None
        is_token = self.host_documents != PADDING
        if bool(is_token.all()):
            return None
        lengths = is_token.sum(1)
        positions = torch.arange(is_token.shape[1], device=is_token.device)
        if not torch.equal(is_token, positions < lengths.unsqueeze(1)):
            raise ValueError("a row has padding before a token: only its end may be padded")
        return lengths.tolist()

    @property
    def num_sequences(self) -> int:
        """Return the number of rows with a token."""
        return len(self.tokens) if self.lengths is None else sum(length > 0 for length in self.lengths)

    @property
    def num_tokens(self) -> int:
        """Return the number of positions with a token."""
        return self.tokens.numel() if self.lengths is None else sum(self.lengths)


def collate(rows: Sequence[PackedRow], pinned: bool = False) -> Batch:
    """Stack rows of [sequence + 1] into a batch of [len(rows), sequence].

    `pinned` memory is what a GPU copies from while the host goes on: made here, it costs no copy of its own.
    The values are written by numpy, which works on one core: in a thread beside training PyTorch would start
    a second set of its worker threads.
    """
    shape = (len(rows), len(rows[0].tokens) - 1)
    tokens, targets = (torch.empty(shape, dtype=torch.int64, pin_memory=pinned) for _ in range(2))
    documents = torch.empty(shape, dtype=torch.int32, pin_memory=pinned)
    arrays = (tokens.numpy(), targets.numpy(), documents.numpy())
    for row, inputs, labels, current in zip(rows, *arrays, strict=True):
        following = row.documents[1:]
        inputs[:] = row.tokens[:-1]
        current[:] = row.documents[:-1]
        labels[:] = row.tokens[1:]
        labels[(current != following) | (following == PADDING)] = IGNORE_INDEX
    return Batch(tokens, targets, documents)


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
