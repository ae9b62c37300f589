"""Fill-in-the-middle: every document can be put together again, and positions stay a closed form."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from dsv3.data import packing
from dsv3.data.fill_in_middle import ADDED_TOKENS, FillInMiddle, FimTokens
from dsv3.data.packing import PackedDataset, PackedEvaluationDataset
from dsv3.data.rows import RowOptions, training_rows
from dsv3.errors import UserError
from dsv3.tokens.shuffle import Ids
from dsv3.tokens.token_store import TokenStore
from dsv3.tokens.tokenizer import SPECIAL_TOKENS, Tokenizer

BOS, EOS, BEGIN, HOLE, END = 0, 1, 3, 4, 5
TOKENS = FimTokens(BEGIN, HOLE, END, BOS, EOS)


@pytest.fixture
def store() -> TokenStore:
    """Return 300 documents of 0 to 12 tokens between bos and eos; a token says its document and place."""
    lengths = np.random.default_rng(0).integers(0, 13, 300)
    texts = [[BOS, *(1000 * (1 + d) + np.arange(n)).tolist(), EOS] for d, n in enumerate(lengths)]
    return TokenStore.of(np.concatenate(texts), np.cumsum([0, *map(len, texts)]))


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "BLOCK_DOCUMENTS", 32)


def reassembled(ids: list[int]) -> list[int]:
    """Return a document without its rearrangement; it must have the form of the report."""
    if BEGIN not in ids:
        return ids
    assert ids[:2] == [BOS, BEGIN]
    assert ids[-1] == EOS
    hole, end = ids.index(HOLE), ids.index(END)
    assert hole < end
    return [BOS, *ids[2:hole], *ids[end + 1 : -1], *ids[hole + 1 : end], EOS]


def documents_of(dataset: PackedDataset, epoch: int) -> list[list[int]]:
    """Return the documents of an epoch in the order of the stream, which the shuffled rows give back."""
    row = dataset._stream.read(0, dataset.num_tokens, epoch)
    bounds = np.flatnonzero(np.diff(row.documents, prepend=-1, append=-1))
    return [row.tokens[first:end].tolist() for first, end in itertools.pairwise(bounds)]


@pytest.mark.parametrize(("rate", "shuffle"), [(0.1, True), (0.5, False), (1.0, True), (0.003, True)])
def test_every_document_is_there_once_and_can_be_put_together(
    store: TokenStore, rate: float, shuffle: bool
) -> None:
    dataset = PackedDataset(store, 7, 3, shuffle, FillInMiddle(rate, TOKENS, 3))
    originals = sorted(store.read(first, end - first).tolist() for first, end in store_bounds(store))
    chosen = []
    for epoch in range(3):
        found = documents_of(dataset, epoch)
        assert sorted(map(reassembled, found)) == originals
        chosen.append({tuple(reassembled(ids)) for ids in found if BEGIN in ids})
        assert len([ids for ids in found if BEGIN in ids]) == int(rate * 300)
    assert dataset.num_tokens == store.num_tokens + ADDED_TOKENS * int(rate * 300)
    if rate < 1 and rate * 300 > 1:
        assert chosen[0] != chosen[1] != chosen[2]  # other documents in every epoch


def store_bounds(store: TokenStore) -> list[tuple[int, int]]:
    offsets = store.offsets(0, store.num_documents).tolist()
    return list(itertools.pairwise(offsets))


def test_rows_are_cuts_of_that_stream_in_any_order(store: TokenStore) -> None:
    dataset = PackedDataset(store, 7, 3, True, FillInMiddle(0.3, TOKENS, 3))
    for epoch in range(2):
        stream = dataset._stream.read(0, dataset.num_tokens, epoch).tokens
        expected = sorted(stream[first : first + 8].tolist() for first in range(0, 7 * len(dataset), 7))
        rows = [dataset.row(epoch * len(dataset) + number) for number in range(len(dataset))]
        assert sorted(row.tokens.tolist() for row in rows) == expected
        targets = np.concatenate([row.tokens[1:] for row in rows])
        texts = targets[targets >= 1000]
        assert len(set(texts.tolist())) == len(texts)  # each token of a document at most once
        again = PackedDataset(store, 7, 3, True, FillInMiddle(0.3, TOKENS, 3))
        assert again.row(epoch * len(dataset) + 11).tokens.tolist() == rows[11].tokens.tolist()


def test_of_the_first_documents_of_any_block_the_floor_is_chosen(store: TokenStore) -> None:
    fim = FillInMiddle(0.1, TOKENS, 5)
    for first, end in ((0, 32), (32, 64), (64, 71), (10**12, 10**12 + 1000)):
        for epoch in range(3):
            assert fim.choose(first, end, epoch).sum() == end // 10 - first // 10
    # 0.1 is a tenth, not the binary number above it; of 10^13 documents that would be one more.
    assert FillInMiddle(0.3, TOKENS, 5).rearranged_before(10**17) == 3 * 10**16


def test_cuts_are_drawn_evenly_from_the_whole_text_and_anew_in_every_epoch() -> None:
    text = TokenStore.of(np.array([BOS, 1000, 1001, 1002, EOS]), np.array([0, 5]))
    fim, seen = FillInMiddle(1.0, TOKENS, 1), []
    for epoch in range(2000):
        ids = fim.read(text, 0, 5, epoch, 0, 8).tolist()
        seen.append((ids.index(HOLE) - 2, ids.index(END) - ids.index(HOLE) - 1))
    # Two of 4 places: equal ones with 1/16 each, others with 2/16; (prefix, suffix) lengths of 3 tokens.
    counts = {pair: seen.count(pair) / len(seen) for pair in set(seen)}
    assert len(counts) == 10
    for (prefix, suffix), share in counts.items():
        assert share == pytest.approx((1 if prefix + suffix == 3 else 2) / 16, abs=0.03)


def test_any_part_of_a_rearranged_document_is_that_part(store: TokenStore) -> None:
    fim = FillInMiddle(1.0, TOKENS, 1)
    for first, end in store_bounds(store)[:20]:
        size = end - first + ADDED_TOKENS
        whole = fim.read(store, first, end - first, 0, 0, size)
        for skip in range(size):
            for count in range(1, size - skip + 1):
                part = fim.read(store, first, end - first, 0, skip, count)
                assert part.tolist() == whole[skip : skip + count].tolist()
    # without bos and eos, and without a token at all
    bare = TokenStore.of(np.array([7, 8]), np.array([0, 0, 2]))
    assert sorted(fim.read(bare, 0, 2, 0, 0, 5).tolist()) == [3, 4, 5, 7, 8]
    assert fim.read(bare, 0, 0, 0, 0, 3).tolist() == [BEGIN, HOLE, END]


def test_the_source_takes_the_ids_of_the_tokenizer_and_leaves_held_out_rows_alone(
    store: TokenStore, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    assert tokenizer.fim == tuple(
        SPECIAL_TOKENS.index(f"<|fim_{part}|>") for part in ("begin", "hole", "end")
    )
    rows, counts = training_rows(store, RowOptions(fim_rate=0.2), 16, 0, tokenizer, "x")
    read: Ids = np.concatenate([rows.row(number).tokens[:-1] for number in range(len(rows))])
    assert counts["documents_fim"] == 60
    assert 50 <= (read == BEGIN).sum() <= 60  # a remainder is left out
    held_out = PackedEvaluationDataset(store, 16)
    assert all((held_out.row(number).tokens != BEGIN).all() for number in range(len(held_out)))


@pytest.mark.parametrize(("missing", "words"), [(True, "tokenizer=local"), (False, "<|fim_begin|>")])
def test_a_tokenizer_without_these_tokens_is_refused(
    store: TokenStore, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, missing: bool, words: str
) -> None:
    monkeypatch.setattr("dsv3.tokens.tokenizer.FIM_NAMES", (("<a>", "<b>", "<c>"),))
    with pytest.raises(UserError) as caught:
        training_rows(store, RowOptions(fim_rate=0.2), 16, 0, None if missing else tokenizer, "x")
    assert "data.fim_rate" in str(caught.value)
    assert words in str(caught.value)
