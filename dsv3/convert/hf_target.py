"""Writes a released checkpoint (safetensors files with an index), in bf16, fp32 or block-fp8.

Scale grids: checked before a conversion begins, and written as pieces.

direction=dcp_to_hf and hf_to_hf: a released checkpoint that transformers loads.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dsv3.checkpoint.directory import TOKENIZER_DIR
from dsv3.config.convert import ConvertConfig, ScaleFormat, StoredType, parse_size
from dsv3.config.model import ModelConfig
from dsv3.convert.dcp_source import DcpSource
from dsv3.convert.destination import Finished
from dsv3.convert.engine import Work
from dsv3.convert.hf_assets import HF_DIR, copy_assets, write_json
from dsv3.convert.live_export import copy_tokenizer
from dsv3.convert.output_file import Output, Piece, Sink, row_slices, shaped
from dsv3.fp8.quantize import quantize
from dsv3.hf.config_json import config_json
from dsv3.hf.config_values import read_config
from dsv3.hf.names import SCALE, HFTensor, is_quantized, mtp_duplicates, stored_dtype
from dsv3.hf.safetensors_reader import INDEX
from dsv3.hf.safetensors_writer import Entry, ShardPlan, ShardWriter, index_json, plan_shards
from dsv3.hf.storage_reader import HFSource


class Source(Protocol):
    """What weights are read from: a released checkpoint or a DCP."""

    layout: list[HFTensor]
    block: tuple[int, int]

    def rows(self, tensor: HFTensor, first: int, count: int, out: Tensor) -> Tensor:
        """Rows of a tensor as numbers in `out`."""

    def codes(self, name: str, first: int, count: int) -> tuple[Tensor, Tensor] | None:
        """Rows of whole blocks in fp8 with their scales, where they are stored so."""

    def scales(self, name: str) -> Tensor | None:
        """The grid of scales that the weights were released with, if they were in fp8."""

    def numbers(self, tensor: HFTensor) -> torch.dtype:
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
    tensor: HFTensor
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
    source: Source, tensors: Sequence[tuple[str, HFTensor]], style: Style, max_shard_size: int
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


def _entries(name: str, tensor: HFTensor, style: Style, block: tuple[int, int]) -> Iterator[Entry]:
    if not style.is_fp8(name):
        yield name, stored_dtype(tensor, style.dtype), tensor.shape
        return
    rows, columns = tensor.shape
    yield name, torch.float8_e4m3fn, tensor.shape
    yield name + SCALE, torch.float32, (-(-rows // block[0]), -(-columns // block[1]))


def _pieces(shard: Shard, source: Source, name: str, tensor: HFTensor, style: Style) -> Iterator[Piece]:
    quantized = style.is_fp8(name)
    dtype = source.numbers(tensor) if quantized else stored_dtype(tensor, style.dtype)
    what = Writing(shard, source, tensor, name, dtype, style.power_of_two)
    for first, count in row_slices(tensor.shape, dtype.itemsize, source.block[0] if quantized else 1):
        rows = Rows(what, first, count)
        yield QuantizedRows(rows) if quantized else rows


def require_sound_scales(source: HFSource, workers: int) -> None:
    """UserError for a scale that is not above 0; read in the order of the files, a few MB of each."""
    stored = source.stored
    names = [tensor.name for tensor in source.layout if source.is_quantized(tensor.name)]
    names.sort(key=lambda name: (str(stored[name + SCALE].file), stored[name + SCALE].offset))
    with ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(source.scales, names):
            pass


@dataclass(frozen=True)
class ScaleGrid:
    """The scales of one weight, written under its name: a few KB to a few hundred."""

    shard: Shard
    source: HFSource
    name: str

    def make(self, buffer: Tensor) -> Tensor:
        """The grid as it is stored."""
        grid = self.source.scales(self.name)
        assert grid is not None
        return grid

    def put(self, made: Tensor, sink: Sink) -> None:
        """Append it."""
        self.shard.open(sink).write(self.name, made)


_NAMES = {StoredType.bf16: "bfloat16", StoredType.fp32: "float32", StoredType.fp8: "bfloat16"}
"""What config.json says of the tensors that are not in fp8."""


def to_hf(config: ConvertConfig, source: HFSource | DcpSource, model: ModelConfig) -> Work:
    """Weights in safetensors files with their index, config.json and what came with the input."""
    known = _known_quantization(source)
    fmt = config.scale_fmt.value if config.scale_fmt else known.get("scale_fmt")
    style = Style(
        torch.float32 if config.dtype is StoredType.fp32 else torch.bfloat16,
        fp8=config.dtype is StoredType.fp8,
        power_of_two=fmt == ScaleFormat.ue8m0.value,
    )
    plans, outputs = hf_outputs(source, _tensors(source, model), style, parse_size(config.max_shard_size))
    origin = source.directory if isinstance(source, HFSource) else source.directory / HF_DIR
    quantization = _quantization(known, source.block, fmt) if style.fp8 else None
    values = _config(origin, model, _NAMES[config.dtype], quantization)

    def complete(directory: Path, finished: list[Finished]) -> None:
        if len(plans) > 1:
            (directory / INDEX).write_text(index_json(plans))
        if origin.is_dir():
            copy_assets(origin, directory)
        write_json(directory / "config.json", values)
        copy_tokenizer(source.directory / TOKENIZER_DIR, directory)

    return Work(outputs, complete)


def _tensors(source: HFSource | DcpSource, model: ModelConfig) -> list[tuple[str, HFTensor]]:
    """Every tensor to write with what it is read as: all of the layout, and the copies behind their layer."""
    by_name = {tensor.name: tensor for tensor in source.layout}
    tensors = list(by_name.items())
    if source.has_mtp_duplicates:
        tensors += [(copy, by_name[name]) for copy, name in mtp_duplicates(model).items()]
    return tensors


def _known_quantization(source: HFSource | DcpSource) -> dict[str, Any]:
    """The quantization_config that the weights came with."""
    return dict(source.quantization or {})


def _quantization(known: dict[str, Any], block: tuple[int, int], fmt: str | None) -> dict[str, Any]:
    style = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"}
    values = style | known | {"weight_block_size": list(block)}
    values.pop("scale_fmt", None)
    return values | ({"scale_fmt": fmt} if fmt == ScaleFormat.ue8m0.value else {})


def _config(
    origin: Path, model: ModelConfig, dtype: str, quantization: dict[str, Any] | None
) -> dict[str, Any]:
    """The config.json that came with the weights, or a new one, with the types that are written."""
    carried = (origin / "config.json").is_file()
    values = dict(read_config(origin).values) if carried else config_json(model, dtype)
    values.pop("quantization_config", None)
    if model.mtp_depths == 0:
        values.pop("num_nextn_predict_layers", None)
    values["dtype" if "dtype" in values else "torch_dtype"] = dtype
    return values | ({"quantization_config": quantization} if quantization else {})
