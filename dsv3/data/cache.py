"""The cache of prepared data: where it is, and how an entry appears whole or not at all."""

import contextlib
import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from dsv3.errors import UserError

Value = TypeVar("Value")


class StaleError(Exception):
    """An entry of the cache that is missing, incomplete or damaged: it is built anew."""


def cache_root(cache_dir: str | None) -> Path:
    """The folder of `data.cache_dir`, else $DSV3_CACHE, else $XDG_CACHE_HOME/dsv3, else ~/.cache/dsv3."""
    if cache_dir or os.environ.get("DSV3_CACHE"):
        return Path(cache_dir or os.environ["DSV3_CACHE"]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(base) / "dsv3" if base else Path("~/.cache/dsv3").expanduser()


def cached(target: Path, read: Callable[[Path], Value], build: Callable[[Path], None]) -> Value:
    """Read the directory `target` of the cache, building it first where there is none that is sound.

    Several processes may ask for the same entry at once: one builds, the others wait for it; on a
    file system without locks each builds its own and the first to finish wins.

    Args:
        read: opens an entry; raises StaleError where it is not whole.
        build: writes an entry into the empty directory it is given.

    Raises:
        UserError: the cache cannot be written.
    """
    with contextlib.suppress(StaleError):
        return read(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target.with_name(f".{target.name}.lock")):
            with contextlib.suppress(StaleError):  # built by someone else while this process waited
                return read(target)
            _build(target, read, build)
            return read(target)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"data.cache_dir={target.parent} cannot be written ({reason}): "
            "name a folder that can, with data.cache_dir=FOLDER or in $DSV3_CACHE"
        ) from error


def _build(target: Path, read: Callable[[Path], object], build: Callable[[Path], None]) -> None:
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        new = Path(scratch) / "new"
        new.mkdir()
        build(new)
        _publish(new, target, read)


def _publish(new: Path, target: Path, read: Callable[[Path], object]) -> None:
    """Rename `new` to `target`, unless another process has put a sound entry there in the meantime."""
    while True:
        try:
            new.rename(target)
            return
        except OSError:
            if not target.exists():
                raise
        with contextlib.suppress(StaleError):
            read(target)
            return
        # whoever loses the race to move the damaged entry away finds it gone, and tries again
        with contextlib.suppress(FileNotFoundError):
            target.rename(new.with_name(f"stale-{time.monotonic_ns()}"))


@contextlib.contextmanager
def _lock(path: Path, patience: float = 1800.0) -> Iterator[None]:
    """Hold a file lock; without it (no locks here, or out of patience in seconds) work is only done twice."""
    with path.open("w") as file:
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)
            except OSError:
                break
        yield
