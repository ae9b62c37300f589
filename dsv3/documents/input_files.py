"""Find the files that documents are read from: files, folders, patterns, saved datasets and the hub's."""

import errno
import glob
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from fnmatch import translate
from pathlib import Path
from stat import S_ISDIR, S_ISREG

from dsv3.documents.byte_blocks import read_blocks, split_records
from dsv3.documents.json_values import JsonValues
from dsv3.errors import UserError, list_hint, quoted, repository_hint
from dsv3.metrics.progress import amount

HUB = "hf:"
"""Begins the name of a dataset of the HuggingFace hub."""

LEFTOVERS = (
    "*~",
    "#*#",
    "*.swp",
    "*.swo",
    "*.swx",
    "*.bak",
    "*.orig",
    "*.rej",
    "*.tmp",
    "*.part",
    "*.crdownload",
)
"""Names of what editors, merges and downloads leave behind."""

_LEFTOVER = re.compile("|".join(map(translate, LEFTOVERS)))

_NOWHERE = "a link that leads nowhere"

COMPRESSED = frozenset({".gz", ".zst", ".bz2", ".xz"})

_JSON_LINES = frozenset({".jsonl", ".ndjson"})

_JSON = ".json"


class FileKind(Enum):
    """The way in which documents lie in a file."""

    text = "text"
    json_lines = "JSON lines"
    json_values = "JSON"
    """The elements of an array, or objects over several lines."""
    parquet = "Parquet"
    dataset = "saved dataset"
    hub = "dataset of the hub"


@dataclass(frozen=True)
class InputFile:
    """A file of documents, as it was when the work was planned.

    Attributes:
        name: the name in messages and in the index.
        size: bytes.
        mtime_ns: the time of the last change, ns.
        detail: for datasets what is read of one: its split, revision and number of files.
    """

    path: Path
    name: str
    kind: FileKind
    size: int
    mtime_ns: int
    detail: tuple[tuple[str, str], ...] = ()

    def check_unchanged(self) -> None:
        """Raise UserError where the file is not what it was when the work was planned."""
        if self.kind is FileKind.hub:
            return
        try:
            now = self.path.stat()
        except OSError:
            return  # reading it has told
        if (now.st_size, now.st_mtime_ns) != (self.size, self.mtime_ns) and not self.path.is_dir():
            raise UserError(
                f"{self.path} has changed while it was read: repeat the command once it is at rest"
            )

    def identity(self) -> list[object]:
        """Return what tells this file from another one, for a journal."""
        return [self.name, self.kind.name, self.size, self.mtime_ns, *map(list, self.detail)]


@dataclass(frozen=True)
class Part:
    """A file, or a range of it.

    Attributes:
        start: byte, row group, row or file of the dataset at which the part begins.
        end: where it ends, exclusive; None: the file's end, which is read without looking for a boundary.
        nbytes: bytes of the file that belong to it, for the progress.
    """

    file: InputFile
    start: int
    end: int | None
    nbytes: int


@dataclass(frozen=True)
class Unit:
    """Parts of files, in order, that one process reads at a time."""

    number: int
    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        """Return the bytes to be read."""
        return sum(part.nbytes for part in self.parts)

    @property
    def name(self) -> str:
        """Return a name for messages: the first file."""
        return self.parts[0].file.name


@dataclass
class FoundFiles:
    """Files found; those left out as hidden or leftovers; those that cannot be read, with reasons."""

    files: list[InputFile] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)

    def told_json(self, field: str) -> list[str]:
        """Return a line where .json files are read as text, because they hold no documents as JSON does."""
        names = [file.name for file in self.files if file.kind is FileKind.text and _is_json(file.path)]
        if not names:
            return []
        are = "is" if len(names) == 1 else "are"
        read = f"{amount(len(names), 'files')} named {_JSON} {are} read as text"
        return [f"{read}, first {names[0]}: no object with data.field={field} stands at the begin"]


def find_files(paths: Sequence[str], field: str = "text", key: str = "task.input") -> FoundFiles:
    """Return the files at `paths`: files, folders with all that is below, or patterns with * and **.

    Files of a folder come in the order of their names, paths in the order given; a file that two paths lead
    to counts once. In folders hidden files and LEFTOVERS are left out.

    Args:
        field: the field that a .json file must have to be read as JSON.
        key: the config key of `paths`, for messages.

    Raises:
        UserError: a path leads to nothing, cannot be read, or is a pipe or a device; a folder below it is a
            dataset that was saved, whose files are no text.
    """
    found = FoundFiles()
    seen: set[tuple[int, int]] = set()

    def enter(folder: os.DirEntry[str]) -> bool:
        if is_saved(Path(folder.path)):
            raise UserError(
                f"{key}: {folder.path} is a dataset of save_to_disk among other files: give it as a path of "
                f"its own to task=prepare, or read it by data=hf data.dataset={folder.path}"
            )
        return True

    for path in paths:
        count = len(found.files)
        for place, inside in _expand(path, key):
            walked = walk_files(place, found.left_out, found.unreadable, enter)
            below = (Path(entry.path) for _, entry in walked)
            for file in below if place.is_dir() and not is_saved(place) else [place]:
                try:
                    stat = file.stat()
                except OSError as error:
                    if inside or place.is_dir():
                        reason = _NOWHERE if is_broken_link(file, error) else error.strerror
                        found.unreadable.append(f"{file} ({reason})")
                        continue
                    raise UserError(f"{key}={file} cannot be read: {error.strerror}") from None
                if not (S_ISREG(stat.st_mode) or S_ISDIR(stat.st_mode)):
                    if inside:
                        found.left_out.append(f"{file} (no file)")
                        continue
                    raise UserError(f"{key}={file} is a pipe or a device: write what comes out to a file")
                if (stat.st_dev, stat.st_ino) not in seen:
                    seen.add((stat.st_dev, stat.st_ino))
                    kind = FileKind.dataset if file.is_dir() else file_kind(file, field)
                    found.files.append(InputFile(file, str(file), kind, stat.st_size, stat.st_mtime_ns))
        if len(found.files) == count and len(paths) == 1:
            counts = [
                (len(found.left_out), "hidden, leftovers of editors, or pipes and the like"),
                (len(found.unreadable), f"unreadable, first {next(iter(found.unreadable), '')}"),
            ]
            told = "; ".join(f"{count:,} {what}" for count, what in counts if count)
            told = f" ({told})" if told else ""
            raise UserError(
                f"{key}={path} holds no file to read{told}: give files, folders or a pattern of names"
            )
    return found


