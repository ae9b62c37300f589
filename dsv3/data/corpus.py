"""The corpus of `data=text` and `data=stdlib`: its files, and the stamp by which a change of them is seen."""

import os
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import xxhash

from dsv3.documents.document_files import ReadOptions
from dsv3.documents.input_files import (
    FileKind,
    FoundFiles,
    InputFile,
    Unit,
    find_files,
    is_saved,
    walk_files,
)
from dsv3.documents.input_units import plan_units
from dsv3.errors import UserError
from dsv3.metrics.progress import phase

EXCLUDED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})

FINE, COARSE = 20_000_000, 2_000_000_000
"""Nanoseconds within which a file can change twice and keep one time: where times have fractions of a second,
and where they have none."""

_TOLD = 1000
"""Files that are looked at between two counts of the progress."""


@dataclass(frozen=True)
class Stamp:
    """The names, sizes and times of all files, without reading one.

    Attributes:
        digest: equal while no file is added, removed, renamed or written to.
        files: how many there are.
        newest_ns: the latest time of a change.
    """

    digest: str
    files: int
    newest_ns: int


class Corpus:
    """Text files in the order of their names.

    Attributes:
        title: what messages call it.
        identity: tells it from another corpus of the same files.
        root: the file or folder; of a pattern the folder above what it matches.
        options: how documents are found in its files.
    """

    title: str
    identity: str
    root: Path
    options: ReadOptions

    def stamp(self) -> Stamp:
        """Look at every file without reading it: some microseconds for each."""
        state, count, newest = xxhash.xxh3_128(), 0, 0
        with phase(f"looking at the files of {self.root}", unit="files", each_node=True) as looking:
            for count, (name, size, mtime_ns) in enumerate(self.stats(), 1):
                state.update(f"{name}\0{size} {mtime_ns}\n".encode("utf-8", "surrogateescape"))
                newest = max(newest, mtime_ns)
                if count % _TOLD == 0:
                    looking.advance(_TOLD)
            looking.advance(count % _TOLD)
        return Stamp(state.hexdigest(), count, newest)

    def settled_stamp(self) -> Stamp:
        """Return the stamp once the last change is old enough for the next one to have another time."""
        while True:
            stamp = self.stamp()
            wait = stamp.newest_ns + (FINE if stamp.newest_ns % 10**9 else COARSE) - time.time_ns()
            if not 0 < wait <= COARSE:  # files from the future keep their times, and changes have others
                return stamp
            time.sleep(wait / 1e9)

    def files(self) -> FoundFiles:
        """Return the files with their paths below the root as names, and what is left out or unreadable."""
        raise NotImplementedError

    def units(self, stamp: Stamp) -> list[Unit]:
        """Return the units in which the files are read; UserError where they are not those of a stamp."""
        units = plan_units(self.files().files, self.options)
        if self.stamp() != stamp:
            raise UserError(
                f"{self.title}: files have changed since they were looked at, a moment ago: "
                "repeat the command once they are at rest"
            )
        return units

    def stats(self) -> Iterator[tuple[str, int, int]]:
        """Yield name, size and time of change, ns, of every file."""
        for file in self.files().files:
            yield file.name, file.size, file.mtime_ns


class StdlibCorpus(Corpus):
    """The .py files of the running interpreter's standard library, without tests and installed packages."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or Path(sysconfig.get_path("stdlib"))
        self.identity = str(self.root)
        self.title = f"the standard library in {self.root}"
        self.options = ReadOptions()

    def files(self) -> FoundFiles:
        """Return the files; UserError where there is none."""
        found = FoundFiles()
        for name, entry in walk_files(self.root, [], found.unreadable, enter=_is_library):
            if name.endswith(".py"):
                try:
                    stat = entry.stat()
                except OSError as error:
                    found.unreadable.append(f"{entry.path} ({error.strerror})")
                    continue
                file = InputFile(Path(entry.path), name, FileKind.text, stat.st_size, stat.st_mtime_ns)
                found.files.append(file)
        if not found.files:
            raise UserError(
                f"data=stdlib: this Python has no library sources under {self.root}\n"
                "Give text of your own: data=text data.path=FILE_OR_FOLDER"
            )
        return found


class TextCorpus(Corpus):
    """A file, the files that a pattern matches, or those of a folder and its subfolders.

    Args:
        path: every file that is UTF-8 counts as text, whatever its suffix, but those that a suffix says to be
            JSON lines or Parquet. Hidden files and what editors leave behind are left out.

    Raises:
        UserError: `path` leads to no file.
    """

    def __init__(self, path: str, options: ReadOptions | None = None) -> None:
        self.path = self.identity = str(Path(path).expanduser())
        self.title = f"data.path={path}"
        self.options = options or ReadOptions()
        self.root = Path(self.path)
        if not self.root.exists():
            places = [str(file.path.parent) for file in self._find().files]
            self.root = Path(os.path.commonpath(places))

    def files(self) -> FoundFiles:
        """Return the files; UserError where there is none."""
        found = self._find()
        begin = len(str(self.root).rstrip(os.sep)) + 1
        for number, file in enumerate(found.files):
            name = file.path.name if file.path == self.root else str(file.path)[begin:].replace(os.sep, "/")
            found.files[number] = replace(file, name=name)
        return found

    def _find(self) -> FoundFiles:
        if is_saved(self.root):
            raise UserError(
                f"data.path={self.path} is a dataset of save_to_disk: read it by "
                f"data=hf data.dataset={self.path}, or make shards of it by task=prepare"
            )
        return find_files([self.path], self.options.field, "data.path")

    def stats(self) -> Iterator[tuple[str, int, int]]:
        if not self.root.is_dir() or str(self.root) != self.path or is_saved(self.root):
            yield from super().stats()
            return
        # Without an object per file: there may be millions.
        unreadable: list[str] = []
        for name, entry in walk_files(self.root, [], unreadable):
            try:
                stat = entry.stat()
            except OSError as error:
                yield f"{name} ({error.strerror})", 0, 0
            else:
                yield name, stat.st_size, stat.st_mtime_ns
        for folder in unreadable:
            yield folder, 0, 0


def _is_library(folder: os.DirEntry[str]) -> bool:
    return folder.name not in EXCLUDED_FOLDERS and not folder.is_symlink()
