"""Damaged files of strangers: every reader refuses them in one or two short lines, or reads them."""

from pathlib import Path

import pytest

from tests.faults.corruptions import corruptions, judge, judge_read
from tests.faults.file_readers import CASES, FILES, READERS

COUNT = 40
"""Damaged inputs per reader; benchmarks/faults.py gives them more."""


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_refused_in_one_or_two_lines(name: str, tmp_path: Path) -> None:
    reader, place = READERS[name], tmp_path / "case"
    place.mkdir()
    assert judge_read(lambda: reader.read(reader.write(tmp_path))).outcome == "read"
    verdicts = {case.name: judge(case, place, seconds=30) for case in corruptions(reader, 0, COUNT)}
    assert {name: verdict for name, verdict in verdicts.items() if verdict.outcome == "fault"} == {}
    assert sum(verdict.outcome == "refused" for verdict in verdicts.values()) > COUNT / 2


@pytest.mark.parametrize("case", sorted(CASES.glob("*-*")), ids=lambda path: path.name)
def test_what_fuzzing_has_found_stays_mended(case: Path, tmp_path: Path) -> None:
    reader = FILES[case.name.partition("-")[0]]
    (tmp_path / reader.name).write_bytes(case.read_bytes())
    assert judge_read(lambda: reader.read(tmp_path)).outcome != "fault"
