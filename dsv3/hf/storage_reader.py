"""Read HF checkpoints (safetensors files, block-fp8 or not) by slices, and give them to DCP.

DCP plans the boxes of parameters that a rank owns. Each box is read from the files and dequantized by its
global rows and columns, so that shards may begin anywhere in a block of fp8 scales.
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

from dsv3.config.convergence import flatten
from dsv3.config.model import ModelConfig
from dsv3.config.strict import to_yaml
from dsv3.errors import UserError, quoted
from dsv3.fp8.quantize import dequantize
from dsv3.hf.config_json import block_size, model_from_hf
from dsv3.hf.config_values import read_config
from dsv3.hf.names import MODEL_PREFIX, SCALE_SUFFIX, HFTensor, hf_layout, is_derived, mtp_duplicates
from dsv3.hf.pread_file import PreadFile, fault
from dsv3.hf.safetensors_header import TensorInfo, byte_view
from dsv3.hf.safetensors_reader import SafetensorsReader, ScratchMemory, read_headers

VALUE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that weights may have beside block-fp8."""

_FREE = ("model.mtp_depths", "model.attention.kernel")
"""What may differ from config.json beside the same tensors."""

# Scale grids are small, but those of 671b are 168 MB together.
_CACHED_GRIDS = 64


class HFSource:
    """Reads slices of the HF tensors that make up a model; any number of threads may share one.

    Everything is checked at the start, by headers alone: UserError names what is missing, misshapen, of
    a dtype that is not supported, or left over (only MTP layers may be left out of the model).
    """

    def __init__(
        self,
        directory: Path,
        config: ModelConfig,
        shapes: dict[str, tuple[int, ...]],
        kind: type[PreadFile] = PreadFile,
    ) -> None:
        self.directory = directory
        self.stored = read_headers(directory)
        self.layout = hf_layout(config, shapes)
        self.shapes = shapes
        config_json = read_config(directory)
        self.block = block_size(config_json)
        self.quantization: dict[str, Any] | None = config_json.values.get("quantization_config")
        self.has_mtp_duplicates = bool(mtp_duplicates(config)) and all(
            name in self.stored for name in mtp_duplicates(config)
        )
        self._reader = SafetensorsReader(kind=kind)
        self._grids: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = threading.Lock()
        self._scratch = ScratchMemory()
        self._check(config)

    def close(self) -> None:
        """Close the files."""
        self._reader.close()

    def is_quantized(self, name: str) -> bool:
        """Return whether a tensor is stored as fp8 codes with scales."""
        return self.stored[name].dtype is torch.float8_e4m3fn

    def read_scales(self, name: str) -> Tensor | None:
        """Return the scale grid [block rows, block columns] fp32 of an fp8 tensor.

        UserError for a scale that is not above 0; None for a tensor that is not in fp8.
        """
        if not self.is_quantized(name):
            return None
        with self._lock:
            if name in self._grids:
                self._grids.move_to_end(name)
                return self._grids[name]
        entry = self.stored[name + SCALE_SUFFIX]
        grid = self._reader.read_rows(entry, 0, entry.rows).float()
        is_valid = grid.isfinite() & (grid > 0)
        if not bool(is_valid.all()):
            bad = grid[~is_valid][0].item()
            raise fault(entry.file, f"has {quoted(entry.name)} with a scale of {bad}: it must be above 0")
        with self._lock:
            self._grids[name] = grid
            if len(self._grids) > _CACHED_GRIDS:
                self._grids.popitem(last=False)
        return grid

    def value_dtype(self, tensor: HFTensor) -> torch.dtype:
        """Return the narrower of bf16 and fp32 that holds the stored values."""
        return torch.bfloat16 if self.stored[tensor.name].dtype is torch.bfloat16 else torch.float32

    def read_rows(self, tensor: HFTensor, first: int, count: int, out: Tensor) -> Tensor:
        """Fill `out` (fp32 or bf16) with rows [first, first + count), dequantized and rounded."""
        entry = self.stored[tensor.name]
        if entry.dtype is out.dtype and out.is_contiguous():
            return self._reader.read_rows(entry, first, count, out)
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
            return out.copy_(read)
        return dequantize(read, grid, self.block, origin, out.dtype, out)

    def read_codes(self, name: str, first: int, count: int) -> tuple[Tensor, Tensor] | None:
        """Return rows of whole blocks as stored fp8 codes with their scales, None if not in fp8."""
        grid = self.read_scales(name)
        if grid is None:
            return None
        begin, end = first // self.block[0], -(-(first + count) // self.block[0])
        return self._reader.read_rows(self.stored[name], first, count), grid[begin:end]

    def read_bytes(self, name: str, first: int, count: int) -> Tensor:
        """Return rows as they are stored, uint8 [bytes]."""
        return byte_view(self._reader.read_rows(self.stored[name], first, count))

    def _model_source(self, config: ModelConfig) -> tuple[str, str]:
        """Return what sets the model's numbers, config.json or the command, and for the command the fix."""
        try:
            own = flatten(to_yaml(model_from_hf(self.directory)))
        except UserError:
            own = {}
        typed = [
            f"model.{key}={value}" for key, value in flatten(to_yaml(config)).items() if own.get(key) != value
        ]
        changed = [text for text in typed if not text.startswith(_FREE)]
        if not changed:
            return "config.json", ""
        return "the configured model", f": leave {' '.join(changed)} out" if own else ""

    def _check(self, config: ModelConfig) -> None:
        """Raise UserError for tensors that are not those of config.json."""
        for depth in range(config.mtp_depths):
            first = f"model.layers.{config.num_layers + depth}."
            if not any(name.startswith(first) for name in self.stored):
                missing = f"has no '{first}enorm.weight', nor anything else of that MTP layer"
                raise fault(self.directory, f"{missing}: model.mtp_depths=0 leaves it out")
        source = self._model_source(config)
        for tensor in self.layout:
            if tensor.name not in self.stored:
                text = f"has no tensor '{tensor.name}', which its config.json asks for"
                raise fault(self.directory, text)
            _check_tensor(self.stored, tensor, self.block, source)
        allowed = {tensor.name for tensor in self.layout} | set(mtp_duplicates(config))
        for name, entry in self.stored.items():
            weight = name.removesuffix(SCALE_SUFFIX)
            is_scales = weight in allowed and weight in self.stored and self.is_quantized(weight)
            if not (name in allowed or is_scales or is_derived(name, config)):
                text = f"has {quoted(name)}, for which the model of its config.json has no place"
                raise fault(entry.file, text)


