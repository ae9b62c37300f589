"""The record of data names what changed, in a bounded file, and says if rows keep their places."""

from pathlib import Path

import pytest

from dsv3.tokens import data_record
from dsv3.tokens.data_record import DataChange, DataRecord, Piece

FILES = [Piece(f"{number:04}.txt", 10 + number, f"digest {number}") for number in range(300)]


def told(new: list[Piece], old: list[Piece] = FILES[:6]) -> str:
    return DataChange.between(DataRecord.of(old, "a"), DataRecord.of(new, "a")).told


def test_changed_added_removed_and_renamed_pieces_are_named() -> None:
    files = FILES[:6]
    assert told([*files[:2], files[2]._replace(digest="other"), *files[3:]]) == "1 file changed (0002.txt)"
    assert told([*files, FILES[9]]) == "1 file added (0009.txt)"
    assert told(files[2:]) == "2 files removed (0000.txt, 0001.txt)"
    assert told([*files[1:], files[0]._replace(name="z.txt")]) == "1 file renamed (0000.txt is z.txt)"
    both = [files[0]._replace(digest="other"), *files[2:], FILES[7]]
    assert told(both) == "1 file changed (0000.txt), 1 file added (0007.txt), 1 file removed (0001.txt)"
    assert told(FILES[:20]).endswith("14 files added (0006.txt, 0007.txt, 0008.txt and 11 more)")
    one = DataRecord.of(files, "a", "shards")
    assert (
        DataChange.between(one, DataRecord.of(files[::-1], "b", "shards")).told
        == "the same shards in another order"
    )
    assert DataChange.between(one, one).told == "the same shards read otherwise"
    assert "no record" in DataChange.between(None, one).told


def test_the_layout_says_what_a_change_does_to_the_rows() -> None:
    def effect(old: str | None, new: str | None) -> str:
        change = DataChange.between(DataRecord.of(FILES[:2], old), DataRecord.of(FILES[1:3], new))
        return change.effect(1200)

    assert effect("a", "a").startswith("from step 1,201 on only the rows that hold these documents differ")
    assert effect("a", "b").startswith("from step 1,201 on rows come from another order")
    assert effect("a", None).startswith("from step 1,201 on perhaps rows come from another order")


@pytest.mark.parametrize("limit", [300, 40, 7])
def test_a_record_is_bounded_and_finds_any_change(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(data_record, "LIMIT", limit)
    old = DataRecord.of(FILES, "a")
    assert len(old.entries) <= limit
    assert sum(entry.pieces for entry in old.entries) == 300
    assert sum(entry.size for entry in old.entries) == sum(piece.size for piece in FILES)
    for number in (0, 7, 150, 299):
        for new in (
            [*FILES[:number], FILES[number]._replace(digest="other"), *FILES[number + 1 :]],
            [*FILES[:number], *FILES[number + 1 :]],
            [*FILES[:number], Piece(f"{number:04}.new", 1, "new"), *FILES[number:]],
        ):
            change = DataChange.between(old, DataRecord.of(new, "b"))
            assert "the same" not in change.told
            if limit == 40:  # the change is told within few neighbours
                assert change.told.startswith("some of the ")
                assert int(change.told.split()[3]) < 100
    few = DataRecord.of(FILES[:20], "a")  # of another level
    assert "the same" not in DataChange.between(old, few).told
    for other in (300, 40, 7):  # a later version may hold more or fewer entries
        monkeypatch.setattr(data_record, "LIMIT", other)
        now = DataRecord.of(FILES, "a")
        assert DataChange.between(old, now).told == "the same files read otherwise"
    assert DataChange.between(old, DataRecord.of(FILES, "a")).told == "the same files read otherwise"


def test_a_file_more_changes_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_record, "LIMIT", 40)
    old, new = (DataRecord.of(files, "a") for files in (FILES, [Piece("0000.a", 1, "x"), *FILES]))
    assert len(set(new.entries) - set(old.entries)) <= 2


def test_a_record_survives_its_file(tmp_path: Path) -> None:
    record = DataRecord.of([*FILES, Piece("odd \udcff ü.txt", 1, "x")], "a")
    record.write(tmp_path / "a.json")
    assert DataRecord.read(tmp_path / "a.json") == record
    assert DataRecord.read(tmp_path / "b.json") is None
    for damaged in ("", "[]", '{"format": "other"}', '{"format": "dsv3-data-record", "version": 1}'):
        (tmp_path / "a.json").write_text(damaged)
        assert DataRecord.read(tmp_path / "a.json") is None


def test_several_data_are_told_apart() -> None:
    def joined(**names: list[Piece]) -> DataRecord:
        return DataRecord.joined({name: DataRecord.of(files, "a") for name, files in names.items()})

    old = joined(web=FILES[:3], code=FILES[:3])
    new = joined(web=FILES[:3], code=FILES[:2])
    assert DataChange.between(old, new).told == "1 file removed (code: 0002.txt)"
    assert old.layout == joined(web=FILES[:3], code=FILES[:3]).layout
    assert DataRecord.joined({"a": None, "b": DataRecord.of(FILES, "a")}).layout is None
