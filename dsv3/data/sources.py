"""The data sources `data=stdlib` and `data=text`: from a corpus to training rows and held-out rows."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from dsv3.data.cache import CacheEntryError, cache_root
from dsv3.data.corpus import Corpus, Document, HeldOutSplit, StdlibCorpus, TextCorpus
from dsv3.data.packing import PackedDataset, PackedEvaluationDataset, RowDataset
from dsv3.data.token_file import FORMAT, TokenFile, load_or_tokenize, read_token_file
from dsv3.data.tokenizer import LocalTokenizer, Tokenizer, TokenizerSource
from dsv3.errors import UserError
from dsv3.metrics.progress import amount, phase

_SLOWEST_START, _SLOWEST_TRAINING = 60.0, 50_000
"""Seconds, and characters per second: a BPE training is one call that says nothing until it is done."""


@dataclass(frozen=True)
class PreparedData:
    """Data ready for the data loader.

    Attributes:
        train: rows without end; None when prepared for evaluation only.
        held_out: rows to score, each once.
        tokenizer: None for data that is token ids already.
        fingerprint: 16 hex characters, the same for the same data.
        summary: counts to show the user and to record.
        recipe: what another process needs to `reopen` the same data; None where the source has no reopen.
    """

    train: RowDataset | None
    held_out: RowDataset
    tokenizer: Tokenizer | None
    fingerprint: str
    summary: dict[str, int]
    recipe: object = field(default=None, kw_only=True)

    @property
    def sequence_length(self) -> int:
        """Return the tokens per row without the one after it; data of token ids sets it itself."""
        return self.held_out.sequence_length

    @property
    def tokenizer_fingerprint(self) -> str | None:
        """Return the fingerprint of the tokenizer; None for data that is token ids already."""
        return self.tokenizer.fingerprint() if self.tokenizer else None

    def check_vocabulary(self, vocab_size: int, share: tuple[int, int] = (0, 1)) -> None:
        """Check that a model of `vocab_size` ids has an embedding for every id.

        Args:
            share: (number, count), the part of given ids that this process reads.

        Raises:
            UserError: the tokenizer, or an id, goes beyond the vocabulary.
        """
        size = self.tokenizer.size if self.tokenizer else 0
        if size > vocab_size:
            raise UserError(
                f"the tokenizer has {size} ids, model.vocab_size={vocab_size} is too small for it: "
                f"use model.vocab_size={size} or a smaller tokenizer"
            )


class CorpusRecipe(NamedTuple):
    """The entries of the cache that hold a prepared corpus, and what is known of it."""

    tokenizer: str
    """Prefix of the tokenizer's entry."""
    tokens: str
    """Prefix of the token files' entries."""
    fingerprint: str
    summary: dict[str, int]


