"""Lanes: rows of a stream follow from (seed, step) on any world and from any bookmark, and lose no token."""

from collections.abc import Iterator
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.data import lanes
from dsv3.data.lanes import Bookmark, LaneOptions, LaneRows, lane_parts, left_out, left_out_line, newest
from dsv3.documents.skip_limit import Skipped
from dsv3.errors import UserError
from dsv3.tokens.document_encoder import DocumentEncoder, document_ends
from dsv3.tokens.tokenizer import Tokenizer
from tests.data.texts import sentence

LENGTH = 24


class Texts:
    """Pieces in memory, which count the documents that are read."""

    def __init__(self, sizes: list[int]) -> None:
        self.pieces: list[list[str | None]] = [
            [sentence(100 * piece + number, 8 * (1 + number % 3)) for number in range(size)]
            for piece, size in enumerate(sizes)
        ]
        self.num_pieces = len(sizes)
        self.read = 0

    def texts(self, piece: int, first: int = 0) -> Iterator[tuple[int, str | None]]:
        for number in range(first, len(self.pieces[piece])):
            self.read += 1
            yield number, self.pieces[piece][number]

    def place(self, piece: int, number: int) -> str:
        return f"piece {piece} row {number}"


def rows_of(
    texts: Texts, tokenizer: Tokenizer, lanes: int = 4, rows: int = 2, seed: int | None = 3, block: int = 3
) -> LaneRows:
    options = LaneOptions(lanes, rows, LENGTH, seed, block)
    return LaneRows(texts, options, tokenizer, lambda text: "# text 101\n" not in text)


def taken(rows: LaneRows, indices: range) -> list[list[int]]:
    return [[*row.tokens.tolist(), *row.documents.tolist()] for row in map(rows.row, indices)]


def document(tokenizer: Tokenizer, text: str) -> list[int]:
    before, after = document_ends(tokenizer)
    encoder = DocumentEncoder(tokenizer)
    return [*before, *chain.from_iterable(encoder.encode(list(encoder.windows([text])))), *after]


