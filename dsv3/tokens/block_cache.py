"""A cache of blocks of remote files on a local disk, of a fixed size, shared by the processes of a node.

Two sparse files: `blocks` has room for a number of blocks, `slots` an entry of 32 bytes for each. A block may
lie in any of the WAYS slots of one set, which its key chooses, and takes the place of the one that was used
longest ago. Nothing is scanned, and nothing grows. An entry holds a checksum of its block. So what a killed
process or a power cut has left half-written, and what two processes have written at once, is a block that is
missing, and never a wrong one.
"""

import contextlib
import fcntl
import mmap
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import xxhash

from dsv3.metrics.progress import tell

BLOCK = 64 * 1024
"""Bytes of a block: half of a row of 32,768 tokens, and what an object store sends as fast as one byte."""

WAYS = 8

_SLOT = np.dtype([("key", "<u8", 2), ("check", "<u8"), ("size", "<u4"), ("used", "<u4")])


class BlockCache:
    """The cache in a directory that `BlockCache.make` has made."""

    def __init__(self, directory: Path) -> None:
        self._slots_file = os.open(directory / "slots", os.O_RDWR | os.O_CLOEXEC)
        self._blocks_file = os.open(directory / "blocks", os.O_RDWR | os.O_CLOEXEC)
        self._map = mmap.mmap(self._slots_file, 0)
        self._sets = np.frombuffer(self._map, _SLOT).reshape(-1, WAYS)
        self._is_full = self._is_damaged = False

    @staticmethod
    def make(directory: Path, nbytes: int) -> None:
        """Make an empty cache of at most `nbytes` of blocks in a directory; it takes no space yet."""
        slots = BlockCache.slots(nbytes)
        for name, size in (("slots", slots * _SLOT.itemsize), ("blocks", slots * BLOCK)):
            with (directory / name).open("wb") as file:
                file.truncate(size)

    @staticmethod
    def is_sound(directory: Path, nbytes: int) -> bool:
        """Return True where a directory holds a cache of this size."""
        slots, wanted = directory / "slots", BlockCache.slots(nbytes) * _SLOT.itemsize
        return slots.is_file() and slots.stat().st_size == wanted and (directory / "blocks").is_file()

    @staticmethod
    def slots(nbytes: int) -> int:
        """Return the number of blocks in a cache of `nbytes`."""
        return max(1, nbytes // BLOCK // WAYS) * WAYS

    def get(self, key: bytes) -> bytes | None:
        """Return the block of a key of 16 bytes; None where it is not there."""
        low, high = np.frombuffer(key, "<u8")
        number = int(low) % len(self._sets)
        ways = self._sets[number]
        for way in np.flatnonzero((ways["key"][:, 0] == low) & (ways["key"][:, 1] == high)):
            entry = ways[way].copy()
            place = (number * WAYS + int(way)) * BLOCK
            content = os.pread(self._blocks_file, min(int(entry["size"]), BLOCK), place)
            if _check(content, key) == entry["check"]:
                ways["used"][way] = _now()
                return content
            if not self._is_damaged and entry["check"]:
                tell("a block of the cache of remote data is damaged, or was half-written: it is read again")
                self._is_damaged = True
        return None

    def put(self, key: bytes, content: bytes) -> None:
        """Keep a block of at most BLOCK bytes, in place of the one of its set that was used longest ago."""
        number = int(np.frombuffer(key, "<u8")[0]) % len(self._sets)
        ways = self._sets[number]
        way = int(np.argmin(ways["used"]))
        ways[way] = (0, 0), 0, 0, _now()
        try:
            os.pwrite(self._blocks_file, content, (number * WAYS + way) * BLOCK)
        except OSError as error:  # a full disk makes the cache smaller, and ends no run
            if not self._is_full:
                tell(f"the cache of remote data cannot be written ({error.strerror}): blocks are read again")
                self._is_full = True
            return
        ways[way] = np.frombuffer(key, "<u8"), _check(content, key), len(content), _now()

    @contextlib.contextmanager
    def fetching(self, key: bytes) -> Iterator[None]:
        """Hold the right to fetch a block: another process of the node that wants it waits, and then has it.

        The kernel takes it from a process that dies. Without locks on the file system, both fetch.
        """
        number = int(np.frombuffer(key, "<u8")[0]) % len(self._sets)
        with contextlib.suppress(OSError):
            fcntl.lockf(self._slots_file, fcntl.LOCK_EX, 1, number)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                fcntl.lockf(self._slots_file, fcntl.LOCK_UN, 1, number)


def _check(content: bytes, key: bytes) -> int:
    """Return a checksum of a block and its key, never 0, as the content of an empty slot."""
    return xxhash.xxh3_64_intdigest(content, int.from_bytes(key[8:], "little")) | 1


def _now() -> int:
    """Return the time in seconds; 0 is a slot that has never been used."""
    return int(time.time()) & 0xFFFFFFFF