class CorpusData:
    """Text of a corpus, split by document, tokenized once and kept in the cache.

    Args:
        document_mask: read by the model's side; the rows carry document ids in any case.
        held_out: fraction of the documents to hold out.
        shuffle: whether documents and rows are shuffled in every epoch.
        cache_dir: the folder of prepared tokens; None for the default.
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
        """Return the documents."""
        raise NotImplementedError

    def prepare(
        self,
        tokenizer_source: TokenizerSource | Tokenizer,
        sequence_length: int,
        seed: int,
        evaluate: bool = False,
    ) -> PreparedData:
        """Read, split, tokenize and pack the corpus; tokenizer and tokens come from the cache where they can.

        Args:
            tokenizer_source: a choice of `tokenizer`, or an existing tokenizer.
            sequence_length: tokens per row.
            seed: seed of the shuffling; the split does not depend on it.
            evaluate: prepare only the held-out side.

        Raises:
            UserError: there is no text or too little of it, or the cache cannot be written.
        """
        split = HeldOutSplit(self.corpus(), self.held_out)
        root = cache_root(self.cache_dir)
        fingerprint = split.corpus.fingerprint()
        key = hashlib.sha256(f"{fingerprint} {self.held_out!r} {FORMAT}".encode()).hexdigest()[:16]
        name = f"tokenizer-{key}"
        if isinstance(tokenizer_source, Tokenizer):
            tokenizer = tokenizer_source
        else:
            texts = (document.text for document in split.training())  # held-out text must not shape it
            title = f"training the tokenizer on {amount(split.training_size, 'characters')}"
            if isinstance(tokenizer_source, LocalTokenizer):
                title = "loading the tokenizer"
            patience = _SLOWEST_START + split.training_size / _SLOWEST_TRAINING
            with phase(title, each_node=True, patience=patience):
                tokenizer = tokenizer_source.prepare(texts, root / name)
        prefix = f"tokens-{key}-{tokenizer.fingerprint()}"

        def tokenize(read: Callable[[Callable[[int], None]], Iterator[Document]], side: str) -> TokenFile:
            title = {"train": "training", "held_out": "held-out"}[side]
            with phase(f"tokenizing the {title} text", split.size, "characters", each_node=True) as work:
                texts = (document.text for document in read(work.advance))
                return load_or_tokenize(root / f"{prefix}-{side}", tokenizer, texts)

        summary = {
            "documents_read": len(split.corpus.infos()),
            "duplicates_dropped": split.duplicates,
            "files_skipped": split.corpus.skipped,
            "files_empty": split.corpus.empty,
            "characters_train": split.training_size,
            "vocabulary": tokenizer.size,
        }
        recipe = CorpusRecipe(name, prefix, fingerprint, summary)
        held_out = tokenize(split.evaluation, "held_out")
        train = None if evaluate else tokenize(split.training, "train")
        return self._pack(recipe, tokenizer, held_out, train, sequence_length, seed)

    def reopen(
        self,
        recipe: CorpusRecipe,
        tokenizer_source: TokenizerSource | Tokenizer,
        sequence_length: int,
        seed: int,
        evaluate: bool = False,
    ) -> PreparedData:
        """Return what `prepare` has returned in another process, from the cache alone: no text is read.

        Raises:
            CacheEntryError: this machine's cache does not have it.
        """
        root = cache_root(self.cache_dir)
        tokenizer = tokenizer_source
        if not isinstance(tokenizer, Tokenizer):
            tokenizer = tokenizer.prepare(_NoTexts(), root / recipe.tokenizer)
        held_out = read_token_file(root / f"{recipe.tokens}-held_out")
        train = None if evaluate else read_token_file(root / f"{recipe.tokens}-train")
        return self._pack(recipe, tokenizer, held_out, train, sequence_length, seed)

    def _pack(
        self,
        recipe: CorpusRecipe,
        tokenizer: Tokenizer,
        held_out: TokenFile,
        train: TokenFile | None,
        sequence_length: int,
        seed: int,
    ) -> PreparedData:
        """Return the rows of both sides; without `train` of the held-out side alone."""
        summary = {
            **recipe.summary,
            "documents_held_out": held_out.num_documents,
            "tokens_held_out": len(held_out.tokens),
        }
        rows = None
        if train is not None:
            rows = PackedDataset(train.tokens, train.offsets, sequence_length, seed, self.shuffle)
            summary["documents_train"] = train.num_documents
            summary["tokens_train"] = len(train.tokens)
            summary["rows_per_epoch"] = len(rows)
            summary["tokens_left_out"] = len(train.tokens) - 1 - len(rows) * sequence_length
        scored = PackedEvaluationDataset(held_out.tokens, held_out.offsets, sequence_length)
        return PreparedData(rows, scored, tokenizer, recipe.fingerprint, summary, recipe=recipe)


class _NoTexts:
    """Texts that must not be read: a tokenizer is to come from the cache."""

    def __iter__(self) -> Iterator[str]:
        raise CacheEntryError("the tokenizer is not in the cache")


class StdlibData(CorpusData):
    """`data=stdlib`: the Python standard library of the running interpreter."""

    def corpus(self) -> Corpus:
        """Return the library's own sources, without its tests."""
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
        """Return the text files at `path`."""
        return TextCorpus(self.path)