def _check_tensor(
    stored: dict[str, TensorInfo], tensor: HFTensor, block: tuple[int, int], source: tuple[str, str]
) -> None:
    """Raise UserError unless a tensor has the model's shape, a supported dtype and its scales.

    `source` says where the model's numbers come from, and the fix.
    """
    entry, scales = stored[tensor.name], stored.get(tensor.name + SCALE_SUFFIX)
    name = quoted(tensor.name)
    if entry.shape != tensor.shape:
        raise fault(
            entry.file,
            f"has {name} of shape {list(entry.shape)}, {source[0]} makes it {list(tensor.shape)}{source[1]}",
        )
    if entry.dtype is torch.float8_e4m3fn:
        if scales is None:
            raise fault(
                entry.file, f"has {name} in fp8, but no scales '{tensor.name + SCALE_SUFFIX}' are there"
            )
        if len(entry.shape) != 2:
            raise fault(entry.file, f"has {name} in fp8, of shape {list(entry.shape)}: blocks need a matrix")
        grid = [-(-length // side) for length, side in zip(entry.shape, block, strict=True)]
        if list(scales.shape) != grid:
            what = f"the weight's {list(entry.shape)} in blocks of {list(block)} needs {grid}"
            raise fault(scales.file, f"has {quoted(scales.name)} of shape {list(scales.shape)}, {what}")
        if scales.dtype not in VALUE_DTYPES:
            raise fault(scales.file, f"has {quoted(scales.name)} of {scales.dtype}; supported: float32")
    elif entry.dtype not in VALUE_DTYPES:
        known = "float32, bfloat16, float16 and float8_e4m3fn"
        raise fault(entry.file, f"has {name} of {entry.dtype}; supported: {known}")
    elif scales is not None:
        raise fault(scales.file, f"has {quoted(scales.name)}, but its weight is of {entry.dtype}, not fp8")


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
            if out.device.type == "cpu":
                self.source.read_rectangle(tensor, *box, out)
            else:
                host = torch.empty(end - begin, columns, dtype=out.dtype)
                out.copy_(self.source.read_rectangle(tensor, *box, host))
