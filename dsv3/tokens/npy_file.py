"""The header of an .npy file of whole numbers, checked against the size of the file.

numpy's `load` maps what it can and tells the rest in its own words. Here every file that is cut off, damaged
or of another kind is a UserError that names it, and no file can run code: no pickle is ever read.
"""

import io
import math
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dsv3.errors import UserError, quoted
from dsv3.tokens.file_array import FileArray, read_head

HEAD = 4096
"""Bytes at the start of a file that hold its header: numpy's own have 128."""

_DIMENSIONS = 64
"""Of an array of numpy's at most."""

_PARSING = threading.Lock()
"""Held while warnings are off: that is one setting of the process, and headers are read in threads."""

_KINDS = {b"PK": "a zip archive, as numpy.savez writes it", b"\x1f\x8b": "compressed (gzip)"}


@dataclass(frozen=True)
class NpyFile:
    """Whole numbers in an .npy file, [shape] in C order from byte `begin` on."""

    path: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    begin: int

    @property
    def array(self) -> FileArray:
        """Return the numbers as one dimension."""
        return FileArray(self.path, self.dtype, self.begin, math.prod(self.shape))

    @classmethod
    def read(cls, path: str | Path, wanted: str) -> "NpyFile":
        """Read the header of a file.

        Args:
            wanted: what is needed, the end of each message.

        Raises:
            UserError: the file cannot be read, or is not such a file from its first byte to its last.
        """
        head, size = read_head(path, HEAD)
        return cls.parse(head, size, str(path), wanted)

    @classmethod
    def parse(cls, head: bytes, size: int, path: str, wanted: str) -> "NpyFile":
        """Return what the first HEAD bytes of a file of `size` bytes say; raise UserError as `read` does."""
        if not head.startswith(np.lib.format.MAGIC_PREFIX):
            kinds = (told for begin, told in _KINDS.items() if head.startswith(begin))
            found = next(kinds, "empty" if size == 0 else "no .npy file")
            raise UserError(f"{path} is {found}: {wanted}")
        shape, is_fortran, dtype, begin = parse_header(head, path, wanted)
        if dtype.kind not in "iu":
            found = "Python objects" if dtype.hasobject else dtype.name
            raise UserError(f"{path} holds {found} {list(shape)}: {wanted}")
        if not dtype.isnative:
            order = {"<": "little-endian", ">": "big-endian"}[dtype.byteorder]
            raise UserError(
                f"{path} holds {order} {dtype.name} {list(shape)}, which is not this machine's byte order: "
                "write it anew, numpy.save(FILE, array.astype(array.dtype.newbyteorder('=')))"
            )
        if is_fortran and len(shape) > 1:
            raise UserError(
                f"{path} {list(shape)} is stored column by column (Fortran order), rows are read: "
                "write it anew, numpy.save(FILE, numpy.ascontiguousarray(array))"
            )
        needed = begin + math.prod(shape) * dtype.itemsize
        if size != needed:
            how = "cut off" if size < needed else "longer than it says"
            raise UserError(
                f"{path} is {how}: {dtype.name} {list(shape)} end at byte {needed:,}, it has {size:,} bytes"
            )
        return cls(path, dtype, shape, begin)


def parse_header(head: bytes, path: str, wanted: str) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Return shape, order and dtype of a header by numpy's own reader, and the byte behind the header.

    UserError, with `wanted` at its end, for a header that is damaged. numpy's words are not passed on: they
    advise to load the file in unsafe ways.
    """
    file = io.BytesIO(head)
    try:
        version = np.lib.format.read_magic(file)
        readers = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
            (3, 0): np.lib.format.read_array_header_2_0,  # the same but for names of fields, in UTF-8
        }
        if version not in readers:
            raise UserError(
                f"{path} has a damaged header (its version {version[0]}.{version[1]} is not one of plain "
                f"numbers): {wanted}"
            )
        with _PARSING, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy's about headers of Python 2, Python's about odd literals
            shape, is_fortran, dtype = readers[version](file)
    except UserError:
        raise
    except Exception as error:  # of numpy and of Python's parser, on a text that numpy has not written
        raise UserError(f"{path} has a damaged header: {wanted}") from error
    if len(shape) > _DIMENSIONS or any(not 0 <= length < 1 << 62 for length in shape):
        raise UserError(f"{path} has a damaged header (its shape is {quoted(shape)}): {wanted}")
    return shape, is_fortran, dtype, file.tell()
