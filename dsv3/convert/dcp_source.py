"""Boxes of a tensor: what shards, chunks and released tensors have in common.

The weights of a DCP directory in slices of released tensors, whatever the shards it was saved in.
"""

import io
import os
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from dsv3.checkpoint.dcp_metadata import read_metadata
from dsv3.config.model import ModelConfig
from dsv3.convert.hf_assets import HF_DIR, SCALES_FILE, read_import_metadata
from dsv3.errors import UserError
from dsv3.hf.config_json import BLOCK
from dsv3.hf.names import HFTensor, released_layout
from dsv3.hf.pread_file import DirectReader, PreadFile, fault, quoted
from dsv3.hf.safetensors_header import StoredTensor, byte_view, read_header
from dsv3.hf.safetensors_reader import ShardReader


def overlap(
    offset: Sequence[int], sizes: Sequence[int], other: Sequence[int], other_sizes: Sequence[int]
) -> tuple[list[int], list[int]] | None:
    """Where two boxes of a tensor, by offsets and sizes, meet: first and end by dim; None if nowhere."""
    low = [max(a, b) for a, b in zip(offset, other, strict=True)]
    high = [min(a + n, b + m) for a, n, b, m in zip(offset, sizes, other, other_sizes, strict=True)]
    return (low, high) if all(a < b for a, b in zip(low, high, strict=True)) else None


def inside(low: Sequence[int], high: Sequence[int], origin: Sequence[int]) -> tuple[slice, ...]:
    """The box from `low` to `high`, counted from `origin`: an index."""
    return tuple(slice(a - o, b - o) for a, b, o in zip(low, high, origin, strict=True))


_PREFIX = "model."

_WINDOW = 4 * 2**20

_OPEN = 64
"""Files: a run of thousands of ranks has as many."""

_NUMBERS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Chunk:
    """A box of a parameter and where its numbers lie, row by row, in a file."""

    offset: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    begin: int
    """Of the entry in the file."""
    length: int


