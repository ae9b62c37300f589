"""Look at an archive of torch.save before torch.load reads it: a stranger's may run no code and never end.

torch.load(weights_only=True) builds tensors alone, but it hashes whatever a pickle names as a key, and
unpacks what is compressed. A tensor's archive is a zip without compression: a short pickle, `data.pkl`, and a
file per storage (https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT, 4.3.12 to 4.3.16).
"""

from struct import Struct
from typing import IO, Any, NamedTuple

from dsv3.checkpoint.metadata_pickle import Record, load_records

_TAIL = 2**16
"""Bytes at the end of an archive, in which its directory must lie: one of a tensor has 1,000."""

_MOST_FILES = 64

_LONGEST_PICKLE = 2**14
"""Bytes; that of a tensor has 400."""

_END = Struct("<4s4H2IH")
"""Signature, two disk numbers, files twice, bytes and place of the directory, length of a comment."""

_LOCATOR = Struct("<4sIQI")
"""Signature, disk, place of the 64-bit end record, disks."""

_END_64 = Struct("<4sQ2H2I4Q")
"""Signature, length, versions, disks, files twice, bytes and place of the directory."""

_ENTRY = Struct("<4s6H3I5H2I")
"""Signature, versions, flags, method, time, date, CRC, two sizes, three lengths, disk, attributes, place."""

_FILE = Struct("<4s5H3I2H")
"""Signature, version, flags, method, time, date, CRC, two sizes, two lengths."""


class _Entry(NamedTuple):
    """A file of the archive."""

    name: str
    size: int
    place: int


def require_tensor_archive(file: IO[bytes]) -> None:
    """Raise ValueError unless torch.load may read the archive that `file` holds; leave it at its begin."""
    if file.read(4) != b"PK\x03\x04":
        raise ValueError("it is no archive of torch.save")
    file.seek(0, 2)
    length = file.tell()  # a view of DCP's returns another number from seek
    entries = _directory(file, length)
    pickles = [entry for entry in entries if entry.name.rpartition("/")[2] == "data.pkl"]
    if len(pickles) != 1 or len({entry.name for entry in entries}) < len(entries):
        raise ValueError("it is no archive of one object")
    if sum(entry.size for entry in entries) > length or pickles[0].size > _LONGEST_PICKLE:
        raise ValueError("its files are larger than a tensor's")
    load_records(_content(file, pickles[0]), _stand_in)
    file.seek(0)


def _directory(file: IO[bytes], length: int) -> list[_Entry]:
    """Return the files that the archive's directory lists."""
    begin = max(0, length - _TAIL)
    file.seek(begin)
    tail = file.read(_TAIL)
    end = len(tail) - _END.size
    if end < 0 or tail[end : end + 4] != b"PK\x05\x06":
        raise ValueError("it is cut off, or has a comment behind it")
    _, _, _, _, count, size, place, _ = _END.unpack_from(tail, end)
    locator = end - _LOCATOR.size
    if locator >= 0 and tail[locator : locator + 4] == b"PK\x06\x07":
        end_64 = _LOCATOR.unpack_from(tail, locator)[2] - begin
        if not 0 <= end_64 <= locator - _END_64.size or tail[end_64 : end_64 + 4] != b"PK\x06\x06":
            raise ValueError("the end of its directory is damaged")
        *_, count, size, place = _END_64.unpack_from(tail, end_64)
    first = place - begin
    if not (count <= _MOST_FILES and first >= 0 and size <= len(tail) - first):
        raise ValueError("its directory is larger than a tensor's")
    entries: list[_Entry] = []
    for _ in range(count):
        entry, first = _entry(tail, first)
        entries.append(entry)
    return entries


def _entry(tail: bytes, at: int) -> tuple[_Entry, int]:
    """Return the file of a directory's entry, and where the next entry begins."""
    if len(tail) - at < _ENTRY.size or tail[at : at + 4] != b"PK\x01\x02":
        raise ValueError("its directory is damaged")
    fields = _ENTRY.unpack_from(tail, at)
    method, packed, size, lengths, place = fields[4], fields[8], fields[9], fields[10:13], fields[16]
    name_at = at + _ENTRY.size
    extra_at = name_at + lengths[0]
    # Numbers beyond 32 bits stand in the extra field, in this order, each where its own is full.
    extra, wide = tail[extra_at : extra_at + lengths[1]], [size, packed, place]
    values = iter(_wide_numbers(extra))
    size, packed, place = (next(values, number) if number == 0xFFFFFFFF else number for number in wide)
    if method != 0 or size != packed:
        raise ValueError("it is compressed")
    name = tail[name_at:extra_at].decode("utf-8", "replace")
    return _Entry(name, size, place), extra_at + lengths[1] + lengths[2]


def _wide_numbers(extra: bytes) -> list[int]:
    """Return the 64-bit numbers of an extra field."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = (int.from_bytes(extra[n : n + 2], "little") for n in (at, at + 2))
        if kind == 1:
            body = extra[at + 4 : at + 4 + length]
            return [int.from_bytes(body[n : n + 8], "little") for n in range(0, len(body) - 7, 8)]
        at += 4 + length
    return []


def _content(file: IO[bytes], entry: _Entry) -> bytes:
    """Return the bytes of a file of the archive."""
    file.seek(entry.place)
    header = file.read(_FILE.size)
    if len(header) < _FILE.size or header[:4] != b"PK\x03\x04":
        raise ValueError("its pickle is not where its directory says")
    *_, name, extra = _FILE.unpack(header)
    file.seek(entry.place + _FILE.size + name + extra)
    return file.read(entry.size)


def _stand_in(module: str, name: str) -> Any:
    """Return a record for any name: torch.load decides which of them may be called."""
    return Record
