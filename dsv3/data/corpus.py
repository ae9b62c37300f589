"""Where the text comes from: files of the Python standard library, or the user's own."""

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dsv3.runtime.errors import UserError

EXCLUDED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


@dataclass(frozen=True)
class Document:
    """One text with the name it goes by: its path relative to the corpus, with forward slashes."""

    name: str
    text: str

    def digest(self) -> str:
        """The sha256 of the content alone: equal for equal texts, whatever their names."""
        return hashlib.sha256(self.text.encode()).hexdigest()


class Entry(NamedTuple):
    """What is remembered of a document once its text has been read and let go."""

    name: str
    digest: str
    size: int  # characters


class Corpus:
    """Text files under one root, read one at a time in the order of their names."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.skipped = 0  # files that are no text, known after the first pass
        self._entries: list[Entry] | None = None

    def documents(self) -> Iterator[Document]:
        """Every document that is not empty; files that are not UTF-8 text are left out and counted.

        Raises:
            UserError: a file cannot be read.
        """
        self.skipped = 0
        for path in self._paths():
            text = _read(path)
            if text is None:
                self.skipped += 1
            elif text:
                yield Document(self._name(path), text)

    def entries(self) -> list[Entry]:
        """Name, digest and size of every document; the texts are read once, at the first call."""
        if self._entries is None:
            self._entries = [Entry(d.name, d.digest(), len(d.text)) for d in self.documents()]
        return self._entries

    def fingerprint(self) -> str:
        """16 hex characters over all names and contents."""
        total = hashlib.sha256()
        for entry in self.entries():
            total.update(f"{entry.name}\0{entry.digest}\n".encode())
        return total.hexdigest()[:16]

    def _paths(self) -> list[Path]:
        raise NotImplementedError

    def _name(self, path: Path) -> str:
        return path.name if path == self.root else path.relative_to(self.root).as_posix()

    def _sorted(self, paths: Iterator[Path]) -> list[Path]:
        # by name rather than by Path, whose order differs between systems
        return sorted((path for path in paths if path.is_file()), key=self._name)


class StdlibCorpus(Corpus):
    """The .py files of the running interpreter's standard library, without tests and installed packages."""

    def __init__(self, root: Path | None = None) -> None:
        super().__init__(root or Path(sysconfig.get_path("stdlib")))

    def _paths(self) -> list[Path]:
        paths = self._sorted(p for p in self.root.rglob("*.py") if not self._excluded(p))
        if not paths:
            raise UserError(
                f"data=stdlib: this Python has no library sources under {self.root}\n"
                "Give text of your own: data=text data.path=FILE_OR_FOLDER"
            )
        return paths

    def _excluded(self, path: Path) -> bool:
        return not EXCLUDED_FOLDERS.isdisjoint(path.relative_to(self.root).parts)


class TextCorpus(Corpus):
    """One file, or every text file of a folder and the folders in it, hidden ones left out.

    Args:
        path: any file that is UTF-8 counts as text, whatever its ending. Hidden: the name begins with a dot.

    Raises:
        UserError: there is nothing at `path`; when read, nothing there is text.
    """

    def __init__(self, path: str) -> None:
        root = Path(path).expanduser()
        if not root.exists():
            raise UserError(f"data.path={path} does not exist: give a text file or a folder of text files")
        super().__init__(root)

    def entries(self) -> list[Entry]:
        """Name, digest and size of every document, of which there is at least one."""
        found = super().entries()
        if not found:
            what = "no text" if self.root.is_file() else "no file with text"
            raise UserError(
                f"data.path={self.root} holds {what} ({self.skipped} files are not UTF-8): "
                "give a text file or a folder of text files"
            )
        return found

    def _paths(self) -> list[Path]:
        if self.root.is_file():
            return [self.root]
        return self._sorted(p for p in self.root.rglob("*") if not self._hidden(p))

    def _hidden(self, path: Path) -> bool:
        return any(part.startswith(".") for part in path.relative_to(self.root).parts)


def _read(path: Path) -> str | None:
    """The text of a file, line ends as they are; None if it is binary."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if b"\0" in content:
        return None
    try:
        return content.decode()
    except UnicodeDecodeError:
        return None
