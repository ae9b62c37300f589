"""The data source `data=hf`: documents of a dataset as they stream in, tokenized while the run trains.

The `datasets` library reads the dataset: one of the hub, or a local directory. Nothing is kept on the disk
but the held-out documents. Rank 0 alone asks the hub what the dataset consists of; the others get the answer,
and open the files of their own lanes (lanes.py).
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from dsv3.config.registry import command
from dsv3.data.dataset_files import dataset_pieces, shard_file
from dsv3.data.hub_connection import offline, quiet_libraries, why_unreachable
from dsv3.data.lanes import LaneOptions, LaneRows, is_document
from dsv3.data.packing import PackedEvaluationDataset
from dsv3.data.rows import RowOptions
from dsv3.data.sources import PreparedData
from dsv3.errors import RunFailed, UserError
from dsv3.metrics.progress import amount, phase
from dsv3.tokens.cache import CacheEntryError, cache_root, load_or_build
from dsv3.tokens.data_record import DataRecord, layout_digest
from dsv3.tokens.document_encoder import DocumentEncoder, document_ends
from dsv3.tokens.shuffle import Ids, permutation
from dsv3.tokens.token_store import TokenStore
from dsv3.tokens.tokenizer import LocalTokenizer, Tokenizer, TokenizerSource, training_patience
from dsv3.untrusted_files import read_json

READ_TOGETHER = 64
"""Documents that are taken from a file together."""

SCANNED_CHARACTERS = 128 << 20
"""Characters from which the held-out documents are chosen."""

HELD_OUT_CHARACTERS = 4 << 20
"""Characters of held-out documents at most: about a million tokens."""

TOKENIZER_CHARACTERS = 64 << 20
"""Characters that a new tokenizer is trained on."""


class StreamRecipe(NamedTuple):
    """All that another process needs to read the same stream."""

    stream: "TextStream"
    fingerprint: str
    held_out: tuple[npt.NDArray[np.uint32], Ids]
    """Tokens, and offsets [documents + 1]."""
    held_out_digests: frozenset[bytes]
    tokenizer: str
    """Name of the tokenizer's entry in the cache."""
    summary: dict[str, int]


@dataclass
class TextStream:
    """The documents of a split by its pieces: files, or groups of rows of Parquet files.

    Attributes:
        dataset: a datasets.IterableDataset that yields Arrow tables; it can be pickled.
        column: holds the text.
        name: of the dataset, for messages.
    """

    dataset: Any
    column: str
    name: str

    @property
    def num_pieces(self) -> int:
        """Return the number of pieces."""
        return int(self.dataset.num_shards)

    def texts(self, piece: int, first: int = 0) -> Iterator[tuple[int, str | None]]:
        """Yield number and text of the rows of a piece from number `first` on, documents or not.

        Raises:
            UserError: there is no such column, it holds no text, or the file is damaged.
            RunFailed: the file cannot be read any more; the library has tried again and again.
        """
        number = 0
        try:
            for table in self._shard(piece).iter(READ_TOGETHER):
                end = number + len(table)
                if end > first:
                    texts = self._column(table).slice(max(first - number, 0)).to_pylist()
                    yield from zip(range(max(first, number), end), texts, strict=True)
                number = end
        except (UserError, RunFailed, GeneratorExit):
            raise
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            place = f"{self._name(piece)} cannot be read behind row {number}"
            told = f"data.dataset={self.name}: {place}: {reason}"
            if isinstance(error, ValueError) or type(error).__module__.startswith("pyarrow"):
                folder = self.name if Path(self.name).is_dir() else "FOLDER"
                prepare = f"{' '.join(command('train'))} task=prepare task.input={folder} task.output=DIR"
                prepare += f" data.field={self.column}" * (self.column != "text")
                here = "" if folder == self.name else ", once its files are in a FOLDER"
                raise UserError(
                    f"{told}\nMend the file, or skip and count what cannot be read{here}: {prepare}, "
                    "then data=shards data.path=DIR"
                ) from error
            raise RunFailed(told) from error

    def place(self, piece: int, number: int) -> str:
        """Return where a row stands, for messages: its number in the piece, from 0 on."""
        return f"{self._name(piece)} row {number}"

    def _shard(self, piece: int) -> Any:
        return self.dataset.shard(self.num_pieces, piece, contiguous=False)

    def _name(self, piece: int) -> str:
        """Return the file of a piece, and the piece where it may be a part of a file."""
        file = shard_file(self._shard(piece))
        return f"piece {piece}" if file is None else f"{file} (piece {piece})"

    def _column(self, table: Any) -> Any:
        if self.column not in table.column_names:
            names = ", ".join(table.column_names[:8])
            raise UserError(
                f"data.dataset={self.name} has no column {self.column}: data.field is one of {names}"
            )
        column = table.column(self.column)
        if str(column.type) not in ("string", "large_string", "string_view", "null"):
            raise UserError(
                f"data.dataset={self.name}: the column {self.column} holds {column.type} and no text; "
                "name the one that does, data.field=NAME"
            )
        return column


