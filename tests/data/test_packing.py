"""Rows: every token is a target once per epoch, each epoch has its own order, the index is the only state."""

import tracemalloc
from itertools import pairwise

import numpy as np
import pytest

from dsv3.data import packing
from dsv3.data.packing import PADDING, PackedDataset, PackedEvaluationDataset
from dsv3.errors import UserError
from dsv3.tokens.shuffle import Ids
from dsv3.tokens.token_store import TokenStore

Documents = tuple[Ids, Ids]


def epoch(dataset: PackedDataset, number: int) -> list[Ids]:
    return [dataset.row(number * len(dataset) + i).tokens for i in range(len(dataset))]


def document_of(documents: Documents, token: int) -> int:
    return int(np.searchsorted(documents[1], token - 1000, side="right")) - 1


def test_a_hand_written_example_in_file_order() -> None:
    dataset = PackedDataset(
        TokenStore.of(np.arange(10, 20, dtype=np.uint16), np.array([0, 2, 3, 8, 10])), 4, 0, False
    )
    assert len(dataset) == 2
    rows = [dataset.row(index) for index in range(3)]
    assert [row.tokens.tolist() for row in rows[:2]] == [[10, 11, 12, 13, 14], [14, 15, 16, 17, 18]]
    assert [row.documents.tolist() for row in rows[:2]] == [[0, 0, 1, 2, 2], [0, 0, 0, 0, 1]]
    assert rows[2].tokens.tolist() == rows[0].tokens.tolist()  # the next epoch
    assert rows[0].tokens.dtype == np.int64
    assert rows[0].documents.dtype == np.int32


@pytest.mark.parametrize(("shuffle", "block"), [(True, 1024), (True, 8), (True, 1), (False, 8)])
def test_every_token_is_a_target_once_but_the_first_and_the_remainder(
    documents: Documents, monkeypatch: pytest.MonkeyPatch, shuffle: bool, block: int
) -> None:
    monkeypatch.setattr(packing, "BLOCK_DOCUMENTS", block)
    dataset = PackedDataset(TokenStore.of(*documents), 7, 3, shuffle)
    for number in range(3):
        targets = np.concatenate([tokens[1:] for tokens in epoch(dataset, number)])
        assert len(set(targets)) == len(targets) == len(dataset) * 7
        assert 0 <= len(documents[0]) - 1 - len(targets) < 7


