"""Reads rows and rectangles of stored tensors, from several threads at once.

Unlike the library's `safe_open` it maps nothing: what is read is what was asked for, into memory that
the caller may use again.


Finds the tensors of a directory of safetensors files, with or without an index.
"""

import os
import threading
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from dsv3.hf.pread_file import PreadFile, fault, quoted
from dsv3.hf.safetensors_header import LIMIT, StoredTensor, byte_view, json_object, read_header

PIECE = 4 * 2**20
"""Bytes of whole rows that are in memory while columns are cut out of them."""


class ShardReader:
    """Reads from the files of stored tensors; any number of threads may share one.

    At most `limit` files stay open, each opened as a `kind`. A wrong range or buffer is the program's
    fault: RuntimeError.
    """

    def __init__(self, limit: int = 64, kind: type[PreadFile] = PreadFile) -> None:
        self._limit, self._kind = limit, kind
        self._lock = threading.Lock()
        self._files: dict[Path, PreadFile] | None = {}

    def __enter__(self) -> "ShardReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files, each once no thread reads from it any more."""
        with self._lock:
            self._files = None

    def read_rows(self, tensor: StoredTensor, first: int, count: int, out: Tensor | None = None) -> Tensor:
        """Rows [first, first + count) of dim 0, in `out` (contiguous, same type and shape) or a new tensor.

        A tensor without dims is one row and comes back without dims.
        """
        if not tensor.shape and (first, count) != (0, 1):
            raise RuntimeError(f"'{tensor.name}' is a scalar: rows {first} + {count} are not possible")
        _check_range(tensor, first, first + count, tensor.rows)
        out = _target(tensor, (count, *tensor.shape[1:]) if tensor.shape else (), out)
        self._read(tensor, first * tensor.row_nbytes, byte_view(out))
        return out

    def read_rectangle(
        self,
        tensor: StoredTensor,
        rows: tuple[int, int],
        columns: tuple[int, int],
        out: Tensor | None = None,
        piece: int = PIECE,
    ) -> Tensor:
        """[rows, columns] from first to end (exclusive) of a matrix, as `read_rows` gives rows.

        Beside the result no more than `piece` bytes are in memory.
        """
        if len(tensor.shape) != 2:
            raise RuntimeError(f"'{tensor.name}' has shape {tensor.shape}: only a matrix has rectangles")
        _check_range(tensor, *rows, tensor.shape[0])
        _check_range(tensor, *columns, tensor.shape[1])
        if columns == (0, tensor.shape[1]):
            return self.read_rows(tensor, rows[0], rows[1] - rows[0], out)
        out = _target(tensor, (rows[1] - rows[0], columns[1] - columns[0]), out)
        if out.numel():
            target = byte_view(out).view(out.shape[0], -1)
            self._cut(tensor, rows[0], columns[0] * tensor.dtype.itemsize, target, piece)
        return out

    def _cut(self, tensor: StoredTensor, first: int, left: int, target: Tensor, piece: int) -> None:
        """Fill `target` [rows, bytes] from row `first` and byte `left` of each row on."""
        width, step = tensor.row_nbytes, piece // tensor.row_nbytes
        if step == 0:  # not even one row fits: its columns alone, a row at a time
            for number, row in enumerate(target):
                self._read(tensor, (first + number) * width + left, row)
            return
        buffer = torch.empty((min(step, len(target)), width), dtype=torch.uint8, device="cpu")
        for begin in range(0, len(target), step):
            some = buffer[: len(target) - begin]
            self._read(tensor, (first + begin) * width, some.view(-1))
            # NumPy copies in this thread; PyTorch would start others beside the callers', and be slower.
            target.numpy()[begin : begin + step] = some.numpy()[:, left : left + target.shape[1]]

    def _read(self, tensor: StoredTensor, begin: int, target: Tensor) -> None:
        """Fill `target` (uint8 [bytes]) from byte `begin` of the tensor on."""
        if target.numel():
            self._file(tensor.file).read(target.numpy().data, tensor.offset + begin, quoted(tensor.name))

    def _file(self, path: Path) -> PreadFile:
        with self._lock:
            if self._files is None:
                raise RuntimeError("the reader is closed")
            # Taken out and put behind the others: the first is the one that was not used for longest.
            file = self._files.pop(path, None) or self._kind(path)
            self._files[path] = file
            if len(self._files) > self._limit:
                del self._files[next(iter(self._files))]
            return file


