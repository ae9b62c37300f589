"""Read the tensors of safetensors files by rows and rectangles, and find those of a checkpoint directory.

Unlike the safetensors library's `safe_open`, nothing is memory-mapped: exactly the bytes asked for are read,
into memory that the caller may use again, and a failing disk is an error instead of a signal that ends the
process.
"""

import os
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from dsv3.errors import quoted
from dsv3.hf.names import SCALE_SUFFIX
from dsv3.hf.pread_file import OpenFiles, PreadFile, fault
from dsv3.hf.safetensors_header import TensorInfo, byte_view, json_object, read_header
from dsv3.metrics.progress import amount, phase
from dsv3.untrusted_files import read_bytes, refuse_lfs_pointer

WINDOW = 4 * 2**20
"""Bytes of whole rows that are in memory while columns are cut out of them."""


class ScratchMemory(threading.local):
    """Memory that each thread reuses for its reads.

    Taken anew for each read it would make glibc's heap grow.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return an uninitialized tensor on the CPU, valid until this thread's next call."""
        needed = torch.Size(shape).numel() * dtype.itemsize
        if len(self._memory) < needed:
            self._memory = torch.empty(needed, dtype=torch.uint8)
        return self._memory[:needed].view(dtype).view(shape)


class SafetensorsReader:
    """Reads from the files of tensors; any number of threads may share one.

    At most `limit` files stay open, each opened as a `kind`. A wrong range or buffer is the program's
    fault: RuntimeError.
    """

    def __init__(self, limit: int = 64, kind: type[PreadFile] = PreadFile) -> None:
        self._files = OpenFiles(limit, kind)

    def __enter__(self) -> "SafetensorsReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files, each once no thread reads from it any more."""
        self._files.close()

    def read_rows(self, tensor: TensorInfo, first: int, count: int, out: Tensor | None = None) -> Tensor:
        """Return rows [first, first + count) of dim 0, in `out` (contiguous, same dtype) or a new tensor.

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
        tensor: TensorInfo,
        rows: tuple[int, int],
        columns: tuple[int, int],
        out: Tensor | None = None,
        window: int = WINDOW,
    ) -> Tensor:
        """Return [rows, columns] of a matrix, each from first to end (exclusive), in `out` or a new tensor.

        Beside the result no more than `window` bytes are in memory.
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
            self._read_columns(tensor, rows[0], columns[0] * tensor.dtype.itemsize, target, window)
        return out

    def _read_columns(self, tensor: TensorInfo, first: int, left: int, target: Tensor, window: int) -> None:
        """Fill `target` [rows, bytes] from row `first` and byte `left` of each row on."""
        width, step = tensor.row_nbytes, window // tensor.row_nbytes
        if step == 0:  # not even one row fits: its columns alone, a row at a time
            for number, row in enumerate(target):
                self._read(tensor, (first + number) * width + left, row)
            return
        buffer = torch.empty((min(step, len(target)), width), dtype=torch.uint8, device="cpu")
        for begin in range(0, len(target), step):
            rows = buffer[: len(target) - begin]
            self._read(tensor, (first + begin) * width, rows.view(-1))
            # NumPy copies in this thread; PyTorch would start others beside the callers', and be slower.
            target.numpy()[begin : begin + step] = rows.numpy()[:, left : left + target.shape[1]]

    def _read(self, tensor: TensorInfo, begin: int, target: Tensor) -> None:
        """Fill `target` (uint8 [bytes]) from byte `begin` of the tensor on."""
        if target.numel():
            file = self._files.get(tensor.file)
            file.read(target.numpy().data, tensor.offset + begin, quoted(tensor.name))


def _check_range(tensor: TensorInfo, first: int, end: int, length: int) -> None:
    if not 0 <= first <= end <= length:
        raise RuntimeError(f"'{tensor.name}' has shape {tensor.shape}: [{first}, {end}) is not in it")


def _target(tensor: TensorInfo, shape: tuple[int, ...], out: Tensor | None) -> Tensor:
    """Return `out`, checked, or a new tensor."""
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

_WHOLE = f"model{_SUFFIX}"
"""The name of a checkpoint in one file."""

_SHARD = re.compile(rf"model-\d+-of-(\d+){_SUFFIX}")

_OTHER_FORMATS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".npz")

_ONE_REVISION = "take the index and the files from one revision"


