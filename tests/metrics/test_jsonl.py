from pathlib import Path

import pytest

from dsv3.metrics.jsonl import JsonlWriter, read_rows, truncate_after
from dsv3.metrics.row import MetricsRow


def _row(step: int, loss: float = 1.0) -> MetricsRow:
    return MetricsRow(step=step, tokens=step * 10, loss=loss)


def _write(path: Path, *rows: MetricsRow) -> None:
    writer = JsonlWriter(path)
    for row in rows:
        writer.append(row)
    writer.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def test_rows_wait_for_the_flush_and_then_are_there(path: Path) -> None:
    writer = JsonlWriter(path)
    writer.append(_row(1))
    assert path.read_text() == ""
    writer.flush()
    writer.flush()
    assert read_rows(path) == [_row(1)]
    writer.append(_row(2))
    writer.close()
    writer.close()
    assert read_rows(path) == [_row(1), _row(2)]


def test_a_second_writer_appends(path: Path) -> None:
    _write(path, _row(1))
    _write(path, _row(2))
    assert [row.step for row in read_rows(path)] == [1, 2]


def test_a_torn_last_line_is_dropped_and_the_next_row_does_not_stick_to_it(path: Path) -> None:
    _write(path, _row(1), _row(2))
    path.write_text(path.read_text()[:-20])
    assert [row.step for row in read_rows(path)] == [1]
    _write(path, _row(3))
    assert [row.step for row in read_rows(path)] == [1, 3]


def test_cut_back_keeps_each_step_once_up_to_the_given_one(path: Path) -> None:
    _write(path, *[_row(step) for step in (1, 2, 3, 4)], _row(3, loss=7.0), _row(5))
    truncate_after(path, 3)
    assert read_rows(path) == [_row(1), _row(2), _row(3, loss=7.0)]
    assert len(path.read_text().splitlines()) == 3
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_cut_back_drops_a_torn_line_and_leaves_the_others_as_they_were(path: Path) -> None:
    path.write_text('{"step": 1, "tokens": 10, "novel": 1}\n{"step": 2, "tok')
    truncate_after(path, 9)
    assert path.read_text() == '{"step": 1, "tokens": 10, "novel": 1}\n'


def test_cut_back_to_the_start_empties_the_file(path: Path) -> None:
    _write(path, _row(1))
    truncate_after(path, 0)
    assert path.read_text() == ""


def test_a_kill_during_cut_back_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(path, _row(1), _row(2))

    def killed(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        truncate_after(path, 1)
    assert [row.step for row in read_rows(path)] == [1, 2]


def test_a_missing_file_has_no_rows(path: Path) -> None:
    truncate_after(path, 3)
    assert read_rows(path) == []
    assert not path.exists()
