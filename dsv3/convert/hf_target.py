"""Writes a released checkpoint (safetensors files with an index), in bf16, fp32 or block-fp8."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from dsv3.checkpoint.released.names import SCALE, Released, is_quantized, stored_dtype
from dsv3.checkpoint.released.shard_writer import Entry, ShardPlan, ShardWriter, plan_shards
from dsv3.convert.pieces import Output, Piece, row_slices, shaped
from dsv3.convert.sink import Sink
from dsv3.precision.blocks import quantize


class Source(Protocol):
    """What weights are read from: a released checkpoint or a DCP."""

    layout: list[Released]
    block: tuple[int, int]

    def rows(self, tensor: Released, first: int, count: int, out: Tensor) -> Tensor:
        """Rows of a tensor as numbers in `out`."""

    def codes(self, name: str, first: int, count: int) -> tuple[Tensor, Tensor] | None:
        """Rows of whole blocks in fp8 with their scales, where they are stored so."""

    def scales(self, name: str) -> Tensor | None:
        """The grid of scales that the weights were released with, if they were in fp8."""

    def numbers(self, tensor: Released) -> torch.dtype:
        """The narrower of fp32 and bf16 that holds what is stored."""


@dataclass
class Shard:
    """A file under way."""

    plan: ShardPlan
    writer: ShardWriter | None = None

    def open(self, sink: Sink) -> ShardWriter:
        """The writer of this file; it begins with the header."""
        if self.writer is None:
            self.writer = ShardWriter(self.plan, sink)  # type: ignore[arg-type]  # as far as it looks
        return self.writer


@dataclass
class Writing:
    """A tensor under way to its file."""

    shard: Shard
    source: Source
    tensor: Released
    name: str
    """What it is called there."""
    dtype: torch.dtype
    """Of the numbers; fp8 codes are made from these."""
    power_of_two: bool = False
    grid: list[Tensor] = field(default_factory=list)
    """The scales of the rows so far."""


@dataclass(frozen=True)
class Rows:
    """Rows [first, first + count) of a tensor, written as numbers."""

    what: Writing
    first: int
    count: int

    def make(self, buffer: Tensor) -> Tensor:
        """The numbers of the rows."""
        tensor = self.what.tensor
        shape = (self.count, *tensor.shape[1:]) if tensor.shape else ()
        return self.what.source.rows(tensor, self.first, self.count, shaped(buffer, shape, self.what.dtype))

    def put(self, made: Tensor, sink: Sink) -> None:
        """Append them."""
        self.what.shard.open(sink).write(self.what.name, made)


@dataclass(frozen=True)
class QuantizedRows:
    """Rows of whole blocks of a matrix as fp8 codes; behind its last rows the scales of all of it."""

    rows: Rows

    def make(self, buffer: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and scales, the stored or once released ones where they give the same numbers."""
        what, first, count = self.rows.what, self.rows.first, self.rows.count
        stored = what.source.codes(what.tensor.name, first, count)
        if stored is not None:
            return stored
        height, known = what.source.block[0], what.source.scales(what.tensor.name)
        kept = None if known is None else known[first // height : -(-(first + count) // height)]
        return quantize(self.rows.make(buffer), what.source.block, kept, what.power_of_two)

    def put(self, made: tuple[Tensor, Tensor], sink: Sink) -> None:
        """Append the codes, and after the last of them the scales."""
        what, (codes, scales) = self.rows.what, made
        writer = what.shard.open(sink)
        writer.write(what.name, codes)
        what.grid.append(scales)
        if self.rows.first + self.rows.count == what.tensor.shape[0]:
            writer.write(what.name + SCALE, torch.cat(what.grid))
            what.grid.clear()


@dataclass(frozen=True)
class Style:
    """How weights are written: `dtype` of the numbers, or fp8 (then they are quantised from `dtype`)."""

    dtype: torch.dtype
    fp8: bool = False
    power_of_two: bool = False

    def is_fp8(self, name: str) -> bool:
        """Whether this tensor is written in fp8."""
        return self.fp8 and is_quantized(name)


def hf_outputs(
    source: Source, tensors: Sequence[tuple[str, Released]], style: Style, max_shard_size: int
) -> tuple[list[ShardPlan], list[Output]]:
    """The files of `tensors` (the name to write and what to read), and what makes each."""
    entries = [entry for name, tensor in tensors for entry in _entries(name, tensor, style, source.block)]
    plans = plan_shards(entries, max_shard_size)
    by_name = dict(tensors)
    outputs = []
    for plan in plans:
        shard = Shard(plan)
        names = [entry.name for entry in plan.tensors if entry.name in by_name]
        pieces = [piece for name in names for piece in _pieces(shard, source, name, by_name[name], style)]
        outputs.append(Output(plan.name, plan.nbytes, pieces))
    return plans, outputs


def _entries(name: str, tensor: Released, style: Style, block: tuple[int, int]) -> Iterator[Entry]:
    if not style.is_fp8(name):
        yield name, stored_dtype(tensor, style.dtype), tensor.shape
        return
    rows, columns = tensor.shape
    yield name, torch.float8_e4m3fn, tensor.shape
    yield name + SCALE, torch.float32, (-(-rows // block[0]), -(-columns // block[1]))


def _pieces(shard: Shard, source: Source, name: str, tensor: Released, style: Style) -> Iterator[Piece]:
    quantized = style.is_fp8(name)
    dtype = source.numbers(tensor) if quantized else stored_dtype(tensor, style.dtype)
    what = Writing(shard, source, tensor, name, dtype, style.power_of_two)
    for first, count in row_slices(tensor.shape, dtype.itemsize, source.block[0] if quantized else 1):
        rows = Rows(what, first, count)
        yield QuantizedRows(rows) if quantized else rows
