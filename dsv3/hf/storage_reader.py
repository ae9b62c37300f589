"""The weights of a released checkpoint (HuggingFace's safetensors files) in slices, block-fp8 or not.

A released checkpoint as if it were a DCP: each rank reads the slices that it owns, fp8 included.

DCP plans which boxes of which tensors a rank needs; here a box is read from safetensors files and
dequantised by its global rows and columns, so that shards may begin anywhere in a block.
"""

import threading
from collections import OrderedDict
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
from dsv3.fp8.quantize import dequantize
from dsv3.hf.config_json import block_size
from dsv3.hf.config_values import read_config
from dsv3.hf.names import SCALE, HFTensor, is_derived, mtp_duplicates, released_layout
from dsv3.hf.pread_file import PreadFile, fault, quoted
from dsv3.hf.safetensors_header import StoredTensor, byte_view
from dsv3.hf.safetensors_reader import ShardReader, open_shards

_PLAIN = (torch.float32, torch.bfloat16, torch.float16)

# Scale grids are small, but those of 671b are 168 MB together.
_GRIDS = 64


class HFSource:
    """Reads slices of the tensors that make up a model; any number of threads may share one.

    Everything is checked at the start, by headers alone: UserError names what is missing, misshapen, of
    a type that is not supported, or left over (MTP layers alone may be left out of the model).
    """

    def __init__(
        self,
        directory: Path,
        config: ModelConfig,
        shapes: dict[str, tuple[int, ...]],
        kind: type[PreadFile] = PreadFile,
    ) -> None:
        self.directory = directory
        self.stored = open_shards(directory)
        self.layout = released_layout(config, shapes)
        self.shapes = shapes
        config_json = read_config(directory)
        self.block = block_size(config_json)
        self.quantization: dict[str, Any] | None = config_json.values.get("quantization_config")
        self.has_mtp_duplicates = bool(mtp_duplicates(config)) and all(
            name in self.stored for name in mtp_duplicates(config)
        )
        self._reader = ShardReader(kind=kind)
        self._grids: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = threading.Lock()
        self._scratch = threading.local()
        _check(self, config)

    def close(self) -> None:
        """Close the files."""
        self._reader.close()

    def is_quantized(self, name: str) -> bool:
        """Whether a tensor is stored as fp8 codes with scales."""
        return self.stored[name].dtype is torch.float8_e4m3fn

    def scales(self, name: str) -> Tensor | None:
        """The scale grid [block rows, block columns] fp32 of an fp8 tensor; UserError for a bad one."""
        if not self.is_quantized(name):
            return None
        with self._lock:
            if name in self._grids:
                self._grids.move_to_end(name)
                return self._grids[name]
        entry = self.stored[name + SCALE]
        grid = self._reader.read_rows(entry, 0, entry.rows).float()
        if not bool((grid.isfinite() & (grid > 0)).all()):
            bad = grid[~(grid.isfinite() & (grid > 0))][0].item()
            raise fault(entry.file, f"has {quoted(entry.name)} with a scale of {bad}: it must be above 0")
        with self._lock:
            self._grids[name] = grid
            if len(self._grids) > _GRIDS:
                self._grids.popitem(last=False)
        return grid

    def numbers(self, tensor: HFTensor) -> torch.dtype:
        """The narrower of bf16 and fp32 that holds what is stored."""
        return torch.bfloat16 if self.stored[tensor.name].dtype is torch.bfloat16 else torch.float32

    def rows(self, tensor: HFTensor, first: int, count: int, out: Tensor) -> Tensor:
        """Rows [first, first + count) as numbers, in `out` (fp32 or bf16), rounded where it is narrower."""
        entry = self.stored[tensor.name]
        if entry.dtype is out.dtype and out.is_contiguous():
            return self._reader.read_rows(entry, first, count, out)
        read = self._reader.read_rows(entry, first, count, self._buffer(entry, (count, *entry.shape[1:])))
        return self._numbers(tensor.name, read, (first, 0), out)

    def rectangle(
        self, tensor: HFTensor, rows: tuple[int, int], columns: tuple[int, int], out: Tensor
    ) -> Tensor:
        """[rows, columns], from first to end, of a matrix, as `rows`; they may begin and end in a block."""
        read = self._reader.read_rectangle(self.stored[tensor.name], rows, columns)
        return self._numbers(tensor.name, read, (rows[0], columns[0]), out)

    def codes(self, name: str, first: int, count: int) -> tuple[Tensor, Tensor] | None:
        """Rows of whole blocks as they are stored, and their scales; None where they are not in fp8."""
        grid = self.scales(name)
        if grid is None:
            return None
        begin, end = first // self.block[0], -(-(first + count) // self.block[0])
        return self._reader.read_rows(self.stored[name], first, count), grid[begin:end]

    def raw(self, name: str, first: int, count: int) -> Tensor:
        """Rows as they are stored, as bytes."""
        return byte_view(self._reader.read_rows(self.stored[name], first, count))

    def _numbers(self, name: str, read: Tensor, origin: tuple[int, int], out: Tensor) -> Tensor:
        grid = self.scales(name)
        if grid is None:
            return out.copy_(read)
        return dequantize(read, grid, self.block, origin, out.dtype, out)

    def _buffer(self, entry: StoredTensor, shape: tuple[int, ...]) -> Tensor:
        """Memory of this thread for what is read."""
        shape = shape if entry.shape else ()
        needed = torch.Size(shape).numel() * entry.dtype.itemsize
        buffer: Tensor | None = getattr(self._scratch, "buffer", None)
        if buffer is None or buffer.numel() < needed:
            buffer = self._scratch.buffer = torch.empty(needed, dtype=torch.uint8)
        return buffer[:needed].view(entry.dtype).view(shape)


