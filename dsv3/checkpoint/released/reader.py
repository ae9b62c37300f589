"""A released checkpoint as if it were a DCP: each rank reads the slices that it owns, fp8 included.

DCP plans which boxes of which tensors a rank needs; here a box is read from safetensors files and
dequantised by its global rows and columns, so that shards may begin anywhere in a block.
"""

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

from dsv3.checkpoint.released.names import Released
from dsv3.checkpoint.released.source import ReleasedSource

_PREFIX = "model."
_PIECE = 16 * 2**20


class ReleasedReader(StorageReader):
    """Reads model weights under the names of our checkpoints; nothing larger than a piece is copied."""

    def __init__(self, source: ReleasedSource) -> None:
        self.source = source
        self._load_id = ""
        self._tensors: dict[tuple[str, torch.Size], Released] = {
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

    def _tensor(self, item: ReadItem) -> Released:
        offset = item.storage_index.offset
        assert offset is not None
        return self._tensors[item.storage_index.fqn, offset]

    def _place(self, item: ReadItem) -> tuple[Path, int]:
        stored = self.source.stored[self._tensor(item).name]
        return stored.file, stored.offset

    def _fill(self, tensor: Released, item: ReadItem, target: Tensor) -> None:
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
