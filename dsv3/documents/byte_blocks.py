"""Files as blocks of UTF-8 bytes: decompressed and, where a byte order mark says so, transcoded.

A block has about BLOCK bytes whatever the file is, and records are split off without holding more than
LONG_RECORD bytes of one: memory does not grow with a file or with a line.
"""

import bz2
import codecs
import errno
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any

from dsv3.errors import UserError
from dsv3.untrusted_files import BadFile, open_file

BLOCK = 1 << 20

ZSTD_BLOCK = 1 << 12
"""Compressed bytes that are given to zstd at once: its output is bounded by nothing but its input."""

LONG_RECORD = 4 << 20
"""Bytes of a record, such as a line, beyond which it is given in pieces."""

NEEDS_DATA_EXTRA = "install what it takes: pip install 'dsv3[data]'"

_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)

_ARCHIVES = {
    b"PK\x03\x04": "zip",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"Rar!\x1a\x07": "rar",
    b"\x1f\x9d": "compress (.Z)",
    b"\x04\x22\x4d\x18": "lz4",
    b"\xff\x06\x00\x00sNaPpY": "snappy",
}
"""The first bytes of what is compressed and not read here."""

Report = Callable[[int], None]
"""Gets the bytes of a file that have been read since the last call."""

ByteRecord = tuple[bytes, "LongRecord | None"]


class DamagedFile(Exception):
    """A file cannot be read to its end; the argument says why."""


class UnreadFile(Exception):
    """A file is of a kind that is not read; the argument names the kind."""


def _open(path: Path) -> IO[bytes]:
    """Return a file open for reading; OSError where it is none, such as a pipe that has taken its place."""
    try:
        return open_file(path)
    except BadFile as error:
        raise OSError(errno.EINVAL, error.reason, str(path)) from error


def file_form(path: Path) -> str:
    """Return how a file's bytes are to be read: plain, gz, zst, bz2, xz, or an encoding such as utf-16-le.

    Raises:
        UnreadFile: it is an archive, or compressed in another way.
        OSError: it cannot be opened.
    """
    with _open(path) as file:
        head = file.read(10)
    for magic, form in (
        (b"\x1f\x8b", "gz"),
        (b"\x28\xb5\x2f\xfd", "zst"),
        (b"BZh", "bz2"),
        (b"\xfd7zXZ\0", "xz"),
    ):
        if head.startswith(magic):
            return form
    if kind := next((kind for magic, kind in _ARCHIVES.items() if head.startswith(magic)), None):
        raise UnreadFile(kind)
    return next((name for mark, name in _MARKS if head.startswith(mark)), "plain")


def read_blocks(path: Path, report: Report, start: int = 0, end: int | None = None) -> Iterator[bytes]:
    """Yield the content of a file as UTF-8 without a byte order mark; of a plain file bytes [start, end).

    Raises:
        DamagedFile: it is truncated or damaged, or its encoding is not the one that its mark names.
        UnreadFile: it is of a kind that is not read.
        OSError: it cannot be read.
    """
    form = file_form(path)
    with _open(path) as file:
        if form == "plain":
            file.seek(start)
            yield from _counted(file, report, None if end is None else end - start)
            return
        if form.startswith("utf"):
            yield from _transcode(_counted(file, report), form)
            return
        blocks = _decompress(file, form, report)
        head = next(blocks, b"")
        mark = next((name for mark, name in _MARKS if head.startswith(mark)), None)
        content = chain([head], blocks)
        yield from content if mark is None else _transcode(content, mark)


def _counted(file: IO[bytes], report: Report, limit: int | None = None, size: int = 0) -> Iterator[bytes]:
    size = size or BLOCK
    while block := file.read(size if limit is None else min(size, limit)):
        if limit is not None:
            limit -= len(block)
        report(len(block))
        yield block