def _check(source: HFSource, config: ModelConfig) -> None:
    """UserError for tensors that are not what config.json says."""
    stored, wanted = source.stored, {tensor.name for tensor in source.layout}
    for depth in range(config.mtp_depths):
        first = f"model.layers.{config.num_layers + depth}."
        if not any(name.startswith(first) for name in stored):
            missing = f"has no '{first}enorm.weight', nor anything else of that MTP layer"
            raise fault(source.directory, f"{missing}: model.mtp_depths=0 leaves it out")
    for tensor in source.layout:
        if tensor.name not in stored:
            raise fault(source.directory, f"has no tensor '{tensor.name}', which its config.json asks for")
        _check_tensor(stored, tensor, source.block)
    allowed = wanted | set(mtp_duplicates(config))
    for name, entry in stored.items():
        weight = name.removesuffix(SCALE)
        scales = weight in allowed and weight in stored and source.is_quantized(weight)
        if name in allowed or scales or is_derived(name, config):
            continue
        raise fault(entry.file, f"has {quoted(name)}, for which the model of its config.json has no place")


def _check_tensor(stored: dict[str, StoredTensor], tensor: HFTensor, block: tuple[int, int]) -> None:
    entry, scales = stored[tensor.name], stored.get(tensor.name + SCALE)
    name = quoted(tensor.name)
    if entry.shape != tensor.shape:
        raise fault(
            entry.file, f"has {name} of shape {list(entry.shape)}, config.json makes it {list(tensor.shape)}"
        )
    if entry.dtype is torch.float8_e4m3fn:
        if scales is None:
            raise fault(entry.file, f"has {name} in fp8, but no scales '{tensor.name + SCALE}' are there")
        if len(entry.shape) != 2:
            raise fault(entry.file, f"has {name} in fp8, of shape {list(entry.shape)}: blocks need a matrix")
        grid = [-(-length // side) for length, side in zip(entry.shape, block, strict=True)]
        if list(scales.shape) != grid:
            what = f"the weight's {list(entry.shape)} in blocks of {list(block)} needs {grid}"
            raise fault(scales.file, f"has {quoted(scales.name)} of shape {list(scales.shape)}, {what}")
        if scales.dtype not in _PLAIN:
            raise fault(scales.file, f"has {quoted(scales.name)} of {scales.dtype}; supported: float32")
    elif entry.dtype not in _PLAIN:
        known = "float32, bfloat16, float16 and float8_e4m3fn"
        raise fault(entry.file, f"has {name} of {entry.dtype}; supported: {known}")
    elif scales is not None:
        raise fault(scales.file, f"has {quoted(scales.name)}, but its weight is of {entry.dtype}, not fp8")


_PREFIX = "model."

_PIECE = 16 * 2**20


class HFStorageReader(StorageReader):
    """Reads model weights under the names of our checkpoints; nothing larger than a piece is copied."""

    def __init__(self, source: HFSource) -> None:
        self.source = source
        self._load_id = ""
        self._tensors: dict[tuple[str, torch.Size], HFTensor] = {
            (_PREFIX + tensor.parameter, torch.Size(tensor.offset)): tensor for tensor in source.layout
        }

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """DCP need not choose a reader for a path: this one was made for its directory."""
        return True

    def reset(self, checkpoint_id: Any = None) -> None:
        """A reader belongs to one directory."""
        self._load_id = ""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Every released tensor as a chunk of our parameter."""
        chunks: dict[str, list[ChunkStorageMetadata]] = {}
        for tensor in self.source.layout:
            box = ChunkStorageMetadata(torch.Size(tensor.offset), torch.Size(tensor.sizes))
            chunks.setdefault(_PREFIX + tensor.parameter, []).append(box)
        properties = TensorProperties(dtype=torch.float32)
        entries: dict[str, Any] = {
            name: TensorStorageMetadata(
                properties, torch.Size(self.source.shapes[name.removeprefix(_PREFIX)]), boxes
            )
            for name, boxes in chunks.items()
        }
        index = {MetadataIndex(name, offset): tensor for (name, offset), tensor in self._tensors.items()}
        meta = StorageMeta(load_id=self._load_id)
        return Metadata(state_dict_metadata=entries, storage_data=index, storage_meta=meta)

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing has to be set up."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Read in the order of the files."""
        plan.items.sort(key=self._place)
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Every rank reads for itself."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill what the plan asks for."""
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

    def _place(self, item: ReadItem) -> tuple[Path, int]:
        stored = self.source.stored[self._tensor(item).name]
        return stored.file, stored.offset

    def _fill(self, tensor: HFTensor, item: ReadItem, target: Tensor) -> None:
        """Read a box of a tensor into `target` (any device and strides, fp32 or bf16) piece by piece."""
        if len(tensor.shape) < 2:
            first, count = (item.storage_offsets[0], item.lengths[0]) if tensor.shape else (0, 1)
            out = torch.empty(item.lengths, dtype=target.dtype)
            target.copy_(self.source.rows(tensor, first, count, out))
            return
        (row, column), (rows, columns) = item.storage_offsets[-2:], item.lengths[-2:]
        matrix = target.view(rows, columns) if target.dim() == 2 else target[0]
        step = max(1, _PIECE // max(1, columns * target.dtype.itemsize))
        for begin in range(0, rows, step):
            end = min(begin + step, rows)
            out = matrix[begin:end]
            box = (row + begin, row + end), (column, column + columns)
            if out.device.type == "cpu":
                self.source.rectangle(tensor, *box, out)
            else:
                host = torch.empty(end - begin, columns, dtype=out.dtype)
                out.copy_(self.source.rectangle(tensor, *box, host))