@pytest.mark.parametrize("block", [1024, 8])
def test_document_numbers_change_where_the_documents_do(
    documents: Documents, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(packing, "BLOCK_DOCUMENTS", block)
    dataset = PackedDataset(TokenStore.of(*documents), 31, 3)
    for index in range(2 * len(dataset)):
        row = dataset.row(index)
        true = np.array([document_of(documents, token) for token in row.tokens])
        assert row.documents[0] == 0
        assert ((np.diff(true) != 0) == (np.diff(row.documents) == 1)).all()
        # and within a document the tokens are in order
        assert (np.diff(row.tokens)[np.diff(row.documents) == 0] == 1).all()


def test_the_order_changes_with_the_epoch_and_the_seed_in_both_ways(documents: Documents) -> None:
    dataset = PackedDataset(TokenStore.of(*documents), 7, 3)
    first, second = epoch(dataset, 0), epoch(dataset, 1)
    assert [row.tolist() for row in first] != [row.tolist() for row in second]
    # other rows, not only the same rows in another order: the documents are permuted too
    assert {tuple(row) for row in first} != {tuple(row) for row in second}
    other = PackedDataset(TokenStore.of(*documents), 7, 4)
    assert [row.tolist() for row in epoch(other, 0)] != [row.tolist() for row in first]
    # a row is followed by its neighbour in the stream only by chance
    neighbours = sum(a[-1] == b[0] for a, b in pairwise(first))
    assert neighbours < len(first) / 4


def test_both_permutations_follow_the_seed_and_the_epoch(documents: Documents) -> None:
    # one document: only the rows can be permuted
    one = (documents[0], np.array([0, len(documents[0])]))
    orders = [
        [int(row[0]) for row in epoch(PackedDataset(TokenStore.of(*one), 7, seed), number)]
        for seed, number in [(1, 0), (1, 1), (2, 0), (2, 1)]
    ]
    assert len({tuple(order) for order in orders}) == 4
    assert len({tuple(sorted(order)) for order in orders}) == 1
    # one row: only the documents can be
    length = len(documents[0]) - 1
    orders = [
        epoch(PackedDataset(TokenStore.of(*documents), length, seed), number)[0].tolist()
        for seed, number in [(1, 0), (1, 1), (2, 0), (2, 1)]
    ]
    assert len({tuple(order) for order in orders}) == 4


def test_a_row_depends_on_its_index_alone(documents: Documents) -> None:
    straight = PackedDataset(TokenStore.of(*documents), 7, 3)
    rows = [straight.row(index).tokens.tolist() for index in range(5 * len(straight))]
    jumping = PackedDataset(TokenStore.of(*documents), 7, 3)
    for index in np.random.default_rng(1).permutation(len(rows)):
        assert jumping.row(int(index)).tokens.tolist() == rows[index]


def test_documents_are_shuffled_in_their_block_and_another_block_begins_every_epoch(
    documents: Documents, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "BLOCK_DOCUMENTS", 8)
    tokens, offsets = documents
    stream = packing.DocumentStream(TokenStore.of(tokens, offsets), seed=3)
    begins = set()
    for epoch in range(20):
        row = stream.read(0, len(tokens), epoch)
        found = [
            document_of(documents, token) for token in row.tokens[np.diff(row.documents, prepend=-1) > 0]
        ]
        blocks = [(document + 1) * 7 // 50 - ((document + 1) * 7 % 50 == 0) for document in found]
        first = blocks[0]
        assert [(block - first) % 7 for block in blocks] == sorted((block - first) % 7 for block in blocks)
        assert sorted(found) == list(range(50)) != found
        begins.add(first)
    assert begins == set(range(7))


def test_rows_of_any_number_of_documents_take_constant_memory() -> None:
    offsets = 3 * np.arange(10**6 + 1)
    tokens = np.broadcast_to(np.uint16(1), offsets[-1:])
    tracemalloc.start()
    try:
        dataset = PackedDataset(TokenStore.of(tokens, offsets), 64, 3)
        for index in range(0, 10 * len(dataset), len(dataset) // 20):
            dataset.row(index)
        assert tracemalloc.get_traced_memory()[1] < 2**21  # a permutation of the documents is 8 MB
    finally:
        tracemalloc.stop()


def test_too_few_tokens_are_told_with_the_numbers() -> None:
    with pytest.raises(UserError) as caught:
        PackedDataset(TokenStore.of(np.arange(10), np.array([0, 10])), 10, 0)
    for words in ("train.sequence_length=10", "11 tokens", "has 10", "at most train.sequence_length=9"):
        assert words in str(caught.value)
    assert len(PackedDataset(TokenStore.of(np.arange(10), np.array([0, 10])), 9, 0)) == 1


@pytest.mark.parametrize("length", [1, 5, 7, 9, 1000])
def test_evaluation_scores_every_target_once(documents: Documents, length: int) -> None:
    rows = PackedEvaluationDataset(TokenStore.of(*documents), length)
    targets: list[int] = []
    for index in range(len(rows)):
        tokens, numbers = rows.row(index)
        assert tokens.shape == numbers.shape == (length + 1,)
        same = (numbers[1:] == numbers[:-1]) & (numbers[1:] != PADDING)
        targets += tokens[1:][same].tolist()
        assert (numbers == PADDING).any() == (index == len(rows) - 1 and (len(documents[0]) - 1) % length > 0)
    starts = set(documents[1][:-1] + 1000)
    assert targets == [token for token in documents[0] if token not in starts]
