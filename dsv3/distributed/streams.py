"""Keep a process going whose reader has left: `python train.py task=plan | head -2`, a closed terminal.

Python raises BrokenPipeError at the next print, wherever that is, and once more when the interpreter exits. A
command has its work to finish, a training run above all, and loses nothing: the run directory has it too.
"""

import contextlib
import os
import sys
from typing import Any, TextIO, cast


class LenientStream:
    """A text stream that drops what is written once nobody reads it; everything else is the stream's own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write `text`; drop it where the reader is gone."""
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            discard(self._stream)
            return len(text)

    def flush(self) -> None:
        """Flush; drop what waits where the reader is gone."""
        try:
            self._stream.flush()
        except BrokenPipeError:
            discard(self._stream)


def outlive_readers() -> None:
    """Make stdout and stderr of this process lenient."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, LenientStream):
            setattr(sys, name, cast(TextIO, LenientStream(stream)))


def discard(stream: TextIO) -> None:
    """Send to nowhere what `stream` still holds, and all that is written to it from now on."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def print_any_name() -> None:
    """Let stdout and stderr print what their encoding lacks as escapes, here and in processes started here.

    Names of files may be no UTF-8, and Python's own setting is to raise.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):  # a stream that stands in for a file
            cast(Any, stream).reconfigure(errors="backslashreplace")
    os.environ.setdefault("PYTHONIOENCODING", ":backslashreplace")
