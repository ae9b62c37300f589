"""Best-fit packing: whole documents, every target once an epoch, the rows of plain best-fit decreasing."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from dsv3.config.data import Packing
from dsv3.data import best_fit as packer
from dsv3.data.batch import collate
from dsv3.data.best_fit import BestFitDataset, best_fit
from dsv3.data.fill_in_middle import FillInMiddle, FimTokens
from dsv3.data.packing import PADDING
from dsv3.data.rows import RowOptions, expected_cuts, training_rows
from dsv3.errors import UserError
from dsv3.model.head import IGNORE_INDEX
from dsv3.tokens.cache import CacheEntryError
from dsv3.tokens.shuffle import Ids
from dsv3.tokens.token_store import TokenStore

LENGTH = 15


@pytest.fixture
def store() -> TokenStore:
    """Return 400 documents of 0 to 49 tokens in two files; no token occurs twice."""
    lengths = np.random.default_rng(0).geometric(0.1, 400) % 50
    lengths[[3, 200]] = 0
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return TokenStore.of(np.arange(1000, 1000 + offsets[-1]), offsets)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packer, "BLOCK_DOCUMENTS", 150)
    monkeypatch.setattr(packer, "_WRITTEN_TOGETHER", 7)


def dataset(
    store: TokenStore, folder: Path, fim: FillInMiddle | None = None, seed: int = 3
) -> BestFitDataset:
    return BestFitDataset(store, LENGTH, seed, fim, str(folder), "print")


def documents(store: TokenStore) -> list[Ids]:
    return [
        store.read(first, end - first)
        for first, end in pairwise(store.offsets(0, 400).tolist())
        if end > first
    ]


def plain_best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing as textbooks have it: each piece into the fullest row that has room."""
    rows: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        room = [(capacity - sum(row), number) for number, row in enumerate(rows)]
        fitting = [pair for pair in room if pair[0] >= length]
        if fitting:
            rows[min(fitting)[1]].append(length)
        else:
            rows.append([length])
    return rows


@pytest.mark.parametrize("capacity", [1, 7, 64, 1000])
def test_the_rows_are_those_of_plain_best_fit_decreasing(capacity: int) -> None:
    draws = np.random.default_rng(capacity)
    for count in (0, 1, 30, 200):
        lengths = np.minimum(draws.geometric(0.03, count), capacity)
        rows = best_fit(lengths, capacity)
        # Rows with equal room are equally good: which of them is taken changes no row's room.
        filled = np.bincount(rows, lengths, rows.max(initial=-1) + 1).astype(int).tolist()
        assert Counter(filled) == Counter(map(sum, plain_best_fit(lengths.tolist(), capacity)))


def test_every_target_comes_once_an_epoch_and_only_long_documents_are_cut(
    store: TokenStore, tmp_path: Path
) -> None:
    rows = dataset(store, tmp_path)
    originals = documents(store)
    whole = {tuple(ids.tolist()) for ids in originals if len(ids) <= LENGTH + 1}
    padding = 0
    for epoch in range(2):
        read = [rows.row(epoch * len(rows) + number) for number in range(len(rows))]
        batch = collate(read)
        targets = batch.targets[batch.targets != IGNORE_INDEX].tolist()
        assert sorted(targets) == sorted(token for ids in originals for token in ids[1:].tolist())
        pieces = [
            row.tokens[row.documents == number].tolist()
            for row in read
            for number in range(row.documents.max() + 1)
        ]
        assert {tuple(piece) for piece in pieces} >= whole
        for row in read:
            # Documents are counted from 0 on, and pads stand at the end alone.
            numbers = row.documents[row.documents != PADDING]
            assert sorted(set(numbers.tolist())) == list(range(numbers.max() + 1))
            assert (np.diff(numbers) >= 0).all()
            assert (row.documents[len(numbers) :] == PADDING).all()
        padding = sum(int((row.documents == PADDING).sum()) for row in read)
    assert rows.padding == padding < 0.05 * len(rows) * (LENGTH + 1)
    assert rows.documents_cut == sum(len(ids) > LENGTH + 1 for ids in originals) > 0


