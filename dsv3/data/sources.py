"""The data sources `data=stdlib` and `data=text`: from a corpus to training rows and held-out rows."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from dsv3.data.corpus import Corpus, Stamp, StdlibCorpus, TextCorpus
from dsv3.data.corpus_scan import SCAN_FORMAT, CorpusScan, scan_corpus
from dsv3.data.packing import RowDataset
from dsv3.data.rows import RowOptions, held_out_rows, training_rows
from dsv3.documents.document_files import ReadOptions, no_report
from dsv3.documents.input_files import Unit
from dsv3.documents.skip_limit import Skipped, require_few_skipped
from dsv3.errors import UserError
from dsv3.metrics.progress import amount, phase
from dsv3.tokens.cache import CacheEntryError, cache_root, load_or_build, read_entry
from dsv3.tokens.data_record import DataRecord, layout_digest
from dsv3.tokens.prepare_shards import prepare_shards
from dsv3.tokens.shard_index import HELD_OUT, TRAIN, ShardIndex
from dsv3.tokens.token_inputs import open_side
from dsv3.tokens.token_store import TokenStore
from dsv3.tokens.tokenizer import (
    TRAINING_CHUNK,
    LocalTokenizer,
    Tokenizer,
    TokenizerSource,
    split_text,
    training_patience,
)

FORMAT = 2
"""Part of the key of prepared tokens: raise it when the same documents are to be written otherwise."""


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
        record: what the data consists of, to tell what of it has changed; None in a process that reopened it.
        told: lines for the user on what was read and what was skipped; the first one follows the data's name.
        is_shared: True where the process that prepared it reads the very same files, and not copies of them.
    """

    train: RowDataset | None
    held_out: RowDataset
    tokenizer: Tokenizer | None
    fingerprint: str
    summary: dict[str, int]
    recipe: object = field(default=None, kw_only=True)
    record: DataRecord | None = field(default=None, kw_only=True)
    told: Sequence[str] = field(default=(), kw_only=True)
    is_shared: bool = field(default=True, kw_only=True)

    @property
    def sequence_length(self) -> int:
        """Return the tokens per row without the one after it; data of token ids sets it itself."""
        return self.held_out.sequence_length

    @property
    def tokenizer_fingerprint(self) -> str | None:
        """Return the fingerprint of the tokenizer; None for data that is token ids already."""
        return self.tokenizer.fingerprint() if self.tokenizer else None

    def verify_newer(self, since: float) -> None:
        """Compare what was written after `since` (seconds of the epoch) with its digest, where it has one.

        Raises:
            UserError: a file is not what its digest tells.
        """

    def check_digests(self, share: tuple[int, int] = (0, 1)) -> None:
        """Compare the files of a share (number, count) with their digests, where they have them.

        Raises:
            UserError: a file is not what its digest tells.
        """

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
    """Prefix of the entries of both sides."""
    fingerprint: str
    summary: dict[str, int]
    told: Sequence[str]


@dataclass(frozen=True)
class _ScannedCorpus:
    """A corpus and what a scan of it has found."""

    corpus: Corpus
    stamp: Stamp
    scan: CorpusScan

    @cached_property
    def units(self) -> list[Unit]:
        """Return the units that were scanned; UserError where a file has changed since."""
        return self.corpus.units(self.stamp)


