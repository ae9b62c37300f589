"""A file read at given positions by several threads at once."""

import os
import stat
import weakref
from contextlib import suppress
from pathlib import Path

from dsv3.checkpoint.released.stored_tensor import fault, quoted
from dsv3.runtime.errors import UserError

# The kernel's own limit lies just below 2 GiB; some systems refuse a call above theirs.
_LONGEST_CALL = 2**30


class ShardFile:
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
