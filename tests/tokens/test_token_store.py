"""The token store: documents of any number of files are one sequence, and a split shares no document."""

from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.errors import UserError
from dsv3.tokens import file_array, token_store
from dsv3.tokens.file_array import FileArray
from dsv3.tokens.token_store import Segment, TokenStore

Lengths = list[int]


def whole(lengths: Lengths) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
    """Return tokens that are all different, and offsets."""
    offsets = np.cumsum([0, *lengths])
    return np.arange(offsets[-1], dtype=np.uint32), offsets


def segmented(lengths: Lengths, files: int, before: int = 0) -> list[Segment]:
    """Return the documents of `lengths` in so many files, each behind `before` documents of others."""
    tokens, offsets = whole(lengths)
    bounds = [len(lengths) * number // files for number in range(files + 1)]
    segments: list[Segment] = []
    for first, end in pairwise(bounds):
        part = tokens[offsets[first] : offsets[end]]
        noise = np.full(3 * before, 7, np.uint32)
        inside = np.concatenate(
            [3 * np.arange(before), 3 * before + offsets[first : end + 1] - offsets[first]]
        )
        ids = np.concatenate([noise, part, noise])
        segments.append(Segment(ids, inside, before, before + end - first, f"file {len(segments)}"))
    return segments


def documents(store: TokenStore) -> list[list[int]]:
    """Return the ids of every document, empty ones left out."""
    offsets = store.offsets(0, store.num_documents).tolist()
    return [store.read(begin, end - begin).tolist() for begin, end in pairwise(offsets) if end > begin]


LENGTHS = st.lists(st.integers(0, 9), min_size=1, max_size=40).filter(any)


@given(LENGTHS, st.sampled_from([1, 7]), st.integers(0, 2), st.sampled_from([1, 3, 512]))
@settings(max_examples=60, deadline=None)
def test_documents_of_any_files_are_one_sequence(
    lengths: Lengths, files: int, before: int, window: int
) -> None:
    tokens, offsets = whole(lengths)
    store = TokenStore(segmented(lengths, files, before))
    assert store.num_tokens == len(tokens)
    kept = store.offsets(0, store.num_documents)
    assert kept.dtype == np.int64
    assert np.unique(kept).tolist() == np.unique(offsets).tolist()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_store, "WINDOW", window)
        for position in range(len(tokens)):
            found = store.find(position)
            assert kept[found] <= position < kept[found + 1]
            count = (position * 7) % (len(tokens) - position + 1)
            ids = store.read(position, count)
            assert ids.dtype == np.int64
            assert ids.tolist() == tokens[position : position + count].tolist()
    for first in range(store.num_documents + 1):
        end = first + (first * 5) % (store.num_documents - first + 1)
        assert store.offsets(first, end).tolist() == kept[first : end + 1].tolist()


@given(
    LENGTHS, st.sampled_from([1, 7]), st.floats(0.01, 0.5), st.integers(0, 3), st.booleans(), st.booleans()
)
@settings(max_examples=150, deadline=None)
def test_a_split_has_every_token_on_one_side_and_cuts_no_document(
    lengths: Lengths, files: int, share: float, seed: int, divisible: bool, one: bool
) -> None:
    lengths = [sum(lengths)] if one else lengths
    segments = segmented(lengths, files)
    if divisible:
        segments = [
            Segment(s.tokens, np.array([s.begin(s.first), s.begin(s.end)]), 0, 1, "", True) for s in segments
        ]
    store = TokenStore(segments)
    train, held_out = store.split(share, seed)
    read = [side.read(0, side.num_tokens).tolist() if side.num_tokens else [] for side in (train, held_out)]
    assert sorted(read[0] + read[1]) == list(range(store.num_tokens))
    assert read[1]
    assert read[0] or store.num_tokens == 1
    if not divisible and sum(map(bool, lengths)) > 1:
        assert sorted(documents(train) + documents(held_out)) == documents(store)
        again = TokenStore(segmented(lengths, 1)).split(share, seed)[1]
        assert documents(again) == documents(held_out)  # however the documents lie in files


