"""What the schedule does over the steps to come is said or refused, and each remedy works."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from dsv3.config.root import Config
from dsv3.config.training import (
    BatchRampConfig,
    ScheduleConfig,
    StepsConfig,
    WarmupCosineConfig,
    WSDConfig,
)
from dsv3.errors import UserError
from dsv3.launch.job import plan_job
from dsv3.launch.schedule_outlook import fit_warmup, schedule_notes
from tests.harness.commands import PlannedCommand
from tests.harness.composing import strict_config
from tests.harness.runs import StoredRun

WSD = ["schedule=wsd", "schedule.warmup_steps=0", "schedule.total_steps=10", "logger=none"]


@cache
def planned_config() -> Config:
    """Return the debug model's completed config: composing takes half a second."""
    return plan_job(strict_config([]), []).config


def completed(schedule: ScheduleConfig | None = None, lr: float = 3e-3, **train: Any) -> Config:
    """Return a completed config with a schedule, which ends with the run unless it says otherwise."""
    config = planned_config()
    chosen = schedule or WarmupCosineConfig(warmup_steps=20)
    settings = replace(config.train, **train)
    ended = replace(chosen, total_steps=chosen.total_steps or settings.steps)
    return replace(config, train=settings, schedule=ended, optimizer=replace(config.optimizer, lr=lr))


def stored_run(stored: StoredRun, *overrides: str, done: int = 10) -> Path:
    directory = stored.store(*overrides, total_steps=10)
    (directory / "checkpoints" / f"step-{done}").mkdir(parents=True)
    (directory / "checkpoints" / f"step-{done}" / ".metadata").touch()
    return directory


def test_a_usual_run_has_nothing_to_say() -> None:
    assert schedule_notes(completed(steps=300)) == []
    assert schedule_notes(completed(steps=300), done=100) == []


def test_the_last_step_of_a_schedule_that_ends_at_0_is_by_design() -> None:
    assert schedule_notes(completed(WSDConfig(), steps=10)) == []
    assert schedule_notes(completed(WSDConfig(), steps=10), done=9) == []


@pytest.mark.parametrize(
    "schedule", [WSDConfig(total_steps=10), WarmupCosineConfig(total_steps=10, final=0.0)]
)
def test_a_learning_rate_of_0_past_the_end_is_refused(schedule: ScheduleConfig) -> None:
    with pytest.raises(UserError, match=r"is 0 from step 11 to 20: .*schedule\.total_steps=20 stretches"):
        schedule_notes(completed(schedule, steps=20), done=10)


REMEDIES = {
    "schedule.total_steps=20": [
        "stretches the schedule from 10 to 20 steps",
        "a learning rate of",
        "instead of 0",
    ],
    "schedule.final=0.1": [
        "the schedule has ended at step 10: steps 11 to 20 have a learning rate of 0.0003"
    ],
    "optimizer.lr=0": ["the learning rate is 0, as optimizer.lr=0 says: nothing is learnt"],
}


def test_a_wsd_run_resumed_past_its_end_is_refused_with_three_ways_out(
    planned: PlannedCommand, stored: StoredRun
) -> None:
    directory = stored_run(stored, *WSD, "train.steps=10")
    refused = planned.run(f"resume={directory}", "train.steps=20")
    assert refused.code == 2
    assert len(refused.err.splitlines()) == 1
    for remedy, told in REMEDIES.items():
        assert remedy in refused.err
        notes = "\n".join(planned.run(f"resume={directory}", "train.steps=20", remedy).job.notes)
        for words in told:
            assert words in notes


def test_a_stretched_schedule_says_what_becomes_of_rate_bias_and_mtp() -> None:
    config = completed(WarmupCosineConfig(), steps=20)
    (note,) = schedule_notes(config, 10, {"schedule.total_steps": 10})
    assert note == (
        "stretches the schedule from 10 to 20 steps: step 11 has a learning rate of 0.00144 instead of "
        "0.0003, an expert bias speed of 0.001 instead of 0, an MTP weight of 0.3 instead of 0.1"
    )


def test_the_schedules_end_shortened_is_told() -> None:
    (note,) = schedule_notes(completed(steps=30), 20, {"schedule.total_steps": 300})
    assert note.startswith("shortens the schedule from 300 to 30 steps: step 21 has")


def test_another_batch_on_resume_is_told() -> None:
    notes = schedule_notes(completed(global_batch_size=16), 10, {"train.global_batch_size": 8})
    assert notes == [
        "from step 11 on a step has 16 sequences instead of 8; the learning rate per step stays as it is"
    ]


