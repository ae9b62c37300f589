"""The plan of a live model's export: its files, who writes them, and the slices that concern each rank."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv3.checkpoint.directory import ASSETS_DIR, TOKENIZER_DIR
from dsv3.checkpoint.load import parameter_shapes
from dsv3.config.convert import ScaleFormat, StoredType, Unaligned
from dsv3.config.model import ModelConfig
from dsv3.convert.fp8_choice import Fp8Choice
from dsv3.convert.hf_assets import ExportAssets
from dsv3.convert.hf_target import (
    DTYPE_NAMES,
    HFFormat,
    HFSlice,
    QuantizedHFSlice,
    SafetensorsOutput,
    hf_plans,
    quantization_config,
    tensor_slices,
)
from dsv3.convert.output_file import HashingWriter, OutputSlice
from dsv3.convert.shard_exchange import RowTransfer, ShardExchange
from dsv3.hf.config_values import read_config
from dsv3.hf.names import HFTensor, hf_layout, with_mtp_duplicates
from dsv3.hf.quantization import block_size
from dsv3.hf.safetensors_writer import SafetensorsPlan
from dsv3.planning.sharding import FP8_BLOCK


class ArrivedRows:
    """A source of weights (hf_target.py) that has one slice at a time: the rows that have just arrived.

    They are fp32, as the master weights are, and nothing came in fp8.
    """

    def __init__(self, layout: list[HFTensor], block: tuple[int, int]) -> None:
        self.layout, self.block = layout, block
        self.rows = torch.empty(0)

    def read_rows(self, tensor: HFTensor, first: int, count: int, out: Tensor) -> Tensor:
        """Return the rows, which are those asked for; `out` is not needed."""
        return self.rows

    def read_codes(self, name: str, first: int, count: int) -> None:
        """Return None: no weight is stored as codes."""

    def is_quantized(self, name: str) -> bool:
        """Return False: no weight came in fp8."""
        return False

    def read_scales(self, name: str) -> None:
        """Return None: no weight came with scales."""

    def value_dtype(self, tensor: HFTensor) -> torch.dtype:
        """Return the dtype of master weights."""
        return torch.float32


@dataclass(frozen=True)
class ExportSlice:
    """Rows of a tensor on their way to a file; `rows` is the same slice in the words of hf_target.py."""

    transfer: RowTransfer
    rows: HFSlice | QuantizedHFSlice
    output: SafetensorsOutput

    @property
    def nbytes(self) -> int:
        """Return the bytes that travel."""
        shape = (self.transfer.rows, *self.transfer.tensor.shape[1:])
        return torch.Size(shape).numel() * self.transfer.dtype.itemsize

    def write(self, file: HashingWriter) -> None:
        """Append the rows that have just arrived to the file, quantized where it is to have fp8."""
        rows: OutputSlice = self.rows
        buffer = torch.empty(0, dtype=torch.uint8)  # not needed: the rows are there
        rows.write(rows.load(buffer), file)


@dataclass(frozen=True)
class ExportPlan:
    """The files of an export of a model, which follow from the model and the stored type alone."""

    config: ModelConfig
    stored: StoredType
    shapes: dict[str, tuple[int, ...]]
    """Of all parameters, by name."""
    tensors: dict[str, HFTensor]
    """What to read, by the name under which it is written."""
    source: ArrivedRows
    form: HFFormat
    quantization: dict[str, Any] | None
    """The quantization_config to write."""
    files: list[SafetensorsPlan]

    @classmethod
    def of(cls, config: ModelConfig, stored: StoredType, run_dir: Path, largest_file: int) -> "ExportPlan":
        """Return the plan for a model whose weights began as those of the assets in `run_dir`, if any.

        New fp8 scales are of the kind that those weights came with.
        """
        shapes = parameter_shapes(config)
        known: dict[str, Any] = {}
        block = (FP8_BLOCK, FP8_BLOCK)
        if (run_dir / ASSETS_DIR / "config.json").is_file():
            came = read_config(run_dir / ASSETS_DIR)
            known, block = came.values.get("quantization_config") or {}, block_size(came)
        source = ArrivedRows(hf_layout(config, shapes), block)
        choice = Fp8Choice.of(source.layout, block, Unaligned.fp8) if stored is StoredType.fp8 else None
        form = HFFormat(
            torch.float32 if stored is StoredType.fp32 else torch.bfloat16,
            fp8=choice.names if choice else frozenset(),
            power_of_two=known.get("scale_fmt") == ScaleFormat.ue8m0.value,
        )
        quantization = None if choice is None else quantization_config(choice, form, known, config, block)
        tensors = with_mtp_duplicates(source.layout, config)
        files = hf_plans(source, tensors, form, largest_file)
        return cls(config, stored, shapes, dict(tensors), source, form, quantization, files)

    def assets(self, run_dir: Path) -> ExportAssets:
        """Return what belongs beside the weights; UserError as of ExportAssets."""
        folders = run_dir / ASSETS_DIR, run_dir / TOKENIZER_DIR
        return ExportAssets.of(self.config, DTYPE_NAMES[self.stored], *folders, self.quantization)

    def rounds(self, world: int) -> Iterator[dict[int, int]]:
        """Yield which rank writes which file, by number, for rounds of at most one file per rank.

        The ranks of a round are at equal distances, so that files are dealt out over the nodes.
        """
        for first in range(0, len(self.files), world):
            numbers = range(first, min(first + world, len(self.files)))
            yield {number: (number - first) * world // len(numbers) for number in numbers}

    def slices(self, writers: dict[int, int], exchange: ShardExchange) -> list[ExportSlice]:
        """Return the slices of a round's files that this rank writes or sends rows of, in their order.

        Slices come by their position in the file, so that all files grow at the same pace.
        """
        me, found = exchange.ranks.rank, []
        for number, writer in writers.items():
            output = SafetensorsOutput(self.files[number])
            for entry in output.plan.tensors:
                tensor = self.tensors.get(entry.name)  # none for scales: they are written with their weight
                if tensor is None or not (writer == me or exchange.sends(tensor)):
                    continue
                for each in tensor_slices(output, self.source, entry.name, tensor, self.form):
                    rows = each.rows if isinstance(each, QuantizedHFSlice) else each
                    if writer == me or exchange.sends(tensor, rows.first, rows.count):
                        order = (entry.offset + rows.first * entry.row_nbytes, number)
                        dtype = rows.conversion.dtype
                        transfer = RowTransfer(order, writer, tensor, rows.first, rows.count, dtype)
                        found.append(ExportSlice(transfer, each, output))
        return sorted(found, key=lambda each: each.transfer.order)
