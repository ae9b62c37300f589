"""Convert an HF checkpoint to a DCP (direction=hf_to_dcp), a slice of rows at a time.

Every slice is an entry of its own, as a rank's shard would be: any layout reads the entries that it needs,
and no stack of experts has to be in memory to be written. The directory describes itself; hf/ keeps what an
export needs to repeat the release.
"""

import pickle
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from dsv3.checkpoint.directory import HF_DIR, MODEL_FILE, TOKENIZER_DIR
from dsv3.config.model import ModelConfig
from dsv3.config.strict import to_yaml
from dsv3.convert.destination import Finished
from dsv3.convert.engine import Conversion
from dsv3.convert.hf_assets import (
    IMPORT_METADATA_FILE,
    SCALES_FILE,
    asset_warnings,
    copy_assets,
    copy_record,
    require_assets,
    write_json,
)
from dsv3.convert.hf_target import SafetensorsOutput, ScaleGridSlice
from dsv3.convert.output_file import HashingWriter, OutputFile, row_slices, view_buffer
from dsv3.distributed.torch_private import chunk_location
from dsv3.hf.names import MODEL_PREFIX, SCALE_SUFFIX, HFTensor, mtp_duplicates, stored_dtype
from dsv3.hf.safetensors_writer import plan_files
from dsv3.hf.storage_reader import HFSource

# About 64 files, so that a kill loses little, but neither tiny files nor ones that take long alone.
_FILES, _SMALLEST, _LARGEST = 64, 64 * 2**20, 2 * 2**30


@dataclass(frozen=True)
class DcpSlice:
    """Rows [first, first + count) of an HF tensor, to be stored as `dtype` in an entry of a DCP."""

    source: HFSource
    tensor: HFTensor
    first: int
    count: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Return the bytes of the values."""
        return torch.Size(self._shape).numel() * self.dtype.itemsize

    @property
    def _shape(self) -> tuple[int, ...]:
        shape = self.tensor.shape
        return (self.count, *shape[1:]) if shape else ()

    def load(self, buffer: Tensor) -> Tensor:
        """Return the values of the rows."""
        out = view_buffer(buffer, self._shape, self.dtype)
        return self.source.read_rows(self.tensor, self.first, self.count, out)

    def write(self, loaded: Tensor, file: HashingWriter) -> dict[str, Any]:
        """Append the entry as torch.load reads it.

        Returns its place and the box of the parameter that it holds.
        """
        offset, sizes = self.tensor.box_of_rows(self.first, self.count)
        begin = file.position
        torch.save(loaded.view(sizes), file)  # type: ignore[arg-type]  # a file object as far as it looks
        place = {"parameter": self.tensor.parameter, "offset": offset, "sizes": sizes}
        return place | {"begin": begin, "length": file.position - begin}


def dcp_files(source: HFSource, dtype: torch.dtype) -> list[OutputFile]:
    """Return the files of the weights; slices are in the order in which they lie in the input."""
    layout = sorted(
        source.layout, key=lambda t: (str(source.stored[t.name].file), source.stored[t.name].offset)
    )
    slices = []
    for tensor in layout:
        stored = stored_dtype(tensor, dtype, source.value_dtype(tensor))
        multiple = source.block[0] if source.is_quantized(tensor.name) else 1
        for first, count in row_slices(tensor.shape, stored.itemsize, multiple):
            slices.append(DcpSlice(source, tensor, first, count, stored))
    total = sum(each.nbytes for each in slices)
    limit = min(max(total // _FILES, _SMALLEST), _LARGEST)
    groups: list[list[DcpSlice]] = []
    filled = limit
    for each in slices:
        if filled >= limit:
            groups.append([])
            filled = 0
        groups[-1].append(each)
        filled += each.nbytes
    return [
        OutputFile(f"__{number}_0.distcp", sum(each.nbytes for each in group), group)
        for number, group in enumerate(groups)
    ]


def write_metadata(
    directory: Path,
    finished: Sequence[Finished],
    shapes: dict[str, tuple[int, ...]],
    dtypes: dict[str, torch.dtype],
) -> None:
    """Write `.metadata`: for every box of every tensor, the file and the entry that hold it."""
    chunks: dict[str, list[ChunkStorageMetadata]] = {name: [] for name in shapes}
    storage = {}
    for file in finished:
        for record in file.records:
            name, offset = record["parameter"], torch.Size(record["offset"])
            index = MetadataIndex(MODEL_PREFIX + name, offset, len(chunks[name]))
            chunks[name].append(ChunkStorageMetadata(offset, torch.Size(record["sizes"])))
            storage[index] = chunk_location(file.name, record["begin"], record["length"])
    entries = {
        MODEL_PREFIX + name: TensorStorageMetadata(
            TensorProperties(dtype=dtypes[name]), torch.Size(shape), chunks[name]
        )
        for name, shape in shapes.items()
    }
    metadata = Metadata(state_dict_metadata=dict(entries), storage_data=storage)
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


def to_dcp(source: HFSource, model: ModelConfig, dtype: torch.dtype) -> Conversion:
    """Return the conversion to a DCP in `dtype`, with model.yaml, the tokenizer and hf/.

    UserError for assets that no client could read.
    """
    require_assets(source.directory)
    weights = dcp_files(source, dtype)
    dtypes = {
        tensor.parameter: stored_dtype(tensor, dtype, source.value_dtype(tensor)) for tensor in source.layout
    }

    def complete(directory: Path, finished: list[Finished]) -> None:
        write_metadata(directory, finished[: len(weights)], source.shapes, dtypes)
        (directory / MODEL_FILE).write_text(yaml.safe_dump(to_yaml(model), sort_keys=False))
        copy_assets(source.directory, directory / HF_DIR)
        copy_record(source.directory, directory)
        # An export repeats how the weights were stored; without MTP layers nothing says so.
        stored_twice = source.has_mtp_duplicates or not mtp_duplicates(model)
        import_metadata = {
            "block": list(source.block),
            "quantization_config": source.quantization,
            "copies": stored_twice,
        }
        write_json(directory / HF_DIR / IMPORT_METADATA_FILE, import_metadata)
        tokenizer = source.directory / "tokenizer.json"
        if tokenizer.is_file():
            (directory / TOKENIZER_DIR).mkdir(exist_ok=True)
            shutil.copyfile(tokenizer, directory / TOKENIZER_DIR / tokenizer.name)

    return Conversion(weights + _scales_file(source), complete, asset_warnings(source.directory, model))


def _scales_file(source: HFSource) -> list[OutputFile]:
    """Return the safetensors file of the scale grids, under their weights' names, if there are any."""
    names = [tensor.name for tensor in source.layout if source.is_quantized(tensor.name)]
    if not names:
        return []
    entries = [(name, torch.float32, source.stored[name + SCALE_SUFFIX].shape) for name in names]
    (plan,) = plan_files(entries, 2**62)
    output = SafetensorsOutput(plan)
    slices = [ScaleGridSlice(output, source, name) for name in names]
    return [OutputFile(f"{HF_DIR}/{SCALES_FILE}", plan.nbytes, slices)]
