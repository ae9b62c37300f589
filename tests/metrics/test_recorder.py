"""The recorder reads rows together, shows them to the watch, and knows what the slowest rank waits for."""

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dsv3.distributed.process_group import RankContext
from dsv3.errors import RunFailed
from dsv3.metrics.console import Console
from dsv3.metrics.jsonl import read_rows
from dsv3.metrics.recorder import Recorder
from dsv3.metrics.row import MetricsRow

ALONE = RankContext(rank=0, local_rank=0, world=1, device=torch.device("cpu"))


def test_each_row_is_shown_to_the_watch_with_what_has_no_column_and_is_written_where_that_raises(
    tmp_path: Path,
) -> None:
    seen: list[tuple[int, float | None, list[str]]] = []

    def watch(row: MetricsRow, figures: dict[str, torch.Tensor]) -> None:
        seen.append((row.step, row.loss, sorted(figures)))
        row.skipped = row.step - 1
        if row.step == 2:
            raise RunFailed("over")

    file = tmp_path / "metrics.jsonl"
    recorder = Recorder(file, ALONE, 1, None, None, watch)
    figures = {"loss": torch.tensor(1.5), "accident": torch.tensor(1), "gradient_places": torch.ones(3)}
    recorder.add(MetricsRow(step=1, tokens=8), figures)
    with pytest.raises(RunFailed, match="over"):
        recorder.add(MetricsRow(step=2, tokens=16), figures)
    assert seen == [(step, 1.5, ["accident", "gradient_places"]) for step in (1, 2)]
    assert [(row.step, row.skipped) for row in read_rows(file)] == [(1, 0), (2, 1)]


def test_a_mean_of_nothing_is_unknown(tmp_path: Path) -> None:
    """A step without a target has no loss; one without a token has no load of its experts either."""
    file, zero = tmp_path / "metrics.jsonl", torch.tensor(0.0)
    recorder = Recorder(file, ALONE, 1, None, None)
    names = ("loss", "mtp_loss", "balance_loss", "moe_max_violation", "moe_entropy", "grad_norm")
    for step, (targets, padding) in enumerate([(0, 1.0), (0, 0.5), (3, 0.5)], 1):
        figures = dict.fromkeys(names, zero)
        figures |= {"targets": torch.tensor(targets), "padding": torch.tensor(padding)}
        recorder.add(MetricsRow(step=step, tokens=step), figures)
    recorder.close()
    unknown = [{name for name in names if getattr(row, name) is None} for row in read_rows(file)]
    assert unknown == [{*names[:5]}, {*names[:2]}, set()]


def test_a_run_that_goes_back_has_each_step_once(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    recorder = Recorder(file, ALONE, 1, None, None)
    for step, loss in ((1, 1.0), (2, 2.0), (3, 3.0)):
        recorder.add(MetricsRow(step=step, tokens=step), {"loss": torch.tensor(loss)})
    recorder.go_back(1)
    recorder.add(MetricsRow(step=2, tokens=4), {"loss": torch.tensor(4.0)})
    recorder.close()
    assert [(row.step, row.loss) for row in read_rows(file)] == [(1, 1.0), (2, 4.0)]


@pytest.mark.parametrize(
    ("elsewhere", "told"),
    [(0.04, ""), (0.5, "a rank waits for its data 50% of the time, rank 0 10%\n"), (0.19, ""), (0.1, "")],
)
def test_another_rank_that_waits_for_its_data_is_told_by_the_collective_that_finds_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elsewhere: float, told: str
) -> None:
    clock, reduced, stream = iter([100.0, 110.0, 120.0]), [], io.StringIO()
    monkeypatch.setattr("dsv3.metrics.recorder.time", SimpleNamespace(monotonic=lambda: next(clock)))

    def largest(value: torch.Tensor) -> torch.Tensor:
        reduced.append(value.tolist()[1])
        return torch.maximum(value, torch.tensor([3.0 * 2**30, elsewhere]))

    ranks: Any = SimpleNamespace(is_main=True, device=torch.device("cpu"), max=largest)
    recorder = Recorder(tmp_path / "metrics.jsonl", ranks, 1, Console(log_every=100, file=stream), None)
    for step, waited in ((2, 0.25), (3, 0.75)):
        recorder.add(MetricsRow(step=step, tokens=8, data_wait=waited), {})
    steps = stream.getvalue()
    recorder.flush()
    recorder.close()
    assert reduced == [0.0, pytest.approx(0.1)]  # 1 of 10 seconds; 0.1 there is rank 0's own
    assert stream.getvalue() == steps + told
    assert recorder.memory >= 3.0
