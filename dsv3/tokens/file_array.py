"""Arrays in files, read a slice at a time: any number of files, few of them open.

Ten terabytes of shards are 40,000 files, and a process may hold 1,024 open ones on many machines: a file is
opened when it is read, and closed when OPEN_FILES others have been read since. Slices are read rather than
memory-mapped. A row is then one request to the disk, where a map reads 128 KiB around each page, and a file
that became shorter is an error, where a map kills the process.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dsv3.errors import UserError
from dsv3.tokens.background_check import BACKGROUND
from dsv3.untrusted_files import BadFile, open_descriptor, open_file

OPEN_FILES = 256


class ArrayLike(Protocol):
    """A one-dimensional array that is read a slice at a time: an ndarray, a file, an object of a store."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> npt.NDArray[Any]:
        """Return the values of a slice `first:end` without a step, 0 <= first <= end <= len."""


@dataclass(frozen=True)
class FileArray:
    """An array [length] of `dtype` that begins `begin` bytes into the file at `path`.

    It holds no open file, so that it can be pickled and there can be many.
    """

    path: str
    dtype: np.dtype[Any]
    begin: int
    length: int

    def __post_init__(self) -> None:
        _open.cache_clear()  # the path may lead to another file by now

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, part: slice) -> npt.NDArray[Any]:
        """Return the values of a slice.

        Raises:
            UserError: the file cannot be read or has become shorter, or the background check has found damage
                in one of the run's files.
        """
        BACKGROUND.require_sound()
        first, end, _ = part.indices(self.length)
        width = self.dtype.itemsize
        wanted = max(end - first, 0) * width
        content = _read(self.path, self.begin + first * width, wanted)
        if len(content) != wanted:
            raise UserError(
                f"{self.path} has become shorter than at the start of the run: {len(content):,} of the "
                f"{wanted:,} bytes from byte {self.begin + first * width:,} on are there"
            )
        return np.frombuffer(content, self.dtype)


def find_missing(arrays: Sequence[ArrayLike], most: int = 256) -> str | None:
    """Return what is wrong with a file of FileArrays that is not there or cut off; None where nothing is.

    Only the sizes of `most` files from all over are compared: of 40,000 files on a network file system every
    process would wait minutes. What is missing of the others is told when it is read.
    """
    files = [array for array in arrays if isinstance(array, FileArray)]
    for number in range(min(len(files), most)):
        file = files[number * len(files) // min(len(files), most)]
        try:
            is_whole = Path(file.path).stat().st_size >= file.begin + file.length * file.dtype.itemsize
        except OSError as error:
            return f"{file.path} cannot be read: {error.strerror}"
        if not is_whole:
            return f"{file.path} is cut off"
    return None


def read_head(path: str | Path, nbytes: int) -> tuple[bytes, int]:
    """Return up to `nbytes` bytes from the start of a file, and its size.

    Raises:
        UserError: there is none, it is no regular file, or it cannot be read.
    """
    with open_file(path) as file:
        try:
            return file.read(nbytes), os.fstat(file.fileno()).st_size
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error


def map_array(path: Path) -> npt.NDArray[Any]:
    """Return the array in an .npy file of the cache, memory-mapped.

    Raises:
        ValueError: it is none, such as one of Python objects.
        OSError: it cannot be read.
    """
    with open_file(path) as file:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError(f"{path} is no file of this cache")
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        return np.memmap(file, dtype, "r", file.tell(), shape)


class _OpenFile:
    """A file descriptor that is closed when nobody holds the object: also not while another thread reads."""

    def __init__(self, path: str) -> None:
        self.descriptor = open_descriptor(path)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


_open = lru_cache(OPEN_FILES)(_OpenFile)


def _read(path: str, begin: int, count: int) -> bytes:
    """Return `count` bytes of a file from byte `begin` on, fewer at its end."""
    try:
        file = _open(path)
        content = os.pread(file.descriptor, count, begin)
        while 0 < len(content) < count:  # Linux reads 2 GiB at once at most
            more = os.pread(file.descriptor, count - len(content), begin + len(content))
            if not more:
                break
            content += more
    except BadFile:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    return content
