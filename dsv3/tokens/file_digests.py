"""Digests of files, and lists of them that know when they are damaged themselves.

The manifest of a checkpoint (checkpoint/manifest.py) and the seal of an entry of the cache (cache_seal.py)
are such lists, in one form:

    {"algorithm": "xxh3_128", "digest": of the list, "files": {NAME: {"size": bytes, "digest": of the file}}}

They find accidents (a copy that broke off, a disk that flips bits). They are no signature, because whoever
can write the files can write the list as well.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath
from typing import Any

import xxhash

from dsv3.untrusted_files import open_file

_BUFFER_BYTES = 16 * 2**20

_DIGEST_LENGTH = 32

_ALGORITHM = "xxh3_128"


@dataclass(frozen=True)
class FileEntry:
    """A file's size in bytes and the XXH3-128 of its content, in hexadecimal digits."""

    size: int
    digest: str

    @classmethod
    def of(cls, path: Path, progress: Callable[[int], None] | None = None) -> "FileEntry":
        """Return the entry of a file as it is now; `progress` gets the bytes of each read."""
        return cls(path.stat().st_size, digest(path, progress))


def digest(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """Return the XXH3-128 of a file's content, 32 hexadecimal digits.

    `progress` gets the bytes of each read.
    """
    state = xxhash.xxh3_128()
    with open_file(path) as file:
        buffer = bytearray(min(_BUFFER_BYTES, os.fstat(file.fileno()).st_size + 1))
        view = memoryview(buffer)
        while count := file.readinto(buffer):  # type: ignore[attr-defined]  # typeshed's IO lacks it
            state.update(view[:count])
            if progress is not None:
                progress(count)
    return state.hexdigest()


def encode_entries(entries: Mapping[str, FileEntry]) -> str:
    """Return the list of files by name as text."""
    files = {name: asdict(entry) for name, entry in sorted(entries.items())}
    return json.dumps({"algorithm": _ALGORITHM, "digest": _digest_of(files), "files": files}, indent=1) + "\n"


def decode_entries(content: Any) -> dict[str, FileEntry]:
    """Return the files by name that a parsed list holds.

    ValueError, TypeError, KeyError or AttributeError where it is damaged.
    """
    files = content["files"]
    if content["algorithm"] != _ALGORITHM:
        raise ValueError(f"its digests are of another kind, {content['algorithm']!r}")
    if content["digest"] != _digest_of(files):
        raise ValueError("its list of files is not what its own digest says")
    return {_name(name): _entry(entry) for name, entry in files.items()}


def _digest_of(files: object) -> str:
    text = json.dumps(files, sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_128_hexdigest(text.encode())


def _name(name: str) -> str:
    path = PurePath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts:
        raise ValueError(f"it points outside the directory, to {name!r}")
    return name


def _entry(stored: dict[str, object]) -> FileEntry:
    size, text = stored["size"], stored["digest"]
    if type(size) is not int or size < 0 or not isinstance(text, str) or len(text) != _DIGEST_LENGTH:
        raise ValueError(f"it holds no size and digest but {size!r} and {text!r}")
    return FileEntry(size, text)
