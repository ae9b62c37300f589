"""Given ids: every row is a document and is scored, and no file can run code."""

import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from dsv3.data.batch import collate
from dsv3.data.loader import evaluation_batches
from dsv3.data.token_table import CHUNK_IDS, TableDataset, TokensData
from dsv3.errors import UserError
from dsv3.model.head import IGNORE_INDEX


def written(folder: Path, table: object) -> str:
    np.save(folder / "ids.npy", np.asarray(table))
    return str(folder / "ids.npy")


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_evaluation_scores_all_but_the_first_id_of_every_row(tmp_path: Path, dtype: type) -> None:
    table: npt.NDArray[Any] = np.arange(70).reshape(10, 7).astype(dtype)
    data = TokensData(path=written(tmp_path, table))
    prepared = data.prepare(evaluate=True)
    assert prepared.train is None
    assert (prepared.tokenizer, prepared.sequence_length, data.sequence_length) == (None, 6, 6)
    targets = np.concatenate([b.targets.numpy() for b in evaluation_batches(prepared.held_out, 4)])
    assert targets[targets != IGNORE_INDEX].tolist() == table[:, 1:].flatten().tolist()
    assert collate([prepared.held_out.row(3)]).documents.tolist() == [[0] * 6]


def test_the_file_is_read_in_place(tmp_path: Path) -> None:
    prepared = TokensData(path=written(tmp_path, np.zeros((4, 5), np.int32))).prepare()
    assert isinstance(prepared.table, np.memmap)


def test_training_sets_rows_aside_whatever_the_seed(tmp_path: Path) -> None:
    path = written(tmp_path, np.arange(400, dtype=np.int32).reshape(100, 4))

    def sides(seed: int) -> tuple[list[int], list[int]]:
        prepared = TokensData(path=path, held_out=0.1).prepare(seed=seed)
        assert prepared.train is not None
        rows = (prepared.train, prepared.held_out)
        train, held_out = ([int(r.row(i).tokens[0]) for i in range(len(r))] for r in rows)
        return train, held_out

    train, held_out = sides(1)
    assert [first // 40 for first in held_out] == list(range(10))  # from all over the file
    assert len(set(np.diff(held_out))) > 3  # and not at regular distances
    assert sorted(train + held_out) == list(range(0, 400, 4))
    other_train, other_held_out = sides(2)
    assert other_held_out == held_out
    assert other_train != train
    assert sorted(other_train) == sorted(train) != train


def test_epochs_differ_and_a_row_depends_on_its_index_alone(tmp_path: Path) -> None:
    table = np.arange(60).reshape(20, 3)
    rows = TableDataset(table, range(20), seed=1)
    order = [int(rows.row(index).tokens[0]) for index in range(60)]
    assert sorted(order[:20]) == sorted(order[20:40]) == sorted(table[:, 0].tolist())
    assert order[:20] != order[20:40] != order[40:]
    again = TableDataset(table, range(20), seed=1)
    assert [int(again.row(index).tokens[0]) for index in range(59, -1, -1)] == order[::-1]


def test_without_shuffling_rows_keep_their_order(tmp_path: Path) -> None:
    path = written(tmp_path, np.arange(60, dtype=np.int32).reshape(20, 3))
    train = TokensData(path=path, shuffle=False).prepare(seed=5).train
    assert train is not None
    order = [int(train.row(index).tokens[0]) for index in range(len(train))]
    assert order == sorted(order)


def test_a_single_row_trains_and_is_scored(tmp_path: Path) -> None:
    prepared = TokensData(path=written(tmp_path, np.array([[3, 1, 2]], np.int32))).prepare()
    assert prepared.train is not None
    assert prepared.train.row(5).tokens.tolist() == prepared.held_out.row(0).tokens.tolist() == [3, 1, 2]


@pytest.mark.parametrize(
    "table",
    [
        np.zeros((3, 4), np.float32),
        np.zeros((3, 4), np.uint16),
        np.zeros(12, np.int32),
        np.zeros((3, 4, 5), np.int64),
        np.zeros((3, 1), np.int32),
        np.zeros((0, 4), np.int32),
    ],
)
def test_other_types_and_shapes_are_refused(tmp_path: Path, table: object) -> None:
    with pytest.raises(UserError, match=r"data\.path=.*needed"):
        TokensData(path=written(tmp_path, table))


class Trap:
    """Run code when it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return (pytest.fail, ("a data file ran code",))


def test_a_pickle_is_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "ids.npy").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UserError, match=r"data\.path="):
        TokensData(path=str(tmp_path / "ids.npy"))
    (tmp_path / "lines.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(UserError, match=r"lines\.jsonl is no \.npy file: an \.npy file of int32"):
        TokensData(path=str(tmp_path / "lines.jsonl"))
    np.save(tmp_path / "objects.npy", np.array([[Trap()]], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match=r"data\.path="):
        TokensData(path=str(tmp_path / "objects.npy"))


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.path is not set"):
        TokensData()
    with pytest.raises(UserError, match="does not exist"):
        TokensData(path=str(tmp_path / "none.npy"))
    whole = Path(written(tmp_path, np.zeros((9, 9), np.int32))).read_bytes()
    for content in (b"", b"text", whole[:-5]):
        (tmp_path / "bad.npy").write_bytes(content)
        with pytest.raises(UserError, match=r"data\.path=.*bad\.npy"):
            TokensData(path=str(tmp_path / "bad.npy"))
    np.savez(tmp_path / "several.npz", np.zeros((3, 3), np.int32))
    with pytest.raises(UserError, match="archive"):
        TokensData(path=str(tmp_path / "several.npz"))


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_a_foreign_byte_order_is_named(tmp_path: Path, dtype: type) -> None:
    foreign = np.zeros((3, 4), np.dtype(dtype).newbyteorder("S"))
    name = {"little": "big-endian", "big": "little-endian"}[sys.byteorder]
    with pytest.raises(UserError, match=rf"holds {name} {np.dtype(dtype).name} \[3, 4\]"):
        TokensData(path=written(tmp_path, foreign))


@pytest.mark.parametrize("bad", [-1, 50, 2**31 - 1])
def test_an_id_outside_the_vocabulary_is_named_with_its_row(tmp_path: Path, bad: int) -> None:
    table = np.full((CHUNK_IDS // 1024 + 9, 1024), 49, np.int32)
    prepared = TokensData(path=written(tmp_path, table)).prepare()
    prepared.check_vocabulary(50)
    row = len(table) - 2  # in the second chunk
    table[row, 5] = bad
    prepared = TokensData(path=written(tmp_path, table)).prepare()
    with pytest.raises(UserError) as caught:
        prepared.check_vocabulary(50)
    for words in (f"row {row} ", f"the id {bad}", "0 to 49", "model.vocab_size=50"):
        assert words in str(caught.value)


def test_the_fingerprint_follows_the_content(tmp_path: Path) -> None:
    table = np.arange(60, dtype=np.int32).reshape(20, 3)
    prints = [
        TokensData(path=written(tmp_path, part)).prepare().fingerprint
        for part in (table, table, table + 1, table[:10])
    ]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3
