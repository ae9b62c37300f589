"""A file that is appended to in large blocks, past the page cache where the disk allows it.

A conversion writes more than memory holds and reads none of it again: through the page cache every byte
costs a page to be found, filled and given back, which is most of the processors' time.


A file under way: whatever passes is digested, counted and reported.

What is written is made of pieces of bounded size: slices of rows, in the order of their files.
"""

import errno
import fcntl
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from xxhash import xxh3_128

from dsv3.hf.pread_file import ALIGNMENT, BLOCK, aligned_memory

Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]

_DIRECT = getattr(os, "O_DIRECT", 0)


class DirectWriter:
    """A new file at `path`, or the old one emptied; OSError where it cannot be written."""

    def __init__(self, path: Path) -> None:
        self._descriptor = _open(path)
        self._memory: mmap.mmap | None = aligned_memory(BLOCK)
        self._filled = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes; they are in the file once it is synced."""
        assert self._memory is not None
        block = np.frombuffer(self._memory, np.uint8)
        for part in _parts(np.frombuffer(data, np.uint8), BLOCK - self._filled):
            # NumPy lets other threads run meanwhile, a memoryview does not.
            block[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            if self._filled == BLOCK:
                self._put(memoryview(self._memory))
                self._filled = 0

    def sync(self) -> None:
        """Wait until all is on the disk; nothing can be appended any more."""
        if self._memory is not None:
            whole = self._filled // ALIGNMENT * ALIGNMENT
            self._put(memoryview(self._memory)[:whole])
            _through_cache(self._descriptor)  # the end of a file is no multiple of anything
            self._put(memoryview(self._memory)[whole : self._filled])
            self._memory = None
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Let go of the file; what was not synced may be lost."""
        self._memory = None
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)

    def _put(self, rest: memoryview) -> None:
        while rest:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except OSError as error:
                # Some disks want other multiples, and none is left where one took a part of a block.
                if error.errno != errno.EINVAL or not _through_cache(self._descriptor):
                    raise


def _open(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    try:
        return os.open(path, flags | _DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666)  # a file system that has nothing but the page cache


def _through_cache(descriptor: int) -> bool:
    """Write through the page cache from here on; whether that is new."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    if not flags & _DIRECT:
        return False
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~_DIRECT)
    return True


def _parts(data: Bytes, room: int) -> Iterator[Bytes]:
    """`data` cut so that the first part fits into `room` bytes, the others into a block."""
    yield data[:room]
    for begin in range(room, len(data), BLOCK):
        yield data[begin : begin + BLOCK]


class Interrupted(Exception):
    """The conversion is to stop: another worker has failed, or the user has had enough."""


class Sink:
    """Binary file object that appends to `path`; `report` is told of bytes written."""

    def __init__(self, path: Path, report: Callable[[int], None], stop: Event) -> None:
        self.path = path
        self.position = 0
        self.failure: Exception | None = None
        """What stopped a write: torch.save, which calls it, makes an error of its own of that."""
        self._digest = xxh3_128()
        self._report = report
        self._stop = stop
        self._file = DirectWriter(path)

    def write(self, data: bytes | memoryview) -> int:
        """Append all of `data`; Interrupted where the conversion is to stop, OSError of a full disk."""
        try:
            return self._append(data)
        except (Interrupted, OSError) as failure:
            self.failure = failure
            raise

    def _append(self, data: bytes | memoryview) -> int:
        if self._stop.is_set():
            raise Interrupted
        rest = memoryview(data).cast("B") if len(data) else memoryview(b"")
        self._digest.update(rest)
        self._file.write(rest)
        self.position += len(rest)
        self._report(len(rest))
        return len(rest)

    def flush(self) -> None:
        """Nothing is buffered here."""

    def discard(self) -> None:
        """Give the file up: what is half written would only fill the disk."""
        with suppress(OSError):  # why it is given up matters more
            self._file.close()
            self.path.unlink(missing_ok=True)

    def finish(self) -> str:
        """Wait until the bytes are on the disk, close; the digest of the whole file."""
        self._file.sync()
        self._file.close()
        return self._digest.hexdigest()


PIECE = 16 * 2**20
"""Bytes of a piece of output."""


class Piece(Protocol):
    """A part of a file: made by any worker, put into the file in its turn."""

    def make(self, buffer: Tensor) -> Any:
        """Read and compute, into `buffer` (uint8, as long as the largest piece) where it helps."""

    def put(self, made: Any, sink: Sink) -> Any:
        """Append what was made; what comes back (a JSON value) is what the file's record keeps."""


@dataclass(frozen=True)
class Output:
    """A file to be written: its name below the output, its size in bytes and what makes it."""

    name: str
    nbytes: int
    """Without the few bytes an entry that a format adds."""
    pieces: Sequence[Piece]


def row_slices(shape: tuple[int, ...], itemsize: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """First row and count of slices of at most PIECE bytes, or of `multiple` rows where those have more.

    All but the last have a multiple of `multiple` rows. A scalar is one row.
    """
    rows = shape[0] if shape else 1
    row_nbytes = max(1, itemsize * torch.Size(shape[1:]).numel())
    step = max(1, PIECE // row_nbytes // multiple) * multiple
    for first in range(0, rows, step):
        yield first, min(step, rows - first)


def shaped(buffer: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The beginning of `buffer` (uint8) as a tensor, whose storage ends where the tensor does.

    torch.save writes all of a tensor's storage. A buffer that is too short gives a new tensor.
    """
    count = torch.Size(shape).numel()
    if count == 0 or count * dtype.itemsize > buffer.numel():
        return torch.empty(*shape, dtype=dtype)
    return torch.frombuffer(buffer.numpy().data, dtype=dtype, count=count).view(*shape)
