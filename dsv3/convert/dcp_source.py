"""Read the weights of a DCP directory as rows of HF tensors, whatever shards they were saved in.

Boxes of a tensor, by offset and sizes per dim, are what shards, DCP's chunks and HF tensors have in common.
"""

import io
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from dsv3.checkpoint.dcp_metadata import read_metadata
from dsv3.checkpoint.directory import HF_DIR
from dsv3.checkpoint.load import require_no_others
from dsv3.checkpoint.tensor_archive import require_tensor_archive
from dsv3.config.model import ModelConfig
from dsv3.convert.hf_assets import SCALES_FILE, read_import_metadata
from dsv3.distributed.torch_private import locate_saved_tensor
from dsv3.errors import UserError, quoted
from dsv3.hf.names import MODEL_PREFIX, HFTensor, hf_layout
from dsv3.hf.nonfinite import require_finite
from dsv3.hf.pread_file import DirectReader, OpenFiles, PreadFile, fault
from dsv3.hf.safetensors_header import TensorInfo, byte_view, read_header
from dsv3.hf.safetensors_reader import WINDOW, SafetensorsReader, ScratchMemory
from dsv3.hf.tensor_check import VALUE_DTYPES
from dsv3.planning.sharding import FP8_BLOCK


def intersect(
    offset: Sequence[int], sizes: Sequence[int], other: Sequence[int], other_sizes: Sequence[int]
) -> tuple[list[int], list[int]] | None:
    """Return first and end, by dim, of the part that two boxes of a tensor share, or None."""
    low = [max(a, b) for a, b in zip(offset, other, strict=True)]
    high = [min(a + n, b + m) for a, n, b, m in zip(offset, sizes, other, other_sizes, strict=True)]
    return (low, high) if all(a < b for a, b in zip(low, high, strict=True)) else None


def relative_index(low: Sequence[int], high: Sequence[int], origin: Sequence[int]) -> tuple[slice, ...]:
    """Return the box from `low` to `high` as an index into a tensor that begins at `origin`."""
    return tuple(slice(a - o, b - o) for a, b, o in zip(low, high, origin, strict=True))


@dataclass(frozen=True)
class Chunk:
    """A box of a parameter, and the entry of a file that holds it: an archive of torch.save."""

    parameter: str
    dtype: torch.dtype
    offset: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Path
    begin: int
    """First byte of the entry in the file."""
    length: int
    """Bytes of the entry."""