@pytest.mark.parametrize("divisible", [False, True])
def test_a_split_takes_its_share_from_all_over(divisible: bool) -> None:
    lengths = np.random.default_rng(0).integers(1, 2000, 10_000)
    tokens, offsets = whole(lengths.tolist())
    known = offsets[[0, -1]] if divisible else offsets
    store = TokenStore([Segment(tokens, known, 0, len(known) - 1, "", divisible)])
    held_out = store.split(0.03)[1]
    assert held_out.num_tokens == pytest.approx(0.03 * store.num_tokens, rel=0.05)
    assert len(held_out.segments) == token_store.STRETCHES
    begins = [int(held_out.read(p, 1)[0]) for p in held_out.offsets(0, held_out.num_documents)[:-1]]
    assert len({begin * 64 // store.num_tokens for begin in begins}) == 64
    assert store.split(0.03)[1].read(0, 99).tolist() == held_out.read(0, 99).tolist()
    assert store.split(0.03, 1)[1].read(0, 99).tolist() != held_out.read(0, 99).tolist()


def test_a_document_of_more_than_2_to_the_31_tokens_is_one_like_others() -> None:
    length = 2**31 + 10
    tokens = np.broadcast_to(np.uint16(3), (length + 9,))
    store = TokenStore.of(tokens, np.array([0, 4, length + 4, length + 9]))
    assert [store.find(position) for position in (3, 4, length + 3, length + 4)] == [0, 1, 1, 2]
    assert store.read(length + 2, 4).tolist() == [3] * 4


def test_a_search_among_millions_reads_few_windows() -> None:
    class Counted:
        reads = 0

        def __len__(self) -> int:
            return 10**7 + 1

        def __getitem__(self, part: slice) -> npt.NDArray[Any]:
            self.reads += 1
            first, end, _ = part.indices(len(self))
            return np.arange(first, end) ** 2  # sizes that differ by a million times

    offsets = Counted()
    store = TokenStore.of(np.broadcast_to(np.uint16(0), (10**14,)), offsets)
    for position in (0, 5, 10**6, 10**10, 10**13, 10**14 - 1):
        offsets.reads = 0
        assert store.find(position) == int(np.sqrt(position))
        assert offsets.reads < 30


def test_ids_outside_the_vocabulary_are_named_where_they_are_read() -> None:
    tokens = np.arange(20, dtype=np.int32)
    store = TokenStore([Segment(tokens, np.array([0, 20]), 0, 1, "a.bin")], vocab_size=18)
    assert store.read(0, 18).tolist() == list(range(18))
    with pytest.raises(UserError, match=r"a\.bin: token 18 is the id 18, .* 0 to 17"):
        store.read(10, 10)
    tokens[3] = -1
    with pytest.raises(UserError, match=r"a\.bin: token 3 is the id -1"):
        store.split(0.1)[0].read(0, 5)


def test_few_files_are_open_and_a_file_that_shrinks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = []
    for number in range(9):
        path = tmp_path / f"{number}.bin"
        path.write_bytes(b"head" + np.arange(number, number + 10, dtype="<u2").tobytes())
        arrays.append(FileArray(str(path), np.dtype("<u2"), 4, 10))
    monkeypatch.setattr(file_array, "_open", lru_cache(2)(file_array._OpenFile))
    before = len(list(Path("/proc/self/fd").iterdir()))
    for number, array in enumerate(arrays):
        assert (array[2:5].tolist(), array[3:3].tolist(), len(array)) == (
            [number + 2, number + 3, number + 4],
            [],
            10,
        )
    assert len(list(Path("/proc/self/fd").iterdir())) == before + 2
    (tmp_path / "8.bin").write_bytes(b"head" + bytes(10))
    with pytest.raises(UserError, match=r"8\.bin has become shorter .* 2 of the 8 bytes from byte 12"):
        arrays[8][4:8]
    (tmp_path / "0.bin").unlink()
    with pytest.raises(UserError, match=r"0\.bin does not exist"):
        arrays[0][0:1]
