"""The cache of prepared data: its folder, and entries that appear complete or not at all.

An entry is a directory. It is built in a temporary directory beside its place and published by one rename,
so a reader never sees half of it. A file lock only spares processes from building the same entry twice:
correctness rests on the rename alone.
"""

import contextlib
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from filelock import FileLock

from dsv3.errors import UserError
from dsv3.metrics.progress import phase

LOCK_TIMEOUT = 1800.0  # seconds to wait for the process that builds the entry

Value = TypeVar("Value")


class CacheEntryError(Exception):
    """An entry of the cache is missing, incomplete or damaged; the caller builds it again."""


def cache_root(cache_dir: str | None) -> Path:
    """Return `cache_dir` where it is set, else $DSV3_CACHE, else $XDG_CACHE_HOME/dsv3, else ~/.cache/dsv3."""
    if cache_dir or os.environ.get("DSV3_CACHE"):
        return Path(cache_dir or os.environ["DSV3_CACHE"]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(base) / "dsv3" if base else Path("~/.cache/dsv3").expanduser()


def load_or_build(target: Path, read: Callable[[Path], Value], build: Callable[[Path], None]) -> Value:
    """Read the entry at the directory `target`, and build it first where there is no sound one.

    Several processes may ask for the same entry at once: one builds it, the others wait. On a file system
    without locks, and after LOCK_TIMEOUT, each process builds its own and the first to finish wins. The
    kernel drops the lock of a process that dies, even by kill -9.

    Args:
        read: opens an entry; raises CacheEntryError where it is not complete.
        build: writes an entry into the empty directory it is given.

    Raises:
        UserError: the cache cannot be written.
    """
    with contextlib.suppress(CacheEntryError):
        return read(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # flock only: filelock's fallback, a file that must not exist, would outlive a process that is killed.
        lock = FileLock(target.with_name(f".{target.name}.lock"), fallback_to_soft=False)
        with contextlib.ExitStack() as held:
            with (
                contextlib.suppress(OSError),  # no locks here, or LOCK_TIMEOUT is over
                phase(
                    f"waiting for the process that makes {target.name}", each_node=True, patience=LOCK_TIMEOUT
                ),
            ):
                held.enter_context(lock.acquire(timeout=LOCK_TIMEOUT, poll_interval=0.1))
            with contextlib.suppress(CacheEntryError):  # another process built it while this one waited
                return read(target)
            with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
                new = Path(scratch) / "new"
                new.mkdir()
                build(new)
                _publish(new, target, read)
            return read(target)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"data.cache_dir={target.parent} cannot be written ({reason}): "
            "name a folder that can, with data.cache_dir=FOLDER or in $DSV3_CACHE"
        ) from error


def _publish(new: Path, target: Path, read: Callable[[Path], object]) -> None:
    """Rename `new` to `target`, unless another process has published a sound entry there in the meantime."""
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
        # The process that loses the race to move the damaged entry away does not find it, and tries again.
        with contextlib.suppress(FileNotFoundError):
            target.rename(new.with_name(f"stale-{time.monotonic_ns()}"))
