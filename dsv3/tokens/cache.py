"""The cache of prepared data: its folder, and entries that appear complete or not at all.

An entry is a directory. It is built beside its place, in a hidden directory of its own, and published by one
rename, so a reader never sees half of it. The process that builds holds a lock, and a directory that a killed
process has left is gone on with by the next one. Where a file system has no locks, every process builds for
itself and the first to finish wins: correctness rests on the rename alone.

    NAME/             an entry; NAME/entry.json says what it was made from, its time is that of the last use,
                      and NAME/seal.json the digests by which damage is noticed
    .NAME.lock        held while the entry is built
    .NAME.work/       what is built
    .NAME.progress    how far that is, for the processes that wait
"""

import contextlib
import fcntl
import json
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from dsv3.config.data import cache_root as cache_root
from dsv3.distributed.directory_lock import kernel_lock
from dsv3.distributed.heartbeat import HEARTBEAT
from dsv3.errors import UserError
from dsv3.metrics import progress
from dsv3.metrics.progress import Phase, duration, phase
from dsv3.tokens.cache_seal import BrokenSeal, check_seal, write_seal
from dsv3.untrusted_files import read_json

ENTRY_FILE = "entry.json"

LOOK, TELL = 1.0, 1.0
"""Seconds at most between two looks at a lock that is held, and between two notes of progress."""

SILENCE = 60.0
"""Seconds after which a waiting process says that the other one does not move."""

Value = TypeVar("Value")


class CacheEntryError(Exception):
    """An entry of the cache is missing, incomplete or damaged; the caller builds it again."""


def load_or_build(
    target: Path,
    read: Callable[[Path], Value],
    build: Callable[[Path], None],
    made_from: str = "",
    work: str = "",
    sealed: bool = True,
) -> Value:
    """Read the entry at the directory `target`, and build it first where there is no sound one.

    Several processes may ask for the same entry at once: one builds it. The others wait for as long as that
    takes, and show how far it is. The kernel drops the lock of a process that dies, even by kill -9; the
    next one goes on in the directory that it has left. An entry that is damaged is told of and built anew.

    Args:
        read: opens an entry; raises CacheEntryError where it is not complete.
        build: writes an entry into a directory, which holds what a killed build of the same entry has left.
        made_from: what it is made from, for people.
        work: which work it is; what a killed build of other work has left is removed.
        sealed: its files are compared with their digests (cache_seal.py); False for an entry that changes.

    Raises:
        UserError: the cache cannot be written.
    """
    with contextlib.suppress(CacheEntryError):
        return read_entry(target, read, sealed)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target) as is_locked:
            try:
                return read_entry(target, read, sealed)  # another has built it while this process waited
            except CacheEntryError as error:
                if target.exists():
                    why = f": {error}" if str(error) else ""
                    progress.tell(f"the cache's {target.name} is damaged and is made anew{why}")
            with _directory(target, is_locked, work) as new, _telling(target, is_locked):
                known = {"made_from": made_from, "work": work}
                (new / ENTRY_FILE).write_text(json.dumps(known), "utf-8")
                build(new)
                if sealed:
                    write_seal(new, apart=[ENTRY_FILE])
                known["made"] = datetime.now(UTC).isoformat(timespec="seconds")
                (new / ENTRY_FILE).write_text(json.dumps(known), "utf-8")
                _publish(new, target, lambda folder: read_entry(folder, read, sealed))
            if (descriptor := _USED.pop(target, None)) is not None:  # that of the entry before
                os.close(descriptor)
            return read_entry(target, read, sealed=False)  # the digests are those of a moment ago
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"data.cache_dir={target.parent} cannot be written ({reason}): name a folder that can, with "
            "data.cache_dir=FOLDER or in $DSV3_CACHE; task=cache shows what is there, and clears it"
        ) from error


def read_entry(target: Path, read: Callable[[Path], Value], sealed: bool = True) -> Value:
    """Read the entry at the directory `target`, and note that it is in use.

    It is compared with its seal first, unless `sealed` is False or it `is_verified`.

    Raises:
        CacheEntryError: it is missing, incomplete or damaged.
    """
    if sealed and not _VERIFIED.get():
        try:
            check_seal(target)
        except BrokenSeal as error:
            raise CacheEntryError(str(error)) from error
    value = read(target)
    # The first process of a node speaks for the others; a cache that cannot be written is read all the same.
    if os.environ.get("LOCAL_RANK", "0") == "0" and target not in _USED:
        with contextlib.suppress(OSError):
            descriptor = os.open(target / ENTRY_FILE, os.O_RDONLY | os.O_CLOEXEC)
            _USED[target] = descriptor
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            os.utime(target / ENTRY_FILE)
    return value


_VERIFIED: ContextVar[bool] = ContextVar("verified", default=False)


