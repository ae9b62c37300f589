from pathlib import Path

import pytest

from dsv3.metrics.plots import plot_comparison
from dsv3.metrics.row import MetricsRow


def _rows(count: int) -> list[MetricsRow]:
    rows = [MetricsRow(step=step, tokens=step, loss=9.0 - step / count) for step in range(1, count + 1)]
    for row in rows[::4]:
        row.evaluation_loss = 8.5
    return rows


@pytest.mark.parametrize(
    "curves",
    [
        [("one", _rows(1))],
        [(f"optimizer.lr={number} $x_$", _rows(20)) for number in range(15)],
        [("no figures", [MetricsRow(step=1, tokens=1)])],
    ],
    ids=["one step", "more than are named", "nothing known"],
)
def test_curves_of_any_number_are_drawn(curves: list[tuple[str, list[MetricsRow]]], tmp_path: Path) -> None:
    plot_comparison(curves, tmp_path / "a.png", "Runs of $it")
    apart = [[(1, 0.0), (2, 1e-6)][: len(rows)] for _, rows in curves]
    plot_comparison(curves, tmp_path / "a.png", "Runs of $it", apart)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
