"""Documents of files, one after the other: text, JSON lines, Parquet and datasets, compressed or not.

A document is given whole, or in pieces where it is long, so that memory is bounded whatever a file, a line or
a document holds. What is no document is skipped and counted by reason, with the first place of each.
"""

import codecs
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

from dsv3.documents.byte_blocks import (
    ByteRecord,
    DamagedFile,
    LongRecord,
    Report,
    UnreadFile,
    read_blocks,
    record_start,
    split_records,
)
from dsv3.documents.input_files import FileKind, Part, Unit
from dsv3.documents.json_values import JsonValues
from dsv3.documents.long_json import FieldKind, LongObject, NotJson
from dsv3.documents.skip_limit import BadDocument, Reason, Skipped
from dsv3.documents.table_files import TABLE_READERS
from dsv3.errors import quoted

FIRST_PIECE = 1 << 16
"""Characters that the first piece of a document has at least, unless the document has fewer."""


@dataclass(frozen=True)
class ReadOptions:
    """The options by which documents are found in files.

    Attributes:
        field: the field or column that holds a document's text.
        separator: the text between the documents of a text file; None: a file is one document.
    """

    field: str = "text"
    separator: str | None = None


@dataclass
class Document:
    """One document.

    Attributes:
        name: the file, with a line, byte or row behind it where a file holds many.
        text: the whole document, or its first piece of at least FIRST_PIECE characters.
        rest: the other pieces; None where `text` is all.
    """

    name: str
    text: str
    rest: Iterator[str] | None = None

    def pieces(self) -> Iterator[str]:
        """Yield the text in order; once.

        Raises:
            BadDocument: what was given so far belongs to no document, and is to be forgotten.
        """
        yield self.text
        if self.rest is not None:
            yield from self.rest


def no_report(nbytes: int) -> None:
    """Take note of bytes that were read, and do nothing."""


def read_documents(
    unit: Unit, options: ReadOptions, skipped: Skipped, report: Report = no_report
) -> Iterator[Document]:
    """Yield the documents of a unit, always the same ones in the same order.

    A document's pieces are to be read before the next document is asked for; those that are not read then are
    read over, and judged all the same.

    Args:
        skipped: takes the counts.
        report: gets the bytes that are read, `unit.nbytes` in all.
    """
    for part in unit.parts:
        left = part.nbytes

        def count(nbytes: int) -> None:
            nonlocal left
            left -= nbytes
            report(nbytes)

        try:
            for document in _READERS[part.file.kind](part, options, skipped, count):
                try:
                    if document.rest is not None:
                        document.rest = _Watched(document.rest)
                    yield document
                    if document.rest is not None:
                        for _ in document.rest:
                            pass
                        if document.rest.failed:
                            continue
                except BadDocument:
                    continue
                skipped.documents += 1
        except UnreadFile as error:
            skipped.add(Reason.ARCHIVE, f"{part.file.name} ({error})")
        except DamagedFile as error:
            skipped.add(Reason.DAMAGED, f"{part.file.name} ({error})")
        except OSError as error:
            skipped.add(Reason.UNREADABLE, f"{part.file.name} ({error.strerror or error})")
        report(left)  # of a file that was given up, or of a range whose last record ends elsewhere
        part.file.check_unchanged()


class _Watched:
    """The rest of a document, which notes that it ended in BadDocument: its reader may have caught it."""

    def __init__(self, pieces: Iterator[str]) -> None:
        self._pieces = pieces
        self.failed = False

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        try:
            return next(self._pieces)
        except BadDocument:
            self.failed = True
            raise


def _read_text(part: Part, options: ReadOptions, skipped: Skipped, report: Report) -> Iterator[Document]:
    separator = None if options.separator is None else options.separator.encode()
    if part.file.size == 0:
        skipped.empty += 1
        return
    for name, (content, rest) in _records(part, separator, report):
        if rest is not None:
            document = _long_document(name, _decode_long(content, rest, name, skipped), skipped)
            if document is not None:
                yield document
            continue
        if b"\0" in content:
            skipped.add(Reason.NUL, name)
            continue
        try:
            text = content.decode()
        except UnicodeDecodeError:
            skipped.add(Reason.NOT_UTF8, name)
            continue
        if not text or (separator is not None and text.isspace()):
            skipped.empty += 1
        else:
            yield Document(name, text)


def _read_json_lines(
    part: Part, options: ReadOptions, skipped: Skipped, report: Report
) -> Iterator[Document]:
    return _read_json(_records(part, b"\n", report), options.field, skipped)


def _read_json_values(
    part: Part, options: ReadOptions, skipped: Skipped, report: Report
) -> Iterator[Document]:
    values = enumerate(JsonValues(read_blocks(part.file.path, report)), 1)
    records = ((f"{part.file.name}: document {number}", record) for number, record in values)
    return _read_json(records, options.field, skipped)


def _read_json(
    records: Iterable[tuple[str, tuple[bytes, Iterable[bytes] | None]]], key: str, skipped: Skipped
) -> Iterator[Document]:
    """Yield the documents of JSON objects that come with their names."""
    for name, (line, rest) in records:
        if rest is not None:
            document = _long_document(name, _decode_long_json(line, rest, key, name, skipped), skipped)
            if document is not None:
                yield document
            continue
        if b"\0" in line:
            skipped.add(Reason.NUL, name)
            continue
        try:
            found = json.loads(line.decode())
        except UnicodeDecodeError:
            skipped.add(Reason.NOT_UTF8, name)
            continue
        except (ValueError, RecursionError):
            if line and not line.isspace():
                skipped.add(Reason.NO_JSON, name)
            continue
        if not isinstance(found, dict):
            skipped.add(Reason.NO_OBJECT, name)
            continue
        text = found.get(key)
        if isinstance(text, str):
            if b"\\u" in line and (reason := _no_text(text)):
                skipped.add(reason, name)
            elif text:
                yield Document(name, text)
            else:
                skipped.empty += 1
        elif key in found:
            skipped.add(Reason.NO_TEXT, f"{name} ({quoted(text)})")
        else:
            skipped.add(Reason.NO_FIELD, f"{name} (it has {_listed(found)})")