class DcpSource:
    """Reads rows of HF tensors out of the shards that hold them; any number of threads may share one.

    A shard may be larger than memory: only ranges of its bytes are read. UserError for a tensor that is
    missing or of another shape, and for entries that are not plain tensors.
    """

    def __init__(self, directory: Path, config: ModelConfig, shapes: dict[str, tuple[int, ...]]) -> None:
        self.directory = directory
        self.layout = hf_layout(config, shapes)
        import_metadata = read_import_metadata(directory)
        self.block: tuple[int, int] = tuple(import_metadata.get("block", (FP8_BLOCK, FP8_BLOCK)))
        self.quantization: dict[str, Any] | None = import_metadata.get("quantization_config")
        # A model trained here is exported as DeepSeek exports: with the duplicates.
        self.has_mtp_duplicates = bool(import_metadata.get("copies", True))
        metadata = read_metadata(directory)
        known = {MODEL_PREFIX + name for name in shapes}
        require_no_others(config, directory, metadata.state_dict_metadata, known)
        self._chunks = find_chunks(directory, metadata, shapes)
        self._entries = EntryReader()
        for chunks in self._chunks.values():
            for chunk in chunks:
                self._entries.require_whole(chunk)
        self._scratch = ScratchMemory()
        self._reader = SafetensorsReader()
        self._scales = _find_scales(directory / HF_DIR / SCALES_FILE, self.layout, self.block)

    def value_dtype(self, tensor: HFTensor) -> torch.dtype:
        """Return the dtype of the stored values, bf16 or else fp32."""
        chunk = self._chunks[tensor.parameter, _chunk_group(tensor.offset)][0]
        return torch.bfloat16 if chunk.dtype is torch.bfloat16 else torch.float32

    def is_quantized(self, name: str) -> bool:
        """Return whether an HF weight came in fp8."""
        return name in self._scales

    def read_scales(self, name: str) -> Tensor | None:
        """Return the scale grid that an HF weight was imported with, or None."""
        entry = self._scales.get(name)
        return None if entry is None else self._reader.read_rows(entry, 0, entry.rows)

    def read_codes(self, name: str, first: int, count: int) -> tuple[Tensor, Tensor] | None:
        """Return None: a DCP holds no fp8 codes."""
        return None

    def read_rows(self, tensor: HFTensor, first: int, count: int, out: Tensor) -> Tensor:
        """Fill `out` with rows [first, first + count) of an HF tensor, from all chunks that hold any.

        UserError for a value that is not finite.
        """
        offset, sizes = tensor.box_of_rows(first, count)
        box = out.view(sizes)
        for chunk in self._chunks[tensor.parameter, _chunk_group(tensor.offset)]:
            shared = intersect(offset, sizes, chunk.offset, chunk.sizes)
            if shared is not None:
                source = relative_index(*shared, chunk.offset)
                self._copy_box(chunk, source, box[relative_index(*shared, offset)])

        def stored() -> Tensor:
            return self.read_rows(tensor, first, count, torch.empty(out.shape))

        rounded = stored if out.dtype is not torch.float32 else None
        require_finite(out, self.directory, tensor.name, (first,) if tensor.shape else (), rounded)
        return out

    def _copy_box(self, chunk: Chunk, box: tuple[slice, ...], target: Tensor) -> None:
        """Fill `target`, of any dtype and strides, with the part `box` of a chunk, matrix by matrix."""
        if len(box) < 2:  # a vector is a matrix of one row, a scalar one of one element
            columns = box[0] if box else slice(0, 1)
            first, count = columns.start, columns.stop - columns.start
            values = self._scratch.take((count,), chunk.dtype)
            self._entries.read(chunk, first, values)
            target.copy_(values.view(target.shape))
            return
        rows, columns = box[-2:]
        leading = [range(dim.start, dim.stop) for dim in box[:-2]]
        for index in product(*leading):
            matrix = 0  # number of the matrix [index] in the chunk
            for position, size in zip(index, chunk.sizes[:-2], strict=True):
                matrix = matrix * size + position
            first_row = matrix * chunk.sizes[-2] + rows.start
            place = tuple(position - dim.start for position, dim in zip(index, box[:-2], strict=True))
            self._copy_matrix(chunk, first_row, columns, target[place])

    def _copy_matrix(self, chunk: Chunk, first_row: int, columns: slice, target: Tensor) -> None:
        """Fill the matrix `target` from row `first_row` of a chunk on, all its matrices counted as one."""
        width = chunk.sizes[-1]
        is_whole_rows = (columns.start, columns.stop) == (0, width)
        if is_whole_rows and target.dtype is chunk.dtype and target.is_contiguous():
            self._entries.read(chunk, first_row * width, target)
            return
        step = max(1, WINDOW // (width * chunk.dtype.itemsize))
        for first in range(0, len(target), step):
            count = min(step, len(target) - first)
            values = self._scratch.take((count, width), chunk.dtype)
            self._entries.read(chunk, (first_row + first) * width, values)
            target[first : first + count].copy_(values[:, columns])


def find_chunks(
    directory: Path, metadata: Metadata, shapes: dict[str, tuple[int, ...]]
) -> dict[tuple[str, int], list[Chunk]]:
    """Return the chunks by parameter and group (see `_chunk_group`).

    UserError where a parameter is missing, of another shape or dtype, or where chunks overlap.
    """
    found: dict[tuple[str, int], list[Chunk]] = defaultdict(list)
    files: dict[str, Path] = {}
    places = {(index.fqn, index.offset): info for index, info in metadata.storage_data.items()}
    for parameter, shape in shapes.items():
        name = MODEL_PREFIX + parameter
        entry = metadata.state_dict_metadata.get(name)
        if not isinstance(entry, TensorStorageMetadata):
            raise UserError(f"{directory} has no tensor '{name}', which its model has")
        if tuple(entry.size) != shape:
            stored, wanted = list(entry.size), list(shape)
            raise UserError(f"{directory}: '{name}' has shape {stored}, the model {wanted}")
        dtype = entry.properties.dtype
        if dtype not in VALUE_DTYPES:
            known = "float32, bfloat16 and float16"
            raise UserError(f"{directory} has '{name}' of {dtype}; supported: {known}")
        for box in entry.chunks:
            info = places.get((name, box.offsets))
            if info is None:
                raise UserError(f"{directory}/.metadata does not say where '{name}' lies")
            offset, sizes = tuple(box.offsets), tuple(box.sizes)
            file = files.setdefault(info.relative_path, directory / info.relative_path)
            chunk = Chunk(parameter, dtype, offset, sizes, file, info.offset, info.length)
            first = _chunk_group(offset)
            for group in range(first, first + (sizes[0] if len(sizes) == 3 else 1)):
                others = found[parameter, group]
                if any(intersect(offset, sizes, other.offset, other.sizes) for other in others):
                    what = "parts that overlap, and so another that is missing"
                    raise UserError(f"{directory}/.metadata gives '{name}' {what}")
                others.append(chunk)
    return found


def _chunk_group(offset: tuple[int, ...]) -> int:
    """Return the expert at which a box of a stack begins, 0 for other parameters.

    Chunks of stacks are kept by expert, for there are thousands of them.
    """
    return offset[0] if len(offset) == 3 else 0


class EntryReader:
    """Reads elements of chunks from the files of a DCP; any number of threads may share one."""

    def __init__(self) -> None:
        # A run of thousands of ranks has as many files.
        self._files = OpenFiles(kind=DirectReader)
        self._sizes: dict[Path, int] = {}
        self._places: dict[tuple[Path, int], int] = {}
        self._lock = Lock()

    def require_whole(self, chunk: Chunk) -> None:
        """Raise UserError where the file ends before the entry does: before anything is written."""
        if chunk.file not in self._sizes:
            self._sizes[chunk.file] = self._files.get(chunk.file).size
        end, size = chunk.begin + chunk.length, self._sizes[chunk.file]
        if end > size:
            what = f"the entry of '{chunk.parameter}' ends at byte {end}, the file has {size}"
            raise fault(chunk.file, f"is cut off: {what}")

    def read(self, chunk: Chunk, first: int, target: Tensor) -> None:
        """Fill `target` (contiguous, of the chunk's dtype) with elements from number `first` on."""
        offset = self._data_offset(chunk) + first * target.itemsize
        file = self._files.get(chunk.file)
        file.read(byte_view(target).numpy().data, offset, f"'{chunk.parameter}'")

    def _data_offset(self, chunk: Chunk) -> int:
        """Return the byte of the file at which a chunk's elements begin; the archive's index says it."""
        key = (chunk.file, chunk.begin)
        if key not in self._places:
            file = self._files.get(chunk.file)
            with self._lock:
                try:
                    entry = io.BufferedReader(_FileRange(file, chunk.begin, chunk.length))
                    require_tensor_archive(entry)
                    stored, storage_offset = locate_saved_tensor(entry)
                except Exception as error:
                    what = str(error).splitlines()[0] if str(error) else type(error).__name__
                    raise UserError(
                        f"{file.path}: the entry of '{chunk.parameter}' is no tensor: {what}"
                    ) from None
                wanted = (chunk.sizes, chunk.dtype, True)
                found = (tuple(stored.shape), stored.dtype, stored.is_contiguous())
                if found != wanted:
                    raise UserError(
                        f"{file.path}: the entry of '{chunk.parameter}' has shape {list(found[0])} and "
                        f"{found[1]}, .metadata says {list(wanted[0])} and {wanted[1]}"
                    )
                within = int(storage_offset + stored.storage_offset() * stored.itemsize)
                self._places[key] = chunk.begin + within
        return self._places[key]


class _FileRange(io.RawIOBase):
    """A range of a file as a file of its own."""

    def __init__(self, file: PreadFile, begin: int, length: int) -> None:
        self._file, self._begin, self._length, self._position = file, begin, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        count = max(0, min(len(view), self._length - self._position))
        if count:
            self._file.read(view[:count], self._begin + self._position, "an entry")
        self._position += count
        return count


def _find_scales(path: Path, layout: list[HFTensor], block: tuple[int, int]) -> dict[str, TensorInfo]:
    """Return the scale grids that the weights were imported with, by the weights' HF names."""
    if not path.is_file():
        return {}
    stored = {entry.name: entry for entry in read_header(PreadFile(path))}
    for tensor in layout:
        entry = stored.get(tensor.name)
        grid = tuple(-(-length // side) for length, side in zip(tensor.shape, block, strict=False))
        if entry is not None and (entry.shape, entry.dtype) != (grid, torch.float32):
            found = f"{entry.dtype} of shape {list(entry.shape)}"
            raise fault(path, f"has the scales of {quoted(tensor.name)} as {found}, not float32 {list(grid)}")
    return stored
