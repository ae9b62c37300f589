"""Where the text comes from: files of the Python standard library, or the user's own.

Which documents train the model and which only judge it.
"""

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dsv3.errors import UserError

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


class Split:
    """A corpus in two sides that share no content.

    A document's side follows from the hash of its content, so the same text under two names cannot
    be on both sides, and neither the order of the files nor their number moves a document across.
    Exact duplicates are dropped on either side, but for the first. Where so few documents leave
    a side empty, the one whose size comes nearest to the share is held out; a single document is cut,
    and its last lines are held out.

    Args:
        held_out: share of the documents to hold out, 0 < held_out < 0.5.

    Raises:
        UserError: there is not even one document of two characters.
    """

    def __init__(self, corpus: Corpus, held_out: float) -> None:
        self.corpus = corpus
        self.share = held_out
        distinct = {entry.digest: entry for entry in corpus.entries()}
        self.duplicates = len(corpus.entries()) - len(distinct)
        self.single = len(distinct) == 1
        self._held_out = _choose(distinct.values(), held_out)

    def training(self) -> Iterator[Document]:
        """The documents to train on, in the corpus's order, each content once."""
        return self._side(held_out=False)

    def evaluation(self) -> Iterator[Document]:
        """The documents held out, in the corpus's order, each content once."""
        return self._side(held_out=True)

    def _side(self, held_out: bool) -> Iterator[Document]:
        seen: set[str] = set()
        for document in self.corpus.documents():
            digest = document.digest()
            if digest in seen:
                continue
            seen.add(digest)
            if self.single:
                yield cut(document, self.share)[held_out]
            elif (digest in self._held_out) == held_out:
                yield document


def cut(document: Document, share: float) -> tuple[Document, Document]:
    """The head of a document and its last `share` of lines (of characters, if it has one line only).

    Raises:
        UserError: the document has a single character.
    """
    text = document.text
    lines = text.splitlines(keepends=True)
    if len(text) < 2:
        raise UserError(f"{document.name} holds a single character: data.path needs text to train on")
    if len(lines) > 1:
        tail = sum(len(line) for line in lines[-_part(len(lines), share) :])
    else:
        tail = _part(len(text), share)
    return Document(document.name, text[:-tail]), Document(document.name, text[-tail:])


def _part(count: int, share: float) -> int:
    return max(1, round(count * share))


def _choose(distinct: Iterable[Entry], share: float) -> frozenset[str]:
    entries = list(distinct)
    chosen = frozenset(entry.digest for entry in entries if int(entry.digest[:16], 16) < share * 2**64)
    if 0 < len(chosen) < len(entries):
        return chosen
    wanted = share * sum(entry.size for entry in entries)
    nearest = min(entries, key=lambda entry: (abs(entry.size - wanted), entry.digest))
    return frozenset({nearest.digest})
