"""A file whose long reads pass the page cache by: what a conversion reads once is not worth keeping."""

import errno
import mmap
import os
import threading
import weakref
from pathlib import Path

import numpy as np

from dsv3.checkpoint.released.shard_file import ShardFile

ALIGNMENT = mmap.PAGESIZE
"""What addresses, positions and sizes must be multiples of past the page cache."""
BLOCK = 8 * 2**20
"""Bytes a call to the disk."""
_LONG = 2**18
"""Bytes from which on a read is worth a call of its own to the disk."""
_scratch = threading.local()


class DirectFile(ShardFile):
    """A ShardFile that is read past the page cache where the disk allows it and a read is long."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._direct = _open(path)
        if self._direct >= 0:
            weakref.finalize(self, os.close, self._direct)

    def read(self, target: memoryview, offset: int, what: str) -> None:
        """Fill `target` (bytes) from byte `offset` on; the UserError of a failure names `what` was read."""
        done = self._read_directly(target, offset) if self._direct >= 0 and len(target) >= _LONG else 0
        if done < len(target):
            super().read(target[done:], offset + done, what)

    def _read_directly(self, target: memoryview, offset: int) -> int:
        """Bytes that were filled: fewer where the file ends or the disk fails, which `read` then tells."""
        filled, done = np.frombuffer(target, np.uint8), 0
        block = _block()
        while done < len(target):
            skipped = (offset + done) % ALIGNMENT
            wanted = min(len(target) - done, BLOCK)
            length = -(-(skipped + wanted) // ALIGNMENT) * ALIGNMENT
            try:
                view = memoryview(block)[:length]
                count = os.preadv(self._direct, [view], offset + done - skipped) - skipped
            except OSError as error:
                if error.errno == errno.EINVAL:  # this disk wants larger multiples
                    self._direct = -1
                break
            count = min(count, wanted)
            if count <= 0:
                break
            # NumPy lets other threads run meanwhile, a memoryview does not.
            filled[done : done + count] = np.frombuffer(block, np.uint8, count, skipped)
            done += count
        return done


def _block() -> mmap.mmap:
    """Memory of this thread that begins with a page."""
    block: mmap.mmap | None = getattr(_scratch, "block", None)
    if block is None:
        block = _scratch.block = aligned_memory(BLOCK + ALIGNMENT)
    return block


def aligned_memory(size: int) -> mmap.mmap:
    """Memory of `size` bytes that begins with a page, as calls past the page cache want it."""
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _open(path: Path) -> int:
    """A descriptor, -1 where there is nothing but the page cache."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_DIRECT)
    except (AttributeError, OSError):
        return -1