class CorpusData:
    """Text of a corpus, split by document, tokenized once and kept in the cache as token shards.

    `common` are the fields of RowOptions.
    """

    max_skipped = 1.0
    """Share of the documents, and of the files, that may be skipped."""

    def __init__(self, **common: Any) -> None:
        self.options = RowOptions(**common)

    def corpus(self) -> Corpus:
        """Return the files."""
        raise NotImplementedError

    @cached_property
    def _scanned(self) -> _ScannedCorpus:
        """Return the corpus as it is now; texts are read where the cache has no scan of these very files."""
        corpus, root = self.corpus(), cache_root(self.options.cache_dir)

        def entry(stamp: Stamp) -> Path:
            what = f"{SCAN_FORMAT} {type(corpus).__qualname__} {corpus.identity} {corpus.options!r}"
            told = f"{what} {self.options.held_out!r} {stamp.digest}"
            digest = hashlib.sha256(told.encode("utf-8", "surrogateescape"))  # names may be no UTF-8
            return root / f"corpus-{digest.hexdigest()[:16]}"

        stamp = corpus.stamp()
        try:
            scan = read_entry(entry(stamp), CorpusScan.read)
        except CacheEntryError:
            stamp = corpus.settled_stamp()
            scan = load_or_build(
                entry(stamp),
                CorpusScan.read,
                lambda folder: scan_corpus(corpus, stamp, self.options.held_out, folder),
                f"a scan of {corpus.title}",
            )
        files, field = sum(scan.files.values()) + scan.unlisted, corpus.options.field
        require_few_skipped(scan.skipped, files, self.max_skipped, corpus.title, field=field)
        return _ScannedCorpus(corpus, stamp, scan)

    def training_texts(self) -> tuple[Iterator[str], str, int]:
        """Return the texts of the training side, a fingerprint of it, and its characters.

        Long texts come in several parts, as the training of a tokenizer would cut them.
        """
        corpus, scan = self._scanned.corpus, self._scanned.scan

        def texts() -> Iterator[str]:
            documents = scan.documents(corpus.options)
            for unit in self._scanned.units:
                for side, pieces in documents.documents(unit, Skipped(), no_report):
                    if side is not None:
                        yield from split_text(pieces, TRAINING_CHUNK)

        return texts(), f"{scan.fingerprint} {self.options.held_out!r}", scan.split.characters_train

    def prepare(
        self,
        tokenizer_source: TokenizerSource | Tokenizer,
        sequence_length: int,
        seed: int,
        evaluate: bool = False,
    ) -> PreparedData:
        """Scan, split, tokenize and pack the corpus; what was done before comes from the cache.

        Args:
            tokenizer_source: a choice of `tokenizer`, or an existing tokenizer.
            sequence_length: tokens per row.
            seed: seed of the shuffling; the split does not depend on it.
            evaluate: prepare only the held-out side.

        Raises:
            UserError: there is no text or too little of it, too much is skipped, or the cache cannot be
                written.
        """
        corpus, scan = self._scanned.corpus, self._scanned.scan
        root = cache_root(self.options.cache_dir)
        key = f"{scan.fingerprint} {self.options.held_out!r} {FORMAT}"
        key = hashlib.sha256(key.encode()).hexdigest()[:16]
        name = f"tokenizer-{key}"
        if isinstance(tokenizer_source, Tokenizer):
            tokenizer = tokenizer_source
        else:
            texts, _, characters = self.training_texts()  # held-out text must not shape it
            title = f"training the tokenizer on {amount(characters, 'characters')}"
            if isinstance(tokenizer_source, LocalTokenizer):
                title = "loading the tokenizer"
            with phase(title, each_node=True, patience=training_patience(characters)):
                tokenizer = tokenizer_source.prepare(texts, root / name)
        prefix = f"tokens-{key}-{tokenizer.fingerprint()}"
        held_out = self._tokenize(root / f"{prefix}-{HELD_OUT}", tokenizer, HELD_OUT)
        train = None if evaluate else self._tokenize(root / f"{prefix}-{TRAIN}", tokenizer, TRAIN)
        summary = scan.summary() | {"vocabulary": tokenizer.size}
        recipe = CorpusRecipe(name, prefix, scan.fingerprint, summary, scan.told(corpus.options))
        prepared = self._pack(recipe, tokenizer, held_out, train, sequence_length, seed)
        record = scan.record
        if record is not None and train is not None:
            shards = ShardIndex.read(root / f"{prefix}-{TRAIN}").splits[TRAIN]
            layout = (value for shard in shards for value in (shard.num_tokens, shard.digests.get("offsets")))
            record = replace(record, layout=layout_digest(layout))
        return replace(prepared, record=record)

    def _tokenize(self, target: Path, tokenizer: Tokenizer, side: str) -> TokenStore:
        """Return a side of the corpus from the cache, encoded first where the cache does not have it."""
        corpus, stamp, scan = self._scanned.corpus, self._scanned.stamp, self._scanned.scan
        named = {TRAIN: "training", HELD_OUT: "held-out"}[side]

        def build(folder: Path) -> None:
            documents = replace(scan.documents(corpus.options), only=side)
            with phase(f"tokenizing the {named} text", unit="bytes", each_node=True) as work:
                prepared = prepare_shards(
                    folder,
                    self._scanned.units,
                    documents,
                    tokenizer,
                    {"files": stamp.digest},
                    progress=work,
                    told={"path": str(corpus.root)},
                    splits=(side,),
                    key="data.cache_dir",
                    compare=True,
                )
            if not prepared.index.num_tokens(side):
                raise UserError("data: the tokenizer makes no token of these documents; give more text")

        made_from = f"{named} side of {corpus.title}, by a tokenizer of {tokenizer.size:,} ids"
        return load_or_build(target, lambda folder: _open_side(folder, side), build, made_from, stamp.digest)

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
        root = cache_root(self.options.cache_dir)
        tokenizer = tokenizer_source
        if not isinstance(tokenizer, Tokenizer):
            tokenizer = tokenizer.prepare(NoTexts(), root / recipe.tokenizer)

        def read(side: str) -> TokenStore:
            return read_entry(root / f"{recipe.tokens}-{side}", lambda folder: _open_side(folder, side))

        held_out, train = read(HELD_OUT), None if evaluate else read(TRAIN)
        return self._pack(recipe, tokenizer, held_out, train, sequence_length, seed)

    def _pack(
        self,
        recipe: CorpusRecipe,
        tokenizer: Tokenizer,
        held_out: TokenStore,
        train: TokenStore | None,
        sequence_length: int,
        seed: int,
    ) -> PreparedData:
        """Return the rows of both sides; without `train` of the held-out side alone."""
        scored, counts = held_out_rows(held_out, sequence_length)
        rows, summary = None, {**recipe.summary, **counts}
        if train is not None:
            rows, counts = training_rows(train, self.options, sequence_length, seed, tokenizer, recipe.tokens)
            summary |= counts
        return PreparedData(
            rows, scored, tokenizer, recipe.fingerprint, summary, recipe=recipe, told=recipe.told
        )


def _open_side(folder: Path, side: str) -> TokenStore:
    """Return the documents of an entry of the cache; CacheEntryError where it is damaged or missing."""
    try:
        return open_side(folder, side)
    except UserError as error:
        raise CacheEntryError(str(error)) from error


class NoTexts:
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

    Args:
        path: a file, a folder, or a pattern of names.
        field: the field of JSON lines and Parquet that holds a document's text.
        separator: the text between the documents of a text file; None: a file is a document.
        max_skipped: share of the documents, and of the files, that may be skipped.
        common: the fields of RowOptions.

    Raises:
        UserError: `path` is not given.
    """

    def __init__(
        self,
        path: str | None = None,
        field: str = "text",
        separator: str | None = None,
        max_skipped: float = 0.01,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if not path:
            raise UserError("data.path is not set: give a text file or a folder, data.path=FILE_OR_FOLDER")
        self.path = path
        self.max_skipped = max_skipped
        self.read_options = ReadOptions(field, separator)

    def corpus(self) -> Corpus:
        """Return the text files at `path`."""
        return TextCorpus(self.path, self.read_options)
