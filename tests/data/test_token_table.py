"""Given ids: every row is a document and is scored, and no file can run code."""

import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from dsv3.config.data import Packing, TokensDataConfig, Verify
from dsv3.data import token_table
from dsv3.data.batch import collate
from dsv3.data.loader import evaluation_batches
from dsv3.data.packing import PADDING
from dsv3.data.token_table import CHUNK_IDS, TableDataset, TokensData, TokenTable
from dsv3.errors import InvalidValue, UserError
from dsv3.model.head import IGNORE_INDEX
from dsv3.tokens.cache import CacheEntryError
from dsv3.tokens.npy_file import NpyFile


def written(folder: Path, table: object) -> str:
    np.save(folder / "ids.npy", np.asarray(table))
    return str(folder / "ids.npy")


@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8"])
def test_evaluation_scores_all_but_the_first_id_of_every_row(tmp_path: Path, dtype: str) -> None:
    table: npt.NDArray[Any] = np.arange(70).reshape(10, 7).astype(dtype)
    data = TokensData(path=written(tmp_path, table))
    prepared = data.prepare(evaluate=True)
    assert prepared.train is None
    assert (prepared.tokenizer, prepared.sequence_length, data.sequence_length) == (None, 6, 6)
    targets = np.concatenate([b.targets.numpy() for b in evaluation_batches(prepared.held_out, 4)])
    assert targets[targets != IGNORE_INDEX].tolist() == table[:, 1:].flatten().tolist()
    assert collate([prepared.held_out.row(3)]).documents.tolist() == [[0] * 6]


def test_a_folder_is_one_table_and_another_process_opens_nothing(tmp_path: Path) -> None:
    table = np.arange(66, dtype=np.uint16).reshape(22, 3)
    (tmp_path / "one").mkdir()
    one = TokensData(path=written(tmp_path / "one", table)).prepare(seed=1)
    for number, part in enumerate((table[:5], table[5:6], table[6:])):
        np.save(tmp_path / f"{number}.npy", part)
    several = TokensData(path=str(tmp_path)).prepare(seed=1)
    recipe = pickle.loads(pickle.dumps(several.recipe))
    again = TokensData(path=str(tmp_path)).reopen(recipe, None, None, 1)
    assert several.fingerprint == again.fingerprint
    for prepared in (several, again):
        assert (prepared.train is None) == (one.train is None)
        for rows, others in ((one.train, prepared.train), (one.held_out, prepared.held_out)):
            assert rows is not None
            assert others is not None
            assert [rows.row(i).tokens.tolist() for i in range(len(rows))] == [
                others.row(i).tokens.tolist() for i in range(len(others))
            ]
    (tmp_path / "1.npy").write_bytes(b"")
    with pytest.raises(CacheEntryError, match=r"1\.npy is cut off"):
        TokensData(path=str(tmp_path)).reopen(recipe, None, None, 1)
    np.save(tmp_path / "1.npy", np.zeros((2, 4), np.uint16))
    with pytest.raises(UserError, match=r"1\.npy holds uint16 of width 4, .*0\.npy uint16 of width 3"):
        TokensData(path=str(tmp_path)).prepare()


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
    written(tmp_path, table)
    rows = TableDataset(TokenTable([NpyFile.read(tmp_path / "ids.npy", "")]), range(20), seed=1)
    order = [int(rows.row(index).tokens[0]) for index in range(60)]
    assert sorted(order[:20]) == sorted(order[20:40]) == sorted(table[:, 0].tolist())
    assert order[:20] != order[20:40] != order[40:]
    again = TableDataset(TokenTable([NpyFile.read(tmp_path / "ids.npy", "")]), range(20), seed=1)
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
        np.zeros((3, 4), np.bool_),
        np.zeros(12, np.int32),
        np.zeros((3, 4, 5), np.int64),
        np.zeros((3, 1), np.int32),
        np.zeros((0, 4), np.int32),
    ],
)
def test_other_types_and_shapes_are_refused(tmp_path: Path, table: object) -> None:
    with pytest.raises(UserError, match=r"ids\.npy holds .*needed"):
        TokensData(path=written(tmp_path, table))


def test_rows_that_are_stored_column_by_column_are_refused_with_the_way_on(tmp_path: Path) -> None:
    table = np.asfortranarray(np.arange(12, dtype=np.int32).reshape(3, 4))
    with pytest.raises(UserError, match=r"Fortran order.*ascontiguousarray"):
        TokensData(path=written(tmp_path, table))