def is_saved(folder: Path) -> bool:
    """Return whether `datasets` has saved a dataset in this folder (save_to_disk)."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")) and (
        (folder / "dataset_dict.json").is_file() or (folder / "dataset_info.json").is_file()
    )


def file_kind(path: Path, field: str) -> FileKind:
    """Return how documents lie in a file, by its name; of a .json file the first object decides."""
    last = _last_suffix(path)
    if last in _JSON_LINES:
        return FileKind.json_lines
    if last == _JSON:
        return _json_kind(path, field)
    return FileKind.parquet if last in (".parquet", ".pq") else FileKind.text


def _last_suffix(path: Path) -> str:
    """Return a file's suffix in small letters; of a compressed one that before."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _is_json(path: Path) -> bool:
    return _last_suffix(path) == _JSON


def _json_kind(path: Path, field: str) -> FileKind:
    """Return the kind of a .json file: text, unless its first object has the field."""

    def has_field(record: bytes, is_whole: bool) -> bool:
        if not is_whole:
            return record.lstrip().startswith(b"{") and json.dumps(field).encode() in record
        try:
            found = json.loads(record)
        except (ValueError, RecursionError):
            return False
        return isinstance(found, dict) and field in found

    try:
        line, rest = next(split_records(read_blocks(path, lambda nbytes: None), b"\n"), (b"", None))
        if has_field(line, rest is None):
            return FileKind.json_lines
        value, more = next(iter(JsonValues(read_blocks(path, lambda nbytes: None))), (b"", None))
        return FileKind.json_values if has_field(value, more is None) else FileKind.text
    except Exception:  # whatever is wrong with it will be told when it is read
        return FileKind.text


def _expand(path: str, key: str) -> Iterator[tuple[Path, bool]]:
    """Yield the places that a path or pattern leads to, and whether a pattern led there."""
    place = Path(path).expanduser()
    if place.exists():
        yield place, False
        return
    if glob.has_magic(path):
        found = sorted(glob.glob(str(place), recursive=True))  # noqa: PTH207  # Path.glob takes no absolute pattern
        if not found:
            raise UserError(f"{key}={path} matches no file{list_hint(path)}")
        for name in found:
            if "**" not in path or not os.path.isdir(name):  # noqa: PTH112  # Path.is_dir may raise
                yield Path(name), True
        return
    hub = repository_hint(path) and f"; a dataset of the hub is named {HUB}{path}"
    raise UserError(f"{key}={quoted(path)} does not exist: give files, folders or a pattern of names{hub}")


def walk_files(
    folder: Path,
    left_out: list[str],
    unreadable: list[str],
    enter: Callable[[os.DirEntry[str]], bool] = lambda entry: True,
) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Yield the files below a folder with their paths below it, with forward slashes, in the order of those.

    Links are followed, but no folder is entered twice. A link that leads nowhere or may not be followed is
    yielded as a file, so that whoever opens it learns so; pipes, sockets and devices are left out. It holds
    the entries of one folder of each depth, and takes some microseconds per file: a folder may have millions.

    Args:
        left_out: gets the paths of hidden files and folders, of LEFTOVERS, and of pipes and the like.
        unreadable: gets those of folders that cannot be listed.
        enter: says of a folder whether to enter it.
    """
    seen: set[str] = set()

    def listed(where: str) -> list[os.DirEntry[str]]:
        """Return the entries of a folder, last first."""
        real = os.path.realpath(where)
        if real in seen:
            return []
        seen.add(real)
        try:
            with os.scandir(where) as entries:
                # A folder's files have its name and a slash before theirs.
                return sorted(entries, key=lambda each: each.name + "/" * _is_folder(each), reverse=True)
        except OSError as error:
            unreadable.append(f"{where} ({error.strerror})")
            return []

    root = str(folder)
    begin = len(root.rstrip(os.sep)) + 1
    open_folders = [listed(root)]
    while open_folders:
        if not open_folders[-1]:
            open_folders.pop()
            continue
        entry = open_folders[-1].pop()
        if entry.name.startswith("."):
            left_out.append(entry.path)
        elif _is_folder(entry):
            if enter(entry):
                open_folders.append(listed(entry.path))
        elif _LEFTOVER.match(entry.name):
            left_out.append(entry.path)
        elif _is_special(entry):
            left_out.append(f"{entry.path} (no file)")
        else:
            yield entry.path[begin:].replace(os.sep, "/"), entry


def is_broken_link(path: Path, error: OSError) -> bool:
    """Return whether a path that could not be looked at is a link to nothing, or to itself."""
    return error.errno in (errno.ENOENT, errno.ELOOP) and path.is_symlink()


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or one behind which nothing may be looked at
        return False


def _is_special(entry: os.DirEntry[str]) -> bool:
    """Return True for a pipe, a socket or a device; False for a file and for what cannot be looked at."""
    try:
        if entry.is_file():
            return False
        entry.stat()  # fails for a link that leads nowhere
        return True
    except OSError:
        return False
