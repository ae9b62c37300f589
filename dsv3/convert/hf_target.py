"""Convert weights to an HF checkpoint that transformers loads (direction=dcp_to_hf and hf_to_hf).

Files are safetensors with an index, in bf16, fp32 or block-fp8.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dsv3.checkpoint.directory import TOKENIZER_DIR
from dsv3.checkpoint.retention import doubt_notes
from dsv3.config.convert import ConvertConfig, ScaleFormat, StoredType, parse_size
from dsv3.config.model import ModelConfig
from dsv3.convert.dcp_source import DcpSource
from dsv3.convert.destination import Finished
from dsv3.convert.engine import Conversion
from dsv3.convert.fp8_choice import Fp8Choice
from dsv3.convert.hf_assets import ExportAssets, assets_folder, copy_record
from dsv3.convert.output_file import HashingWriter, OutputFile, row_slices, view_buffer
from dsv3.fp8.quantize import quantize
from dsv3.hf.names import SCALE_SUFFIX, HFTensor, stored_dtype, with_mtp_duplicates
from dsv3.hf.nonfinite import require_finite_in_bf16
from dsv3.hf.safetensors_reader import INDEX
from dsv3.hf.safetensors_writer import Entry, SafetensorsPlan, SafetensorsWriter, index_json, plan_files
from dsv3.hf.storage_reader import HFSource
from dsv3.metrics.progress import phase


class Source(Protocol):
    """A reader of weights: an HF checkpoint or a DCP."""

    layout: list[HFTensor]
    block: tuple[int, int]

    def read_rows(self, tensor: HFTensor, first: int, count: int, out: Tensor) -> Tensor:
        """Fill `out` with rows [first, first + count), dequantized."""

    def read_codes(self, name: str, first: int, count: int) -> tuple[Tensor, Tensor] | None:
        """Return rows of whole blocks as stored fp8 codes, and their scales; None if they are not in fp8."""

    def is_quantized(self, name: str) -> bool:
        """Return whether a weight came in fp8."""

    def read_scales(self, name: str) -> Tensor | None:
        """Return the scale grid that a weight was released with, None if it was not in fp8."""

    def value_dtype(self, tensor: HFTensor) -> torch.dtype:
        """Return the narrower of fp32 and bf16 that holds the stored values."""


@dataclass
class SafetensorsOutput:
    """A safetensors file to be written; its writer begins when the first slice comes."""

    plan: SafetensorsPlan
    _writer: SafetensorsWriter | None = None

    def writer(self, file: HashingWriter) -> SafetensorsWriter:
        """Return the writer of this file; the first call writes the header."""
        if self._writer is None:
            self._writer = SafetensorsWriter(self.plan, file)  # type: ignore[arg-type]  # as far as it looks
        return self._writer


@dataclass
class TensorConversion:
    """An HF tensor to read, and the name and dtype under which its slices are written to a file."""

    output: SafetensorsOutput
    source: Source
    tensor: HFTensor
    name: str
    dtype: torch.dtype
    """Dtype of the values; fp8 codes are computed from values of this dtype."""
    power_of_two: bool = False
    """True if new fp8 scales are powers of two."""
    grid: list[Tensor] = field(default_factory=list)
    """Scales of the rows that are written."""


@dataclass(frozen=True)
class HFSlice:
    """Rows [first, first + count) of a tensor, written as values."""

    conversion: TensorConversion
    first: int
    count: int

    def load(self, buffer: Tensor) -> Tensor:
        """Return the values of the rows."""
        tensor = self.conversion.tensor
        shape = (self.count, *tensor.shape[1:]) if tensor.shape else ()
        out = view_buffer(buffer, shape, self.conversion.dtype)
        return self.conversion.source.read_rows(tensor, self.first, self.count, out)

    def write(self, loaded: Tensor, file: HashingWriter) -> None:
        """Append the rows."""
        self.conversion.output.writer(file).write(self.conversion.name, loaded)


@dataclass(frozen=True)
class QuantizedHFSlice:
    """Rows of whole blocks of a matrix, written as fp8 codes.

    The scales of the whole matrix follow its last rows.
    """

    rows: HFSlice

    def load(self, buffer: Tensor) -> tuple[Tensor, Tensor]:
        """Return codes and scales: stored ones, or released scales where they give the same values."""
        conversion, first, count = self.rows.conversion, self.rows.first, self.rows.count
        source, name = conversion.source, conversion.tensor.name
        stored = source.read_codes(name, first, count)
        if stored is not None:
            return stored
        height, known = source.block[0], source.read_scales(name)
        kept = None if known is None else known[first // height : -(-(first + count) // height)]
        values = self.rows.load(buffer)
        if values.numel():
            require_finite_in_bf16(values, name, first)
        return quantize(values, source.block, kept, conversion.power_of_two)

    def write(self, loaded: tuple[Tensor, Tensor], file: HashingWriter) -> None:
        """Append the codes, and after the last of them the scales."""
        conversion, (codes, scales) = self.rows.conversion, loaded
        writer = conversion.output.writer(file)
        writer.write(conversion.name, codes)
        conversion.grid.append(scales)
        if self.rows.first + self.rows.count == conversion.tensor.shape[0]:
            writer.write(conversion.name + SCALE_SUFFIX, torch.cat(conversion.grid))
            conversion.grid.clear()


@dataclass(frozen=True)
class ScaleGridSlice:
    """The scale grid of one weight, written under the weight's name: a few KB to a few hundred."""

    output: SafetensorsOutput
    source: HFSource
    name: str

    def load(self, buffer: Tensor) -> Tensor:
        """Return the grid as it is stored."""
        grid = self.source.read_scales(self.name)
        assert grid is not None
        return grid

    def write(self, loaded: Tensor, file: HashingWriter) -> None:
        """Append the grid."""
        self.output.writer(file).write(self.name, loaded)


