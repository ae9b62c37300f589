"""The data source `data=tokens`: a table of given token ids, each row a document."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dsv3.data.packing import PackedRow
from dsv3.data.rows import RowOptions
from dsv3.data.shuffle import Permutation, SplitRows
from dsv3.data.sources import PreparedData
from dsv3.data.tokenizer import Tokenizer, TokenizerSource
from dsv3.errors import UserError
from dsv3.metrics.progress import phase

CHUNK_IDS = 1 << 22  # ids that are checked together

FINGERPRINT_ROWS = 1024  # rows that enter the fingerprint


class TableDataset:
    """Some rows of a table, each a document of its own.

    Args:
        table: [rows, sequence + 1] ids.
        chosen: the rows of the table to use.
        seed: shuffles them anew in every epoch; None keeps their order.
    """

    def __init__(self, table: npt.NDArray[Any], chosen: Sequence[int], seed: int | None = None) -> None:
        self.sequence_length = table.shape[1] - 1
        self._table, self._chosen, self._seed = table, chosen, seed

    def __len__(self) -> int:
        return len(self._chosen)

    def row(self, index: int) -> PackedRow:
        """Return the row at `index` >= 0, which is row `index % len` of epoch `index // len`."""
        epoch, place = divmod(index, len(self))
        if self._seed is not None:
            place = Permutation(len(self), self._seed, epoch, 0)[place]
        tokens = self._table[self._chosen[place]].astype(np.int64)
        return PackedRow(tokens, np.zeros(len(tokens), np.int32))


@dataclass(frozen=True)
class PreparedTable(PreparedData):
    """Given ids, ready for the data loader; `table` is [rows, width]."""

    table: npt.NDArray[Any]

    def check_vocabulary(self, vocab_size: int, share: tuple[int, int] = (0, 1)) -> None:
        """Read a share of the table, and raise UserError at the first id outside 0 .. vocab_size - 1."""
        step = max(1, CHUNK_IDS // self.table.shape[1])
        begin, end = (len(self.table) * (share[0] + more) // share[1] for more in (0, 1))
        with phase("checking the token ids", self.table[begin:end].nbytes) as work:
            for first in range(begin, end, step):
                chunk = self.table[first : min(first + step, end)]
                invalid = (chunk < 0) | (chunk >= vocab_size)
                if invalid.any():
                    row, column = (int(i) for i in np.argwhere(invalid)[0])
                    raise UserError(
                        f"data.path: row {first + row} holds the id {int(chunk[row, column])}, "
                        f"the model's vocabulary is 0 to {vocab_size - 1} (model.vocab_size={vocab_size})"
                    )
                work.advance(chunk.nbytes)


class TokensData:
    """`data=tokens`: an .npy file of int32 or int64 [rows, width], memory-mapped.

    The ids are taken as they are, without bos or eos, and the width sets the sequence length to width - 1.
    The held-out rows come from all over the table, the same ones in every run; equal rows are not looked for.

    Raises:
        UserError: `path` is not given, or is not such a file.
    """

    def __init__(self, path: str | None = None, **common: Any) -> None:
        if not path:
            raise UserError("data.path is not set: give a file of ids [rows, width], data.path=FILE.npy")
        self.options = RowOptions(**common)
        self._table = _open_table(path)

    @property
    def sequence_length(self) -> int:
        """Return the sequence length that the width of the file sets; known without reading the ids."""
        return int(self._table.shape[1]) - 1

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
        return self._split(_fingerprint(self._table), seed, evaluate)

    def reopen(
        self,
        recipe: str,
        tokenizer_source: TokenizerSource | Tokenizer | None,
        sequence_length: int | None,
        seed: int,
        evaluate: bool = False,
    ) -> PreparedTable:
        """Return what `prepare` has returned in another process; `recipe` is the fingerprint."""
        return self._split(recipe, seed, evaluate)

    def _split(self, fingerprint: str, seed: int, evaluate: bool) -> PreparedTable:
        """Return the rows of both sides."""
        table = self._table
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
        summary = {"documents_held_out": len(held_out), "tokens_held_out": len(held_out) * table.shape[1]}
        if train is not None:
            summary |= {"documents_train": len(train), "tokens_train": len(train) * table.shape[1]}
            summary["rows_per_epoch"] = len(train)
        scored = TableDataset(table, held_out)
        return PreparedTable(rows, scored, None, fingerprint, summary, table, recipe=fingerprint)


def _open_table(path: str) -> npt.NDArray[Any]:
    """Memory-map the .npy file at `path`; UserError unless it is int32 or int64 [rows >= 1, width >= 2]."""
    file = Path(path).expanduser()
    wanted = "an .npy file of int32 or int64 [rows, width] is needed"
    if not file.is_file():
        raise UserError(f"data.path={path} does not exist: {wanted}")
    try:
        with file.open("rb") as opened:
            begin = opened.read(len(np.lib.format.MAGIC_PREFIX))
        if begin != np.lib.format.MAGIC_PREFIX and not begin.startswith(b"PK"):  # an archive is told of below
            raise UserError(f"data.path={path} is no .npy file: {wanted}")
        # Without pickles: a data file must not be able to run code.
        table = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        why = "it holds Python objects" if "allow_pickle" in str(error) else error
        raise UserError(f"data.path={path} is not an array that can be read ({why}): {wanted}") from error
    if not isinstance(table, np.ndarray):
        raise UserError(f"data.path={path} holds an archive of arrays: {wanted}")
    if table.dtype not in (np.int32, np.int64) or table.ndim != 2:
        # numpy writes "=" for this machine's byte order; another one is named.
        order = {"<": "little-endian ", ">": "big-endian "}.get(table.dtype.byteorder, "")
        raise UserError(f"data.path={path} holds {order}{table.dtype.name} {list(table.shape)}: {wanted}")
    if table.shape[0] < 1 or table.shape[1] < 2:
        raise UserError(f"data.path={path} is {list(table.shape)}: at least 1 row of 2 ids is needed")
    return table


def _fingerprint(table: npt.NDArray[Any]) -> str:
    """Hash shape, dtype and up to FINGERPRINT_ROWS rows spread over the table.

    Reading all of a table of many GB would take minutes.
    """
    total = hashlib.sha256(f"{table.dtype.str} {table.shape}".encode())
    sampled = np.linspace(0, len(table) - 1, min(len(table), FINGERPRINT_ROWS))
    for row in np.unique(sampled.astype(np.int64)):
        total.update(np.ascontiguousarray(table[row]).tobytes())
    return total.hexdigest()[:16]
