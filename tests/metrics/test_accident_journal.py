"""accidents.jsonl outlives kills, holds what JSON cannot, and is cut back by the data that is taken again."""

import math
from pathlib import Path

from dsv3.metrics.accident_journal import append, cut_back, read


def test_entries_come_back_in_order_and_a_torn_line_is_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "accidents.jsonl"
    assert read(file) == []
    values = [math.nan, -math.inf, {"x": math.inf}]
    append(file, {"kind": "spike", "step": 1, "values": values, "place": (1, 2)})
    with file.open("a") as torn:
        torn.write('{"kind": "nonfin')
    before = file.read_bytes()
    (found,) = read(file)
    assert file.read_bytes() == before
    assert found == {"kind": "spike", "step": 1, "values": ["nan", "-inf", {"x": "inf"}], "place": [1, 2]}
    append(file, {"kind": "alarm", "step": 2})
    assert [each["step"] for each in read(file)] == [1, 2]
    with file.open("a") as other:
        other.write('[]\n{"kind": 1, "step": 3}\n{"kind": "x", "step": 3, "samples": [1]}\n\n{"step": 4}\n')
    assert [each["step"] for each in read(file)] == [1, 2]


def test_what_is_cut_back_is_behind_the_sequences_that_are_done_whatever_its_step(tmp_path: Path) -> None:
    file = tmp_path / "accidents.jsonl"
    cut_back(file, 0)
    assert not file.exists()
    for step, samples in ((9, [0, 40]), (4, [40, 44]), (5, [44, 48])):
        append(file, {"kind": "nonfinite", "step": step, "samples": samples})
    append(file, {"kind": "restart", "step": 9})
    cut_back(file, 48)
    assert len(read(file)) == 4
    cut_back(file, 44)
    assert [each["step"] for each in read(file)] == [9, 4, 9]
    assert {path.name for path in tmp_path.iterdir()} == {"accidents.jsonl"}
