"""Make corrupted inputs from a seed, and tell whether a reader refuses them as it should.

    for case in corruptions(READERS["shards"], seed=0, count=100):
        verdict = judge(case, an_empty_folder)

A reader writes a sound input into a folder and reads one as a command would. A case is that input with one
thing changed, named so that it can be made again: bytes cut, flipped, added or exchanged, a value of a JSON
file replaced, another kind of file in its place. A verdict is `read`, `refused` with the message, or a fault:
another exception than UserError and RunFailed, or a message that is no short one.

Add a reader to READERS and every kind of change is tried on each of its files.
"""

import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3.errors import RunFailed, UserError

LONGEST, LINES = 500, 2
"""Characters and lines of a message at most."""


@dataclass(frozen=True)
class Reader:
    """A kind of input: how a sound one is written, and how a command reads it.

    Attributes:
        write: writes a sound input into an empty folder, and returns the path that a user would give.
        read: reads the input at a path; raises UserError for a damaged one.
    """

    name: str
    write: Callable[[Path], Path]
    read: Callable[[Path], object]


@dataclass(frozen=True)
class Case:
    """A corrupted input: `spoil` changes one file of a sound one."""

    reader: Reader
    name: str
    spoil: Callable[[Path], None]


@dataclass(frozen=True)
class Verdict:
    """The end of reading a case."""

    outcome: str
    """read, refused or fault."""
    message: str = ""


def judge(case: Case, folder: Path, seconds: float = 0.0) -> Verdict:
    """Make a case in an empty folder, read it, and remove it; a read of more than `seconds` is a fault.

    0 seconds: there is no limit. One needs the main thread.
    """
    path = case.reader.write(folder)

    def too_long(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, too_long) if seconds else None
    try:
        case.spoil(folder)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        return judge_read(lambda: case.reader.read(path))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        if seconds:
            signal.signal(signal.SIGALRM, before)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()


def judge_read(read: Callable[[], object]) -> Verdict:
    """Return how reading ends."""
    try:
        read()
    except (UserError, RunFailed) as error:
        message = str(error)
        if len(message) > LONGEST or len(message.splitlines()) > LINES:
            return Verdict("fault", f"a message of {len(message)} characters: {message}")
        return Verdict("refused", message)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of a library in Rust is no Exception
        return Verdict("fault", f"{type(error).__module__}.{type(error).__name__}: {error}")
    return Verdict("read")


def corruptions(reader: Reader, seed: int, count: int) -> Iterator[Case]:
    """Yield `count` cases of a reader; each depends on its number and the seed alone."""
    for number in range(count):
        draw = random.Random(f"{reader.name} {seed} {number}")
        kind = draw.choices(list(_CHANGES), [3 if kind == "json value" else 1 for kind in _CHANGES])[0]
        yield Case(reader, f"{reader.name} {seed} {number}: {kind}", _Spoil(kind, draw.getrandbits(64)))


@dataclass(frozen=True)
class _Spoil:
    """Change one file below a folder in a way that a seed chooses."""

    kind: str
    seed: int

    def __call__(self, folder: Path) -> None:
        draw = random.Random(self.seed)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        if self.kind == "json value":
            files = [path for path in files if path.suffix == ".json"] or files
        file = draw.choice(files)
        _CHANGES[self.kind](file, draw)


def _rewrite(change: Callable[[bytearray, random.Random], bytes]) -> Callable[[Path, random.Random], None]:
    def spoil(file: Path, draw: random.Random) -> None:
        content = change(bytearray(file.read_bytes()), draw)
        file.unlink()  # it may be a link to one that others use
        file.write_bytes(content)

    return spoil


def _place(content: bytes | bytearray, draw: random.Random) -> int:
    """Return a place in a file: half of them lie in its first 256 bytes, where headers are."""
    return draw.randrange(min(len(content), draw.choice([256, max(len(content), 1)])) or 1)


def _truncated(content: bytearray, draw: random.Random) -> bytes:
    return bytes(content[: draw.choice([0, 1, _place(content, draw), max(len(content) - 1, 0)])])


def _flipped(content: bytearray, draw: random.Random) -> bytes:
    for _ in range(draw.choice([1, 1, 3, 20])):
        if content:
            content[_place(content, draw)] ^= 1 << draw.randrange(8)
    return bytes(content)


