"""The choices of `data`: each prepares the rows to train on, the rows held out, and what is known of them."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dsv3.data.cache import cache_root
from dsv3.data.corpus import Corpus, Document, Split, StdlibCorpus, TextCorpus
from dsv3.data.packing import PackedDataset, PackedEvaluation, Rows
from dsv3.data.token_file import FORMAT, TokenFile, cached_tokens
from dsv3.data.tokenizer import Tokenizer, TokenizerSource
from dsv3.errors import UserError


@dataclass(frozen=True)
class PreparedData:
    """Data ready for the loader.

    Attributes:
        train: rows for ever; None when prepared for evaluation.
        held_out: rows to score, each once.
        tokenizer: None for data that is ids already.
        fingerprint: 16 hex characters, the same for the same data.
        summary: counts to tell the user and to record.
    """

    train: Rows | None
    held_out: Rows
    tokenizer: Tokenizer | None
    fingerprint: str
    summary: dict[str, int]

    @property
    def sequence_length(self) -> int:
        """Tokens of a row without the one after it; given ids set it themselves."""
        return self.held_out.sequence_length

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuse ids that a model of `vocab_size` ids has no embedding for.

        Raises:
            UserError: the tokenizer, or an id, goes beyond it.
        """
        size = self.tokenizer.size if self.tokenizer else 0
        if size > vocab_size:
            raise UserError(
                f"the tokenizer has {size} ids, model.vocab_size={vocab_size} is too small for it: "
                f"use model.vocab_size={size} or a smaller tokenizer"
            )


class CorpusData:
    """Text of a corpus, split by document, tokenized once and kept in the cache.

    Args:
        document_mask: kept for the model's side; the rows carry document numbers in any case.
        held_out: share of the documents to hold out.
        shuffle: whether documents and rows are permuted in every epoch.
        cache_dir: where prepared tokens live; None for the default.
    """

    def __init__(
        self,
        document_mask: bool = False,
        held_out: float = 0.03,
        shuffle: bool = True,
        cache_dir: str | None = None,
    ) -> None:
        self.document_mask = document_mask
        self.held_out = held_out
        self.shuffle = shuffle
        self.cache_dir = cache_dir

    def corpus(self) -> Corpus:
        """The documents."""
        raise NotImplementedError

    def prepare(
        self,
        tokenizer_source: TokenizerSource | Tokenizer,
        sequence_length: int,
        seed: int,
        evaluate: bool = False,
    ) -> PreparedData:
        """Read, split, tokenize (or find all that in the cache) and pack.

        Args:
            tokenizer_source: a choice of `tokenizer`, or a tokenizer that is there already.
            sequence_length: tokens of a row.
            seed: of the permutations; the split does not depend on it.
            evaluate: only the held-out side is prepared.

        Raises:
            UserError: no text, too little of it, or a cache that cannot be written.
        """
        split = Split(self.corpus(), self.held_out)
        key = self._key(split)
        tokenizer = self._tokenizer(tokenizer_source, split, key)
        held_out = self._tokens(split.evaluation(), key, tokenizer, "held_out")
        summary = _summary(split, tokenizer) | _counts("held_out", held_out)
        train = None
        if not evaluate:
            tokens = self._tokens(split.training(), key, tokenizer, "train")
            train = PackedDataset(tokens.tokens, tokens.offsets, sequence_length, seed, self.shuffle)
            summary |= _counts("train", tokens) | {"rows_per_epoch": len(train)}
        rows = PackedEvaluation(held_out.tokens, held_out.offsets, sequence_length)
        return PreparedData(train, rows, tokenizer, split.corpus.fingerprint(), summary)

    def _key(self, split: Split) -> str:
        what = f"{split.corpus.fingerprint()} {self.held_out!r} {FORMAT}"
        return hashlib.sha256(what.encode()).hexdigest()[:16]

    def _tokenizer(self, source: TokenizerSource | Tokenizer, split: Split, key: str) -> Tokenizer:
        if isinstance(source, Tokenizer):
            return source
        texts = (document.text for document in split.training())
        return source.prepare(texts, self._root() / f"tokenizer-{key}")

    def _tokens(self, documents: Iterator[Document], key: str, tokenizer: Tokenizer, side: str) -> TokenFile:
        target = self._root() / f"tokens-{key}-{tokenizer.fingerprint()}-{side}"
        return cached_tokens(target, tokenizer, (document.text for document in documents))

    def _root(self) -> Path:
        return cache_root(self.cache_dir)


class StdlibData(CorpusData):
    """`data=stdlib`: the Python standard library of the running interpreter."""

    def corpus(self) -> Corpus:
        """The library's own sources, tests left out."""
        return StdlibCorpus()


class TextData(CorpusData):
    """`data=text`: the user's own file or folder.

    Raises:
        UserError: `path` is not given.
    """

    def __init__(
        self,
        document_mask: bool = False,
        held_out: float = 0.03,
        shuffle: bool = True,
        cache_dir: str | None = None,
        path: str | None = None,
    ) -> None:
        super().__init__(document_mask, held_out, shuffle, cache_dir)
        if not path:
            raise UserError("data.path is not set: give a text file or a folder, data.path=FILE_OR_FOLDER")
        self.path = path

    def corpus(self) -> Corpus:
        """The text files at `path`."""
        return TextCorpus(self.path)


def _summary(split: Split, tokenizer: Tokenizer) -> dict[str, int]:
    return {
        "duplicates_dropped": split.duplicates,
        "files_skipped": split.corpus.skipped,
        "vocabulary": tokenizer.size,
    }


def _counts(side: str, tokens: TokenFile) -> dict[str, int]:
    return {f"documents_{side}": tokens.documents, f"tokens_{side}": len(tokens.tokens)}
