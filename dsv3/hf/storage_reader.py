"""Read HF checkpoints (safetensors files, block-fp8 or not) by slices, and give them to DCP.

DCP plans the boxes of parameters that a rank owns. Each box is read from the files and dequantized by its
global rows and columns, so that shards may begin anywhere in a block of fp8 scales.
"""

import math
import threading
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from dsv3.config.model import ModelConfig
from dsv3.errors import UserError, quoted
from dsv3.fp8.quantize import E4M3_MAX, dequantize
from dsv3.hf.config_values import read_config
from dsv3.hf.names import MODEL_PREFIX, SCALE_SUFFIX, HFTensor, hf_layout, mtp_duplicates
from dsv3.hf.nonfinite import require_finite
from dsv3.hf.other_architectures import refuse_other_architecture
from dsv3.hf.pread_file import PreadFile, fault
from dsv3.hf.quantization import block_size
from dsv3.hf.safetensors_header import byte_view
from dsv3.hf.safetensors_reader import SafetensorsReader, ScratchMemory, read_headers
from dsv3.hf.stacked_experts import split_stacks
from dsv3.hf.tensor_check import TensorCheck, is_fp8

# Scale grids are small, but those of 671b are 168 MB together.
_CACHED_GRIDS = 64


class HFSource:
    """Reads slices of the HF tensors that make up a model; any number of threads may share one.

    Everything is checked at the start, by headers alone: UserError names what is missing, misshapen, of
    a dtype that is not supported, of another architecture, or left over (only MTP layers may be left out of
    the model). Values are checked as they are read, for each byte once: they must be finite.
    """

    def __init__(
        self,
        directory: Path,
        config: ModelConfig,
        shapes: dict[str, tuple[int, ...]],
        kind: type[PreadFile] = PreadFile,
    ) -> None:
        self.directory = directory
        self.notes: list[str] = []
        """Lines on what was found and is read all the same."""
        self.stored = split_stacks(read_headers(directory, self.notes))
        self.layout = hf_layout(config, shapes)
        self.shapes = shapes
        config_json = read_config(directory)
        refuse_other_architecture(config_json)
        self.block = block_size(config_json)
        self.quantization: dict[str, Any] | None = config_json.values.get("quantization_config")
        self.has_mtp_duplicates = any(name in self.stored for name in mtp_duplicates(config))
        """True where any duplicate of MTP layers is stored: an export then writes them all."""
        self.mtp_duplicates = {
            original: [
                name for name, of in mtp_duplicates(config).items() if of == original and name in self.stored
            ]
            for original in set(mtp_duplicates(config).values())
        }
        """The stored duplicates of MTP layers by the tensor that they duplicate."""
        self._reader = SafetensorsReader(kind=kind)
        self._grids: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = threading.Lock()
        self._scratch = ScratchMemory()
        check = TensorCheck(directory, config_json, self.stored, self.block, config, layout=self.layout)
        self.notes += check.run()

    def close(self) -> None:
        """Close the files."""
        self._reader.close()

    def is_quantized(self, name: str) -> bool:
        """Return whether a tensor is stored as fp8 codes with scales."""
        return is_fp8(self.stored[name])

    def read_scales(self, name: str) -> Tensor | None:
        """Return the scale grid [block rows, block columns] fp32 of an fp8 tensor, None for any other tensor.

        UserError for a scale that is not above 0, except that of a block of zeros, which may be 0, or with
        which a code of its block is past fp32.
        """
        if not self.is_quantized(name):
            return None
        with self._lock:
            if name in self._grids:
                self._grids.move_to_end(name)
                return self._grids[name]
        entry = self.stored[name + SCALE_SUFFIX]
        grid = self._reader.read_rows(entry, 0, entry.rows).float()
        is_valid = (grid > 0) & (grid * E4M3_MAX).isfinite()
        for row in (~is_valid).any(1).nonzero().flatten().tolist():
            largest = self._largest_codes(name, row)
            is_valid[row] |= (grid[row] == 0) & (largest == 0)
            is_valid[row] |= (grid[row] > 0) & (grid[row] * largest).isfinite()
        if not bool(is_valid.all()):
            bad = grid[~is_valid][0].item()
            past_fp32 = 0 < bad < math.inf
            why = "codes of its block times it are past fp32" if past_fp32 else "it must be above 0"
            raise fault(entry.file, f"has {quoted(entry.name)} with a scale of {bad}: {why}")
        with self._lock:
            self._grids[name] = grid
            if len(self._grids) > _CACHED_GRIDS:
                self._grids.popitem(last=False)
        return grid

    def _largest_codes(self, name: str, row: int) -> Tensor:
        """Return by block column the largest magnitude of the codes of a block row; reads the row."""
        entry, (height, width) = self.stored[name], self.block
        codes = self._reader.read_rows(entry, row * height, min(height, entry.rows - row * height))
        magnitudes = (codes.view(torch.uint8) & 0x7F).amax(0)
        return torch.stack([columns.amax() for columns in magnitudes.split(width)]).view(codes.dtype).float()

    def value_dtype(self, tensor: HFTensor) -> torch.dtype:
        """Return the narrower of bf16 and fp32 that holds the stored values."""
        return torch.bfloat16 if self.stored[tensor.name].dtype is torch.bfloat16 else torch.float32

    def read_rows(self, tensor: HFTensor, first: int, count: int, out: Tensor) -> Tensor:
        """Fill `out` (fp32 or bf16) with rows [first, first + count), dequantized and rounded."""
        entry = self.stored[tensor.name]
        if entry.dtype is out.dtype and out.is_contiguous():
            read = self._reader.read_rows(entry, first, count, out)
            require_finite(read, entry.file, tensor.name, (first,) if entry.shape else ())
            return read
        buffer = self._scratch.take((count, *entry.shape[1:]) if entry.shape else (), entry.dtype)
        read = self._reader.read_rows(entry, first, count, buffer)
        return self._dequantize(tensor.name, read, (first, 0), out)

    def read_rectangle(
        self, tensor: HFTensor, rows: tuple[int, int], columns: tuple[int, int], out: Tensor
    ) -> Tensor:
        """Fill `out` like `read_rows` with [rows, columns] of a matrix, at any place in a block."""
        read = self._reader.read_rectangle(self.stored[tensor.name], rows, columns)
        return self._dequantize(tensor.name, read, (rows[0], columns[0]), out)

    def _dequantize(self, name: str, read: Tensor, origin: tuple[int, int], out: Tensor) -> Tensor:
        """Fill `out` with the values of what was read from row and column `origin` on."""
        grid = self.read_scales(name)
        if grid is None:
            out.copy_(read)
        else:
            dequantize(read, grid, self.block, origin, out.dtype, out)

        def stored() -> Tensor:
            return read.float() if grid is None else dequantize(read, grid, self.block, origin)

        require_finite(out, self.stored[name].file, name, origin[: out.ndim], stored)
        return out

    def read_codes(self, name: str, first: int, count: int) -> tuple[Tensor, Tensor] | None:
        """Return rows of whole blocks as stored fp8 codes with their scales, None if not in fp8."""
        grid = self.read_scales(name)
        if grid is None:
            return None
        begin, end = first // self.block[0], -(-(first + count) // self.block[0])
        codes = self._reader.read_rows(self.stored[name], first, count)
        require_finite(codes, self.stored[name].file, name, (first, 0))
        return codes, grid[begin:end]

    def read_bytes(self, name: str, first: int, count: int) -> Tensor:
        """Return rows as they are stored, uint8 [bytes]."""
        return byte_view(self._reader.read_rows(self.stored[name], first, count))

    def require_equal_duplicates(
        self, tensor: HFTensor, rows: tuple[int, int], columns: tuple[int, int], values: Tensor
    ) -> None:
        """Raise UserError unless the same box of a tensor's MTP duplicates holds `values`; reads it."""
        for name in self.mtp_duplicates.get(tensor.name, ()):
            duplicate = torch.empty(values.shape, dtype=values.dtype)
            self.read_rectangle(replace(tensor, name=name), rows, columns, duplicate)
            if not torch.equal(duplicate, values):
                raise self.unequal_duplicate(name, tensor.name)

    def unequal_duplicate(self, name: str, original: str) -> UserError:
        """Return the error that an MTP layer's duplicate differs from its original: one of them is lost."""
        what = f"has {quoted(name)} that is not equal to '{original}': here an MTP layer shares it"
        return fault(self.stored[name].file, f"{what}; model.mtp_depths=0 leaves the MTP layers out")