class Trap:
    """Run code when it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return (pytest.fail, ("a data file ran code",))


def test_a_pickle_is_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "ids.npy").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UserError, match=r"ids\.npy is no \.npy file"):
        TokensData(path=str(tmp_path / "ids.npy"))
    (tmp_path / "lines.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(UserError, match=r"lines\.jsonl is no \.npy file: an \.npy file of whole numbers"):
        TokensData(path=str(tmp_path / "lines.jsonl"))
    np.save(tmp_path / "objects.npy", np.array([[Trap()]], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match=r"objects\.npy holds Python objects"):
        TokensData(path=str(tmp_path / "objects.npy"))


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.path is not set"):
        TokensData()
    with pytest.raises(UserError, match="does not exist"):
        TokensData(path=str(tmp_path / "none.npy"))
    whole = Path(written(tmp_path, np.zeros((9, 9), np.int32))).read_bytes()
    for content in (b"", b"text", whole[:-5]):
        (tmp_path / "bad.npy").write_bytes(content)
        with pytest.raises(UserError, match=r"bad\.npy is (empty|no \.npy file|cut off)"):
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
def test_an_id_outside_the_vocabulary_is_named_with_its_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: int
) -> None:
    table = np.full((CHUNK_IDS // 1024 + 9, 1024), 49, np.int32)
    prepared = TokensData(path=written(tmp_path, table)).prepare()
    prepared.check_vocabulary(50)
    row = len(table) - 2  # in the second chunk
    table[row, 5] = bad
    prepared = TokensData(path=written(tmp_path, table)).prepare()
    with pytest.raises(UserError) as caught:
        prepared.check_vocabulary(50)
    for words in (
        "ids.npy: row",
        f"row {row} ",
        f"the id {bad} in column 5",
        "0 to 49",
        "model.vocab_size=50",
    ):
        assert words in str(caught.value)
    # Of a large table a part is looked at when a run starts; a row of what is not says it when it is read.
    monkeypatch.setattr(token_table, "CHECKED_IDS", CHUNK_IDS)
    prepared.check_vocabulary(50)
    with pytest.raises(UserError, match=f"row {row} holds the id {bad}"):
        prepared.table.row(row)
    with pytest.raises(UserError, match=f"row {row} holds the id {bad}"):
        TokensData(path=str(tmp_path / "ids.npy"), verify=Verify.all).prepare().check_vocabulary(50)


def test_the_fingerprint_follows_the_content(tmp_path: Path) -> None:
    table = np.arange(60, dtype=np.int32).reshape(20, 3)
    prints = [
        TokensData(path=written(tmp_path, part)).prepare().fingerprint
        for part in (table, table, table + 1, table[:10])
    ]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def padded(folder: Path, pad: int, rows: int = 40) -> tuple[str, list[list[int]]]:
    """Write rows of 6 with padding before, within and behind ids; return the place and the ids of each."""
    random = np.random.default_rng(1)
    table = random.integers(1, 90, (rows, 6)).astype(np.int32)
    holes = random.random((rows, 6)) < 0.4
    holes[3] = True
    table[holes] = pad
    kept = [row[~hole].tolist() for row, hole in zip(table, holes, strict=True)]
    return written(folder, table), kept


@pytest.mark.parametrize(("pad", "pad_id"), [(0, 0), (-100, None), (50_000, 50_000), (-1, -1), (-100, 0)])
def test_padding_is_cut_out_and_fills_up_the_end(tmp_path: Path, pad: int, pad_id: int | None) -> None:
    path, kept = padded(tmp_path, pad)
    prepared = TokensData(path=path, pad_id=pad_id).prepare(evaluate=True)
    prepared.check_vocabulary(90)
    for index, ids in enumerate(kept):
        tokens, documents = prepared.held_out.row(index)
        assert tokens.tolist() == ids + [0] * (6 - len(ids))
        assert documents.tolist() == [0] * len(ids) + [PADDING] * (6 - len(ids))
        assert tokens.dtype == np.int64
        assert documents.dtype == np.int32
    targets = np.concatenate([b.targets.numpy() for b in evaluation_batches(prepared.held_out, 7)])
    assert targets[targets != IGNORE_INDEX].tolist() == [i for ids in kept for i in ids[1:]]
    holes = 6 * len(kept) - sum(map(len, kept))
    assert (prepared.summary["tokens_padding"], prepared.summary["rows_of_padding"]) == (holes, 1)
    assert prepared.summary["tokens_held_out"] == 240 - holes
    assert f"{holes / 240:.1%} of the places are padding" in prepared.told[1]


def test_padding_that_is_not_named_is_an_id_like_others(tmp_path: Path) -> None:
    path, _ = padded(tmp_path, 0)
    prepared = TokensData(path=path).prepare()
    assert "tokens_padding" not in prepared.summary
    assert prepared.held_out.row(0).documents.tolist() == [0] * 6
    path, _ = padded(tmp_path, -1)
    with pytest.raises(UserError, match=r"holds the id -1 .*padding is named, data\.pad_id=ID"):
        TokensData(path=path).prepare().check_vocabulary(90)
    assert (
        TokensData(path=path, pad_id=-1).prepare().fingerprint != TokensData(path=path).prepare().fingerprint
    )
    np.save(path, np.full((3, 4), 7))
    with pytest.raises(UserError, match="nothing but padding"):
        TokensData(path=path, pad_id=7).prepare()


def test_the_counts_of_a_large_table_are_projected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = padded(tmp_path, -100, 4000)
    whole = TokensData(path=path).prepare().summary["tokens_padding"]
    monkeypatch.setattr(token_table, "CHUNK_IDS", 600)
    monkeypatch.setattr(token_table, "CHECKED_IDS", 6000)
    assert TokensData(path=path).prepare().summary["tokens_padding"] == pytest.approx(whole, rel=0.1)


def test_what_rearranges_documents_is_refused_for_rows_as_given() -> None:
    for config in (
        TokensDataConfig(path="x", packing=Packing.best_fit),
        TokensDataConfig(path="x", fim_rate=0.1),
    ):
        with pytest.raises(InvalidValue, match="rows are taken as they are"):
            config.validate()
