"""Files of an object store or a web server, by any URL that fsspec reads: s3://, gs://, https:// and others.

Small files are fetched as a whole, arrays by blocks of 64 KiB. Both are kept in the cache of prepared data,
arrays within a bound. A block is asked for once per node, however many of its processes want it. What fails
in passing is tried again. Blocks are kept by URL, version and number: a file that was replaced is read anew.
"""

import contextlib
import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import xxhash

from dsv3.errors import RunFailed, UserError
from dsv3.metrics.progress import phase, tell
from dsv3.tokens.block_cache import BLOCK, BlockCache
from dsv3.tokens.cache import CacheEntryError, cache_root, load_or_build
from dsv3.tokens.cache_seal import BrokenSeal, check_seal, write_seal
from dsv3.tokens.npy_file import parse_header

ATTEMPTS = 8

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds before the second attempt, doubled for each further one; a minute in all."""

_PASSING_STATUS = (408, 425, 429)
"""Answers of a web server in the range of the client's mistakes that another attempt may change."""

_TIMEOUT = 60.0

LOOK_EVERY = 60.0
"""Seconds between two looks at the version of a file that is being read, at least."""

T = TypeVar("T")


def is_remote(path: str) -> bool:
    """Return True for a URL of another machine's file, such as s3://bucket/key."""
    return "://" in path and not path.startswith("file://")


class RemoteFolder:
    """A folder of an object store or a web server.

    Args:
        url: of the folder, as fsspec reads it.
        cache_dir: the cache of prepared data; None for the default. It should lie on a disk of the node.
        cache_bytes: size of the blocks of arrays that are kept.

    Raises:
        UserError: no library for URLs of this kind is installed.
    """

    def __init__(self, url: str, cache_dir: str | None, cache_bytes: int) -> None:
        self.url = url.rstrip("/")
        self.cache_dir = cache_dir
        self.cache_bytes = cache_bytes

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteFolder, (self.url, self.cache_dir, self.cache_bytes)

    @cached_property
    def _store(self) -> "_Store":
        return _Store(self.url)

    @cached_property
    def _directory(self) -> Path:
        """Return the folder's entry of the cache."""
        name = f"remote-{xxhash.xxh3_64_hexdigest(self.url.encode())}"

        def read(directory: Path) -> Path:
            if not BlockCache.is_sound(directory, self.cache_bytes):
                raise CacheEntryError("data.cache_bytes was another one" if directory.exists() else "")
            return directory

        def build(directory: Path) -> None:
            BlockCache.make(directory, self.cache_bytes)

        return load_or_build(cache_root(self.cache_dir) / name, read, build, self.url, sealed=False)

    @cached_property
    def blocks(self) -> BlockCache:
        """Return the cache of the blocks of arrays."""
        return BlockCache(self._directory)

    def fetch(self, name: str) -> Path:
        """Return a local copy of a whole file, of its newest version.

        Raises:
            UserError: the file does not exist, or may not be read.
        """
        version = self.version(name)
        key = xxhash.xxh3_64_hexdigest(f"{name} {version}".encode())
        copy = self._directory / "files" / key / PurePosixPath(name).name
        with contextlib.suppress(BrokenSeal):
            check_seal(copy.parent)
            return copy
        if copy.parent.exists():
            tell(f"the cache's copy of {self.url}/{name} is damaged, and is fetched again")
            shutil.rmtree(copy.parent, ignore_errors=True)
        partial = copy.parent.with_name(f".{key}-{os.getpid()}-{threading.get_ident()}")
        partial.mkdir(parents=True)
        (partial / copy.name).write_bytes(self.read(name, 0, None))
        write_seal(partial)
        _publish(partial, copy.parent)
        return copy

    def fetch_folder(self, folder: str, names: Iterable[str]) -> Path:
        """Return a local folder with copies of those files among `names` that a folder below this one has."""
        copies = {}
        for name in names:
            with contextlib.suppress(RemoteFileMissing):
                copies[name] = self.fetch(f"{folder}/{name}")
        key = xxhash.xxh3_64_hexdigest(repr(sorted(copies.items())).encode())
        target = self._directory / "folders" / key
        with contextlib.suppress(BrokenSeal):
            check_seal(target)
            return target
        shutil.rmtree(target, ignore_errors=True)
        partial = target.with_name(f".{key}-{os.getpid()}-{threading.get_ident()}")
        partial.mkdir(parents=True)
        for name, copy in copies.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(copy, partial / name)
        write_seal(partial)
        _publish(partial, target)
        return target

    def version(self, name: str) -> str:
        """Return a text that is another one once the file is another one: its tag or time, and its size."""
        return self._store.version(name)

    def read(self, name: str, start: int, end: int | None) -> bytes:
        """Return the bytes of a file from `start` to `end`, fewer where the file ends before; not cached."""
        return self._store.read(name, start, end)

    def array(
        self, name: str, dtype: npt.DTypeLike, length: int, version: str | None = None, ends: Any = None
    ) -> "RemoteArray":
        """Return the one-dimensional array in an .npy file; nothing is asked of the store yet.

        Args:
            name: the file, relative to the folder.
            dtype: that the array has; another one in the file is an error.
            length: of the array, as above.
            version: what tells the content from that of another file at the same place, such as a digest;
                None asks the store.
            ends: first and last value, where they are known: no request is made for them.
        """
        return RemoteArray(self, name, np.dtype(dtype), length, version, None, ends)

    def raw(
        self, name: str, dtype: npt.DTypeLike, length: int, begin: int = 0, version: str | None = None
    ) -> "RemoteArray":
        """Return an array that begins at byte `begin` of a file without a header."""
        return RemoteArray(self, name, np.dtype(dtype), length, version, begin, None)