def _decompress(file: IO[bytes], form: str, report: Report) -> Iterator[bytes]:
    if form == "zst":
        yield from _decompress_zstd(_counted(file, report, size=ZSTD_BLOCK))
        return
    openers: dict[str, Callable[[IO[bytes]], IO[bytes]]] = {"gz": gzip.open, "bz2": bz2.open, "xz": lzma.open}  # type: ignore[dict-item]
    told = 0
    try:
        with openers[form](file) as content:
            while block := content.read(BLOCK):
                report(file.tell() - told)
                told = file.tell()
                yield block
    except (EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
        raise DamagedFile(str(error)) from error
    except OSError as error:
        if error.errno is None:  # for content that is damaged, bz2 and gzip raise OSErrors of their own
            raise DamagedFile(str(error)) from error
        raise


def _decompress_zstd(blocks: Iterator[bytes]) -> Iterator[bytes]:
    zstandard = _import_zstandard()
    opened: Any = None
    content: list[bytes] = []
    size = 0
    try:
        for block in blocks:
            data = block
            while data:
                opened = opened or zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
                content.append(opened.decompress(data))
                size += len(content[-1])
                data = opened.unused_data if opened.eof else b""
                opened = None if opened.eof else opened
            if size >= BLOCK:
                yield b"".join(content)
                content, size = [], 0
    except zstandard.ZstdError as error:
        raise DamagedFile(str(error)) from error
    yield b"".join(content)
    if opened is not None:
        raise DamagedFile("it ends within a compressed frame")


def _import_zstandard() -> Any:
    try:
        import zstandard
    except ImportError:
        raise UserError(f".zst files are read with the package zstandard: {NEEDS_DATA_EXTRA}") from None
    return zstandard


def _transcode(blocks: Iterator[bytes], encoding: str) -> Iterator[bytes]:
    """Yield text as UTF-8 in blocks that are not empty, without the mark; UTF-8 is passed on unread."""
    mark = next(mark for mark, name in _MARKS if name == encoding)
    skip = len(mark)
    decoder = codecs.getincrementaldecoder(encoding)()
    for block in blocks:
        content, skip = block[skip:], max(0, skip - len(block))
        try:
            content = content if encoding == "utf-8" else decoder.decode(content).encode()
        except UnicodeError as error:
            raise DamagedFile(f"it is not the {encoding} that its first bytes name: {error}") from error
        if content:
            yield content
    if encoding != "utf-8":
        try:
            decoder.decode(b"", final=True)
        except UnicodeError as error:
            raise DamagedFile(f"it ends within a character of {encoding}") from error


def split_records(blocks: Iterator[bytes], separator: bytes | None) -> Iterator[ByteRecord]:
    """Yield the records between separators, as bytes.split would; one record where there is none.

    A record of more than LONG_RECORD bytes is given as its first bytes and an iterator over the others, which
    may be left where it is. What follows the last separator is a record unless it is empty.
    """
    left = following = b""
    while (block := following or next(blocks, None)) is not None:
        following = b""
        *whole, left = (left + block).split(separator) if separator else (left + block,)
        for record in whole:
            yield record, None
        if len(left) > LONG_RECORD:
            rest = LongRecord(left, blocks, separator)
            yield rest.first, rest
            for _ in rest:
                pass
            left, following = b"", rest.following
    if left:
        yield left, None


class LongRecord:
    """The rest of a record that is too long to be held: iterate once over its bytes."""

    def __init__(self, begin: bytes, blocks: Iterator[bytes], separator: bytes | None) -> None:
        # The last bytes may be the beginning of a separator.
        cut = len(begin) - (len(separator) - 1 if separator else 0)
        self.first, left = begin[:cut], begin[cut:]
        self.following = b""
        """What has been read beyond the separator, once the record is over."""
        self.length = 0
        """Bytes given since the first ones."""
        self._pieces = self._read(left, blocks, separator)

    def __iter__(self) -> Iterator[bytes]:
        return self._pieces

    def _read(self, left: bytes, blocks: Iterator[bytes], separator: bytes | None) -> Iterator[bytes]:
        for block in blocks:
            data = left + block
            if separator and (at := data.find(separator)) >= 0:
                self.following = data[at + len(separator) :]
                self.length += at
                yield data[:at]
                return
            cut = max(len(data) - (len(separator) - 1 if separator else 0), 0)
            left = data[cut:]
            self.length += cut
            yield data[:cut]
        self.length += len(left)
        yield left


def record_start(path: Path, near: int, size: int, separator: bytes) -> int:
    """Return where the first record begins at or behind byte `near` of a plain file; `size` if none does.

    Two readers that share a file at `near` call this and find the same place, which is also one that a reader
    of the whole file stops at: a separator that no other overlaps from the left, as in a run of line ends.
    """
    if near == 0:
        return 0
    width = len(separator)
    place = max(near - width, 0)
    begin = max(place - width + 1, 0)  # an occurrence that begins here may overlap the first that counts
    with _open(path) as file:
        file.seek(begin)
        data, offset = b"", begin
        free = 0  # the last byte behind an occurrence that has been seen
        while block := file.read(BLOCK):
            data += block
            at = data.find(separator)
            while at >= 0:
                found = offset + at
                if found >= place and found >= free:
                    return found + width
                free = found + width
                at = data.find(separator, at + 1)
            keep = min(len(data), width - 1)
            offset += len(data) - keep
            data = data[len(data) - keep :]
    return size
