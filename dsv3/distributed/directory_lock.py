"""One owner of a directory: a lock that the kernel drops with its holder, and a note that says who that is.

The lock is flock(2) on a file in the directory. The kernel drops it however the process ends, and on NFS
under Linux it holds between hosts too. A copy of the open file goes to the workers of a command, so the
directory is free only when the last of them is gone as well. The note is another file: filelock may empty a
lock's own.
"""

import contextlib
import errno
import json
import os
import shlex
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv3.distributed.signals import before_leaving, say
from dsv3.errors import UserError
from dsv3.untrusted_files import BadFile, read_json

if TYPE_CHECKING:
    from filelock import FileLock

LOCK_FILE, NOTE_FILE = ".lock", ".lock.json"

PATIENCE = 15.0
"""Seconds to wait for the workers of a command that was killed: they end within 10 (launching.md)."""

_LOOK_EVERY = 0.1

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What a file system without locks answers."""

_LONGEST = 120
"""Characters of a command that a message repeats."""

_CLOCK_STEP = 10.0
"""Seconds by which the start of a process may seem to change, as the clock is set."""


def kernel_lock(path: Path) -> "FileLock":
    """Return a lock of the kernel on a file, for all threads of this process; taking it may be an OSError.

    Never filelock's fallback, a file that must not exist: it would outlive a process that is killed.
    """
    from filelock import FileLock

    return FileLock(path, fallback_to_soft=False, is_singleton=False, thread_local=False)


def has_no_locks(error: Exception) -> bool:
    """Return True for the error of a file system that has no locks."""
    return isinstance(error, NotImplementedError) or getattr(error, "errno", None) in _NO_LOCKS


class DirectoryLock:
    """The ownership of a directory, from `take` to `release`.

    Args:
        directory: is made where it is missing, and removed again where nothing has come into it.
        named: what the user calls it, as in `resume=DIRECTORY`.
        doing: what happens to it, for the message to a second comer, as in `being written`.
        stays: the lock's file is still there at the end; not so in a folder that is handed on.
    """

    def __init__(self, directory: Path, named: str, doing: str = "in use", stays: bool = True) -> None:
        self.directory = directory
        self.stays = stays
        self.named = named
        self.doing = doing
        self.made: list[Path] = []
        """Directories to remove at the end where they are empty, the innermost first."""
        self._lock = kernel_lock(directory / LOCK_FILE)
        self._inherited: int | None = None

    @property
    def descriptor(self) -> int | None:
        """Return the open file that is locked; None where nothing is."""
        # filelock has no public name for it.
        return vars(self._lock)["_context"].lock_file_fd if self._lock.is_locked else None

    def take(self, patience: float = PATIENCE) -> None:
        """Take the lock; wait up to `patience` seconds for what a killed holder has left to be gone.

        Raises:
            UserError: another command holds it, with its host, process and start.
            OSError: the directory cannot be made or written.
        """
        directory = Path(os.path.abspath(self.directory))  # noqa: PTH100 (links stay as they are named)
        made = [path for path in (directory, *directory.parents) if not os.path.lexists(path)]
        directory.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + patience
        while not self._acquired():
            holder = read_holder(directory)
            if holder.get("alive") or time.monotonic() > deadline:
                raise UserError(self._refusal(holder))
            time.sleep(_LOOK_EVERY)
        self.made += made
        before_leaving.append(self._tidy)
        if self._lock.is_locked:
            with contextlib.suppress(OSError):  # a full disk: what is to be written will tell
                _write_note(directory / NOTE_FILE, self.doing)

    def release(self) -> None:
        """Give the directory back; remove it where nothing has come into it since this process made it."""
        self._tidy()
        if self._tidy in before_leaving:
            before_leaving.remove(self._tidy)
        self._lock.release(force=True)

    def __enter__(self) -> "DirectoryLock":
        """Take the lock."""
        self.take()
        return self

    def __exit__(self, *_: object) -> None:
        """Release the lock."""
        self.release()

    def __getstate__(self) -> dict[str, Any]:
        """Hand a copy of the open file to a process that is being spawned; any other copy holds nothing."""
        from multiprocessing.context import get_spawning_popen
        from multiprocessing.reduction import DupFd

        passed = DupFd(self.descriptor) if self.descriptor is not None and get_spawning_popen() else None
        return {"directory": self.directory, "named": self.named, "passed": passed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Keep the file open for as long as this process lives."""
        passed = state.pop("passed")
        self.__init__(**state)  # type: ignore[misc]
        self._inherited = passed and passed.detach()

    def _tidy(self) -> None:
        """Remove the note, and the directory where it is empty; the lock is still held."""
        with contextlib.suppress(OSError):
            if self._lock.is_locked:
                (self.directory / NOTE_FILE).unlink(missing_ok=True)
                if not self.stays:  # who waits for it notices, and makes a new one
                    (self.directory / LOCK_FILE).unlink(missing_ok=True)
            if self.made and {path.name for path in self.directory.iterdir()} <= {LOCK_FILE}:
                (self.directory / LOCK_FILE).unlink(missing_ok=True)
                for path in self.made:
                    path.rmdir()
        self.made = []

    def _acquired(self) -> bool:
        """Try to take the lock; return False where another process holds it."""
        from filelock import Timeout

        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            return False
        except (OSError, NotImplementedError) as error:
            if not has_no_locks(error):
                raise
            say(f"{self.directory}: this file system has no locks, so nothing keeps a second command out")
        return True

    def _refusal(self, holder: dict[str, Any]) -> str:
        """Return the message for a directory that another command holds."""
        if "pid" not in holder:
            return f"{self.named} is in use by another process, which has not said who it is: wait for it"
        subject = f"{self.named} is {holder['doing']}"  # what the holder does, which may be another task
        who = f"process {holder['pid']} on {holder['host']} since {holder['since']}"
        command = holder["command"]
        if holder["alive"] is False:
            return f"{subject} by workers of {who}, which has ended: wait for them ({command})"
        way = f"kill {holder['pid']}{'' if holder['here'] else ' on that host'}"
        return f"{subject} by {who} ({command})\nwait for it, or stop it: {way}"


def _write_note(file: Path, doing: str) -> None:
    """Write who holds the lock, for those who come second; nothing is left where it cannot be written."""
    note = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "doing": doing,
    }
    new = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        new.write_text(json.dumps(note), "utf-8")
        new.replace(file)
    finally:
        new.unlink(missing_ok=True)


def read_holder(directory: Path) -> dict[str, Any]:
    """Return what the note beside a lock says, `here` for this host, and whether the process is `alive`.

    `alive` is None on another host. Without a note that can be read the answer is empty.
    """
    try:
        note = read_json(directory / NOTE_FILE)
        found = {name: note[name] for name in ("host", "pid", "started", "since", "command")}
        found["doing"] = note.get("doing", "in use")  # notes of older code do not say
        pid, host, began = int(found["pid"]), str(found["host"]), float(found["started"])
        if not 0 < pid < 2**31:
            return {}
        here = host == socket.gethostname()
        started = _started(pid) if here else None
    except (OSError, BadFile, ValueError, TypeError, KeyError, OverflowError):
        return {}
    alive = started is not None and abs(started - began) < _CLOCK_STEP if here else None
    shown = {name: _shown(str(value), _LONGEST if name == "command" else 40) for name, value in found.items()}
    return shown | {"here": here, "alive": alive}


def _shown(text: str, longest: int) -> str:
    """Return a text out of a note for a message."""
    text = "".join(char if char.isprintable() else "?" for char in text)
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def _started(pid: int) -> float | None:
    """Return when a process has started, in seconds since 1970; None where there is none."""
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None