@dataclass
class RemoteArray:
    """A one-dimensional array in a remote file, read a slice at a time."""

    folder: RemoteFolder
    name: str
    dtype: np.dtype[Any]
    length: int
    version: str | None
    begin: int | None
    """Byte at which the values begin; None: behind the header of an .npy file, read with the first values."""
    ends: tuple[int, int] | None
    _seen: tuple[str, float] | None = field(default=None, init=False)
    """Version that the store told at the last look, and when that was."""

    def __len__(self) -> int:
        return self.length

    @property
    def url(self) -> str:
        """Return the URL of the file."""
        return f"{self.folder.url}/{self.name}"

    def __getitem__(self, part: slice) -> npt.NDArray[Any]:
        """Return the values of a slice.

        Raises:
            UserError: the file is missing, truncated or not the array that it should be.
            RunFailed: the store does not answer.
        """
        first, end, _ = part.indices(self.length)
        if end <= first:
            return np.zeros(0, self.dtype)
        if self.ends is not None and end - first == 1 and first in (0, self.length - 1):
            return np.array([self.ends[first > 0]], self.dtype)
        if self.begin is None:
            self.begin = self._read_header()
        width = self.dtype.itemsize
        content = self._bytes(self.begin + first * width, self.begin + end * width)
        values = np.frombuffer(content, self.dtype)
        if self.ends is not None:
            known = {0: self.ends[0], self.length - 1: self.ends[1]}
            for place, value in known.items():
                if first <= place < end and values[place - first] != value:
                    raise UserError(
                        f"{self.url}: value {place} is {values[place - first]}, the index says {value}: "
                        "they are not of the same data"
                    )
        return values

    def _read_header(self) -> int:
        """Return the byte at which the values of an .npy file begin; UserError where it is another array."""
        head = self._bytes(0, 1)  # the whole block comes with it
        wanted = f"the index says {self.dtype.name} [{self.length}]"
        if not head.startswith(np.lib.format.MAGIC_PREFIX):
            raise UserError(f"{self.url} is no .npy file: {wanted}")
        shape, fortran, dtype, begin = parse_header(head, self.url, wanted)
        if shape != (self.length,) or dtype != self.dtype or fortran:
            found, wanted = f"{dtype.name} {list(shape)}", f"{self.dtype.name} [{self.length}]"
            raise UserError(f"{self.url} holds {found}, the index says {wanted}: it is another file")
        return begin

    def _bytes(self, start: int, end: int) -> bytes:
        """Return the bytes from `start` to `end`, which lie in the file: from the cache, or from the store.

        For bytes 0 to 1, the whole block.
        """
        if self.version is None:
            self.version = self.folder.version(self.name)
        cache, numbers = self.folder.blocks, range(start // BLOCK, -(-end // BLOCK))
        keys = {number: self._key(number) for number in numbers}
        found = {number: cache.get(key) for number, key in keys.items()}
        missing = [number for number in numbers if found[number] is None]
        if missing:
            with cache.fetching(keys[missing[0]]):
                found |= {number: cache.get(keys[number]) for number in missing}
                missing = [number for number in missing if found[number] is None]
                if missing:  # in one request, as they are neighbours but for what lies in the cache
                    first, last = missing[0], missing[-1]
                    content = self.folder.read(self.name, first * BLOCK, (last + 1) * BLOCK)
                    self._look()
                    for number in range(first, last + 1):
                        begin = (number - first) * BLOCK
                        block = content[begin : begin + BLOCK]
                        found[number] = block
                        if number in missing and block:
                            cache.put(keys[number], block)
        content = b"".join(found[number] or b"" for number in numbers)
        begin = start - numbers.start * BLOCK
        if len(content) < begin + end - start:
            raise UserError(
                f"{self.url} is truncated: it ends at byte {numbers.start * BLOCK + len(content):,}, and "
                f"{self.dtype.name} [{self.length:,}] goes on behind byte {end:,}"
            )
        return content if (start, end) == (0, 1) else content[begin : begin + end - start]

    def _look(self) -> None:
        """Ask the store, at most once in LOOK_EVERY, whether the file is still the one of the last look.

        Its blocks in the cache would otherwise be mixed with those of another file of the same size.
        """
        now = time.monotonic()
        if self._seen is not None and now - self._seen[1] < LOOK_EVERY:
            return
        try:
            version = self.folder.version(self.name)
        except (UserError, RunFailed):
            return  # a store may refuse this and give the bytes
        if self._seen is not None and self._seen[0] != version:
            raise UserError(
                f"{self.url} has changed while it was read: put back what was there, or give new data "
                "a place of its own, and resume"
            )
        self._seen = version, now

    def _key(self, number: int) -> bytes:
        return xxhash.xxh3_128_digest(f"{self.url}\0{self.version}\0{number}".encode())


def _publish(partial: Path, target: Path) -> None:
    """Rename a folder to its place, unless another process was faster."""
    try:
        partial.rename(target)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        if not target.is_dir():
            raise


class RemoteFileMissing(UserError):
    """A remote file does not exist."""


class _Store:
    """The file system of a URL, with errors in words and other attempts where an error may pass."""

    def __init__(self, url: str) -> None:
        self.url = url
        protocol = url.partition("://")[0]
        try:
            import fsspec

            options: dict[str, Any] = {}
            if protocol in ("http", "https"):
                import aiohttp

                options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(total=None, sock_read=_TIMEOUT)}
            self.system, self.root = fsspec.core.url_to_fs(url, **options)
        except ImportError as error:
            raise UserError(f"{url} cannot be read ({error}): pip install 'dsv3[remote]'") from None
        except ValueError as error:
            raise UserError(f"{url} cannot be read: {error}") from None

    def version(self, name: str) -> str:
        """Return the tag or time of a file, and its size."""
        info = self._attempt(name, lambda path: self.system.info(path))
        tags = ("blob_id", "ETag", "etag", "LastModified", "last_modified", "mtime", "updated", "size")
        return " ".join(str(info[tag]) for tag in tags if info.get(tag) is not None)

    def read(self, name: str, start: int, end: int | None) -> bytes:
        """Return some bytes of a file."""
        return self._attempt(name, lambda path: _read(self.system, path, start, end))

    def _attempt(self, name: str, work: Callable[[str], T]) -> T:
        """Do `work` with the path of a file, and again while its error may pass."""
        url, pause = f"{self.url}/{name}", FIRST_PAUSE
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return work(f"{self.root}/{name}")
            except FileNotFoundError:
                raise RemoteFileMissing(f"{url} does not exist") from None
            except Exception as error:
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                if not _may_pass(error):
                    how = "the library of its kind takes credentials from its own settings and variables"
                    raise UserError(f"{url} cannot be read ({reason}); {how}") from None
                if attempt == ATTEMPTS:
                    raise RunFailed(
                        f"{url} cannot be read, {ATTEMPTS} attempts have failed: {reason}"
                    ) from None
            with phase(f"waiting to read {url} again, attempt {attempt} has failed: {reason}") as waiting:
                time.sleep(pause * random.uniform(0.5, 1.5))  # ranks must not come back together
                waiting.advance(0)
            pause = min(2 * pause, LONGEST_PAUSE)
        raise AssertionError


def _read(system: Any, path: str, start: int, end: int | None) -> bytes:
    """Return some bytes of a file, none from behind its end on."""
    try:
        content: bytes = system.cat_file(path, start=start, end=end)
    except Exception as error:
        if getattr(error, "status", None) == 416 or "InvalidRange" in str(error):
            return b""
        raise
    # A server that knows no ranges sends the whole file.
    return content if end is None or len(content) <= end - start else content[start:end]


def _may_pass(error: Exception) -> bool:
    """Return True for an error of the network or the server that another attempt may not meet."""
    status = getattr(error, "status", None)
    if isinstance(status, int) and 400 <= status < 500:
        return status in _PASSING_STATUS
    if isinstance(error, PermissionError | IsADirectoryError | NotADirectoryError | NotImplementedError):
        return False
    kinds: tuple[type[BaseException], ...] = (OSError, TimeoutError)
    with contextlib.suppress(ImportError):
        import aiohttp

        kinds += (aiohttp.ClientError,)
    return isinstance(error, kinds) or isinstance(status, int)