@dataclass(frozen=True)
class HFFormat:
    """The form of written weights: values of `dtype`, or fp8 quantized from values of `dtype`."""

    dtype: torch.dtype
    fp8: frozenset[str] = frozenset()
    """Names of the tensors in fp8."""
    power_of_two: bool = False


def hf_plans(
    source: Source, tensors: Sequence[tuple[str, HFTensor]], form: HFFormat, max_shard_size: int
) -> list[SafetensorsPlan]:
    """Return the files that hold `tensors` (name to write, tensor to read), in their order."""
    entries: list[Entry] = []
    for name, tensor in tensors:
        if name in form.fp8:
            rows, columns = tensor.shape
            grid = (-(-rows // source.block[0]), -(-columns // source.block[1]))
            entries.append((name, torch.float8_e4m3fn, tensor.shape))
            entries.append((name + SCALE_SUFFIX, torch.float32, grid))
        else:
            dtype = stored_dtype(tensor, form.dtype, source.value_dtype(tensor))
            entries.append((name, dtype, tensor.shape))
    return plan_files(entries, max_shard_size)


def hf_files(
    source: Source, tensors: Sequence[tuple[str, HFTensor]], form: HFFormat, max_shard_size: int
) -> tuple[list[SafetensorsPlan], list[OutputFile]]:
    """Return the files of `tensors` (name to write, tensor to read), as plans and with their slices."""
    plans = hf_plans(source, tensors, form, max_shard_size)
    by_name = dict(tensors)
    files = []
    for plan in plans:
        output = SafetensorsOutput(plan)
        names = [entry.name for entry in plan.tensors if entry.name in by_name]
        slices = [each for name in names for each in tensor_slices(output, source, name, by_name[name], form)]
        files.append(OutputFile(plan.name, plan.nbytes, slices))
    return plans, files


def tensor_slices(
    output: SafetensorsOutput, source: Source, name: str, tensor: HFTensor, form: HFFormat
) -> Iterator[HFSlice | QuantizedHFSlice]:
    """Yield the slices of a tensor; in fp8 they are of whole blocks."""
    is_fp8 = name in form.fp8
    came = source.value_dtype(tensor)
    dtype = came if is_fp8 else stored_dtype(tensor, form.dtype, came)
    conversion = TensorConversion(output, source, tensor, name, dtype, form.power_of_two)
    for first, count in row_slices(tensor.shape, dtype.itemsize, source.block[0] if is_fp8 else 1):
        rows = HFSlice(conversion, first, count)
        yield QuantizedHFSlice(rows) if is_fp8 else rows


def require_valid_scales(source: HFSource, workers: int) -> None:
    """Raise UserError for a scale that is not above 0; reads a few MB per file, in the order of the files."""
    stored = source.stored
    names = [tensor.name for tensor in source.layout if source.is_quantized(tensor.name)]
    names.sort(key=lambda name: (str(stored[name + SCALE_SUFFIX].file), stored[name + SCALE_SUFFIX].offset))
    with phase("checking the scales", len(names), "tensors") as work, ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(source.read_scales, names):
            work.advance()


DTYPE_NAMES = {StoredType.bf16: "bfloat16", StoredType.fp32: "float32", StoredType.fp8: "bfloat16"}
"""config.json's name for the dtype of the tensors that are not in fp8."""


def quantization_config(
    choice: Fp8Choice, form: HFFormat, known: dict[str, Any], model: ModelConfig, block: tuple[int, int]
) -> dict[str, Any]:
    """Return the quantization_config of an export; `known` is the one that the weights came with."""
    values: dict[str, Any] = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"}
    values |= choice.quantization_config(known, model.num_layers + model.mtp_depths)
    values["weight_block_size"] = list(block)
    values.pop("scale_fmt", None)
    if form.power_of_two:
        values["scale_fmt"] = ScaleFormat.ue8m0.value
    return values


def to_hf(config: ConvertConfig, source: HFSource | DcpSource, model: ModelConfig) -> Conversion:
    """Return the conversion to safetensors files with index, config.json and the assets of the input."""
    known = dict(source.quantization or {})  # the quantization_config that the weights came with
    scale_fmt = config.scale_fmt.value if config.scale_fmt else known.get("scale_fmt")
    choice = None
    if config.dtype is StoredType.fp8:
        choice = Fp8Choice.of(source.layout, source.block, config.fp8.unaligned, source.is_quantized)
    form = HFFormat(
        torch.float32 if config.dtype is StoredType.fp32 else torch.bfloat16,
        fp8=choice.names if choice else frozenset(),
        power_of_two=scale_fmt == ScaleFormat.ue8m0.value,
    )
    tensors = [(tensor.name, tensor) for tensor in source.layout]
    if source.has_mtp_duplicates:
        tensors = with_mtp_duplicates(source.layout, model)
    plans, files = hf_files(source, tensors, form, parse_size(config.max_shard_size))
    quantization = None if choice is None else quantization_config(choice, form, known, model, source.block)
    dtype, tokenizer = DTYPE_NAMES[config.dtype], source.directory / TOKENIZER_DIR
    assets = ExportAssets.of(model, dtype, assets_folder(source.directory), tokenizer, quantization)

    def complete(directory: Path, finished: list[Finished]) -> None:
        if len(plans) > 1:
            (directory / INDEX).write_text(index_json(plans))
        assets.write(directory)
        copy_record(source.directory, directory)

    told = choice.warning() if choice else None
    doubts = doubt_notes(source.directory)
    return Conversion(files, complete, [*doubts, *([told] if told else []), *assets.warnings])