def test_another_ramp_on_resume_is_told() -> None:
    stored = {"train.global_batch_size": 8, "train.batch_ramp.start": 2, "train.batch_ramp.tokens": 1000}
    stored["train.batch_ramp.increment"] = 2
    config = completed(global_batch_size=8, batch_ramp=BatchRampConfig(4, 1000, 2))
    (note,) = schedule_notes(config, 10, stored)
    told = "a step has 8 sequences ramped up from 4 by 2 over the run's first 1000 tokens instead of 8 "
    assert told + "ramped up from 2 by 2 over the run's first 1000 tokens; the learning rate" in note
    (note,) = schedule_notes(config, 10, {"train.global_batch_size": 8})  # a run of older code
    assert told + "without a ramp; the learning rate per step stays" in note
    assert schedule_notes(config, 10, stored | {"train.batch_ramp.start": 4}) == []


OUTLOOKS: dict[str, tuple[ScheduleConfig, dict[str, int], str]] = {
    "past the end": (
        WarmupCosineConfig(total_steps=30),
        {"steps": 40},
        "the schedule has ended at step 30: steps 31 to 40 have a learning rate of 0.0003, an expert bias "
        "speed of 0, an MTP weight of 0.1; schedule.total_steps=40 stretches it",
    ),
    "before the end": (
        WarmupCosineConfig(warmup_steps=20, total_steps=400),
        {"steps": 40},
        "the run ends at step 40 of a schedule of 400 steps: the learning rate is 0.00298 there, and would "
        "be 0.0003 at the end",
    ),
    "within the warm-up": (
        WarmupCosineConfig(warmup_steps=20, total_steps=400),
        {"steps": 10},
        "the run ends within the warm-up of 20 steps, at a rate of 0.0015",
    ),
    "a long warm-up": (
        WarmupCosineConfig(warmup_steps=20),
        {"steps": 30},
        "the warm-up takes 20 of the 30 steps of the schedule",
    ),
    "zeros of its own": (
        StepsConfig(factor=0.0),
        {"steps": 100},
        "the schedule has a learning rate of 0 from step 81 on",
    ),
    "a stop beyond the end": (
        WarmupCosineConfig(),
        {"steps": 100, "stop_after": 200},
        "train.stop_after=200 lies beyond train.steps=100, where the run ends",
    ),
}


@pytest.mark.parametrize("case", OUTLOOKS)
def test_what_is_unusual_is_told(case: str) -> None:
    schedule, train, told = OUTLOOKS[case]
    assert schedule_notes(completed(schedule, **train)) == [told]


def test_nothing_left_to_train_is_told() -> None:
    config = completed(steps=30)
    assert schedule_notes(config, 30) == [
        "nothing is left to train: step 30 is done; train.steps=N goes on to step N"
    ]
    stopped = completed(steps=30, stop_after=8)
    assert "train.stop_after=N" in schedule_notes(stopped, 10)[0]


def test_a_warm_up_of_a_file_is_shortened_to_fit_and_told(planned: PlannedCommand) -> None:
    job = planned.run("train.steps=20", "logger=none").job
    assert job.config.schedule.warmup_steps == 2
    told = "schedule.warmup_steps 20 -> 2, a tenth of the schedule, which has 20 steps only"
    assert f"{told}; schedule.warmup_steps=N sets it" in job.notes
    assert planned.run("train.steps=21", "logger=none").job.config.schedule.warmup_steps == 20


def test_a_typed_warm_up_that_does_not_fit_is_refused_with_its_remedies(planned: PlannedCommand) -> None:
    typed = ["train.steps=20", "schedule.warmup_steps=30", "logger=none"]
    refused = planned.run(*typed)
    assert refused.code == 2
    assert "schedule.warmup_steps=30 is not shorter than the schedule, which has 20 steps" in refused.err
    for remedy in ("schedule.warmup_steps=19", "schedule.total_steps=31"):
        assert remedy in refused.err
        merged = {override.partition("=")[0]: override for override in [*typed, remedy]}
        assert planned.run(*merged.values()).code == 0


def test_a_resumed_run_keeps_a_warm_up_that_was_too_long() -> None:
    config = completed(steps=10)
    kept, (note,) = fit_warmup(config, [], resumed=True)
    assert kept is config
    assert note.startswith("the warm-up is longer than the schedule")
    with pytest.raises(UserError, match="is not shorter than the schedule, which has 9 steps"):
        fit_warmup(completed(steps=9), ["schedule.total_steps=9"], resumed=True)
