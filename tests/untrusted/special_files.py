"""What may lie where a file is expected, and what a reader says of it."""

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

KINDS = {
    "pipe": "is a pipe, not a file",
    "device": "is a device, not a file",
    "directory": "is a directory, not a file",
    "socket": "is a socket, not a file",
    "link to a pipe": "is a pipe, not a file",
    "loop": "is a link that leads back to itself",
    "dangling link": "is a link to '.*', which is not there",
    "nothing": "does not exist",
    "below a file": "does not exist",
}
"""By kind, a pattern of the message."""

PRESENT = [kind for kind in KINDS if kind not in ("nothing", "below a file")]
"""Those that are there, and so could be opened."""


def make(path: Path, kind: str) -> Path:
    """Put something of a kind at `path`; return the path under which it is asked for."""
    other = path.with_name(f"{path.name}.other")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "directory":
        path.mkdir()
    elif kind == "socket":
        # A socket's path may have 107 bytes, fewer than a test's folder can have.
        here = os.open(path.parent, os.O_RDONLY)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"/proc/self/fd/{here}/{path.name}")
        os.close(here)
    elif kind == "link to a pipe":
        os.mkfifo(other)
        path.symlink_to(other)
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "dangling link":
        path.symlink_to(other)
    elif kind == "below a file":
        other.write_text("")
        return other / path.name
    return path


@contextmanager
def no_hang(seconds: int = 20) -> Iterator[None]:
    """Fail, instead of waiting for ever, where something inside waits for a pipe or counts without end."""

    def fail(*_: object) -> None:
        raise AssertionError(f"it hangs: {seconds} s are over")

    before = signal.signal(signal.SIGALRM, fail)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
