"""Write token shards: the ids of documents and their offsets, appended to two .npy files at a time.

Nothing per document is held: offsets go to the disk as the ids do. A writer can be set up again at a place
that it has noted, after a kill.
"""

import os
from array import array
from collections.abc import Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash

from dsv3.tokens.shard_index import Shard

SHARD_TOKENS = 1 << 30
"""Tokens at which a shard ends, with the document that reaches them."""

_BUFFER = 1 << 20

_OFFSETS = np.dtype("<i8")

_IDS_AT_ONCE = 1 << 18
"""Ids that wait, as Python's numbers, before they are converted and written."""


class NpyFile:
    """A 1-D .npy file that grows; its header tells the length once it is closed."""

    def __init__(self, path: Path, dtype: np.dtype[Any], length: int = 0, noted: str | None = None) -> None:
        """Create the file, or open it and cut it back to `length` values where it has that many.

        ValueError where it has fewer, or others than those whose digest was `noted`.
        """
        self.path = path
        self.dtype = dtype
        self._file: IO[bytes] = path.open("r+b" if length else "w+b", buffering=_BUFFER)
        self._header = self._begin(0)
        self._state: xxhash.xxh3_128 | None
        if length and path.stat().st_size < self._header + length * dtype.itemsize:
            self._file.close()
            raise ValueError(f"{path} is shorter than was noted")
        self.cut(length)
        if noted is not None and self.digest() != noted:
            self._file.close()
            raise ValueError(f"{path} is not what was noted")

    def write(self, values: bytes) -> None:
        """Append values as bytes of the dtype."""
        if self._state is not None:
            self._state.update(values)
        self._file.write(values)

    def digest(self) -> str:
        """Return the digest of the values so far as they were written; after a cut they are read for it."""
        if self._state is None:
            self._state = xxhash.xxh3_128()
            self._file.seek(self._header)
            while block := self._file.read(8 << 20):
                self._state.update(block)
        return self._state.hexdigest()

    def cut(self, length: int) -> None:
        """Forget what stands behind the first `length` values."""
        end = self._header + length * self.dtype.itemsize
        self._file.truncate(end)
        self._file.seek(end)
        self._state = None if length else xxhash.xxh3_128()

    def sync(self) -> None:
        """Wait until all that was written is on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self, length: int) -> str:
        """Write the header of `length` values, and return the digest of the file."""
        self._begin(length)
        self.sync()
        self._file.seek(0)
        digest = xxhash.xxh3_128()
        while block := self._file.read(8 << 20):
            digest.update(block)
        self._file.close()
        return digest.hexdigest()

    def abandon(self) -> None:
        """Close the file as it is."""
        self._file.close()

    def _begin(self, length: int) -> int:
        """Write the header at the beginning of the file, and return its size, the same for all lengths."""
        self._file.seek(0)
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (length,)}
        np.lib.format.write_array_header_1_0(self._file, header)
        return self._file.tell()


class ShardWriter:
    """Appends documents to shards NAME-000, NAME-001 .. in a folder.

    Args:
        name: the beginning of the names of the files.
        dtype: the dtype of the ids.
        noted: a place that `note` returned, to go on from.
        shard_tokens: as SHARD_TOKENS.

    Raises:
        ValueError: the files do not reach as far as was noted.
        OSError: they cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        dtype: np.dtype[Any],
        noted: dict[str, Any] | None = None,
        shard_tokens: int = SHARD_TOKENS,
    ) -> None:
        self._folder, self._name, self._dtype = folder, name, dtype
        self._shard_tokens = shard_tokens
        noted = noted or {"done": [], "tokens": 0, "documents": 0, "begin": 0}
        self.done = [Shard(**each) for each in noted["done"]]
        self._tokens, self._documents = int(noted["tokens"]), int(noted["documents"])
        self._begin = int(noted["begin"])
        self._noted: list[str] = list(noted.get("digests", ()))
        self._files: tuple[NpyFile, NpyFile] | None = None
        self._waiting: list[Sequence[int]] = []  # ids that are not written yet; one conversion for many
        self._written = self._tokens
        self._offsets = array("q")  # ends of documents that are not written yet
        if self._tokens:
            self._open()

    @property
    def open_tokens(self) -> int:
        """Return the tokens of the document that has not ended yet."""
        return self._tokens - self._begin

    def write(self, ids: Sequence[int]) -> None:
        """Append ids to the open document; the sequence must not change afterwards."""
        self._waiting.append(ids)
        self._tokens += len(ids)
        if self._tokens - self._written >= _IDS_AT_ONCE:
            self._write_waiting()

    def end_document(self) -> None:
        """End the open document; it has at least one token."""
        self._begin = self._tokens
        self._documents += 1
        self._offsets.append(self._tokens)
        if self._tokens >= self._shard_tokens:
            self._end_shard()

    def drop_document(self) -> None:
        """Forget the open document."""
        while self._waiting and self._tokens > self._begin:
            self._tokens -= len(self._waiting.pop())
        if self._tokens > self._begin:
            assert self._files is not None
            self._files[0].cut(self._begin)
            self._tokens = self._written = self._begin

    def note(self) -> dict[str, Any]:
        """Bring everything to the disk, and return the place to go on from as JSON."""
        self._write_waiting()
        for file in self._files or ():
            file.sync()
        return {
            "done": [shard.to_json() for shard in self.done],
            "tokens": self._tokens,
            "documents": self._documents,
            "begin": self._begin,
            "digests": [file.digest() for file in self._files or ()],
        }

    def close(self) -> list[Shard]:
        """End the last shard, and return all of them; they are on the disk."""
        if self._documents:
            self._end_shard()
        elif self._files is not None:  # of documents that were all dropped
            for file in self._files:
                file.abandon()
                file.path.unlink()
            self._files = None
        return self.done

    def abandon(self) -> None:
        """Leave the files as they are, such as after an error."""
        for file in self._files or ():
            with suppress(OSError):  # what is buffered does not fit on the disk either
                file.abandon()
        self._files = None

    def _open(self) -> None:
        stem = f"{self._name}-{len(self.done):03d}"
        resumed = self._written > 0
        digests = self._noted if resumed and self._noted else [None, None]
        tokens = NpyFile(self._folder / f"{stem}.tokens.npy", self._dtype, self._written, digests[0])
        documents = self._documents + 1 if resumed else 0
        offsets = NpyFile(self._folder / f"{stem}.offsets.npy", _OFFSETS, documents, digests[1])
        if not resumed:
            offsets.write(np.zeros(1, _OFFSETS).tobytes())
        self._files = tokens, offsets

    def _write_waiting(self) -> None:
        """Write what waits; the files are made with the first ids."""
        if self._tokens == self._written and not self._offsets:
            return
        if self._files is None:
            self._open()
        assert self._files is not None
        ids = np.fromiter(chain.from_iterable(self._waiting), self._dtype, self._tokens - self._written)
        self._files[0].write(ids.tobytes())
        self._files[1].write(np.array(self._offsets, _OFFSETS).tobytes())
        self._waiting, self._offsets, self._written = [], array("q"), self._tokens

    def _end_shard(self) -> None:
        self._write_waiting()
        assert self._files is not None
        tokens, offsets = self._files
        digests = {"tokens": tokens.close(self._tokens), "offsets": offsets.close(self._documents + 1)}
        self.done.append(Shard(tokens.path.name, offsets.path.name, self._tokens, self._documents, digests))
        self._files = None
        self._tokens = self._documents = self._begin = self._written = 0