class HubData:
    """`data=hf`: a dataset of the hub or a local directory of one, streamed.

    Args:
        dataset: OWNER/NAME on the hub, or a directory.
        subset: the dataset's configuration; None for its default.
        revision: commit, tag or branch on the hub.
        split: to train on.
        held_out_split: to evaluate on; None sets documents of `split` aside by their content.
        field: the column that holds the text.
        lanes: streams that the dataset is read in.
        lane_rows: consecutive sequences of a batch that one lane supplies.
        shuffled_documents: consecutive documents that are shuffled among one another.
        common: the fields of RowOptions.
    """

    def __init__(
        self,
        dataset: str,
        subset: str | None = None,
        revision: str | None = None,
        split: str = "train",
        held_out_split: str | None = None,
        field: str = "text",
        lanes: int = 1,
        lane_rows: int = 1,
        shuffled_documents: int = 1024,
        **common: Any,
    ) -> None:
        self.dataset, self.subset, self.revision = dataset, subset, revision
        self.split, self.held_out_split, self.field = split, held_out_split, field
        self.lanes, self.lane_rows, self.shuffled_documents = lanes, lane_rows, shuffled_documents
        self.options = RowOptions(**common)

    def prepare(
        self,
        tokenizer_source: TokenizerSource | Tokenizer,
        sequence_length: int,
        seed: int,
        evaluate: bool = False,
    ) -> PreparedData:
        """Find the dataset, choose and tokenize the held-out documents; nothing else is read yet.

        Raises:
            UserError: there is no such dataset, split or column, the hub cannot be reached, or a library is
                missing.
        """
        with phase(f"asking what data.dataset={self.dataset} consists of", patience=300.0):
            streams, record = self._open()
        train = streams[self.split]
        fingerprint = self._fingerprint(record)
        held_out = self._held_out(streams, fingerprint)
        digests = frozenset(map(_digest, held_out))
        if not self._has_training(train, digests):
            raise UserError(
                f"data.dataset={self.dataset} split {self.split} has no document beside the held-out ones: "
                "more of them are needed"
            )
        name = f"tokenizer-{fingerprint}"
        tokenizer = self._tokenizer(tokenizer_source, train, digests, name)
        tokens = _encode(tokenizer, held_out)
        summary = {"pieces": train.num_pieces, "lanes": self.lanes, "vocabulary": tokenizer.size}
        recipe = StreamRecipe(train, fingerprint, tokens, digests, name, summary)
        return self._prepared(recipe, tokenizer, sequence_length, seed, evaluate, record)

    def reopen(
        self,
        recipe: StreamRecipe,
        tokenizer_source: TokenizerSource | Tokenizer,
        sequence_length: int,
        seed: int,
        evaluate: bool = False,
    ) -> PreparedData:
        """Return what `prepare` has returned in another process; the hub is not asked again."""
        quiet_libraries()
        held_out = recipe.held_out_digests
        tokenizer = self._tokenizer(tokenizer_source, recipe.stream, held_out, recipe.tokenizer)
        return self._prepared(recipe, tokenizer, sequence_length, seed, evaluate, None)

    def _prepared(
        self,
        recipe: StreamRecipe,
        tokenizer: Tokenizer,
        sequence_length: int,
        seed: int,
        evaluate: bool,
        record: DataRecord | None,
    ) -> PreparedData:
        """Return the rows of both sides."""
        tokens, offsets = recipe.held_out
        rows = None
        if not evaluate:
            order = seed if self.options.shuffle else None
            shape = (self.lanes, self.lane_rows, sequence_length, order, self.shuffled_documents)
            held_out = recipe.held_out_digests
            rows = LaneRows(
                recipe.stream, LaneOptions(*shape), tokenizer, lambda text: _digest(text) not in held_out
            )
        summary = recipe.summary | {"documents_held_out": len(offsets) - 1, "tokens_held_out": len(tokens)}
        scored = PackedEvaluationDataset(TokenStore.of(tokens, offsets), sequence_length)
        pieces, lanes = amount(recipe.stream.num_pieces, "pieces"), amount(self.lanes, "lanes")
        shares = amount(self.lane_rows, "rows")
        told = [
            "",
            f"{pieces} in {lanes}, {shares} of every batch from each, tokenized as they are read",
            f"held out {amount(len(offsets) - 1, 'documents')}, {len(tokens):,} tokens",
        ]
        known = (rows, scored, tokenizer, recipe.fingerprint, summary)
        return PreparedData(*known, recipe=recipe, record=record, told=told)

    def _open(self) -> tuple[dict[str, TextStream], DataRecord]:
        """Return the streams of the splits that are read, and the record of their files."""
        try:
            import datasets
        except ImportError as error:
            install = "pip install 'dsv3[data]'"
            raise UserError(f"data=hf needs the library datasets ({error}): {install}") from None
        quiet_libraries()
        splits = [self.split, *([self.held_out_split] if self.held_out_split else [])]
        named = {"name": self.subset, "revision": self.revision}
        if not Path(self.dataset).is_dir() and (
            self.dataset.count("/") > 1 or self.dataset.startswith((".", "/"))
        ):
            raise UserError(f"data.dataset={self.dataset} is no directory, and no OWNER/NAME of the hub")
        away = None if Path(self.dataset).is_dir() else why_unreachable(self.dataset)
        try:
            with offline(away is not None):
                builder = datasets.load_dataset_builder(self.dataset, **named)
                if hasattr(builder.config, "columns") and hasattr(builder.config, "batch_size"):  # Parquet
                    taken = {"columns": [self.field], "batch_size": READ_TOGETHER}
                    builder = datasets.load_dataset_builder(self.dataset, **named, **taken)
            files = builder.config.data_files or {}
            missing = [split for split in splits if files and split not in map(str, files)]
            if missing:
                names = ", ".join(map(str, files))
                raise UserError(f"data.dataset={self.dataset} has no split {missing[0]}: it has {names}")
            streams = {split: self._stream(builder.as_streaming_dataset(split)) for split in splits}
        except UserError:
            raise
        except Exception as error:
            raise self._told(error, away) from error
        pieces = dataset_pieces({split: list(files.get(split, [])) for split in splits}, files)
        return streams, DataRecord.of(pieces, None)

    def _stream(self, dataset: Any) -> TextStream:
        # Files of Parquet can be read from any group of rows on: more pieces, so that lanes share none.
        if dataset.num_shards < self.lanes:
            dataset = dataset.reshard()
        return TextStream(dataset.with_format("arrow"), self.field, self.dataset)

    def _told(self, error: Exception, away: str | None) -> UserError:
        """Return the error of a dataset that cannot be opened, with the way on; `away` of the hub."""
        reason = away or " ".join(str(error).split())[:300] or type(error).__name__
        kinds = {kind.__name__ for kind in type(error).__mro__}
        if kinds & {"ConnectionError", "OfflineModeIsEnabled", "LocalEntryNotFoundError", "TimeoutError"}:
            prepare = f"{' '.join(command('train'))} task=prepare task.input={self._named()} task.output=DIR"
            return UserError(
                f"data.dataset={self.dataset} is not here, and the hub cannot be reached: {reason}\n"
                f"where there is a network, {prepare} makes shards for data=shards data.path=DIR"
            )
        return UserError(
            f"data.dataset={self.dataset} cannot be opened ({reason}): give OWNER/NAME of the hub or a "
            "directory of text, JSON lines or Parquet, and data.subset where it has several"
        )

    def _named(self) -> str:
        """Return the dataset as task.input names it."""
        return self.dataset if Path(self.dataset).is_dir() else f"hf:{self.dataset}"

    def _fingerprint(self, record: DataRecord) -> str:
        """Return 16 hex characters over the files and over what decides which side a document is on."""
        chosen = (self.subset, self.split, self.held_out_split, self.field, self.options.held_out)
        return layout_digest([*record.entries, record.level, chosen])[:16]

    def _held_out(self, streams: dict[str, TextStream], fingerprint: str) -> list[str]:
        """Return the held-out documents, each text once; from the cache where they were chosen before."""

        def read(directory: Path) -> list[str]:
            try:
                return [str(text) for text in read_json(directory / "texts.json", "listing")]
            except (OSError, ValueError, TypeError) as error:
                raise CacheEntryError(str(error) if directory.exists() else "") from error

        def build(directory: Path) -> None:
            texts = self._choose_held_out(streams)
            (directory / "texts.json").write_text(json.dumps(texts), "utf-8")  # ASCII, whatever they hold

        entry = cache_root(self.options.cache_dir) / f"held-out-{fingerprint}"
        return load_or_build(entry, read, build, f"held-out documents of {self.dataset}")

    def _choose_held_out(self, streams: dict[str, TextStream]) -> list[str]:
        """Return the held-out documents: those at the begin of their split, or some of the training split.

        Of the training split, those are chosen whose content has a hash below the share data.held_out, among
        the first SCANNED_CHARACTERS; where it is none, the one with the least.
        """
        stream = streams[self.held_out_split or self.split]
        share = 1.0 if self.held_out_split else self.options.held_out
        chosen: dict[bytes, str] = {}
        least: tuple[bytes, str] | None = None
        scanned = size = 0
        with phase("choosing the held-out documents", SCANNED_CHARACTERS, "characters") as work:
            for text in _in_any_order(stream):
                digest = _digest(text)
                if int.from_bytes(digest, "little") < share * 2**128 and digest not in chosen:
                    chosen[digest] = text
                    size += len(text)
                least = min(least or (digest, text), (digest, text))
                scanned += len(text)
                work.advance(len(text))
                if scanned >= SCANNED_CHARACTERS or size >= HELD_OUT_CHARACTERS:
                    break
        if least is None:
            raise UserError(f"data.dataset={self.dataset} has no text: is data.field={self.field} right?")
        return list(chosen.values()) or [least[1]]

    def _has_training(self, stream: TextStream, held_out: frozenset[bytes]) -> bool:
        return any(_digest(text) not in held_out for text in _in_any_order(stream))

    def _tokenizer(
        self,
        source: TokenizerSource | Tokenizer,
        stream: TextStream,
        held_out: frozenset[bytes],
        name: str,
    ) -> Tokenizer:
        """Return the tokenizer; a new one is trained on the begin of the training side."""
        if isinstance(source, Tokenizer):
            return source
        title = f"training the tokenizer on up to {amount(TOKENIZER_CHARACTERS, 'characters')}"
        if isinstance(source, LocalTokenizer):
            title = "loading the tokenizer"

        def texts() -> Iterator[str]:
            size = 0
            for text in _in_any_order(stream):
                if _digest(text) not in held_out:
                    yield text
                    size += len(text)
                    if size >= TOKENIZER_CHARACTERS:
                        return

        with phase(title, each_node=True, patience=training_patience(TOKENIZER_CHARACTERS)):
            return source.prepare(texts(), cache_root(self.options.cache_dir) / name)


def _in_any_order(stream: TextStream) -> Iterator[str]:
    """Yield the documents that have text, the pieces in an order that is always the same."""
    order = permutation(stream.num_pieces, 0, 6).tolist() if stream.num_pieces > 1 else [0]
    return (text for _, text in chain.from_iterable(map(stream.texts, order)) if is_document(text))


def _digest(text: str) -> bytes:
    """Return 16 bytes that are equal for equal texts."""
    return xxhash.xxh3_128_digest(text.encode("utf-8", "surrogatepass"))


def _encode(tokenizer: Tokenizer, texts: Iterable[str]) -> tuple[npt.NDArray[np.uint32], Ids]:
    """Return the tokens of all texts, and the offset at which each begins, and the end."""
    encoder, tokens, ends = DocumentEncoder(tokenizer), list[int](), [0]
    before, after = document_ends(tokenizer)
    with phase("tokenizing the held-out text", unit="documents") as work:
        for text in texts:
            windows = encoder.encode(list(encoder.windows([text])))
            tokens += [*before, *chain.from_iterable(windows), *after]
            ends.append(len(tokens))
            work.advance()
    return np.array(tokens, np.uint32), np.array(ends, np.int64)
