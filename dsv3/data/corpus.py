"""The corpus: the text files to read, and the split of their documents into training and held-out sides."""

import hashlib
import json
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dsv3.errors import UserError
from dsv3.metrics.progress import Phase, phase

EXCLUDED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


@dataclass(frozen=True)
class Document:
    """One text and its name: the path relative to the corpus, with forward slashes."""

    name: str
    text: str

    def digest(self) -> str:
        """Return the sha256 of the content alone: equal for equal texts, whatever their names."""
        return hashlib.sha256(self.text.encode()).hexdigest()


class DocumentInfo(NamedTuple):
    """The name, digest and size of a document, kept after its text is dropped."""

    name: str
    digest: str
    size: int  # characters


class Corpus:
    """Text files under one root, read one at a time in the order of their names."""

    def __init__(self, root: Path) -> None:
        self.root = root
        # Files that are not UTF-8 text, and empty ones, known after the first pass.
        self.skipped = self.empty = 0
        self._reading: Phase | None = None  # of the first pass
        self._looking: Phase | None = None
        self._infos: list[DocumentInfo] | None = None

    def documents(self) -> Iterator[Document]:
        """Yield every document that is not empty; skip and count the files that are not UTF-8 text.

        Line ends stay as they are.

        Raises:
            UserError: a file cannot be read.
        """
        self.skipped = self.empty = 0
        with phase(f"looking for files in {self.root}", unit="files", each_node=True) as self._looking:
            paths = self._paths()
            if self._reading is not None:
                self._reading.total, self._reading.unit = len(paths), "files"
        for path in paths:
            if self._reading is not None:
                self._reading.advance()
            try:
                content = path.read_bytes()
            except OSError as error:
                raise UserError(f"{path} cannot be read: {error.strerror}") from error
            try:
                text = None if b"\0" in content else content.decode()
            except UnicodeDecodeError:
                text = None
            if text is None:
                self.skipped += 1
            elif text:
                yield Document(self._name(path), text)
            else:
                self.empty += 1

    def infos(self) -> list[DocumentInfo]:
        """Return name, digest and size of every document; the first call reads the texts."""
        if self._infos is None:
            infos = []
            with phase(f"reading {self.root}", unit="documents", each_node=True) as self._reading:
                for document in self.documents():
                    infos.append(DocumentInfo(document.name, document.digest(), len(document.text)))
                    if self._reading.total is None:  # a corpus that is not read file by file
                        self._reading.advance()
            self._infos, self._reading = infos, None
        return self._infos

    def fingerprint(self) -> str:
        """Return 16 hex characters over all names and contents."""
        total = hashlib.sha256()
        for info in self.infos():
            total.update(f"{info.name}\0{info.digest}\n".encode())
        return total.hexdigest()[:16]

    def _paths(self) -> list[Path]:
        raise NotImplementedError

    def _name(self, path: Path) -> str:
        return path.name if path == self.root else path.relative_to(self.root).as_posix()

    def _sorted(self, paths: Iterator[Path]) -> list[Path]:
        # By name rather than by Path, whose order differs between systems.
        return sorted((path for path in self._counted(paths) if path.is_file()), key=self._name)

    def _counted(self, paths: Iterator[Path]) -> Iterator[Path]:
        """Yield paths as they are found; a folder of a million takes minutes."""
        for path in paths:
            if self._looking is not None:
                self._looking.advance()
            yield path


class StdlibCorpus(Corpus):
    """The .py files of the running interpreter's standard library, without tests and installed packages."""

    def __init__(self, root: Path | None = None) -> None:
        super().__init__(root or Path(sysconfig.get_path("stdlib")))

    def _paths(self) -> list[Path]:
        found = self.root.rglob("*.py")
        paths = self._sorted(p for p in found if EXCLUDED_FOLDERS.isdisjoint(p.relative_to(self.root).parts))
        if not paths:
            raise UserError(
                f"data=stdlib: this Python has no library sources under {self.root}\n"
                "Give text of your own: data=text data.path=FILE_OR_FOLDER"
            )
        return paths


