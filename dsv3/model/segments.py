"""Where documents lie in a packed batch, as attention kernels ask for it."""

import functools
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from dsv3.model.flex import document_mask


@dataclass(frozen=True, eq=False)
class Segments:
    """Where the documents of a batch lie when its rows are put end to end."""

    lengths: list[int]
    """Tokens of each document."""
    longest: int
    """The largest of the lengths."""
    offsets: Tensor
    """int32 [documents + 1]: where each begins, and the end of the last (others: cu_seqlens)."""
    starts: Tensor
    """[batch, sequence]: where in its row a token's document begins."""

    def of_rows(self, rows: int) -> list[list[tuple[int, int]]]:
        """Where each row's documents begin and end, in its own positions."""
        ends, width = list(accumulate(self.lengths)), sum(self.lengths) // rows
        spans: list[list[tuple[int, int]]] = [[] for _ in range(rows)]
        for end, length in zip(ends, self.lengths, strict=True):
            row = (end - 1) // width
            spans[row].append((end - length - row * width, end - row * width))
        return spans

    @functools.cached_property
    def block_mask(self) -> BlockMask:
        """What flex computes, built once for all layers."""
        return document_mask(self.starts)


def document_segments(documents: Tensor | None) -> Segments | None:
    """The runs of equal numbers in each row of `documents` [batch, sequence].

    Their lengths are read on the host: called once a forward pass, not once a layer.
    """
    if documents is None:
        return None
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    offsets = F.pad(begins.flatten().nonzero().squeeze(-1), (0, 1), value=documents.numel())
    positions = torch.arange(documents.shape[1], device=documents.device)
    starts = (positions * begins).cummax(dim=1).values
    lengths = offsets.diff().tolist()
    return Segments(lengths, max(lengths), offsets.int(), starts)
