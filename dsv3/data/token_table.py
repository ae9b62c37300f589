"""The data source `data=tokens`: tables of given token ids, each row a document, perhaps padded."""

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dsv3.config.data import Verify
from dsv3.data.packing import PackedRow
from dsv3.data.rows import RowOptions
from dsv3.data.sources import PreparedData
from dsv3.errors import UserError, list_hint, repository_hint
from dsv3.metrics.progress import amount, phase
from dsv3.tokens.cache import CacheEntryError
from dsv3.tokens.data_record import DataRecord, Piece, layout_digest
from dsv3.tokens.file_array import find_missing
from dsv3.tokens.npy_file import NpyFile
from dsv3.tokens.shuffle import Permutation, SplitRows
from dsv3.tokens.tokenizer import Tokenizer, TokenizerSource

CHUNK_IDS = 1 << 22  # ids that are checked together

CHECKED_IDS = 1 << 25
"""Ids that each rank looks at when a run starts; all are looked at when they are read."""

FINGERPRINT_ROWS = 1024  # rows that enter the fingerprint

RECORDED = 64
"""Parts of a table that are told apart when data has changed."""

IGNORED = -100
"""The id that always is padding: labels that PyTorch's losses leave out have it, no vocabulary does."""

WANTED = "an .npy file of whole numbers [rows, width] is needed; ids in one dimension are read by data=shards"


