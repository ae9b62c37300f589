"""Reads rows and rectangles of stored tensors, from several threads at once.

Unlike the library's `safe_open` it maps nothing: what is read is what was asked for, into memory that
the caller may use again.
"""

import threading
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from dsv3.checkpoint.released.shard_file import ShardFile
from dsv3.checkpoint.released.stored_tensor import StoredTensor, byte_view, quoted

PIECE = 4 * 2**20
"""Bytes of whole rows that are in memory while columns are cut out of them."""


class ShardReader:
    """Reads from the files of stored tensors; any number of threads may share one.

    At most `limit` files stay open, each opened as a `kind`. A wrong range or buffer is the program's
    fault: RuntimeError.
    """

    def __init__(self, limit: int = 64, kind: type[ShardFile] = ShardFile) -> None:
        self._limit, self._kind = limit, kind
        self._lock = threading.Lock()
        self._files: dict[Path, ShardFile] | None = {}

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

    def _file(self, path: Path) -> ShardFile:
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
