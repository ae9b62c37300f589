"""Blocks and records of files: the same as reading the whole, whatever the sizes of blocks and records."""

import bz2
import codecs
import gzip
import lzma
import random
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import zstandard

from dsv3.documents import byte_blocks
from dsv3.documents.byte_blocks import DamagedFile, UnreadFile, read_blocks, record_start, split_records

TEXT = "".join(f"line {number}: \u00e9\u6f22\U0001f600\n" for number in range(2000))

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}


def blocks(content: bytes, size: int) -> Iterator[bytes]:
    for start in range(0, len(content), size):
        yield content[start : start + size]
        if start % 3 == 0:
            yield b""  # as a decoder gives for half a character


def records(content: bytes, separator: bytes | None, size: int) -> list[bytes | None]:
    """The records, some of the long ones left unread behind their first bytes."""
    found: list[bytes | None] = []
    for number, (first, rest) in enumerate(split_records(blocks(content, size), separator)):
        if rest is not None and number % 3 == 2:
            found.append(None)
            continue
        found.append(first + b"".join(rest or ()))
    return found


@pytest.mark.parametrize("separator", [b"\n", b"ab", b"aba", b"aa", None])
def test_records_are_those_of_split(separator: bytes | None, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(1)
    for long, size in [(1 << 20, 100), (4, 1), (4, 3), (9, 7), (30, 64)]:
        monkeypatch.setattr(byte_blocks, "LONG_RECORD", long)
        content = bytes(draw.choices(b"ab\n ", k=draw.randrange(400)))
        expected = content.split(separator) if separator else [content]
        if not expected[-1]:
            expected.pop()
        found = records(content, separator, size)
        assert len(found) == len(expected)
        assert all(each in (None, whole) for each, whole in zip(found, expected, strict=True))


@pytest.mark.parametrize("separator", [b"\n", b"\n\n", b"aba", b"<|end|>"])
def test_ranges_of_a_file_hold_each_record_once(
    separator: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(byte_blocks, "BLOCK", 5)
    draw = random.Random(2)
    file = tmp_path / "file"
    for _ in range(15):
        content = separator.join(
            bytes(draw.choices(b"ab\n<", k=draw.choice([0, 1, 3, 20]))) for _ in range(draw.randrange(1, 12))
        )
        file.write_bytes(content)
        count = draw.randrange(1, 8)
        bounds = [
            record_start(file, len(content) * n // count, len(content), separator) for n in range(count)
        ]
        bounds.append(len(content))
        assert bounds == sorted(bounds)
        found: list[bytes | None] = []
        for start, end in pairwise(bounds):
            found += records(b"".join(read_blocks(file, lambda count: None, start, end)), separator, 4)
        whole = records(content, separator, 4)
        assert found == whole


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_files_are_read_and_damage_is_seen(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"a{suffix}"
    compress = COMPRESS[suffix]
    content = compress(TEXT.encode()) + compress(b"second\n")  # as `cat a.gz b.gz` makes them
    file.write_bytes(content)
    counted: list[int] = []
    assert b"".join(read_blocks(file, counted.append)).decode() == TEXT + "second\n"
    assert sum(counted) == len(content)
    file.write_bytes(compress(TEXT.encode())[:-20])
    with pytest.raises(DamagedFile):
        b"".join(read_blocks(file, counted.append))
    broken = bytearray(compress(TEXT.encode()))
    broken[len(broken) // 2 : len(broken) // 2 + 8] = b"\xff" * 8
    file.write_bytes(broken)
    with pytest.raises(DamagedFile):
        b"".join(read_blocks(file, counted.append))


@pytest.mark.parametrize(
    ("mark", "encoding"),
    [
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
        (codecs.BOM_UTF32_LE, "utf-32-le"),
    ],
)
def test_a_byte_order_mark_decides_the_encoding(
    mark: bytes, encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(byte_blocks, "BLOCK", 7)
    for name, content in [
        ("a", mark + TEXT.encode(encoding)),
        ("b", gzip.compress(mark + TEXT.encode(encoding))),
    ]:
        (tmp_path / name).write_bytes(content)
        assert b"".join(read_blocks(tmp_path / name, lambda count: None)).decode() == TEXT
    if encoding != "utf-8":
        (tmp_path / "a").write_bytes(mark + TEXT.encode(encoding)[:-1])
        with pytest.raises(DamagedFile, match="within a character"):
            list(read_blocks(tmp_path / "a", lambda count: None))


def test_an_archive_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"PK\x03\x04rest")
    with pytest.raises(UnreadFile, match="zip"):
        list(read_blocks(tmp_path / "a.zip", lambda count: None))
