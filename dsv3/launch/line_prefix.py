"""Tell apart what jobs of a sweep print side by side: a prefix before every line of a job and its workers.

Workers inherit the two file descriptors, so the prefix is put there and not at Python's streams.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator

# Seconds to wait for the last lines of a job.
_PATIENCE = 5.0

_CHUNK = 1 << 16


@contextlib.contextmanager
def prefix_lines(prefix: str) -> Iterator[None]:
    """Put `prefix` before every line that this process and its children print meanwhile."""
    _flush()
    with contextlib.ExitStack() as stack:
        for number in (1, 2):
            with contextlib.suppress(OSError):  # a stream that the parent has closed
                stack.callback(_Relay(number, prefix.encode()).end)
        try:
            yield
        finally:
            _flush()


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()


class _Relay:
    """A pipe in the place of a file descriptor, and a thread that passes its lines on with the prefix."""

    def __init__(self, number: int, prefix: bytes) -> None:
        self.number, self.prefix = number, prefix
        self.original = os.dup(number)
        self.reading, writing = os.pipe()
        os.dup2(writing, number)
        os.close(writing)
        self.last = b"\0" + os.urandom(16).hex().encode()
        """Bytes that end the part of the job; a child that goes on, as wandb's does, may write more."""
        self.drained = threading.Event()
        threading.Thread(target=self._pass_on, daemon=True).start()

    def end(self) -> None:
        """Put the file descriptor back once all that was written has been passed on."""
        with contextlib.suppress(OSError):
            os.write(self.number, self.last)
        os.dup2(self.original, self.number)
        self.drained.wait(_PATIENCE)

    def _pass_on(self) -> None:
        rest = b""
        while chunk := os.read(self.reading, _CHUNK):
            before, ended, after = (rest + chunk).partition(self.last)
            lines = before.splitlines(keepends=True)
            # Half a line waits for its end, so that lines of several jobs do not mix.
            rest = lines.pop() if lines and not ended and not lines[-1].endswith(b"\n") else b""
            self._write(lines)
            if ended:
                self.drained.set()
                rest = after
        self._write([rest] if rest else [])
        os.close(self.reading)
        os.close(self.original)

    def _write(self, lines: list[bytes]) -> None:
        text = b"".join(self.prefix + line.rstrip(b"\r\n") + b"\n" for line in lines)
        # A reader that has gone must not stop the job: its pipe would fill up.
        with contextlib.suppress(OSError):
            while text:
                text = text[os.write(self.original, text) :]
