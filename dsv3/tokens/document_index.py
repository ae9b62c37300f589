"""Find the documents of flat files: each ends with the id of the end of a text.

Flat files do not say where documents begin. Every id is looked at once, and the offsets are kept in the
cache, a file of int64 for each file of ids. A scan reads as fast as the disk does. What a killed scan has
left is gone on with.
"""

import hashlib
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from dsv3.metrics.progress import Phase, phase
from dsv3.tokens.cache import CacheEntryError, cache_root, load_or_build
from dsv3.tokens.file_array import FileArray
from dsv3.tokens.file_digests import digest
from dsv3.tokens.shuffle import Ids
from dsv3.tokens.token_store import Segment
from dsv3.untrusted_files import read_text

CHUNK = 1 << 24
"""Ids that are scanned at once; a thread needs 200 MB for them at worst, where each id ends a document."""

THREADS = 8

FORMAT = 1
"""Part of the cache key: raise it when documents are to be found differently."""

_LONG = np.dtype("<i8")


def with_documents(segments: Sequence[Segment], eos_id: int, cache_dir: str | None) -> list[Segment]:
    """Return the segments, those that do not say where documents begin with the ones that end with `eos_id`.

    What follows the last end is a document too.

    Raises:
        UserError: a file cannot be read, or the cache cannot be written.
    """
    unknown = [(s, s.tokens) for s in segments if s.divisible and isinstance(s.tokens, FileArray)]
    if not unknown:
        return list(segments)
    arrays = [array for _, array in unknown]
    key = hashlib.sha256(f"{FORMAT} {eos_id}".encode())
    for array in arrays:
        told = Path(array.path).stat()
        # As for make, names, sizes and times decide whether the entry is current.
        state = f"{array.dtype.str} {array.begin} {told.st_size} {told.st_mtime_ns}\n"
        key.update(f"{array.path}\0{state}".encode("utf-8", "surrogateescape"))

    def read(folder: Path) -> list[FileArray]:
        return [_read(_place(folder, number), len(array)) for number, array in enumerate(arrays)]

    def build(folder: Path) -> None:
        total = sum(len(array) for array in arrays)
        with (
            phase("looking for the ends of documents", total, "tokens", each_node=True) as work,
            ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as threads,
        ):
            for number, array in enumerate(arrays):
                _write(_place(folder, number), array, eos_id, threads, work)

    target = cache_root(cache_dir) / f"documents-{key.hexdigest()[:16]}"
    made_from = f"ends of documents (id {eos_id}) in {len(arrays)} files: {arrays[0].path} .."
    found = dict(zip(arrays, load_or_build(target, read, build, made_from), strict=True))
    return [
        replace(segment, offsets=found[segment.tokens], end=len(found[segment.tokens]) - 1, divisible=False)
        if segment.divisible and segment.tokens in found
        else segment
        for segment in segments
    ]


def _place(folder: Path, number: int) -> Path:
    return folder / f"{number:06}.i8"


def _read(path: Path, total: int) -> FileArray:
    """Return the offsets in a file; CacheEntryError where they are not whole."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise CacheEntryError(str(error)) from error
    offsets = FileArray(str(path), _LONG, 0, size // _LONG.itemsize)
    if (
        size % _LONG.itemsize
        or len(offsets) < 2
        or offsets[:1][0] != 0
        or offsets[len(offsets) - 1 :][0] != total
    ):
        raise CacheEntryError(f"{path} is cut off")
    return offsets


def _write(path: Path, array: FileArray, eos_id: int, threads: ThreadPoolExecutor, work: Phase) -> None:
    """Write the offsets of the documents of one file, where a build that was killed has not done it.

    The digest beside them tells whether they are still as that one has written them.
    """
    partial, noted = path.with_suffix(".partial"), path.with_suffix(".xxh3")
    if path.exists() and noted.exists() and read_text(noted) == digest(path):
        work.advance(len(array))
        return
    last = 0
    with partial.open("wb") as file:
        file.write(np.zeros(1, _LONG).tobytes())
        for ends, count in _scanned(array, eos_id, threads):
            file.write(ends.astype(_LONG).tobytes())
            last = int(ends[-1]) if len(ends) else last
            work.advance(count)
        if last < len(array):
            file.write(np.array([len(array)], _LONG).tobytes())
    noted.write_text(digest(partial), "utf-8")
    partial.replace(path)


def _scanned(array: FileArray, eos_id: int, threads: ThreadPoolExecutor) -> Iterator[tuple[Ids, int]]:
    """Yield where documents end in each chunk of a file, in order, and the ids of the chunk."""

    def scan(begin: int) -> tuple[Ids, int]:
        ids = array[begin : begin + CHUNK]
        return np.flatnonzero(ids == eos_id) + (begin + 1), len(ids)

    waiting: deque[Future[tuple[Ids, int]]] = deque()
    for begin in range(0, len(array), CHUNK):
        waiting.append(threads.submit(scan, begin))
        if len(waiting) > THREADS:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