def _check_range(tensor: StoredTensor, first: int, end: int, length: int) -> None:
    if not 0 <= first <= end <= length:
        raise RuntimeError(f"'{tensor.name}' has shape {tensor.shape}: [{first}, {end}) is not in it")


def _target(tensor: StoredTensor, shape: tuple[int, ...], out: Tensor | None) -> Tensor:
    if out is None:
        return torch.empty(shape, dtype=tensor.dtype, device="cpu")
    fits = tuple(out.shape) == shape and out.dtype is tensor.dtype
    if not fits or not out.is_contiguous() or out.device.type != "cpu":
        raise RuntimeError(
            f"'{tensor.name}' needs a contiguous {tensor.dtype} of shape {shape} on the CPU, "
            f"got {out.dtype} of shape {tuple(out.shape)}, strides {out.stride()}, on {out.device}"
        )
    return out


INDEX = "model.safetensors.index.json"

_SUFFIX = ".safetensors"

_ONE_REVISION = "take the index and the files from one revision"


def open_shards(directory: Path) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint by name, in the order in which they lie in its files.

    An index says which files there are, and must agree with them; without one, all .safetensors files
    count. UserError names the file and the tensor of whatever is wrong with them.
    """
    present = _listed(directory)
    if INDEX not in present:
        files = sorted(name for name in present if name.endswith(_SUFFIX) and not name.startswith("."))
        if not files:
            raise fault(directory, "holds no .safetensors files")
        return _collect(directory, files)
    weight_map = _read_index(directory / INDEX)
    for name, file in weight_map.items():
        if file not in present:
            raise fault(directory / INDEX, f"maps {quoted(name)} to {quoted(file)}, which is not there")
    tensors = _collect(directory, sorted(set(weight_map.values())))
    _check_index(directory / INDEX, weight_map, tensors)
    return tensors


def _listed(directory: Path) -> set[str]:
    try:
        return set(os.listdir(directory))  # noqa: PTH208 (names are what the index has)
    except OSError as error:
        raise fault(directory, f"cannot be read as a directory: {error.strerror}") from None


def _collect(directory: Path, files: Iterable[str]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for tensor in read_header(PreadFile(directory / file)):
            if tensor.name in tensors:
                other = quoted(tensors[tensor.name].file.name)
                raise fault(tensor.file, f"has {quoted(tensor.name)}, which {other} has as well: remove one")
            tensors[tensor.name] = tensor
    return tensors


def _read_index(path: Path) -> dict[str, str]:
    """The files by tensor as an index names them."""
    file = PreadFile(path)
    if file.size > LIMIT:
        raise fault(path, f"has {file.size} bytes, an index may have {LIMIT}")
    raw = bytearray(file.size)
    file.read(memoryview(raw), 0, "the index")
    weight_map = json_object(path, bytes(raw), "index").get("weight_map", ...)
    if weight_map is ...:
        raise fault(path, "has no 'weight_map', which says where each tensor is")
    if not isinstance(weight_map, dict) or not weight_map:
        raise fault(path, f"has weight_map={quoted(weight_map)} instead of files by tensor")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_plain(shard):
            what = f"a plain file name that ends with {_SUFFIX}"
            raise fault(path, f"maps {quoted(name)} to {quoted(shard)} instead of {what}")
    return weight_map


def _is_plain(name: str) -> bool:
    """Whether this names a file beside the index; links are for the file system to follow."""
    return name.endswith(_SUFFIX) and name.isprintable() and "/" not in name and "\\" not in name


def _check_index(path: Path, weight_map: dict[str, str], tensors: dict[str, StoredTensor]) -> None:
    for name, file in weight_map.items():
        if name not in tensors:
            raise fault(path, f"maps {quoted(name)} to {quoted(file)}, which lacks it: {_ONE_REVISION}")
        actual = tensors[name].file.name
        if actual != file:
            text = f"maps {quoted(name)} to {quoted(file)}, but it is in {quoted(actual)}"
            raise fault(path, f"{text}: {_ONE_REVISION}")
    for name, tensor in tensors.items():
        if name not in weight_map:
            text = f"leaves out {quoted(name)}, which is in {quoted(tensor.file.name)}"
            raise fault(path, f"{text}: {_ONE_REVISION}")