def _read_table(part: Part, options: ReadOptions, skipped: Skipped, report: Report) -> Iterator[Document]:
    table = TABLE_READERS[part.file.kind](part, options.field, report)
    if not table.has_field:
        skipped.add(Reason.NO_FIELD, f"{part.file.name} (it has {_listed(table.columns)})", table.num_rows)
        return
    for number, text in enumerate(table.texts, table.first_row + 1):
        if isinstance(text, str):
            if reason := _no_text(text):
                skipped.add(reason, f"{part.file.name}: row {number}")
            elif text:
                yield Document(f"{part.file.name}: row {number}", text)
            else:
                skipped.empty += 1
        elif isinstance(text, UnicodeDecodeError):
            skipped.add(Reason.NOT_UTF8, f"{part.file.name}: row {number}")
        else:
            skipped.add(Reason.NO_TEXT, f"{part.file.name}: row {number} ({quoted(text)})")


_READERS: dict[FileKind, Callable[[Part, ReadOptions, Skipped, Report], Iterator[Document]]] = {
    FileKind.text: _read_text,
    FileKind.json_lines: _read_json_lines,
    FileKind.json_values: _read_json_values,
    FileKind.parquet: _read_table,
    FileKind.dataset: _read_table,
    FileKind.hub: _read_table,
}


def _records(part: Part, separator: bytes | None, report: Report) -> Iterator[tuple[str, ByteRecord]]:
    """Yield the records of a file or of a range of it, each with its name."""
    file = part.file
    start, end = part.start, part.end
    if separator is not None and end is not None:  # a range of a plain file
        start = record_start(file.path, start, file.size, separator)
        end = record_start(file.path, end, file.size, separator)
        if start >= end:
            return
    place = start
    what = "line" if separator == b"\n" else "document"
    for number, record in enumerate(split_records(read_blocks(file.path, report, start, end), separator), 1):
        if separator is None:
            name = file.name
        elif start == 0:
            name = f"{file.name}: {what} {number}"
        else:
            name = f"{file.name}: byte {place}"
        yield name, record
        if separator is not None:
            first, rest = record
            place += len(first) + len(separator) + (rest.length if rest is not None else 0)


def _decode_long(first: bytes, rest: LongRecord, name: str, skipped: Skipped) -> Iterator[str]:
    """Yield a long record's text; BadDocument where it is none."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for block in chain([first], rest):
            if b"\0" in block:
                raise skipped.bad(Reason.NUL, name)
            yield decoder.decode(block)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        raise skipped.bad(Reason.NOT_UTF8, name) from None
    except (DamagedFile, OSError) as error:
        raise _end_of_file(error, name, skipped) from None


def _decode_long_json(
    first: bytes, rest: Iterable[bytes], key: str, name: str, skipped: Skipped
) -> Iterator[str]:
    """Yield the text in a long JSON object; BadDocument where there is none."""

    def blocks() -> Iterator[bytes]:
        for block in chain([first], rest):
            if b"\0" in block:
                raise skipped.bad(Reason.NUL, name)
            yield block

    found = LongObject(blocks(), key)
    try:
        for piece in found:
            if reason := _no_text(piece):
                raise skipped.bad(reason, name)
            yield piece
    except NotJson:
        raise skipped.bad(Reason.NO_JSON, name) from None
    except UnicodeDecodeError:
        raise skipped.bad(Reason.NOT_UTF8, name) from None
    except (DamagedFile, OSError) as error:
        raise _end_of_file(error, name, skipped) from None
    if found.kind is FieldKind.missing:
        raise skipped.bad(Reason.NO_FIELD, f"{name} (it has {_listed(found.keys)})")
    if found.kind is FieldKind.other:
        raise skipped.bad(Reason.NO_TEXT, name)


def _end_of_file(error: Exception, name: str, skipped: Skipped) -> BadDocument:
    """Count a file that ends early, within a document of which pieces were given."""
    reason = Reason.UNREADABLE if isinstance(error, OSError) else Reason.DAMAGED
    return skipped.bad(reason, f"{name} ({error})")


def _long_document(name: str, pieces: Iterator[str], skipped: Skipped) -> Document | None:
    """Return a document whose first piece is long enough; None where it is none, or empty."""
    first: list[str] = []
    try:
        for piece in pieces:
            first.append(piece)
            if sum(map(len, first)) >= FIRST_PIECE:
                return Document(name, "".join(first), pieces)
    except BadDocument:
        return None
    if not any(first):
        skipped.empty += 1
        return None
    return Document(name, "".join(first))


def _no_text(text: str) -> str | None:
    """Return the reason why a string is no text: it cannot be written as UTF-8, or holds NUL; else None."""
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return Reason.LONE_SURROGATE
    return Reason.NUL if "\0" in text else None


def _listed(names: Any) -> str:
    """Return the names of fields for a message."""
    shown = [quoted(name) for name in list(names)[:8]]
    return ", ".join(shown) or "none"