def test_rows_are_shuffled_anew_and_depend_on_their_index_alone(store: TokenStore, tmp_path: Path) -> None:
    rows = dataset(store, tmp_path)
    first, second = ([rows.row(e * len(rows) + n).tokens.tolist() for n in range(len(rows))] for e in (0, 1))
    assert first != second
    assert sorted(first) == sorted(second)
    again = dataset(store, tmp_path)  # from the cache
    for number in np.random.default_rng(0).permutation(len(rows)).tolist():
        assert again.row(number).tokens.tolist() == first[number]
    assert len(list(tmp_path.glob("best-fit-*"))) == 1
    other = dataset(store, tmp_path, seed=4)
    assert [other.row(number).tokens.tolist() for number in range(len(rows))] != first


def test_with_fill_in_the_middle_every_document_is_still_there(store: TokenStore, tmp_path: Path) -> None:
    fim = FillInMiddle(0.25, FimTokens(1, 2, 3), 5, every_epoch_anew=False)
    rows = dataset(store, tmp_path, fim)
    cuts = []
    for epoch in range(2):
        read = [rows.row(epoch * len(rows) + number) for number in range(len(rows))]
        tokens = np.concatenate([row.tokens[row.documents != PADDING] for row in read])
        # Cut parts share a token; of the others each token comes once.
        assert set(tokens[tokens >= 1000].tolist()) == set(np.concatenate(documents(store)).tolist())
        batch = collate(read)
        targets = Counter(batch.targets[batch.targets != IGNORE_INDEX].tolist())
        assert targets[2] == targets[3] == 100
        assert all(count == 1 for token, count in targets.items() if token >= 1000)
        cuts.append(sorted(row.tokens.tolist() for row in read))
    assert cuts[0] != cuts[1]


def test_a_damaged_layout_is_made_anew(store: TokenStore, tmp_path: Path) -> None:
    expected = dataset(store, tmp_path).row(0).tokens.tolist()
    (entry,) = tmp_path.glob("best-fit-*")
    content = (entry / "pieces.npy").read_bytes()
    (entry / "pieces.npy").write_bytes(content[:-16])
    with pytest.raises(CacheEntryError, match="size"):
        packer.read_layout(entry)
    assert dataset(store, tmp_path).row(0).tokens.tolist() == expected
    assert (entry / "pieces.npy").read_bytes() == content


def test_both_packings_tell_their_padding_and_their_cuts(store: TokenStore, tmp_path: Path) -> None:
    options = RowOptions(cache_dir=str(tmp_path))
    _, concat = training_rows(store, options, LENGTH, 0, None, "x")
    best = RowOptions(cache_dir=str(tmp_path), packing=Packing.best_fit)
    rows, fitted = training_rows(store, best, LENGTH, 0, None, "x")
    assert isinstance(rows, BestFitDataset)
    assert concat["tokens_padding"] == 0
    assert fitted["tokens_padding"] == rows.padding > 0
    assert fitted["tokens_left_out"] == 0
    assert 0 < fitted["documents_cut"] < concat["documents_cut"]


def test_the_documents_that_concat_cuts_are_as_many_as_expected_on_average(store: TokenStore) -> None:
    rows, _ = training_rows(store, RowOptions(), LENGTH, 0, None, "x")
    starts = {int(ids[0]): len(ids) for ids in documents(store)}
    cuts = []
    for epoch in range(6):
        whole = 0
        for number in range(len(rows)):
            row = rows.row(epoch * len(rows) + number)
            for document in range(row.documents.max() + 1):
                ids = row.tokens[row.documents == document]
                # The token that rows share would count a document of one or two tokens twice.
                whole += starts.get(int(ids[0])) == len(ids) and (len(ids) > 1 or ids[0] != row.tokens[0])
        cuts.append(398 - whole)
    assert np.mean(cuts) == pytest.approx(expected_cuts(store, LENGTH), rel=0.1)


def test_documents_without_a_token_are_told() -> None:
    with pytest.raises(UserError, match="no token"):
        BestFitDataset(TokenStore([]), LENGTH, 0, None, None, "empty")