_COPY_BYTES = 16 * 2**20


class HFStorageReader(StorageReader):
    """Gives DCP an HF checkpoint under the names of our checkpoints; copies are of at most 16 MiB."""

    def __init__(self, source: HFSource) -> None:
        self.source = source
        self._load_id = ""
        self._tensors: dict[tuple[str, torch.Size], HFTensor] = {
            (MODEL_PREFIX + tensor.parameter, torch.Size(tensor.offset)): tensor for tensor in source.layout
        }

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Return True: DCP need not choose a reader for a path, as this one was made for its directory."""
        return True

    def reset(self, checkpoint_id: Any = None) -> None:
        """Forget the last load; the reader belongs to one directory."""
        self._load_id = ""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return metadata in which every HF tensor is a chunk of our parameter."""
        chunks: dict[str, list[ChunkStorageMetadata]] = {}
        for tensor in self.source.layout:
            box = ChunkStorageMetadata(torch.Size(tensor.offset), torch.Size(tensor.sizes))
            chunks.setdefault(tensor.parameter, []).append(box)
        properties = TensorProperties(dtype=torch.float32)
        entries: dict[str, Any] = {
            MODEL_PREFIX + name: TensorStorageMetadata(
                properties, torch.Size(self.source.shapes[name]), boxes
            )
            for name, boxes in chunks.items()
        }
        index = {MetadataIndex(name, offset): tensor for (name, offset), tensor in self._tensors.items()}
        meta = StorageMeta(load_id=self._load_id)
        return Metadata(state_dict_metadata=entries, storage_data=index, storage_meta=meta)

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Do nothing: everything is set up."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Return the plan in the order of the files."""

        def place(item: ReadItem) -> tuple[Path, int]:
            entry = self.source.stored[self._tensor(item).name]
            return entry.file, entry.offset

        plan.items.sort(key=place)
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Return the plans as they are: every rank reads for itself."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the tensors of the plan."""
        for item in plan.items:
            target = planner.resolve_tensor(item).detach()
            self._fill(self._tensor(item), item, target)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _tensor(self, item: ReadItem) -> HFTensor:
        offset = item.storage_index.offset
        assert offset is not None
        return self._tensors[item.storage_index.fqn, offset]

    def _fill(self, tensor: HFTensor, item: ReadItem, target: Tensor) -> None:
        """Read a box of a tensor into `target` (any device and strides, fp32 or bf16)."""
        if len(tensor.shape) < 2:
            first, count = (item.storage_offsets[0], item.lengths[0]) if tensor.shape else (0, 1)
            out = torch.empty(item.lengths, dtype=target.dtype)
            target.copy_(self.source.read_rows(tensor, first, count, out))
            return
        (row, column), (rows, columns) = item.storage_offsets[-2:], item.lengths[-2:]
        matrix = target.view(rows, columns) if target.dim() == 2 else target[0]
        step = max(1, _COPY_BYTES // max(1, columns * target.dtype.itemsize))
        for begin in range(0, rows, step):
            end = min(begin + step, rows)
            out = matrix[begin:end]
            box = (row + begin, row + end), (column, column + columns)
            on_cpu = out.device.type == "cpu"
            host = out if on_cpu else torch.empty(end - begin, columns, dtype=out.dtype)
            self.source.read_rectangle(tensor, *box, host)
            self.source.require_equal_duplicates(tensor, *box, host)
            if not on_cpu:
                out.copy_(host)
