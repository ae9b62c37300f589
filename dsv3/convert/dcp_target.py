"""Writes a checkpoint of torch.distributed.checkpoint (DCP), a slice of rows at a time.

Every slice is an entry of its own, as a rank's shard would be: any layout reads what it needs of it, and
no stack of experts has to be in memory to be written.


direction=hf_to_dcp: a DCP directory that describes itself, with what a way back needs in hf/.
"""

import pickle
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from dsv3.checkpoint.directory import MODEL_FILE, TOKENIZER_DIR
from dsv3.config.model import ModelConfig
from dsv3.config.strict import to_yaml
from dsv3.convert.destination import Finished
from dsv3.convert.engine import Work
from dsv3.convert.hf_assets import HF_DIR, IMPORT_METADATA_FILE, SCALES_FILE, copy_assets, write_json
from dsv3.convert.hf_target import ScaleGrid, Shard
from dsv3.convert.output_file import Output, Sink, row_slices, shaped
from dsv3.hf.config_values import read_config
from dsv3.hf.names import SCALE, HFTensor, mtp_duplicates, stored_dtype
from dsv3.hf.safetensors_writer import plan_shards
from dsv3.hf.storage_reader import HFSource

# About 64 files, so that little is lost by a kill, but neither tiny files nor ones that take long alone.
_FILES, _SMALLEST, _LARGEST = 64, 64 * 2**20, 2 * 2**30


@dataclass(frozen=True)
class Slice:
    """Rows [first, first + count) of a released tensor, to be stored as `dtype`."""

    source: HFSource
    tensor: HFTensor
    first: int
    count: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers."""
        return torch.Size(self._shape).numel() * self.dtype.itemsize

    @property
    def _shape(self) -> tuple[int, ...]:
        shape = self.tensor.shape
        return (self.count, *shape[1:]) if shape else ()

    def make(self, buffer: Tensor) -> Tensor:
        """The numbers of the rows."""
        return self.source.rows(self.tensor, self.first, self.count, shaped(buffer, self._shape, self.dtype))

    def put(self, made: Tensor, sink: Sink) -> dict[str, Any]:
        """Append the entry as torch.load reads it; where it lies and what box of which parameter it is."""
        offset, sizes = self.tensor.box_of_rows(self.first, self.count)
        begin = sink.position
        torch.save(made.view(sizes), sink)  # type: ignore[arg-type]  # a file object as far as it looks
        place = {"parameter": self.tensor.parameter, "offset": offset, "sizes": sizes}
        return place | {"begin": begin, "length": sink.position - begin}


def dcp_outputs(source: HFSource, dtype: torch.dtype) -> list[Output]:
    """The files of the weights; slices are in the order in which they lie in the input."""
    layout = sorted(
        source.layout, key=lambda t: (str(source.stored[t.name].file), source.stored[t.name].offset)
    )
    slices = [piece for tensor in layout for piece in _slices(source, tensor, stored_dtype(tensor, dtype))]
    total = sum(piece.nbytes for piece in slices)
    limit = min(max(total // _FILES, _SMALLEST), _LARGEST)
    groups: list[list[Slice]] = []
    filled = limit
    for piece in slices:
        if filled >= limit:
            groups.append([])
            filled = 0
        groups[-1].append(piece)
        filled += piece.nbytes
    return [
        Output(f"__{number}_0.distcp", sum(piece.nbytes for piece in group), group)
        for number, group in enumerate(groups)
    ]


def write_metadata(
    directory: Path,
    finished: Sequence[Finished],
    shapes: dict[str, tuple[int, ...]],
    dtypes: dict[str, torch.dtype],
) -> None:
    """Write `.metadata`: which entry of which file is which box of which tensor."""
    chunks: dict[str, list[ChunkStorageMetadata]] = {name: [] for name in shapes}
    storage = {}
    for file in finished:
        for record in file.records:
            name, offset = record["parameter"], torch.Size(record["offset"])
            index = MetadataIndex(f"model.{name}", offset, len(chunks[name]))
            chunks[name].append(ChunkStorageMetadata(offset, torch.Size(record["sizes"])))
            storage[index] = _StorageInfo(file.name, record["begin"], record["length"])
    entries = {
        f"model.{name}": TensorStorageMetadata(
            TensorProperties(dtype=dtypes[name]), torch.Size(shape), chunks[name]
        )
        for name, shape in shapes.items()
    }
    metadata = Metadata(state_dict_metadata=dict(entries), storage_data=storage)
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


def _slices(source: HFSource, tensor: HFTensor, dtype: torch.dtype) -> Iterator[Slice]:
    multiple = source.block[0] if source.is_quantized(tensor.name) else 1
    for first, count in row_slices(tensor.shape, dtype.itemsize, multiple):
        yield Slice(source, tensor, first, count, dtype)


def to_dcp(source: HFSource, model: ModelConfig, dtype: torch.dtype) -> Work:
    """Weights as a DCP in `dtype`, model.yaml, the tokenizer, and hf/ with config, scales and notes."""
    outputs = dcp_outputs(source, dtype)
    weights = len(outputs)
    scales = _scales(source)
    dtypes = {tensor.parameter: stored_dtype(tensor, dtype) for tensor in source.layout}

    def complete(directory: Path, finished: list[Finished]) -> None:
        write_metadata(directory, finished[:weights], source.shapes, dtypes)
        (directory / MODEL_FILE).write_text(yaml.safe_dump(to_yaml(model), sort_keys=False))
        copy_assets(source.directory, directory / HF_DIR)
        write_json(directory / HF_DIR / IMPORT_METADATA_FILE, _notes(source, model))
        tokenizer = source.directory / "tokenizer.json"
        if tokenizer.is_file():
            (directory / TOKENIZER_DIR).mkdir(exist_ok=True)
            shutil.copyfile(tokenizer, directory / TOKENIZER_DIR / tokenizer.name)

    return Work(outputs + scales, complete)


def _notes(source: HFSource, model: ModelConfig) -> dict[str, Any]:
    """How the weights were stored: what an export repeats."""
    quantization = read_config(source.directory).values.get("quantization_config")
    stored_twice = all(name in source.stored for name in mtp_duplicates(model))
    return {"block": list(source.block), "quantization_config": quantization, "copies": stored_twice}


def _scales(source: HFSource) -> list[Output]:
    """The scale grids of fp8 weights under the weights' names, in one file of the same format."""
    names = [tensor.name for tensor in source.layout if source.is_quantized(tensor.name)]
    if not names:
        return []
    entries = [(name, torch.float32, source.stored[name + SCALE].shape) for name in names]
    (plan,) = plan_shards(entries, 2**62)
    shard = Shard(plan)
    return [
        Output(f"{HF_DIR}/{SCALES_FILE}", plan.nbytes, [ScaleGrid(shard, source, name) for name in names])
    ]
