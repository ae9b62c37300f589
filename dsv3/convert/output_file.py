"""Write the files of a conversion: past the page cache, hashed as they pass, cut into slices of bounded size.

A conversion writes more than memory holds and reads none of it again. Through the page cache every byte
costs a page to be found, filled and given back, which is most of the processors' time.
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

from dsv3.hf.pread_file import ALIGNMENT, DISK_BLOCK, aligned_memory

SLICE_BYTES = 16 * 2**20
"""Bytes of a slice of output."""


class OutputSlice(Protocol):
    """A part of an output file: any worker loads it, then it is written to the file in its turn."""

    def load(self, buffer: Tensor) -> Any:
        """Read and compute the slice, in `buffer` (uint8, as long as the largest slice) where it helps."""

    def write(self, loaded: Any, file: "HashingWriter") -> Any:
        """Append what was loaded; return a JSON value for the journal's record of the file, or None."""


@dataclass(frozen=True)
class OutputFile:
    """A file to be written: its name below the output directory, its size and the slices that make it."""

    name: str
    nbytes: int
    """Bytes, without the few per entry that a format adds."""
    slices: Sequence[OutputSlice]


def row_slices(shape: tuple[int, ...], itemsize: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Yield first row and count of slices of at most SLICE_BYTES, or of `multiple` rows.

    A slice has `multiple` rows where those have more bytes; all but the last have a multiple of `multiple`
    rows. A scalar is one row.
    """
    rows = shape[0] if shape else 1
    row_nbytes = max(1, itemsize * torch.Size(shape[1:]).numel())
    step = max(1, SLICE_BYTES // row_nbytes // multiple) * multiple
    for first in range(0, rows, step):
        yield first, min(step, rows - first)


def view_buffer(buffer: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return the beginning of `buffer` (uint8) as a tensor whose storage ends where the tensor does.

    torch.save writes all of a tensor's storage. A buffer that is too short gives a new tensor.
    """
    count = torch.Size(shape).numel()
    if count == 0 or count * dtype.itemsize > buffer.numel():
        return torch.empty(*shape, dtype=dtype)
    return torch.frombuffer(buffer.numpy().data, dtype=dtype, count=count).view(*shape)


class Interrupted(Exception):
    """The conversion has to stop: another worker has failed, or the user asks for it."""


class HashingWriter:
    """Binary file object that appends to `path` and hashes what it writes.

    `report` gets the bytes of each write.
    """

    def __init__(self, path: Path, report: Callable[[int], None], stop: Event) -> None:
        self.path = path
        self.position = 0
        self.failure: Exception | None = None
        """The error that ended a write: torch.save, which calls it, raises one of its own instead."""
        self._digest = xxh3_128()
        self._report = report
        self._stop = stop
        self._file = DirectWriter(path)

    def write(self, data: bytes | memoryview) -> int:
        """Append all of `data`; Interrupted where the conversion has to stop, OSError of a full disk."""
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
        """Do nothing: no bytes are buffered here."""

    def discard(self) -> None:
        """Give the file up and remove it: half a file would only fill the disk."""
        with suppress(OSError):  # the reason to give it up matters more
            self._file.close()
            self.path.unlink(missing_ok=True)

    def finish(self) -> str:
        """Wait until the bytes are on the disk, close the file and return the digest of all of it."""
        self._file.sync()
        self._file.close()
        return self._digest.hexdigest()


_DIRECT = getattr(os, "O_DIRECT", 0)


class DirectWriter:
    """A file at `path`, new or emptied, written in large blocks past the page cache where the disk allows it.

    OSError where it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        try:
            self._descriptor = os.open(path, flags | _DIRECT, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._descriptor = os.open(path, flags, 0o666)  # a file system with nothing but the page cache
        self._memory: mmap.mmap | None = aligned_memory(DISK_BLOCK)
        self._filled = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes; they are in the file once it is synced."""
        assert self._memory is not None
        block = np.frombuffer(self._memory, np.uint8)
        rest = np.frombuffer(data, np.uint8)
        while len(rest):
            part = rest[: DISK_BLOCK - self._filled]
            # NumPy lets other threads run meanwhile, a memoryview does not.
            block[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            if self._filled == DISK_BLOCK:
                self._put(memoryview(self._memory))
                self._filled = 0
            rest = rest[len(part) :]

    def sync(self) -> None:
        """Wait until all bytes are on the disk; nothing can be appended any more."""
        if self._memory is not None:
            whole = self._filled // ALIGNMENT * ALIGNMENT
            self._put(memoryview(self._memory)[:whole])
            self._use_page_cache()  # the end of a file has no alignment
            self._put(memoryview(self._memory)[whole : self._filled])
            self._memory = None
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file; bytes that were not synced may be lost."""
        self._memory = None
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)

    def _put(self, rest: memoryview) -> None:
        """Write a block, or the rest of it after a short write."""
        while rest:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except OSError as error:
                # Some disks want a larger alignment, and the rest of a short write has none.
                if error.errno != errno.EINVAL or not self._use_page_cache():
                    raise

    def _use_page_cache(self) -> bool:
        """Write through the page cache from here on; return whether that is a change."""
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        if not flags & _DIRECT:
            return False
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~_DIRECT)
        return True
