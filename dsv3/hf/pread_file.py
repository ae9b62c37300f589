"""Read files at given positions from several threads at once, through the page cache or past it."""

import errno
import mmap
import os
import threading
import weakref
from contextlib import suppress
from pathlib import Path

import numpy as np

from dsv3.errors import UserError
from dsv3.untrusted_files import open_descriptor


def fault(file: Path, text: str) -> UserError:
    """Return the error that a file is wrong, in one line that cannot steer a terminal."""
    path = "".join(char if char.isprintable() else "\ufffd" for char in str(file))
    return UserError(f"{path} {text}")


# The kernel's own limit lies just below 2 GiB; some systems refuse a call above theirs.
_LONGEST_CALL = 2**30


class PreadFile:
    """A regular file of which every read names its own position; it is closed once nobody holds the object.

    UserError where it cannot be opened or is a directory, pipe or device. Links are followed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = open_descriptor(path)
        # A thread that reads keeps the object, so no descriptor is closed, and its number used again,
        # under a read that is still going on.
        weakref.finalize(self, os.close, self._descriptor)
        self.size = os.fstat(self._descriptor).st_size
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError):  # a hint: some file systems have no use for it
                os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def read(self, target: memoryview, offset: int, what: str) -> None:
        """Fill `target` (bytes) from byte `offset` on; a failure's UserError names `what` was read."""
        done = 0
        while done < len(target):
            try:
                part = target[done : done + _LONGEST_CALL]
                count = os.preadv(self._descriptor, [part], offset + done)
            except OSError as error:
                raise fault(self.path, f"cannot be read at {what}: {error.strerror}") from None
            if count == 0:
                missing = len(target) - done
                raise fault(self.path, f"ends {missing} bytes before {what} does: it was cut off meanwhile")
            done += count


ALIGNMENT = mmap.PAGESIZE
"""Bytes of which addresses, positions and sizes must be multiples for direct I/O (past the page cache)."""

DISK_BLOCK = 8 * 2**20
"""Bytes per call to the disk in direct I/O."""

_SHORTEST_DIRECT = 2**18
"""Bytes from which on a read is worth a call of its own to the disk."""

_aligned = threading.local()


class DirectReader(PreadFile):
    """A PreadFile whose long reads pass the page cache by, where the disk allows it.

    A conversion reads each byte once, so that keeping it in the cache costs time and gains nothing.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._direct = -1  # no descriptor: the page cache alone
        with suppress(AttributeError, OSError):
            self._direct = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_DIRECT)
            weakref.finalize(self, os.close, self._direct)

    def read(self, target: memoryview, offset: int, what: str) -> None:
        """Fill `target` (bytes) from byte `offset` on; a failure's UserError names `what` was read."""
        is_long = len(target) >= _SHORTEST_DIRECT
        done = self._read_directly(target, offset) if self._direct >= 0 and is_long else 0
        if done < len(target):
            super().read(target[done:], offset + done, what)

    def _read_directly(self, target: memoryview, offset: int) -> int:
        """Return how many bytes were filled: fewer than asked where the file ends or the disk fails.

        `read` asks for the rest again through the page cache and raises what is wrong.
        """
        filled, done = np.frombuffer(target, np.uint8), 0
        block: mmap.mmap | None = getattr(_aligned, "block", None)
        if block is None:
            block = _aligned.block = aligned_memory(DISK_BLOCK + ALIGNMENT)
        while done < len(target):
            skipped = (offset + done) % ALIGNMENT
            wanted = min(len(target) - done, DISK_BLOCK)
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


def aligned_memory(size: int) -> mmap.mmap:
    """Return `size` bytes of memory that begins with a page, as direct I/O wants it."""
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


class OpenFiles:
    """The files that were read last, at most `limit` of them open; any number of threads may share it."""

    def __init__(self, limit: int = 64, kind: type[PreadFile] = PreadFile) -> None:
        self._limit, self._kind = limit, kind
        self._lock = threading.Lock()
        self._files: dict[Path, PreadFile] | None = {}

    def close(self) -> None:
        """Close the files, each once no thread reads from it any more."""
        with self._lock:
            self._files = None

    def get(self, path: Path) -> PreadFile:
        """Return the open file of a path; RuntimeError after `close`."""
        with self._lock:
            if self._files is None:
                raise RuntimeError("the reader is closed")
            # Taken out and put behind the others: the first is the one that was not used for longest.
            file = self._files.pop(path, None) or self._kind(path)
            self._files[path] = file
            if len(self._files) > self._limit:
                del self._files[next(iter(self._files))]
            return file
