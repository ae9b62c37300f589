"""One tensor of a safetensors file, its types, and how what is wrong with it is told.

A file read at given positions by several threads at once.

A file whose long reads pass the page cache by: what a conversion reads once is not worth keeping.
"""

import errno
import mmap
import os
import stat
import threading
import weakref
from contextlib import suppress
from pathlib import Path
from reprlib import Repr

import numpy as np

from dsv3.errors import UserError

_SHORT = Repr()

_SHORT.maxstring = _SHORT.maxother = 120

_SHORT.maxlist = 8


def quoted(value: object) -> str:
    """A name or value out of a file, short, in quotes and with everything unprintable escaped."""
    return _SHORT.repr(value)


def fault(file: Path, text: str) -> UserError:
    """What is wrong with a file, in one line that cannot steer the terminal."""
    path = "".join(char if char.isprintable() else "\ufffd" for char in str(file))
    return UserError(f"{path} {text}")


# The kernel's own limit lies just below 2 GiB; some systems refuse a call above theirs.
_LONGEST_CALL = 2**30


class PreadFile:
    """A regular file, closed once nobody holds the object; every read names its own position.

    UserError where it cannot be opened or is a directory, pipe or device; links are followed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = _open(path)
        # A thread that reads keeps the object, so no descriptor is closed, and its number used again,
        # under a read that is still going on.
        weakref.finalize(self, os.close, self._descriptor)
        status = os.fstat(self._descriptor)
        if not stat.S_ISREG(status.st_mode):
            kind = "a directory" if stat.S_ISDIR(status.st_mode) else "a pipe or device"
            raise fault(path, f"is {kind}, not a file")
        self.size = status.st_size
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError):  # a hint: some file systems have no use for it
                os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def read(self, target: memoryview, offset: int, what: str) -> None:
        """Fill `target` (bytes) from byte `offset` on; the UserError of a failure names `what` was read."""
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


def _open(path: Path) -> int:
    try:
        # Without O_NONBLOCK a named pipe would wait for its writer; regular files do not mind.
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        raise _unopened(path, error) from None


def _unopened(path: Path, error: OSError | ValueError) -> UserError:
    if isinstance(error, FileNotFoundError) and path.is_symlink():
        link = quoted(str(path.readlink()))
        return fault(path, f"is a link to {link}, which is not there: the download may be incomplete")
    return fault(path, f"cannot be opened: {getattr(error, 'strerror', None) or error}")


ALIGNMENT = mmap.PAGESIZE
"""What addresses, positions and sizes must be multiples of past the page cache."""

BLOCK = 8 * 2**20
"""Bytes a call to the disk."""

_LONG = 2**18
"""Bytes from which on a read is worth a call of its own to the disk."""

_scratch = threading.local()


class DirectReader(PreadFile):
    """A PreadFile that is read past the page cache where the disk allows it and a read is long."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._direct = _open_direct(path)
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


def _open_direct(path: Path) -> int:
    """A descriptor, -1 where there is nothing but the page cache."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_DIRECT)
    except (AttributeError, OSError):
        return -1