def _extended(content: bytearray, draw: random.Random) -> bytes:
    return bytes(content) + draw.choice([b"\0", b"\n", b"}", bytes(content), draw.randbytes(100)])


def _overwritten(content: bytearray, draw: random.Random) -> bytes:
    begin, length = _place(content, draw), draw.choice([1, 2, 4, 8, 64])
    fill = draw.choice([b"\0", b"\xff", b"\x7f", b"9", draw.randbytes(1)])
    content[begin : begin + length] = fill * min(length, len(content) - begin)
    return bytes(content)


def _exchanged(content: bytearray, draw: random.Random) -> bytes:
    first, second = sorted((_place(content, draw), _place(content, draw)))
    return bytes(content[second:] + content[first:second] + content[:first])


def _inserted(content: bytearray, draw: random.Random) -> bytes:
    place = _place(content, draw)
    content[place:place] = draw.choice([b"\0", b"\xff\xfe", b"[" * 5000, b"9" * 5000, draw.randbytes(16)])
    return bytes(content)


_HEADS = (
    *(b"\x93NUMPY\x01\x00", b"PK\x03\x04", b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", b"PAR1", b"\x80\x04\x95"),
    *(b"MMIDIDX\0\0", b"TNTIDX\0\0", b"LITPKDS", b"version https://git-lfs.github.com/spec/v1\n"),
    *(b"\xef\xbb\xbf{}", b"<html>", b"null", b"[]", b"3", b'""'),
)
"""The begins of other kinds of files."""


def _other_kind(content: bytearray, draw: random.Random) -> bytes:
    return draw.choice(_HEADS) + draw.choice([b"", bytes(content), draw.randbytes(40)])


def odd_value(draw: random.Random) -> Any:
    """Return a value that stands where another one should."""
    deep: Any = 0
    for _ in range(90):
        deep = [deep]
    values: list[Any] = [None, True, -1, 0, 1, 2**31, 2**63, 10**30, 1.5, float("nan"), float("inf"), "", "x"]
    values += [
        "\ud800",
        "x" * 3000,
        [],
        {},
        [1],
        {"a": 1},
        deep,
        [None] * 3000,
        "<|nothing|>",
        "(",
        "\\",
        "1e400",
    ]
    return draw.choice(values)


def _json_value(content: bytearray, draw: random.Random) -> bytes:
    """Replace, remove or rename a value of a JSON file at any depth."""
    try:
        root = json.loads(content)
    except ValueError:
        return _flipped(content, draw)
    holders: list[Any] = [{"": root}]
    for node in holders:  # it grows
        inner = node.values() if isinstance(node, dict) else node
        holders += [value for value in inner if isinstance(value, dict | list) and value][:50]
    # Vocabularies have thousands of values, other nodes few: choose the node first.
    node = draw.choice(holders)
    key = draw.choice(list(node)) if isinstance(node, dict) else draw.randrange(len(node))
    action = draw.choice(["replace", "replace", "replace", "remove", "rename", "twice"])
    if action == "replace" or node is holders[0]:
        node[key] = odd_value(draw)
    elif action == "remove":
        del node[key]
    elif isinstance(node, dict):
        node[f"{key}x"] = node[key] if action == "twice" else node.pop(key)
    else:
        node.append(node[key])
    return json.dumps(holders[0][""] if node is holders[0] else root).encode("utf-8", "surrogatepass")


def _missing(file: Path, draw: random.Random) -> None:
    file.unlink()


def _another_node(file: Path, draw: random.Random) -> None:
    """Put a directory, a pipe or a link in the place of a file."""
    file.unlink()
    kind = draw.choice(["directory", "pipe", "dangling link", "loop"])
    if kind == "directory":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to(file.name if kind == "loop" else "nowhere")


_CHANGES: dict[str, Callable[[Path, random.Random], None]] = {
    "truncated": _rewrite(_truncated),
    "flipped": _rewrite(_flipped),
    "extended": _rewrite(_extended),
    "overwritten": _rewrite(_overwritten),
    "exchanged": _rewrite(_exchanged),
    "inserted": _rewrite(_inserted),
    "other kind": _rewrite(_other_kind),
    "json value": _rewrite(_json_value),
    "missing": _missing,
    "another node": _another_node,
}