def read_headers(directory: Path, notes: list[str] | None = None) -> dict[str, TensorInfo]:
    """Return the tensors of a checkpoint by name, in the order in which they lie in its files.

    An index says which files there are, and must agree with them. Without one, or where its files are not
    there, model.safetensors is the checkpoint; else files numbered as shards are, else all .safetensors
    files. So a second copy of the weights in other files (consolidated.safetensors) is passed over. `notes`
    gets a line on what is passed over. UserError names the file and the tensor of whatever is wrong.
    """
    try:
        present = set(os.listdir(directory))  # noqa: PTH208 (names are what the index has)
    except OSError as error:
        raise fault(directory, f"cannot be read as a directory: {error.strerror}") from None
    notes = [] if notes is None else notes
    if INDEX not in present:
        return _collect(directory, _files_without_index(directory, present, notes))
    weight_map = _read_index(directory / INDEX)
    lost = {name: file for name, file in weight_map.items() if file not in present}
    if lost and _WHOLE in present:
        notes.append(f"{directory / INDEX} names files that are not there: {_WHOLE} is read instead")
        return _collect(directory, [_WHOLE])
    for name, file in lost.items():
        raise fault(directory / INDEX, f"maps {quoted(name)} to {quoted(file)}, which is not there")
    tensors = _collect(directory, sorted(set(weight_map.values())))
    _check_index(directory / INDEX, weight_map, tensors, notes)
    return tensors


def _files_without_index(directory: Path, present: set[str], notes: list[str]) -> list[str]:
    """Return the files that make up a checkpoint without an index; UserError where there are none."""
    files = sorted(name for name in present if name.endswith(_SUFFIX) and not name.startswith("."))
    if not files:
        others = sorted(name for name in present if name.endswith(_OTHER_FORMATS))
        if not others:
            raise fault(directory, "holds no .safetensors files")
        text = f"holds {quoted(others[0])} and no .safetensors files, the only format that is read"
        raise fault(directory, f"{text}: load it in transformers, and save_pretrained() writes safetensors")
    shards = [name for name in files if _SHARD.fullmatch(name)]
    chosen = [_WHOLE] if _WHOLE in files else shards or files
    if len(chosen) < len(files):
        rest = ", ".join(sorted(set(files) - set(chosen)))
        notes.append(f"{directory} holds other weights beside {chosen[0]}, which are passed over: {rest}")
    return chosen


def _collect(directory: Path, files: Sequence[str]) -> dict[str, TensorInfo]:
    """Return the tensors of all files by name; UserError for a name in two files."""
    tensors: dict[str, TensorInfo] = {}
    with phase(f"reading the headers of {directory}", len(files), "files") as work:
        for file in files:
            for tensor in read_header(PreadFile(directory / file)):
                if tensor.name in tensors:
                    other = quoted(tensors[tensor.name].file.name)
                    text = f"has {quoted(tensor.name)}, which {other} has as well: remove one"
                    raise fault(tensor.file, text)
                tensors[tensor.name] = tensor
            work.advance()
    return tensors


def _read_index(path: Path) -> dict[str, str]:
    """Return the index's weight_map: file names by tensor."""
    refuse_lfs_pointer(path)
    weight_map = json_object(path, read_bytes(path, "listing"), "index").get("weight_map", ...)
    if weight_map is ...:
        raise fault(path, "has no 'weight_map', which says where each tensor is")
    if not isinstance(weight_map, dict) or not weight_map:
        raise fault(path, f"has weight_map={quoted(weight_map)} instead of files by tensor")
    for name, shard in weight_map.items():
        # A file beside the index: a path could lead anywhere. Links are for the file system to follow.
        is_file_name = isinstance(shard, str) and shard.endswith(_SUFFIX) and shard.isprintable()
        if not is_file_name or "/" in shard or "\\" in shard:
            what = f"a plain file name that ends with {_SUFFIX}"
            raise fault(path, f"maps {quoted(name)} to {quoted(shard)} instead of {what}")
    return weight_map


def _check_index(
    path: Path, weight_map: dict[str, str], tensors: dict[str, TensorInfo], notes: list[str]
) -> None:
    """Raise UserError unless the index names every tensor and the file that it is in.

    Scales may be listed that no file holds, where their weights are not in fp8: the usual recast of an fp8
    release to bf16 leaves them in the index.
    """
    stale = 0
    for name, file in weight_map.items():
        if name not in tensors:
            weight = tensors.get(name.removesuffix(SCALE_SUFFIX))
            if name.endswith(SCALE_SUFFIX) and weight is not None and weight.dtype.itemsize > 1:
                stale += 1
                continue
            raise fault(path, f"maps {quoted(name)} to {quoted(file)}, which lacks it: {_ONE_REVISION}")
        actual = tensors[name].file.name
        if actual != file:
            text = f"maps {quoted(name)} to {quoted(file)}, but it is in {quoted(actual)}"
            raise fault(path, f"{text}: {_ONE_REVISION}")
    for name, tensor in tensors.items():
        if name not in weight_map:
            text = f"leaves out {quoted(name)}, which is in {quoted(tensor.file.name)}"
            raise fault(path, f"{text}: {_ONE_REVISION}")
    if stale:
        scales = amount(stale, "scale grids")
        notes.append(f"{path} still lists {scales} of fp8, and the weights were recast: passed over")
