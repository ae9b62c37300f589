"""`data=tokens`: a table of ids as given, each row a document."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dsv3.data.packing import Epochs, Ids, Row, permutation
from dsv3.data.sources import PreparedData
from dsv3.data.tokenizer import Tokenizer, TokenizerSource
from dsv3.errors import UserError

CHUNK = 1 << 22  # ids looked at together

SAMPLED = 1024  # rows that enter the fingerprint


class TableRows:
    """Some rows of a table, each a document of its own.

    Args:
        table: [rows, sequence + 1] ids.
        chosen: [count] which of its rows.
        seed: permutes them anew in every epoch; None keeps their order.
    """

    def __init__(self, table: npt.NDArray[Any], chosen: Ids, seed: int | None = None) -> None:
        self.sequence_length = table.shape[1] - 1
        self._table, self._chosen, self._seed = table, chosen, seed
        self._epochs = Epochs(self._arrange)

    def __len__(self) -> int:
        return len(self._chosen)

    def row(self, index: int) -> Row:
        """The row at `index`, which grows for ever: epoch `index // len`."""
        epoch, place = divmod(index, len(self))
        tokens = self._table[int(self._epochs[epoch][place])].astype(np.int64)
        return Row(tokens, np.zeros(len(tokens), np.int32))

    def _arrange(self, epoch: int) -> Ids:
        if self._seed is None:
            return self._chosen
        return self._chosen[permutation(len(self), self._seed, epoch, 0)]


@dataclass(frozen=True)
class PreparedTable(PreparedData):
    """Given ids, ready for the loader; `table` is [rows, width]."""

    table: npt.NDArray[Any]

    def check_vocabulary(self, vocab_size: int) -> None:
        """Read the whole table and refuse the first id outside 0 .. vocab_size - 1."""
        step = max(1, CHUNK // self.table.shape[1])
        for first in range(0, len(self.table), step):
            part = self.table[first : first + step]
            bad = (part < 0) | (part >= vocab_size)
            if bad.any():
                row, column = (int(i) for i in np.argwhere(bad)[0])
                raise UserError(
                    f"data.path: row {first + row} holds the id {int(part[row, column])}, "
                    f"the model's vocabulary is 0 to {vocab_size - 1} (model.vocab_size={vocab_size})"
                )


class TokensData:
    """`data=tokens`: an .npy file of int32 or int64 [rows, width], read in place.

    The ids are taken as they are, without bos or eos, and the width sets the sequence length to
    width - 1. Rows are held out by a permutation of their numbers that never changes; equal rows
    are not looked for.

    Raises:
        UserError: `path` is not given, or is no such file.
    """

    def __init__(
        self,
        document_mask: bool = False,
        held_out: float = 0.03,
        shuffle: bool = True,
        cache_dir: str | None = None,
        path: str | None = None,
    ) -> None:
        if not path:
            raise UserError("data.path is not set: give a file of ids [rows, width], data.path=FILE.npy")
        self.document_mask = document_mask
        self.held_out = held_out
        self.shuffle = shuffle
        self._table = _open(path)

    @property
    def sequence_length(self) -> int:
        """What the width of the file sets it to; known without reading the ids."""
        return int(self._table.shape[1]) - 1

    def prepare(
        self,
        tokenizer_source: TokenizerSource | Tokenizer | None = None,
        sequence_length: int | None = None,
        seed: int = 0,
        evaluate: bool = False,
    ) -> PreparedTable:
        """Divide the rows; nothing is tokenized.

        Args:
            tokenizer_source: not used. sequence_length: not used, the file sets it.
            seed: of the order in each epoch; which rows are held out does not depend on it.
            evaluate: every row is to be scored, none is to train on.
        """
        table = self._table
        train, held_out = (None, np.arange(len(table))) if evaluate else self._divide()
        rows = None if train is None else TableRows(table, train, seed if self.shuffle else None)
        summary = {"documents_held_out": len(held_out), "tokens_held_out": len(held_out) * table.shape[1]}
        if train is not None:
            summary |= {"documents_train": len(train), "tokens_train": len(train) * table.shape[1]}
            summary["rows_per_epoch"] = len(train)
        return PreparedTable(rows, TableRows(table, held_out), None, _fingerprint(table), summary, table)

    def _divide(self) -> tuple[Ids, Ids]:
        count = len(self._table)
        if count == 1:  # better to score what was trained on than not to train
            return np.arange(1), np.arange(1)
        aside = max(1, round(count * self.held_out))
        order = permutation(count, 0)
        return np.sort(order[aside:]), np.sort(order[:aside])


def _kind(table: object) -> str:
    """What a file that is refused holds; the byte order where it is not this machine's."""
    if not isinstance(table, np.ndarray):
        return "an archive of arrays"
    order = {"<": "little-endian ", ">": "big-endian "}.get(table.dtype.byteorder, "")  # "=": the machine's
    return f"{order}{table.dtype.name} {list(table.shape)}"


def _open(path: str) -> npt.NDArray[Any]:
    file = Path(path).expanduser()
    wanted = "an .npy file of int32 or int64 [rows, width] is needed"
    if not file.is_file():
        raise UserError(f"data.path={path} does not exist: {wanted}")
    try:
        # without pickles: a data file must not be able to run code
        table = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"data.path={path} is no array that can be read ({error}): {wanted}") from error
    if not isinstance(table, np.ndarray) or table.dtype not in (np.int32, np.int64) or table.ndim != 2:
        raise UserError(f"data.path={path} holds {_kind(table)}: {wanted}")
    if table.shape[0] < 1 or table.shape[1] < 2:
        raise UserError(f"data.path={path} is {list(table.shape)}: at least 1 row of 2 ids is needed")
    return table


def _fingerprint(table: npt.NDArray[Any]) -> str:
    """Shape, type and up to SAMPLED rows spread over the table; to read many GB would take minutes."""
    total = hashlib.sha256(f"{table.dtype.str} {table.shape}".encode())
    for row in np.unique(np.linspace(0, len(table) - 1, min(len(table), SAMPLED)).astype(np.int64)):
        total.update(np.ascontiguousarray(table[row]).tobytes())
    return total.hexdigest()[:16]