class TextCorpus(Corpus):
    """One file, or every text file of a folder and its subfolders, without hidden ones.

    Args:
        path: a file or a folder. Every file that is UTF-8 counts as text, whatever its suffix; a name that
            begins with a dot is hidden.

    Raises:
        UserError: nothing exists at `path`, or, when it is read, no file there is text.
    """

    def __init__(self, path: str) -> None:
        root = Path(path).expanduser()
        if not root.exists():
            raise UserError(f"data.path={path} does not exist: give a text file or a folder of text files")
        super().__init__(root)

    def infos(self) -> list[DocumentInfo]:
        """Return name, digest and size of every document; there is at least one."""
        found = super().infos()
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

        def is_hidden(path: Path) -> bool:
            return any(part.startswith(".") for part in path.relative_to(self.root).parts)

        return self._sorted(path for path in self.root.rglob("*") if not is_hidden(path))


def looks_like_json_lines(path: Path) -> bool:
    """Return True for a .jsonl file, or a folder with one, that begins with a JSON object."""
    files = [path] if path.is_file() else sorted(path.rglob("*.jsonl"))
    if not files or files[0].suffix != ".jsonl":
        return False
    try:
        with files[0].open(encoding="utf-8") as file:
            return isinstance(json.loads(file.readline()), dict)
    except (OSError, ValueError, RecursionError):
        return False


class HeldOutSplit:
    """A corpus in a training side and a held-out side that share no content.

    The hash of a document's content decides its side. The same text under two names can therefore not be on
    both sides, and neither the order nor the number of the files moves a document across. Only the first of
    exact duplicates is kept. Where too few documents would leave a side empty, the document whose size is
    nearest to the wanted fraction is held out; a single document is cut, and its last lines are held out.

    Args:
        held_out: fraction of the documents to hold out, 0 < held_out < 0.5.

    Raises:
        UserError: there is not even one document of two characters.
    """

    def __init__(self, corpus: Corpus, held_out: float) -> None:
        self.corpus = corpus
        self.fraction = held_out
        distinct = {info.digest: info for info in corpus.infos()}
        self.duplicates = len(corpus.infos()) - len(distinct)
        self.is_single = len(distinct) == 1
        self.size = sum(info.size for info in corpus.infos())  # characters of both sides and duplicates
        self._held_out = _choose_held_out(list(distinct.values()), held_out)
        kept = sum(info.size for digest, info in distinct.items() if digest not in self._held_out)
        self.training_size = round(kept or self.size * (1 - held_out))  # characters of the training side

    def training(self, report: Callable[[int], None] | None = None) -> Iterator[Document]:
        """Yield the training documents in the corpus's order, each content once.

        `report` gets the characters of every document that is read on the way, `size` in all.
        """
        return self._side(False, report)

    def evaluation(self, report: Callable[[int], None] | None = None) -> Iterator[Document]:
        """Yield the held-out documents in the corpus's order, each content once; `report` as above."""
        return self._side(True, report)

    def _side(self, held_out: bool, report: Callable[[int], None] | None) -> Iterator[Document]:
        seen: set[str] = set()
        for document in self.corpus.documents():
            digest = document.digest()
            if report is not None:
                report(len(document.text))
            if digest in seen:
                continue
            seen.add(digest)
            if self.is_single:
                yield split_document(document, self.fraction)[held_out]
            elif (digest in self._held_out) == held_out:
                yield document


def split_document(document: Document, fraction: float) -> tuple[Document, Document]:
    """Split off the last `fraction` of a document's lines, or of its characters where it has one line only.

    Raises:
        UserError: the document has a single character.
    """
    text = document.text
    lines = text.splitlines(keepends=True)
    if len(text) < 2:
        raise UserError(f"{document.name} holds a single character: data.path needs text to train on")
    if len(lines) > 1:
        tail = sum(len(line) for line in lines[-max(1, round(len(lines) * fraction)) :])
    else:
        tail = max(1, round(len(text) * fraction))
    return Document(document.name, text[:-tail]), Document(document.name, text[-tail:])


def _choose_held_out(documents: list[DocumentInfo], fraction: float) -> frozenset[str]:
    """Return the digests of the documents to hold out."""
    chosen = frozenset(info.digest for info in documents if int(info.digest[:16], 16) < fraction * 2**64)
    if 0 < len(chosen) < len(documents):
        return chosen
    wanted = fraction * sum(info.size for info in documents)
    nearest = min(documents, key=lambda info: (abs(info.size - wanted), info.digest))
    return frozenset({nearest.digest})