class DcpSource:
    """Reads rows of released tensors out of the shards that hold them; any number of threads may share one.

    A shard may be larger than memory: what is read of it is a range of its bytes. UserError for a tensor
    that is missing or of another shape, and for entries that are not plain tensors.
    """

    def __init__(self, directory: Path, config: ModelConfig, shapes: dict[str, tuple[int, ...]]) -> None:
        self.directory = directory
        self.layout = released_layout(config, shapes)
        import_metadata = read_import_metadata(directory)
        self.block: tuple[int, int] = tuple(import_metadata.get("block", (BLOCK, BLOCK)))
        self.quantization: dict[str, Any] | None = import_metadata.get("quantization_config")
        # A model trained here is released as DeepSeek's are: with the copies.
        self.has_mtp_duplicates = bool(import_metadata.get("copies", True))
        self._dtypes: dict[str, torch.dtype] = {}
        self._chunks = self._find(shapes)
        self._places: dict[tuple[str, int], int] = {}
        self._files: OrderedDict[str, PreadFile] = OrderedDict()
        self._lock = threading.Lock()
        self._scratch = threading.local()
        self._check_sizes()
        self._reader = ShardReader()
        self._scales = _read_scales(directory / HF_DIR / SCALES_FILE, self.layout, self.block)

    def numbers(self, tensor: HFTensor) -> torch.dtype:
        """What is stored, bf16 or else fp32."""
        return torch.bfloat16 if self._dtypes[tensor.parameter] is torch.bfloat16 else torch.float32

    def scales(self, name: str) -> Tensor | None:
        """The grid of scales that a weight was imported with."""
        entry = self._scales.get(name)
        return None if entry is None else self._reader.read_rows(entry, 0, entry.rows)

    def codes(self, name: str, first: int, count: int) -> tuple[Tensor, Tensor] | None:
        """A DCP holds no codes."""
        return None

    def rows(self, tensor: HFTensor, first: int, count: int, out: Tensor) -> Tensor:
        """Rows [first, first + count) as numbers, in `out`, put together from all shards that have any."""
        offset, sizes = tensor.box_of_rows(first, count)
        whole = out.view(sizes)
        for chunk in self._chunks[tensor.parameter, _shelf(tensor.offset)]:
            shared = overlap(offset, sizes, chunk.offset, chunk.sizes)
            if shared is not None:
                ranges = [(box.start, box.stop) for box in inside(*shared, chunk.offset)]
                self._copy(tensor.parameter, chunk, ranges, whole[inside(*shared, offset)])
        return out

    def _copy(self, parameter: str, chunk: Chunk, box: list[tuple[int, int]], target: Tensor) -> None:
        """Fill `target` with a `box` inside of a chunk, in ranges of whole rows of the chunk."""
        dtype = self._dtypes[parameter]
        width = chunk.sizes[-1] if chunk.sizes else 1
        columns = box[-1] if box else (0, 1)
        if len(box) < 2:  # a vector is one row
            numbers = self._read(parameter, chunk, columns[0], columns[1] - columns[0], dtype)
            target.copy_(numbers.view(target.shape))
            return
        for index, place in _leading(box[:-2]):
            row, end = box[-2]
            begin = 0
            for level, size in zip(index, chunk.sizes[:-2], strict=True):
                begin = begin * size + level
            begin *= chunk.sizes[-2]
            rows = target[place]
            if columns == (0, width) and rows.dtype is dtype and rows.is_contiguous():
                self._fill(parameter, chunk, (begin + row) * width, rows)
                continue
            step = max(1, _WINDOW // (width * dtype.itemsize))
            for first in range(row, end, step):
                count = min(step, end - first)
                numbers = self._read(parameter, chunk, (begin + first) * width, count * width, dtype)
                cut = numbers.view(count, width)[:, slice(*columns)]
                rows[first - row : first - row + count].copy_(cut)

    def _read(self, parameter: str, chunk: Chunk, first: int, count: int, dtype: torch.dtype) -> Tensor:
        """`count` numbers of a chunk from number `first` on."""
        numbers = self._buffer(count * dtype.itemsize).view(dtype)
        self._fill(parameter, chunk, first, numbers)
        return numbers

    def _fill(self, parameter: str, chunk: Chunk, first: int, numbers: Tensor) -> None:
        """Read the numbers of a chunk from number `first` on into a contiguous tensor of its type."""
        place = self._place(parameter, chunk) + first * numbers.itemsize
        self._file(chunk.file).read(byte_view(numbers).numpy().data, place, f"'{parameter}'")

    def _buffer(self, nbytes: int) -> Tensor:
        """Memory of this thread for what is read; taken anew each time it would make the heap grow."""
        buffer: Tensor | None = getattr(self._scratch, "buffer", None)
        if buffer is None or buffer.numel() < nbytes:
            buffer = self._scratch.buffer = torch.empty(max(nbytes, _WINDOW), dtype=torch.uint8)
        return buffer[:nbytes]

    def _file(self, name: str) -> PreadFile:
        with self._lock:
            if name not in self._files:
                self._files[name] = DirectReader(self.directory / name)
                if len(self._files) > _OPEN:  # closed once no thread reads from it any more
                    self._files.popitem(last=False)
            self._files.move_to_end(name)
            return self._files[name]

    def _check_sizes(self) -> None:
        """UserError for a file that ends before an entry does: told before anything is written."""
        sizes: dict[str, int] = {}
        for (parameter, _), chunks in self._chunks.items():
            for chunk in chunks:
                if chunk.file not in sizes:
                    sizes[chunk.file] = self._file(chunk.file).size
                end, size = chunk.begin + chunk.length, sizes[chunk.file]
                if end > size:
                    what = f"the entry of '{parameter}' ends at byte {end}, the file has {size}"
                    raise fault(self.directory / chunk.file, f"is cut off: {what}")

    def _place(self, parameter: str, chunk: Chunk) -> int:
        """Where in the file a chunk's numbers begin: torch.save's archive says it, and is not unpacked."""
        key = (chunk.file, chunk.begin)
        if key not in self._places:
            file = self._file(chunk.file)
            # PyTorch reads no storage in this mode, and remembers where it would have.
            with self._lock, FakeTensorMode():
                try:
                    view = io.BufferedReader(_View(file, chunk.begin, chunk.length))
                    stored = torch.load(view, weights_only=True)
                    offset = stored.untyped_storage()._checkpoint_offset
                except Exception as error:
                    what = str(error).splitlines()[0] if str(error) else type(error).__name__
                    raise UserError(f"{file.path}: the entry of '{parameter}' is no tensor: {what}") from None
                wanted = (chunk.sizes, self._dtypes[parameter], True)
                found = (tuple(stored.shape), stored.dtype, stored.is_contiguous())
                if found != wanted:
                    raise UserError(
                        f"{file.path}: the entry of '{parameter}' has shape {list(found[0])} and {found[1]}, "
                        f".metadata says {list(wanted[0])} and {wanted[1]}"
                    )
                self._places[key] = chunk.begin + offset + stored.storage_offset() * stored.itemsize
        return self._places[key]

    def _find(self, shapes: dict[str, tuple[int, ...]]) -> dict[tuple[str, int], list[Chunk]]:
        """The chunks by parameter and shelf; UserError where one is missing or of another shape."""
        metadata = read_metadata(self.directory)
        found: dict[tuple[str, int], list[Chunk]] = defaultdict(list)
        by_place = {(index.fqn, index.offset): info for index, info in metadata.storage_data.items()}
        for name, shape in shapes.items():
            entry = metadata.state_dict_metadata.get(_PREFIX + name)
            if not isinstance(entry, TensorStorageMetadata):
                raise UserError(f"{self.directory} has no tensor '{_PREFIX + name}', which its model has")
            if tuple(entry.size) != shape:
                stored, wanted = list(entry.size), list(shape)
                raise UserError(
                    f"{self.directory}: '{_PREFIX + name}' has shape {stored}, the model {wanted}"
                )
            self._dtypes[name] = dtype = entry.properties.dtype
            if dtype not in _NUMBERS:
                known = "float32, bfloat16 and float16"
                raise UserError(f"{self.directory} has '{_PREFIX + name}' of {dtype}; supported: {known}")
            for box in entry.chunks:
                info = by_place.get((_PREFIX + name, box.offsets))
                if info is None:
                    raise UserError(f"{self.directory}/.metadata does not say where '{_PREFIX + name}' lies")
                place = (info.relative_path, info.offset, info.length)
                chunk = Chunk(tuple(box.offsets), tuple(box.sizes), *place)
                for shelf in range(*_shelves(chunk)):
                    if any(_meet(chunk, other) for other in found[name, shelf]):
                        what = "parts that overlap, and so another that is missing"
                        raise UserError(f"{self.directory}/.metadata gives '{_PREFIX + name}' {what}")
                    found[name, shelf].append(chunk)
        return found


class _View(io.RawIOBase):
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


def _read_scales(path: Path, layout: list[HFTensor], block: tuple[int, int]) -> dict[str, StoredTensor]:
    """The grids that the weights were imported with, by the weights' names."""
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


def _meet(one: Chunk, other: Chunk) -> bool:
    return overlap(one.offset, one.sizes, other.offset, other.sizes) is not None


def _shelf(offset: tuple[int, ...]) -> int:
    """Chunks of stacks are kept by expert, for there are thousands of them; others all together."""
    return offset[0] if len(offset) == 3 else 0


def _shelves(chunk: Chunk) -> tuple[int, int]:
    first = _shelf(chunk.offset)
    return first, first + (chunk.sizes[0] if len(chunk.sizes) == 3 else 1)


def _leading(ranges: list[tuple[int, int]]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The indices of the leading dims of a box in its chunk, and the same counted from the box."""
    if not ranges:
        yield (), ()
        return
    begin, end = ranges[0]
    for index in range(begin, end):
        for rest, place in _leading(ranges[1:]):
            yield (index, *rest), (index - begin, *place)
