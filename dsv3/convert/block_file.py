"""A file that is appended to in large blocks, past the page cache where the disk allows it.

A conversion writes more than memory holds and reads none of it again: through the page cache every byte
costs a page to be found, filled and given back, which is most of the processors' time.
"""

import errno
import fcntl
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dsv3.checkpoint.released.direct_file import ALIGNMENT, BLOCK, aligned_memory

Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]
_DIRECT = getattr(os, "O_DIRECT", 0)


class BlockFile:
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
