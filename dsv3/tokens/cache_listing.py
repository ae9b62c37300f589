"""List what lies in the cache of prepared data, and clear it; whatever a process has open or builds stays."""

import contextlib
import fcntl
import os
import re
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from filelock import Timeout

from dsv3.distributed.directory_lock import kernel_lock
from dsv3.errors import UserError, did_you_mean
from dsv3.metrics.progress import phase
from dsv3.tokens.cache import ENTRY_FILE
from dsv3.untrusted_files import read_json

_OLD_ENTRY = re.compile(r"\.?(tokenizer|tokens)-[0-9a-f]{16}(-.*)?")
"""Names of entries without an entry.json, which earlier versions made."""


@dataclass(frozen=True)
class CacheEntry:
    """An entry of the cache, or what an unfinished one has left.

    Attributes:
        name: the name of the entry, which an unfinished one will get.
        path: its directory.
        made_from: what it was made from, for people; empty where that is not known.
        size: bytes of its files.
        used: seconds since 1970 of its last use.
        finished: False where a process still builds it, or was killed when it did.
    """

    name: str
    path: Path
    made_from: str
    size: int
    used: float
    finished: bool


def list_entries(root: Path) -> list[CacheEntry]:
    """Return all entries of the cache at `root`, the last used first; other files there are not looked at."""
    found = []
    with phase(f"looking through {root}", unit="entries") as work, contextlib.suppress(FileNotFoundError):
        for path in root.iterdir():
            if (entry := _entry(path)) is not None:
                found.append(entry)
                work.advance()
    return sorted(found, key=lambda entry: (-entry.used, entry.name, entry.path.name))


def choose_entries(entries: Iterable[CacheEntry], which: str, unused_days: float) -> list[CacheEntry]:
    """Return the entries that `which` means: all, unused (not used for `unused_days`), or a name.

    In a name `*` stands for any characters.

    Raises:
        UserError: there is no entry of that name.
    """
    entries = list(entries)
    if which == "all":
        return entries
    if which == "unused":
        return [entry for entry in entries if entry.used < time.time() - unused_days * 86400]
    chosen = [entry for entry in entries if fnmatchcase(entry.name, which)]
    if not chosen:
        names = [entry.name for entry in entries]
        guess = did_you_mean(which, names, "task.clear=")
        raise UserError(
            f"task.clear={which} is no entry of the cache, which has {len(names)}: "
            f"give all, unused or a name that task=cache lists.{guess}"
        )
    return chosen


def remove_entry(entry: CacheEntry) -> bool:
    """Remove an entry; False where it stays because a process has it open or builds it.

    Raises:
        UserError: its files cannot be removed.
    """
    root = entry.path.parent
    lock = kernel_lock(root / f".{entry.name}.lock")
    try:
        with contextlib.ExitStack() as held:
            with contextlib.suppress(OSError):  # no locks here
                try:
                    held.enter_context(lock.acquire(timeout=0))
                except Timeout:
                    return False
            if _is_open(entry.path):
                return False
            if entry.finished:  # from now on nobody finds it
                aside = root / f".{entry.name}-{time.monotonic_ns()}.work"
                entry.path.rename(aside)
            else:
                aside = entry.path
            shutil.rmtree(aside)
            for suffix in ("progress", "lock"):  # who waits for the lock notices, and makes a new one
                (root / f".{entry.name}.{suffix}").unlink(missing_ok=True)
        return True
    except OSError as error:
        raise UserError(f"{entry.path} cannot be removed: {error.strerror or error}") from error


def _entry(path: Path) -> CacheEntry | None:
    """Return the entry at a path; None for what the cache has not made, and for what goes away meanwhile."""
    known = path / ENTRY_FILE
    name, unfinished = path.name, path.name.startswith(".")
    if unfinished:  # .NAME.work, or with something random behind the name; the lock stays beside it
        stem = name[1:].removesuffix(".work")
        names = (each for each in (stem, stem.rpartition("-")[0]) if (path.parent / f".{each}.lock").exists())
        name = next(names, stem) if name.endswith(".work") else stem
        made_here = name != stem or (path.parent / f".{stem}.lock").exists()
    else:
        made_here = known.is_file()
    if not (made_here or _OLD_ENTRY.fullmatch(path.name)) or not path.is_dir():
        return None
    try:
        status = [file.stat() for file in path.rglob("*") if file.is_file()]
        newest = max([path.stat().st_mtime, *(each.st_mtime for each in status)])
        used = known.stat().st_mtime if known.is_file() and not unfinished else newest
    except FileNotFoundError:
        return None
    made_from = ""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        made_from = str(read_json(known)["made_from"])
    return CacheEntry(name, path, made_from, sum(each.st_size for each in status), used, not unfinished)


def _is_open(path: Path) -> bool:
    """Return True where a process has the entry open, as `cache.read_entry` marks it."""
    try:
        descriptor = os.open(path / ENTRY_FILE, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no locks here
        return False
    finally:
        os.close(descriptor)
    return False