class TokenTable:
    """Rows of ids in files of equal width, numbered through all files.

    Args:
        files: arrays of [rows, width].
        pad_id: an id of padding beside IGNORED, None where there is none.

    Attributes:
        vocab_size: refuse other ids than 0 .. vocab_size - 1 and padding when they are read; None takes any.
    """

    def __init__(self, files: Sequence[NpyFile], pad_id: int | None = None) -> None:
        self.files, self.pad_id = files, pad_id
        self.width = files[0].shape[1]
        self.vocab_size: int | None = None
        self._arrays = [file.array for file in files]
        self._starts = [0, *accumulate(file.shape[0] for file in files)]

    def __len__(self) -> int:
        """Return the number of rows."""
        return self._starts[-1]

    def blocks(self, first: int, end: int, size: int) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        """Yield (number of the first, rows [n, width] as they are) of first .. end - 1, n up to `size`."""
        while first < end:
            number = bisect_right(self._starts, first) - 1
            stop = min(end, first + size, self._starts[number + 1])
            begin = first - self._starts[number]
            ids = self._arrays[number][begin * self.width : (begin + stop - first) * self.width]
            yield first, ids.reshape(-1, self.width)
            first = stop

    def is_padding(self, ids: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Return where ids are padding."""
        found: npt.NDArray[np.bool_] = ids == IGNORED
        if self.pad_id is not None:
            found |= ids == self.pad_id
        return found

    def row(self, number: int) -> PackedRow:
        """Return a row as one document: padding is cut out, wherever it stands, and fills up the end.

        Raises:
            UserError: an id lies outside the vocabulary.
        """
        ((_, block),) = self.blocks(number, number + 1, 1)
        ids = block[0].astype(np.int64)
        padding = self.is_padding(ids)
        row = PackedRow.empty(self.width)
        kept = ids if not padding.any() else ids[~padding]
        row.tokens[: len(kept)] = kept
        row.documents[: len(kept)] = 0
        if self.vocab_size is not None and len(kept) and (kept.min() < 0 or kept.max() >= self.vocab_size):
            self.require_vocabulary(number, block, self.vocab_size)
        return row

    def require_vocabulary(self, first: int, block: npt.NDArray[Any], vocab_size: int) -> None:
        """Raise UserError at the first id of some rows that is neither padding nor in the vocabulary."""
        invalid = (block < 0) | (block >= vocab_size)
        if not invalid.any():
            return
        invalid &= ~self.is_padding(block)
        if invalid.any():
            row, column = (int(i) for i in np.argwhere(invalid)[0])
            number = bisect_right(self._starts, first) - 1
            raise UserError(
                f"{self.files[number].path}: row {first + row - self._starts[number]} holds the id "
                f"{int(block[row, column])} in column {column}, the model's vocabulary is 0 to "
                f"{vocab_size - 1} (model.vocab_size={vocab_size}); padding is named, data.pad_id=ID"
            )


class TableDataset:
    """Some rows of a table, each a document of its own.

    Args:
        table: of [rows, sequence + 1] ids.
        chosen: the rows of the table to use.
        seed: shuffles them anew in every epoch; None keeps their order.
    """

    def __init__(self, table: TokenTable, chosen: Sequence[int], seed: int | None = None) -> None:
        self.sequence_length = table.width - 1
        self._table, self._chosen, self._seed = table, chosen, seed

    def __len__(self) -> int:
        return len(self._chosen)

    def row(self, index: int) -> PackedRow:
        """Return the row at `index` >= 0, which is row `index % len` of epoch `index // len`."""
        epoch, place = divmod(index, len(self))
        if self._seed is not None:
            place = Permutation(len(self), self._seed, epoch, 0)[place]
        return self._table.row(self._chosen[place])


class TableRecipe(NamedTuple):
    """Let a process read the table that another one has opened."""

    files: Sequence[NpyFile]
    fingerprint: str
    padding: dict[str, int]


@dataclass(frozen=True)
class PreparedTable(PreparedData):
    """Given ids, ready for the data loader."""

    table: TokenTable
    verify: Verify = field(default=Verify.sample, kw_only=True)

    def check_vocabulary(self, vocab_size: int, share: tuple[int, int] = (0, 1)) -> None:
        """Check ids of a share of the rows: some now, or all with Verify.all, and each when it is read.

        Raises:
            UserError: an id is neither padding nor one of 0 .. vocab_size - 1.
        """
        self.table.vocab_size = vocab_size
        first, end = (len(self.table) * (share[0] + more) // share[1] for more in (0, 1))
        limit = None if self.verify is Verify.all else CHECKED_IDS
        itemsize = self.table.files[0].dtype.itemsize
        total = min((end - first) * self.table.width, limit or 1 << 63) * itemsize
        with phase("checking the token ids", total) as work:
            for begin, block in _spread(self.table, first, end, limit):
                self.table.require_vocabulary(begin, block, vocab_size)
                work.advance(block.nbytes)


class TokensData:
    """`data=tokens`: .npy files of whole numbers [rows, width], one or all of a folder.

    The ids are taken as they are, without bos or eos, and the width sets the sequence length to width - 1.
    The held-out rows come from all over the table, the same ones in every run; equal rows are not looked for.

    Args:
        path: a file, or a folder whose .npy files have one width and one dtype.
        pad_id: an id of padding; IGNORED always is one.
        verify: how much is read at start.
        common: the fields of RowOptions.

    Raises:
        UserError: `path` is not given, or the first file is not such a file.
    """

    def __init__(
        self,
        path: str | None = None,
        pad_id: int | None = None,
        verify: Verify = Verify.sample,
        **common: Any,
    ) -> None:
        if not path:
            raise UserError("data.path is not set: give a file of ids [rows, width], data.path=FILE.npy")
        self.options = RowOptions(**common)
        self.pad_id, self.verify = pad_id, verify
        self._paths = _find(path)
        self._first = _open(self._paths[0])

    @property
    def sequence_length(self) -> int:
        """Return the sequence length that the width of the file sets; known without reading the ids."""
        return self._first.shape[1] - 1

    def prepare(
        self,
        tokenizer_source: TokenizerSource | Tokenizer | None = None,
        sequence_length: int | None = None,
        seed: int = 0,
        evaluate: bool = False,
    ) -> PreparedTable:
        """Split the rows into training and held-out rows; nothing is tokenized.

        Args:
            tokenizer_source: not used.
            sequence_length: not used, the file sets it.
            seed: seed of the shuffling; the choice of held-out rows does not depend on it.
            evaluate: score every row and train on none.
        """
        files = [self._first]
        with phase("opening the files of data.path", len(self._paths), "files", each_node=True) as work:
            for path in self._paths[1:]:
                files.append(_open(path, self._first))
                work.advance()
        table = TokenTable(files, self.pad_id)
        recipe = TableRecipe(files, _fingerprint(table), _count_padding(table))
        return self._split(table, recipe, seed, evaluate, self._record(table))

    def reopen(
        self,
        recipe: TableRecipe,
        tokenizer_source: TokenizerSource | Tokenizer | None,
        sequence_length: int | None,
        seed: int,
        evaluate: bool = False,
    ) -> PreparedTable:
        """Return what `prepare` has returned in another process; CacheEntryError for a missing file."""
        if missing := find_missing([file.array for file in recipe.files]):
            raise CacheEntryError(missing)
        return self._split(TokenTable(recipe.files, self.pad_id), recipe, seed, evaluate, None)

    def _split(
        self, table: TokenTable, recipe: TableRecipe, seed: int, evaluate: bool, record: DataRecord | None
    ) -> PreparedTable:
        """Return the rows of both sides."""
        count = len(table)
        train: Sequence[int] | None
        held_out: Sequence[int]
        if evaluate:
            train, held_out = None, range(count)
        elif count == 1:  # better to score the row that was trained on than not to train
            train, held_out = range(1), range(1)
        else:
            num_held_out = max(1, round(count * self.options.held_out))
            train, held_out = (SplitRows(count, num_held_out, side, 0) for side in (False, True))
        rows = None if train is None else TableDataset(table, train, seed if self.options.shuffle else None)
        padding = recipe.padding.get("tokens_padding", 0) / (count * table.width)

        def tokens(side: Sequence[int]) -> int:
            return round(len(side) * table.width * (1 - padding))  # of a padded table about

        summary = {"documents_held_out": len(held_out), "tokens_held_out": tokens(held_out)}
        if train is not None:
            summary |= {"documents_train": len(train), "tokens_train": tokens(train)}
            summary["rows_per_epoch"] = len(train)
        summary |= recipe.padding
        return PreparedTable(
            rows,
            TableDataset(table, held_out),
            None,
            recipe.fingerprint,
            summary,
            table,
            recipe=recipe,
            record=record,
            told=self._told(table, recipe.padding),
            verify=self.verify,
        )

    def _told(self, table: TokenTable, padding: dict[str, int]) -> list[str]:
        """Return lines for the user on the files and on what of them is padding."""
        lines = [f"{amount(len(table), 'rows')} of {amount(len(table.files), 'files')}"]
        if padding:
            share = padding["tokens_padding"] / (len(table) * table.width)
            about = "about " if len(table) * table.width > CHECKED_IDS else ""
            only = amount(padding["rows_of_padding"], "rows")
            lines.append(f"{about}{share:.1%} of the places are padding, {about}{only} are nothing else")
        return lines

    def _record(self, table: TokenTable) -> DataRecord:
        """Return what the table consists of: its files, or parts of the one file."""
        if len(table.files) > 1:
            pieces = [
                Piece(Path(f.path).name, f.array.length * f.dtype.itemsize, _fingerprint(TokenTable([f])))
                for f in table.files
            ]
            return DataRecord.of(pieces, layout_digest(f.shape for f in table.files), "files")
        pieces, rows = [], len(table)
        for number in range(min(RECORDED, rows)):
            first, end = (rows * bound // min(RECORDED, rows) for bound in (number, number + 1))
            size = (end - first) * table.width * table.files[0].dtype.itemsize
            name = f"{Path(table.files[0].path).name} rows {first} to {end - 1}"
            pieces.append(Piece(name, size, _fingerprint(table, first, end, FINGERPRINT_ROWS // RECORDED)))
        return DataRecord.of(pieces, layout_digest([rows, table.width, self.options.held_out]), "parts")


def _find(path: str) -> list[Path]:
    """Return the .npy files at a path; UserError where there is none."""
    place = Path(path).expanduser()
    if place.is_dir():
        files = sorted(file for file in place.glob("*.npy") if not file.name.startswith("."))
        if not files:
            raise UserError(f"data.path={path} holds no .npy file: {WANTED}")
        return files
    if not place.exists():
        raise UserError(f"data.path={path} does not exist: {WANTED}{repository_hint(path)}{list_hint(path)}")
    return [place]


def _open(path: Path, like: NpyFile | None = None) -> NpyFile:
    """Return the header of a file; UserError unless it is a table, of the width and dtype of `like`."""
    file = NpyFile.read(path, WANTED)
    if len(file.shape) != 2 or file.shape[0] < 1 or file.shape[1] < 2:
        least = "at least 1 row of 2 ids" if len(file.shape) == 2 else "two dimensions"
        raise UserError(f"{path} holds {file.dtype.name} {list(file.shape)}, {least} are needed: {WANTED}")
    if like is not None and (file.shape[1], file.dtype) != (like.shape[1], like.dtype):
        raise UserError(
            f"{path} holds {file.dtype.name} of width {file.shape[1]}, {like.path} {like.dtype.name} of "
            f"width {like.shape[1]}: the files of one folder must have one width and one dtype"
        )
    return file


def _spread(
    table: TokenTable, first: int, end: int, limit: int | None
) -> Iterator[tuple[int, npt.NDArray[Any]]]:
    """Yield blocks of the rows first .. end - 1, of more than `limit` ids some that are evenly spread."""
    size = max(1, CHUNK_IDS // table.width)
    blocks = -(-(end - first) // size)
    sampled = blocks if limit is None else min(blocks, max(1, limit // (size * table.width)))
    for number in range(sampled):
        begin = first + size * (number * blocks // sampled)
        yield from table.blocks(begin, min(begin + size, end), size)


def _count_padding(table: TokenTable) -> dict[str, int]:
    """Return the tokens of padding and the rows of nothing else, projected where not all rows are looked at.

    UserError where there is nothing else.
    """
    looked_at = padding = empty = 0
    for _, block in _spread(table, 0, len(table), CHECKED_IDS):
        found = table.is_padding(block)
        looked_at, padding = looked_at + len(block), padding + int(found.sum())
        empty += int(found.all(axis=1).sum())
    if not padding:
        return {}
    if empty == len(table):
        pad = "null" if table.pad_id is None else table.pad_id
        raise UserError(f"{table.files[0].path} holds nothing but padding (data.pad_id={pad})")
    scale: Callable[[int], int] = lambda count: round(count * len(table) / looked_at)  # noqa: E731
    return {"tokens_padding": scale(padding), "rows_of_padding": scale(empty)}


def _fingerprint(
    table: TokenTable, first: int = 0, end: int | None = None, most: int = FINGERPRINT_ROWS
) -> str:
    """Hash shape, dtype and up to `most` rows spread over the table, or over a part of it.

    Reading all of a table of many GB would take minutes.
    """
    end = len(table) if end is None else end
    total = hashlib.sha256(f"{table.files[0].dtype.str} {(end - first, table.width)}".encode())
    sampled = np.linspace(first, end - 1, min(end - first, most))
    for row in np.unique(sampled.astype(np.int64)).tolist():
        for _, block in table.blocks(row, row + 1, 1):
            total.update(block.tobytes())
    if table.pad_id is not None:
        total.update(f"pad {table.pad_id}".encode())
    return total.hexdigest()[:16]
