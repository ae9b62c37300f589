import os
from pathlib import Path

import matplotlib as mpl
import pytest

from dsv3.metrics.jsonl import JsonlWriter
from dsv3.metrics.plots import plot_comparison, plot_loss_curve, running_mean
from dsv3.metrics.row import MetricsRow


def _rows(count: int) -> list[MetricsRow]:
    rows = [MetricsRow(step=i, tokens=i, loss=9.0 - i / count, lr=1e-3) for i in range(1, count + 1)]
    for row in rows[4::5]:
        row.evaluation_loss = 8.5
    return rows


def _assert_picture(path: Path) -> None:
    data = path.read_bytes()
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    assert data.startswith(b"\x89PNG")
    assert data.endswith(b"IEND\xaeB`\x82")
    assert (width, height) == (1440, 896)


ODD = {
    "no rows": [],
    "one row": _rows(1),
    "two rows": _rows(2),
    "nothing known": [MetricsRow(step=step, tokens=step) for step in range(1, 4)],
    "not finite": [MetricsRow(step=step, tokens=step, loss=float("nan"), lr=0.0) for step in range(1, 4)],
    "held-out alone": [MetricsRow(step=5, tokens=5, evaluation_loss=4.0)],
    "a huge loss": [MetricsRow(step=5, tokens=5, evaluation_loss=1e4)],
    "steps twice": _rows(9) + _rows(12)[5:],
}


@pytest.mark.parametrize("rows", ODD.values(), ids=ODD.keys())
def test_odd_runs_are_drawn(rows: list[MetricsRow], tmp_path: Path) -> None:
    plot_loss_curve(rows, tmp_path / "loss.png")
    _assert_picture(tmp_path / "loss.png")


def test_a_file_is_drawn_like_its_rows_and_nothing_else_is_left(tmp_path: Path) -> None:
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    for row in _rows(20):
        writer.append(row)
    writer.close()
    plot_loss_curve(tmp_path / "metrics.jsonl", tmp_path / "file.png")
    plot_loss_curve(_rows(20), tmp_path / "rows.png")
    assert (tmp_path / "file.png").read_bytes() == (tmp_path / "rows.png").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "file.png", "rows.png"}


@pytest.mark.parametrize("change", [{"loss": 3.0}, {"evaluation_loss": 3.0}, {"lr": 5e-4}])
def test_every_kind_of_number_is_in_the_picture(change: dict[str, float], tmp_path: Path) -> None:
    rows = _rows(20)
    plot_loss_curve(rows, tmp_path / "a.png")
    for name, value in change.items():
        setattr(rows[9], name, value)
    plot_loss_curve(rows, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


def test_a_title_is_taken_literally(tmp_path: Path) -> None:
    plot_loss_curve(_rows(3), tmp_path / "loss.png", title=r"a $\frac$ b {")
    _assert_picture(tmp_path / "loss.png")


def test_the_global_state_of_matplotlib_stays(tmp_path: Path) -> None:
    before = dict(mpl.rcParams)
    plot_loss_curve(_rows(3), tmp_path / "loss.png")
    assert dict(mpl.rcParams) == before


def test_smoothing_keeps_a_line_and_its_ends_and_averages_between() -> None:
    line = [float(value) for value in range(20)]
    assert running_mean(line, 7) == pytest.approx(line)
    assert running_mean([3.0, 0.0, 0.0, 9.0, 6.0], 3) == pytest.approx([3.0, 1.0, 3.0, 5.0, 6.0])
    assert running_mean([], 3) == []


def test_a_name_that_is_no_utf_8_is_drawn_and_written(tmp_path: Path) -> None:
    name = os.fsdecode(b"r\xe9sum\xe9 \xff")
    plot_loss_curve(_rows(2), tmp_path / f"{name}.png", name)
    plot_comparison([(name, _rows(1)), ("$x", _rows(2))], tmp_path / f"{name} 2.png", name)
    assert len(list(tmp_path.iterdir())) == 2
