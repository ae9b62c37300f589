"""The two sides share no content, and a document's side depends on the document alone."""

import functools
import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.data import held_out_split
from dsv3.data.held_out_split import (
    DOCUMENT,
    HELD_OUT,
    TRAIN,
    HeldOutSplit,
    cut_pieces,
    find_tail,
    split_documents,
)
from dsv3.errors import UserError
from tests.data.texts import sentence

TEXTS = [sentence(number) for number in range(120)]


def split(texts: Sequence[str | None], share: float, folder: Path) -> tuple[HeldOutSplit, list[int]]:
    """Return the counts and the sides; None is what turned out to be no document."""
    rows = []
    for text in texts:
        digest = hashlib.sha256((text or "").encode()).digest()
        rows.append((np.frombuffer(digest, ">u8"), -1 if text is None else len(text)))
    counts = split_documents(np.array(rows, DOCUMENT), share, folder / "sides.npy")
    return counts, np.load(folder / "sides.npy").tolist()


def sides(texts: Sequence[str | None], folder: Path, share: float = 0.2) -> tuple[list[str], list[str]]:
    _, chosen = split(texts, share, folder)
    train, held_out = (
        [text for text, side in zip(texts, chosen, strict=True) if side == wanted and text is not None]
        for wanted in (TRAIN, HELD_OUT)
    )
    return train, held_out


@pytest.mark.parametrize("block", [4, 1 << 20])
def test_each_content_is_on_one_side_once(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held_out_split, "BLOCK", block)
    texts = [TEXTS[0], None, *TEXTS, TEXTS[0], None, TEXTS[7]]
    train, held_out = sides(texts, tmp_path)
    assert sorted(train + held_out) == sorted(TEXTS)
    assert 10 <= len(held_out) <= 40
    # By the definition: the hash of the content, as a number, below the share of all numbers.
    below = [text for text in TEXTS if int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) < 0.2 * 2**64]
    assert held_out == below
    counts, chosen = split(texts, 0.2, tmp_path)
    assert (counts.documents, counts.duplicates) == (123, 3)
    assert chosen[0] != held_out_split.LEFT_OUT  # the first of equals stays
    assert chosen[2] == held_out_split.LEFT_OUT
    assert counts.characters == sum(len(text) for text in texts if text is not None)
    assert counts.characters_train == sum(len(text) for text in train)


def test_the_side_follows_from_the_content_alone(tmp_path: Path) -> None:
    train, held_out = sides(TEXTS, tmp_path)
    half_train, half_held_out = sides(TEXTS[:59:-1], tmp_path)
    assert set(half_train) < set(train)
    assert set(half_held_out) < set(held_out)


def test_a_larger_share_only_adds_to_what_is_held_out(tmp_path: Path) -> None:
    assert set(sides(TEXTS, tmp_path, 0.1)[1]) < set(sides(TEXTS, tmp_path, 0.3)[1])


@pytest.mark.parametrize("fraction", [0.01, 0.49])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_a_handful_of_documents_leaves_neither_side_empty(
    tmp_path: Path, count: int, fraction: float
) -> None:
    for trial in range(8):
        train, held_out = sides(TEXTS[trial * 10 : trial * 10 + count], tmp_path, fraction)
        assert train
        assert held_out
        assert len(train) + len(held_out) == count


@pytest.mark.parametrize("block", [1, 1 << 20])
def test_of_a_few_documents_the_one_nearest_to_the_share_is_held_out(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held_out_split, "BLOCK", block)
    short = ["a short text\n", "a short test\n"]
    texts = ["a long text\n" * 100, *short]
    first = min(short, key=lambda text: hashlib.sha256(text.encode()).digest())
    assert sides(texts, tmp_path, 0.001)[1] == [first]
    counts, _ = split(texts, 0.001, tmp_path)
    assert counts.characters_train == 1200 + 13


def test_a_single_content_is_told(tmp_path: Path) -> None:
    counts, _ = split([None, "one\ntwo\n", "one\ntwo\n"], 0.25, tmp_path)
    assert (counts.single, counts.duplicates, counts.characters_train) == (1, 1, 12)


def cut(text: str, share: float) -> tuple[str, str]:
    place = find_tail(lambda: [text], share, "x")
    return text[:place], text[place:]


def test_a_single_document_gives_its_last_lines() -> None:
    lines = [f"line {number}\n" for number in range(100)]
    assert cut("".join(lines), 0.03) == ("".join(lines[:97]), "".join(lines[97:]))


def test_a_single_line_is_cut_between_characters() -> None:
    assert cut("0123456789", 0.2) == ("01234567", "89")
    with pytest.raises(UserError, match="single character"):
        cut("0", 0.2)


@settings(max_examples=100, deadline=None)
@given(
    st.text("ab\r\n\x0b\x1c\x85\u2028", min_size=2, max_size=40),
    st.floats(0.01, 0.49),
    st.lists(st.integers(0, 40), max_size=5),
)
def test_pieces_are_cut_as_the_whole_is(text: str, share: float, ends: list[int]) -> None:
    bounds = [0, *sorted(ends), len(text)]
    pieces = [text[begin:end] for begin, end in itertools.pairwise(bounds)]
    lines = text.splitlines(keepends=True)
    tail = "".join(lines[-max(1, round(len(lines) * share)) :])
    if len(lines) == 1:
        tail = text[-max(1, round(len(text) * share)) :]
    for given_pieces in (pieces, list(text)):
        place = find_tail(functools.partial(iter, given_pieces), share, "x")
        assert "".join(cut_pieces(given_pieces, place, tail=True)) == tail
        assert "".join(cut_pieces(given_pieces, place, tail=False)) + tail == text


def test_every_line_end_of_python_is_known() -> None:
    found = [chr(code) for code in range(0x10000) if len(f"a{chr(code)}b".splitlines()) == 2]
    assert sorted(found) == sorted(held_out_split.LINE_ENDS)