@contextlib.contextmanager
def is_verified() -> Iterator[None]:
    """Let this process read entries that another one of its node has just compared with their seals."""
    token = _VERIFIED.set(True)
    try:
        yield
    finally:
        _VERIFIED.reset(token)


_USED: dict[Path, int] = {}
"""Entries that this process has opened. It keeps a shared lock on each, so that nobody clears them."""


@contextlib.contextmanager
def _lock(target: Path) -> Iterator[bool]:
    """Hold the lock of an entry, once no other process does; False where there are no locks."""
    lock = kernel_lock(target.with_name(f".{target.name}.lock"))
    is_locked = True
    try:
        lock.acquire(timeout=0)
    except Timeout:
        title = f"waiting for another process, which makes {target.name}"
        with phase(title, each_node=True) as waiting:
            _wait(lock, target, waiting)
    except OSError:  # what else is wrong with the folder, writing the entry will tell
        is_locked = False
    try:
        yield is_locked
    finally:
        lock.release()


def _wait(lock: FileLock, target: Path, waiting: Phase) -> None:
    """Wait for a lock without a timeout; this process counts as moving as long as the builder does."""
    seen, moved, pause, title = None, time.monotonic(), 0.05, waiting.title
    while True:
        time.sleep(pause)
        pause = min(1.5 * pause, LOOK)
        with contextlib.suppress(Timeout):
            lock.acquire(timeout=0)
            return
        told, now = _read_progress(target), time.monotonic()
        if told.get("beats") != seen:
            seen, moved = told.get("beats"), now
        silent = now - moved
        if silent <= max(told.get("patience", 0.0), 2 * (LOOK + TELL)):
            waiting.advance(0)
        doing = f" ({told['doing']})" if told.get("doing") else ""
        stuck = f", which has not moved for {duration(silent)}" if silent > SILENCE else ""
        who = f"process {told['process']}" if told.get("process") else "another process"
        waiting.title = f"{title.replace('another process', who)}{doing}{stuck}"


def _read_progress(target: Path) -> dict[str, Any]:
    """Return what the process that builds an entry has noted of itself; nothing where it has not."""
    return _read_object(target.with_name(f".{target.name}.progress"))


def _read_object(file: Path) -> dict[str, Any]:
    """Return a JSON object, an empty one where the file has none."""
    try:
        found = read_json(file)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@contextlib.contextmanager
def _telling(target: Path, is_locked: bool) -> Iterator[None]:
    """Note the progress of this process for those that wait for it, from a thread."""
    if not is_locked:
        yield
        return
    file, done = target.with_name(f".{target.name}.progress"), threading.Event()
    process = f"{os.getpid()} on {socket.gethostname()}"

    def tell() -> None:
        while not done.wait(TELL):
            told: dict[str, Any] = {"process": process, "doing": progress.current_line()}
            told |= {"beats": HEARTBEAT.count, "patience": HEARTBEAT.patience}
            with contextlib.suppress(OSError):  # a full disk is told of by what is built
                file.write_text(json.dumps(told), "utf-8")

    thread = threading.Thread(target=tell, name="cache progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        file.unlink(missing_ok=True)


@contextlib.contextmanager
def _directory(target: Path, is_locked: bool, work: str) -> Iterator[Path]:
    """Make the directory in which an entry is built: with the lock the one that a killed process has left.

    It may hold hours of work, and stays where the build ends by anything but a mistake in the input.
    """
    if is_locked:
        new = target.with_name(f".{target.name}.work")
        if _read_object(new / ENTRY_FILE).get("work", work) != work:
            shutil.rmtree(new)
        new.mkdir(exist_ok=True)
    else:
        new = Path(tempfile.mkdtemp(prefix=f".{target.name}-", suffix=".work", dir=target.parent))
    keep = False
    try:
        yield new
    except BaseException as error:
        keep = is_locked and not (isinstance(error, UserError) and not isinstance(error.__cause__, OSError))
        raise
    finally:
        if not keep:
            shutil.rmtree(new, ignore_errors=True)


def _publish(new: Path, target: Path, read: Callable[[Path], object]) -> None:
    """Rename `new` to `target`, unless another process has published a sound entry there in the meantime.

    `read` raises CacheEntryError for one that is not.
    """
    while True:
        try:
            new.rename(target)
            return
        except OSError:
            if not target.exists():
                raise
        with contextlib.suppress(CacheEntryError):
            read(target)
            return
        stale = new.with_name(f".{target.name}-{time.monotonic_ns()}.work")
        # The process that loses the race to move the damaged entry away does not find it, and tries again.
        with contextlib.suppress(FileNotFoundError):
            target.rename(stale)
            shutil.rmtree(stale, ignore_errors=True)
