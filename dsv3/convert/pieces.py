"""What is written is made of pieces of bounded size: slices of rows, in the order of their files."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dsv3.convert.sink import Sink

PIECE = 16 * 2**20
"""Bytes of a piece of output."""


class Piece(Protocol):
    """A part of a file: made by any worker, put into the file in its turn."""

    def make(self, buffer: Tensor) -> Any:
        """Read and compute, into `buffer` (uint8, as long as the largest piece) where it helps."""

    def put(self, made: Any, sink: Sink) -> Any:
        """Append what was made; what comes back (a JSON value) is what the file's record keeps."""


@dataclass(frozen=True)
class Output:
    """A file to be written: its name below the output, its size in bytes and what makes it."""

    name: str
    nbytes: int
    """Without the few bytes an entry that a format adds."""
    pieces: Sequence[Piece]


def row_slices(shape: tuple[int, ...], itemsize: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """First row and count of slices of at most PIECE bytes, or of `multiple` rows where those have more.

    All but the last have a multiple of `multiple` rows. A scalar is one row.
    """
    rows = shape[0] if shape else 1
    row_nbytes = max(1, itemsize * torch.Size(shape[1:]).numel())
    step = max(1, PIECE // row_nbytes // multiple) * multiple
    for first in range(0, rows, step):
        yield first, min(step, rows - first)


def shaped(buffer: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The beginning of `buffer` (uint8) as a tensor, whose storage ends where the tensor does.

    torch.save writes all of a tensor's storage. A buffer that is too short gives a new tensor.
    """
    count = torch.Size(shape).numel()
    if count == 0 or count * dtype.itemsize > buffer.numel():
        return torch.empty(*shape, dtype=dtype)
    return torch.frombuffer(buffer.numpy().data, dtype=dtype, count=count).view(*shape)