@pytest.mark.parametrize("sizes", [[7, 2, 5, 9, 4], [9], [8, 11]])
@pytest.mark.parametrize("seed", [None, 3])
def test_an_epoch_of_a_lane_has_each_of_its_tokens_once(
    tokenizer: Tokenizer, sizes: list[int], seed: int | None
) -> None:
    texts = Texts(sizes)
    rows = rows_of(texts, tokenizer, seed=seed)
    found = []
    for lane in range(4):
        wanted = {}
        for piece, part, parts in lane_parts(len(sizes), lane, 4):
            for number in range(part, sizes[piece], parts):
                text = texts.pieces[piece][number]
                assert text is not None
                if "# text 101\n" not in text:  # held out
                    found.append((piece, number))
                    wanted[piece, number] = document(tokenizer, text)
        total = sum(map(len, wanted.values()))
        count = 2 * total // LENGTH + 1
        indices = [batch * 8 + lane * 2 + slot for batch in range(-(-count // 2)) for slot in range(2)]
        stream = list(chain.from_iterable(rows.row(index).tokens[:-1].tolist() for index in indices))
        for epoch in range(2):
            once = stream[epoch * total : (epoch + 1) * total]
            ends = [place + 1 for place, token in enumerate(once) if token == tokenizer.eos]
            cut = [once[begin:end] for begin, end in zip([0, *ends[:-1]], ends, strict=True)]
            assert sorted(cut) == sorted(wanted.values())
            assert seed is not None or cut == list(wanted.values())
    everything = [(piece, number) for piece, size in enumerate(sizes) for number in range(size)]
    held_out = [(1, 1)] if len(sizes) > 1 else []
    assert sorted(found) == [each for each in everything if each not in held_out]


def test_documents_are_numbered_at_their_boundaries(tokenizer: Tokenizer) -> None:
    row = rows_of(Texts([5, 6, 7, 8]), tokenizer).row(3)
    following = np.flatnonzero(row.tokens[:-1] == tokenizer.eos) + 1
    assert np.flatnonzero(np.diff(row.documents)).tolist() == (following - 1).tolist()
    assert row.documents[0] == 0


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_any_world_draws_the_same_batches_and_reads_its_lanes_alone(tokenizer: Tokenizer, world: int) -> None:
    sizes = [6, 7, 5, 8, 9, 6]
    alone = taken(rows_of(Texts(sizes), tokenizer), range(40))
    read = []
    for rank in range(world):
        texts = Texts(sizes)
        rows = rows_of(texts, tokenizer)
        share = 8 // world
        for step in range(5):
            first = step * 8 + rank * share
            assert taken(rows, range(first, first + share)) == alone[first : first + share]
        read.append(len(rows.bookmarks(0)))
    assert read == [max(1, 4 // world)] * world


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 60), st.integers(0, 30), st.sampled_from([None, 3]), st.sampled_from([1, 2, 4]))
def test_a_resume_draws_the_same_rows_and_reads_no_more_than_a_block_again(
    tokenizer: Tokenizer, done: int, ahead: int, seed: int | None, world: int
) -> None:
    sizes = [30, 40, 20, 33]
    rows = rows_of(Texts(sizes), tokenizer, seed=seed)
    for index in range(done + ahead):  # the loader has read ahead
        rows.row(index)
    kept = newest([{}, rows.bookmarks(done), {}])
    following = taken(rows_of(Texts(sizes), tokenizer, seed=seed), range(done, done + 16))
    for rank in range(world):
        texts = Texts(sizes)
        again = rows_of(texts, tokenizer, seed=seed)
        again.go_on({lane: list(place) for lane, place in kept.items()})
        indices = range(rank * 16 // world, (rank + 1) * 16 // world)
        assert taken(again, range(done + indices.start, done + indices.stop)) == [
            following[index] for index in indices
        ]
        assert len(kept) < 4 or texts.read < 4 * 12
    for lane, place in kept.items():
        assert place.row <= rows._first(lane, done)


def test_a_checkpoint_behind_all_kept_bookmarks_still_goes_on(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes, "KEPT_BATCHES", 1)
    rows = rows_of(Texts([9, 9, 9, 9]), tokenizer)
    alone = taken(rows, range(64))
    kept = rows.bookmarks(5)
    assert {place.row for place in kept.values()} == {0}
    rows.go_on(kept)
    assert taken(rows, range(5, 20)) == alone[5:20]
    assert taken(rows, range(10, 12)) == alone[10:12]  # backwards, as task=replay does


def test_rows_of_a_lane_are_the_same_from_any_bookmark(tokenizer: Tokenizer) -> None:
    rows = rows_of(Texts([11, 3]), tokenizer, lanes=1, rows=1)
    alone = taken(rows, range(30))
    for number in range(30):
        place = rows.bookmarks(number)[0]
        assert place.row == number
        again = rows_of(Texts([11, 3]), tokenizer, lanes=1, rows=1)
        again.go_on({0: place})
        assert taken(again, range(number, number + 3))[0] == alone[number]


def test_a_lane_without_documents_says_so(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"lane 3 of data.lanes=4 has no document.*fewer lanes"):
        rows_of(Texts([3]), tokenizer).row(6)


def test_rows_that_are_left_out_are_counted_once_by_reason(tokenizer: Tokenizer) -> None:
    texts = Texts([6, 5])
    texts.pieces[0][1:3] = [None, ""]
    texts.pieces[1][2] = "a\0b"
    data = rows_of(texts, tokenizer, lanes=4, rows=1)  # two lanes share a piece
    for index in range(200):  # several epochs
        data.row(index)
    known = data.skipped()
    found = left_out([known, {0: Skipped()}])
    assert (found.documents, found.empty, found.num_skipped) == (8, 1, 2)
    assert left_out_line(found) == (
        "data=hf: 3 of 11 rows read so far are left out: 1 empty; "
        "1 document: NUL characters (no text), first piece 1 row 2; "
        "1 document: the field holds no text, first piece 0 row 1"
    )
    assert left_out_line(Skipped(documents=3)) == ""


def test_what_a_lane_reads() -> None:
    for pieces, count in [(1, 1), (1, 4), (3, 4), (5, 4), (9, 4)]:
        read = [part for lane in range(count) for part in lane_parts(pieces, lane, count)]
        assert {part.piece for part in read} == set(range(pieces))
        for piece in range(pieces):
            parts = [part for part in read if part.piece == piece]
            assert sorted(part.part for part in parts) == list(range(parts[0].parts))
    assert newest([{0: Bookmark(1, 0, 0, 0, 0, 0)}, {0: Bookmark(4, 1, 0, 0, 0, 0)}])[0].row == 4
