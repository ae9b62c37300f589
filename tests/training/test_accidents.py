"""The watch over the rows: messages name the values, alarms come and go, and runs end that must."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dsv3.checkpoint.directory import Progress
from dsv3.checkpoint.run_statistics import RunStatistics
from dsv3.config.accidents import AccidentsConfig, OnAlarm
from dsv3.config.training import TrainConfig
from dsv3.errors import RunFailed
from dsv3.metrics import accident_journal
from dsv3.metrics.accident_journal import ACCIDENTS_FILE
from dsv3.metrics.row import MetricsRow
from dsv3.training.accidents import AccidentWatch
from dsv3.training.step_guard import GOOD, NONFINITE, StepGuard
from tests.harness.tiny import model_config
from tests.harness.trained import ALONE

LENGTH = 4
QUICK = {"alarm_window": 3, "alarm_steps": 3}


class Watched:
    """A watch with nothing behind it; `told` has its messages."""

    def __init__(self, folder: Path, parts: Any = (), **rules: Any) -> None:
        self.told: list[str] = []
        train = TrainConfig(sequence_length=LENGTH, accidents=AccidentsConfig(**rules))
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.0)
        guard = StepGuard(train.accidents, RunStatistics(), ALONE.device, optimizer)
        console: Any = SimpleNamespace(message=self.told.append)
        about = (train, model_config(), folder, ALONE, list(parts), guard, Progress(), console)
        self.watch = AccidentWatch(*about)
        self.file = folder / ACCIDENTS_FILE
        self.step = 0

    def see(self, loss: float, kind: int = GOOD, **figures: float) -> MetricsRow:
        """Show the watch the row of the next step."""
        self.step += 1
        columns = {name: value for name, value in figures.items() if hasattr(MetricsRow, name)}
        row = MetricsRow(step=self.step, tokens=self.step * LENGTH * 2, loss=loss, **columns)  # type: ignore[arg-type]
        others = {name: torch.tensor(value) for name, value in figures.items() if name not in columns}
        self.watch(row, {"accident": torch.tensor(kind), **others})
        return row

    def kinds(self) -> list[str]:
        """Return the kinds of the entries in accidents.jsonl."""
        return [entry["kind"] for entry in accident_journal.read(self.file)]


@pytest.mark.parametrize(
    ("figures", "told"),
    [
        ({"loss": math.nan, "grad_norm": 2.0}, "loss nan, grad_norm 2.0."),
        ({"loss": 0.0, "grad_norm": math.inf}, "loss 0.0, grad_norm inf."),
        (
            {"loss": 1.0, "grad_norm": math.nan, "fp8_broken_tiles": 3.0},
            "loss 1.0, grad_norm nan, 3 nonfinite FP8 tiles.",
        ),
        ({"loss": 1.0, "grad_norm": math.nan, "fp8_broken_tiles": 0.0}, "loss 1.0, grad_norm nan."),
        ({"loss": 1.0, "grad_norm": math.nan, "fp8_broken_tiles": math.nan}, "loss 1.0, grad_norm nan."),
        (
            {"loss": math.nan, "first_nonfinite_router": 0},
            "loss nan, first at the router of layers.1.",
        ),
        ({"loss": 1.5, "evaluation_loss": math.nan}, "loss 1.5, evaluation_loss nan."),
    ],
)
def test_where_nothing_is_skipped_the_first_bad_numbers_end_the_run_by_name(
    tmp_path: Path, figures: dict[str, float], told: str
) -> None:
    watched = Watched(tmp_path, skip=False)
    with pytest.raises(RunFailed) as failed:
        watched.see(kind=NONFINITE, **figures)
    assert str(failed.value).startswith(f"step 1 is not finite: {told} Checkpoints")


def test_a_loss_that_goes_up_and_stays_is_an_alarm_until_it_comes_down(tmp_path: Path) -> None:
    watched = Watched(tmp_path, **QUICK)
    losses = [3.0, 2.5, 2.0, 2.0, 2.0, 9.0, 2.0, 2.0, 5.0, 5.0, 5.0, 5.0, 5.0, 2.0, 2.0, 2.0, 2.0]
    rows = [watched.see(loss) for loss in losses]
    # The mean of three is above 2 + 1 at steps 6 to 8, by one loss, and from step 10 to 14 again.
    assert [row.step for row in rows if row.alarm] == [8, 12, 13, 14]
    assert watched.kinds() == ["alarm", "recovered"] * 2
    assert accident_journal.read(watched.file)[2]["since"] == 10
    assert [line.partition(":")[0] for line in watched.told] == [
        "ALARM at step 8",
        "the alarm is over at step 9",
        "ALARM at step 12",
        "the alarm is over at step 15",
    ]


def test_a_loss_above_that_of_guessing_is_an_alarm_from_the_begin(tmp_path: Path) -> None:
    watched = Watched(tmp_path, **QUICK)
    guessing = math.log(model_config().vocab_size)
    assert [watched.see(guessing + 1.1).alarm for _ in range(3)] == [0, 0, 1]
    still = Watched(tmp_path, **QUICK)
    assert [still.see(guessing + 0.9).alarm for _ in range(9)] == [0] * 9


@pytest.mark.parametrize(("loss", "steps", "told"), [(0.0, 15, True), (0.0, 14, False), (-0.1, 15, False)])
def test_a_run_that_ends_at_the_loss_of_guessing_has_learnt_nothing(
    tmp_path: Path, loss: float, steps: int, told: bool
) -> None:
    watched, progress = Watched(tmp_path, **QUICK), Progress()
    for _ in range(steps):
        watched.see(math.log(model_config().vocab_size) + loss)
    watched.watch.finish(steps)
    watched.watch.fill(progress)
    assert progress.statistics.in_doubt is told
    assert any("nothing is learnt" in line for line in watched.told) is told


def test_the_loss_of_a_skipped_step_counts_where_it_is_finite(tmp_path: Path) -> None:
    watched = Watched(tmp_path, **QUICK)
    assert [watched.see(loss, NONFINITE).alarm for loss in (9.0, math.nan, 9.0)] == [0, 0, 1]


def test_what_is_in_doubt_is_so_before_it_is_an_alarm(tmp_path: Path) -> None:
    watched, progress = Watched(tmp_path, **QUICK), Progress()
    for loss, doubt in ((2.0, False), (2.0, False), (2.0, False), (9.0, True), (2.0, True), (2.0, True)):
        watched.see(loss)
        watched.watch.fill(progress)
        assert progress.statistics.in_doubt is doubt


def test_a_held_out_loss_that_is_not_finite_is_an_alarm_where_the_weights_are(tmp_path: Path) -> None:
    watched = Watched(tmp_path, on_alarm=OnAlarm.rewind)
    watched.see(2.0, evaluation_loss=math.nan)
    assert (watched.watch.statistics.in_doubt, watched.watch.wants_rewind) == (True, True)
    watched.see(2.0, evaluation_loss=2.0)
    assert [watched.watch.statistics.in_doubt] == [False]
    assert watched.kinds() == ["evaluation"]


def test_a_step_that_was_skipped_over_broken_weights_ends_the_run_or_takes_it_back(tmp_path: Path) -> None:
    broken: Any = torch.nn.Linear(2, 2)
    with torch.no_grad():
        broken.weight[0, 1] = math.inf
    with pytest.raises(RunFailed, match=r"step 1 is not finite: loss nan.*weights are not either \(weight\)"):
        Watched(tmp_path, [broken]).see(math.nan, NONFINITE)
    back = Watched(tmp_path, [broken], on_alarm=OnAlarm.rewind)
    back.see(math.nan, NONFINITE)
    assert back.watch.wants_rewind


def test_skipped_steps_are_counted_in_a_window_of_steps(tmp_path: Path) -> None:
    watched = Watched(tmp_path, most=2, within=4)
    for kind in (1, 0, 1, 0, 2, 0, 1, 0, 0, 1):
        watched.see(2.0, kind, spike_limit=1.0, grad_norm=5.0)
        assert watched.watch.over is None
    watched.see(2.0, 1)
    watched.see(2.0, 1)
    assert watched.watch.over is not None
    assert watched.watch.over.startswith("3 of the last 4 steps were skipped")
    assert len(watched.watch.over) < 500
    assert watched.kinds()[-1] == "too_many"


def test_the_statistics_of_a_hostile_checkpoint_are_refused() -> None:
    good = RunStatistics(norms=[1.0], losses=[2.0], recent=[3], skipped=1)
    assert RunStatistics.from_json(good.to_json()) == good
    bad: list[Any] = [
        [], None, {"norms": "x"}, {"norms": [math.nan]}, {"norms": [True]}, {"losses": [None]},
        {"skipped": -1},
        {"recent": [1.5]}, {"alarm": 1}, {"lowest": "2"}, {"above_since": 1.0}, {"norms": [0.0] * 10_001},
        {"other": 1}, {"rewinds": "1"}, {"norms": [10**400]}, {"above_since": True},
    ]  # fmt: skip
    for stored in bad:
        with pytest.raises(ValueError, match="statistics"):
            RunStatistics.from_json(stored)
