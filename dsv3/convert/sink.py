"""A file under way: whatever passes is digested, counted and reported."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Event

from xxhash import xxh3_128

from dsv3.convert.block_file import BlockFile


class Interrupted(Exception):
    """The conversion is to stop: another worker has failed, or the user has had enough."""


class Sink:
    """Binary file object that appends to `path`; `report` is told of bytes written."""

    def __init__(self, path: Path, report: Callable[[int], None], stop: Event) -> None:
        self.path = path
        self.position = 0
        self.failure: Exception | None = None
        """What stopped a write: torch.save, which calls it, makes an error of its own of that."""
        self._digest = xxh3_128()
        self._report = report
        self._stop = stop
        self._file = BlockFile(path)

    def write(self, data: bytes | memoryview) -> int:
        """Append all of `data`; Interrupted where the conversion is to stop, OSError of a full disk."""
        try:
            return self._append(data)
        except (Interrupted, OSError) as failure:
            self.failure = failure
            raise

    def _append(self, data: bytes | memoryview) -> int:
        if self._stop.is_set():
            raise Interrupted
        rest = memoryview(data).cast("B") if len(data) else memoryview(b"")
        self._digest.update(rest)
        self._file.write(rest)
        self.position += len(rest)
        self._report(len(rest))
        return len(rest)

    def flush(self) -> None:
        """Nothing is buffered here."""

    def discard(self) -> None:
        """Give the file up: what is half written would only fill the disk."""
        with suppress(OSError):  # why it is given up matters more
            self._file.close()
            self.path.unlink(missing_ok=True)

    def finish(self) -> str:
        """Wait until the bytes are on the disk, close; the digest of the whole file."""
        self._file.sync()
        self._file.close()
        return self._digest.hexdigest()
