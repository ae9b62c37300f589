"""Which documents train the model and which only judge it."""

from collections.abc import Iterable, Iterator

from dsv3.data.corpus import Corpus, Document, Entry
from dsv3.runtime.errors import UserError


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
