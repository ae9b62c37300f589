"""The two sides share no content, and a document's side depends on the document alone."""

from pathlib import Path

import pytest

from dsv3.data.corpus import Document, HeldOutSplit, TextCorpus, split_document
from dsv3.errors import UserError
from tests.data.texts import sentence


def sides(root: Path, fraction: float = 0.2) -> tuple[list[str], list[str]]:
    split = HeldOutSplit(TextCorpus(str(root)), fraction)
    return [d.text for d in split.training()], [d.text for d in split.evaluation()]


def test_each_content_is_on_one_side_once(folder: Path) -> None:
    train, held_out = sides(folder)
    assert sorted(train + held_out) == sorted(sentence(number) for number in range(120))
    assert 10 <= len(held_out) <= 40
    assert HeldOutSplit(TextCorpus(str(folder)), 0.2).duplicates == 3


def test_the_side_follows_from_the_content_alone(folder: Path, tmp_path: Path) -> None:
    train, held_out = sides(folder)
    other = tmp_path / "other"
    other.mkdir()
    for number in range(60, 120):  # half of the documents, renamed and in the opposite order
        (other / f"{200 - number}.txt").write_text(sentence(number))
    half_train, half_held_out = sides(other)
    assert set(half_train) < set(train)
    assert set(half_held_out) < set(held_out)


def test_a_larger_share_only_adds_to_what_is_held_out(folder: Path) -> None:
    assert set(sides(folder, 0.1)[1]) < set(sides(folder, 0.3)[1])


@pytest.mark.parametrize("fraction", [0.01, 0.49])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_a_handful_of_files_leaves_neither_side_empty(tmp_path: Path, count: int, fraction: float) -> None:
    for trial in range(8):
        root = tmp_path / str(trial)
        root.mkdir()
        for number in range(count):
            (root / f"{number}.txt").write_text(sentence(trial * 10 + number))
        train, held_out = sides(root, fraction)
        assert train
        assert held_out
        assert len(train) + len(held_out) == count


def test_of_a_few_files_the_one_nearest_to_the_share_is_held_out(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("a long text\n" * 100)
    (tmp_path / "short.txt").write_text("a short text\n")
    assert sides(tmp_path, 0.001)[1] == ["a short text\n"]


def test_a_single_document_gives_its_last_lines(tmp_path: Path) -> None:
    lines = [f"line {number}\n" for number in range(100)]
    (tmp_path / "a.txt").write_text("".join(lines))
    (tmp_path / "same.txt").write_text("".join(lines))
    assert sides(tmp_path, 0.03) == (["".join(lines[:97])], ["".join(lines[97:])])


def test_a_single_line_is_cut_between_characters() -> None:
    head, tail = split_document(Document("x", "0123456789"), 0.2)
    assert (head.text, tail.text) == ("01234567", "89")
    with pytest.raises(UserError, match="single character"):
        split_document(Document("x", "0"), 0.2)
