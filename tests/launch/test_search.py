"""An optuna study is kept beside its jobs: after a kill the same command does what is left of it."""

import re
import sqlite3
from pathlib import Path

import pytest

from dsv3.launch.search import STUDY_NAME, continue_search
from dsv3.launch.sweep import Sweep
from tests.harness.commands import PlannedCommand, TrainCommand
from tests.harness.processes import KILL, CommandLine, rows
from tests.harness.tiny import MODEL, TRAINING
from tests.tasks.test_compare import store

optuna = pytest.importorskip("optuna")
pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")

SEARCH = ["hydra/sweeper=optuna", "optimizer.lr=tag(log, interval(1e-4, 1e-2))"]
GRID = ["hydra/sweeper=optuna", "hydra/sweeper/sampler=grid", "train.steps=2,3,4,5"]


def study(finished: int, running: int = 0) -> None:
    """Make a study in ./sweep with so many trials that are finished, the last of them a failed one."""
    Path("sweep").mkdir(exist_ok=True)
    address = f"sqlite:///{Path('sweep/study.db').absolute()}"
    made = optuna.create_study(study_name=STUDY_NAME, storage=address)
    for number in range(finished + running):
        trial = made.ask()
        if number < finished - 1:
            made.tell(trial, 1.0)
        elif number < finished:
            made.tell(trial, state=optuna.trial.TrialState.FAIL)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["train.evaluate_every=0"],
            "error: train.evaluate_every=0 measures no held-out loss, .* between two$",
        ),
        (["train.steps=9", "train.evaluate_every=0"], "as train.evaluate_every=9 for one at the end"),
        (["task=plan"], "error: this task returns no number .* task=train or task=evaluate"),
        (["launch=slurm"], "error: launch=slurm returns before .* take hydra/launcher=submitit_slurm"),
        (["train.steps=9", "train.stop_after=7", "train.evaluate_every=3"], "error: train.stop_after=7 ends"),
        (["hydra.sweeper.n_trials=0"], "error: hydra.sweeper.n_trials=0 is not possible: .* above 0$"),
        (["hydra.sweeper.n_jobs=-1"], "error: hydra.sweeper.n_jobs=-1 is not possible: .* above 0$"),
    ],
)
def test_a_search_that_can_have_no_result_is_refused_as_a_whole(
    planned: PlannedCommand, arguments: list[str], words: str
) -> None:
    kept = [each for each in GRID if not arguments[0].startswith("train.steps") or "train.steps" not in each]
    refused = planned.run("-m", *kept, "optimizer.lr=1e-3,2e-3", "run.dir=sweep", *arguments)
    assert (refused.code, refused.jobs) == (2, [])
    assert re.search(words, refused.err.strip())
    assert not Path("sweep").exists()


def test_a_job_of_a_search_that_alone_has_no_result_is_refused_before_it_trains(
    planned: PlannedCommand,
) -> None:
    grid = [*GRID[:2], "train.evaluate_every=0,1,100", "train.stop_after=3,6", "train.steps=6"]
    searched = planned.run("-m", *grid, "hydra.sweeper.n_trials=6", "run.dir=sweep")
    assert searched.code == 1
    assert {(job.config.train.evaluate_every, job.config.train.stop_after) for job in searched.jobs} == {
        (1, 3),
        (1, 6),
        (100, 6),
    }
    assert "train.evaluate_every=0 measures no held-out loss" in searched.err
    assert "train.stop_after=3 ends a run without a held-out loss" in searched.err


def added(arguments: list[str], sweep: Sweep | None = None) -> dict[str, str] | None:
    """Return the overrides that a search below ./sweep gets besides its own."""
    overrides = continue_search([*arguments, "run.dir=sweep"], sweep or Sweep())
    return None if overrides is None else dict(override.split("=", 1) for override in overrides)


@pytest.mark.slow
def test_a_search_that_was_killed_goes_on_where_it_stopped(
    command_line: CommandLine, commands: TrainCommand, tmp_path: Path
) -> None:
    directory = tmp_path / "a study (it's)"
    search = [*SEARCH, "hydra.sweeper.n_trials=2", "train.steps=30"]
    arguments = ["-m", *command_line.training(directory, *search)]
    process = command_line.start(*arguments)
    process.wait_for_steps(directory / "1", 0)
    process.send(KILL)
    assert process.wait().code == -KILL
    kept = rows(directory / "0")
    again = commands.run(*arguments)
    assert again.code == 0, again.err
    assert "has 1 of 2 trials, 1 broken off and not counted: 1 to go" in again.err
    assert "job 2 (2 of 2): optimizer.lr=" in again.out
    with sqlite3.connect(directory / "study.db") as opened:
        states = dict(opened.execute("select number, state from trials").fetchall())
        values = opened.execute("select value from trial_values order by trial_id").fetchall()
    assert states == {0: "COMPLETE", 1: "RUNNING", 2: "COMPLETE"}
    assert rows(directory / "0") == kept
    losses = [rows(directory / number)[-1]["evaluation_loss"] for number in ("0", "2")]
    assert values == [(loss,) for loss in losses]


def test_a_new_search_keeps_its_study_and_outlives_failed_jobs(here: Path) -> None:
    assert added(SEARCH) == {
        "hydra.sweeper.max_failure_rate": "1.0",
        "hydra.sweeper.n_jobs": "1",
        "hydra.sweeper.storage": f"'sqlite:///{here}/sweep/study.db'",
        "hydra.sweeper.study_name": f"'{STUDY_NAME}'",
    }
    typed = [
        "hydra.sweeper.max_failure_rate=0.5",
        "hydra.sweeper.n_jobs=3",
        "hydra.sweeper.storage=sqlite://",
    ]
    assert added([*SEARCH, *typed]) == {}
    assert continue_search(["train.steps=1,2"], Sweep()) == []


def test_only_trials_that_are_not_finished_are_left(here: Path) -> None:
    study(finished=2, running=1)
    sweep = Sweep()
    left = added([*SEARCH, "hydra.sweeper.n_trials=5"], sweep)
    assert left is not None
    assert left["hydra.sweeper.n_trials"] == "3"
    assert (sweep.first, sweep.finished) == (3, 2)
    assert sweep.number(0) == 3
    left = added(GRID)
    assert left is not None
    assert left["hydra.sweeper.n_trials"] == "2"


def test_a_job_that_ended_in_a_batch_that_was_broken_off_is_told_to_the_study(here: Path) -> None:
    study(finished=1, running=2)
    store(Path("sweep/1"), [], [3.0, 2.0, 1.0], 1.5)
    store(Path("sweep/2"), [], [3.0, 2.0])
    left = added([*SEARCH, "hydra.sweeper.n_trials=4"])
    assert left is not None
    assert left["hydra.sweeper.n_trials"] == "2"
    made = optuna.load_study(study_name=STUDY_NAME, storage="sqlite:///sweep/study.db")
    assert [trial.value for trial in made.trials] == [None, 1.5, None]


def test_a_search_that_has_all_its_trials_starts_no_job(planned: PlannedCommand) -> None:
    study(finished=4)
    outcome = planned.run("-m", "task=train", *GRID, "run.dir=sweep")
    assert (outcome.code, outcome.jobs) == (0, [])
    assert "has 4 of 4 trials: 0 to go" in outcome.err


def test_a_failed_job_is_told_to_a_study_of_the_users_own(commands: TrainCommand, tmp_path: Path) -> None:
    database = tmp_path / "study.db"
    study = ["hydra/sweeper=optuna", "hydra/sweeper/sampler=grid", "hydra.sweeper.n_jobs=1"]
    study += [f"hydra.sweeper.storage=sqlite:///{database}", "hydra.sweeper.study_name=steps"]
    text = ["data=text", f"data.path={commands.text}", "logger=none", "train.generate_every=0"]
    swept = commands.run("-m", *MODEL, *TRAINING, *text, *study, "train.steps=choice(0,2)", "run.dir=sweep")
    with sqlite3.connect(database) as opened:
        states = dict(opened.execute("select number, state from trials").fetchall())
        values = opened.execute("select value from trial_values").fetchall()
    assert sorted(states.values()) == ["COMPLETE", "FAIL"]
    ran, failed = (next(n for n, state in states.items() if state == s) for s in ("COMPLETE", "FAIL"))
    (last,) = [row for row in rows(Path("sweep") / str(ran)) if row["evaluation_loss"] is not None]
    assert values == [(last["evaluation_loss"],)]
    assert swept.code == 1
    assert f"failed: job {failed} of sweep; the others went on" in swept.err
    assert "Traceback" not in swept.err


OPTUNA = ("-m", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "run.dir=sweep")


def test_a_job_without_a_loss_fails_for_a_sweeper_that_searches(planned: PlannedCommand) -> None:
    outcome = planned.run(*OPTUNA, "train.steps=choice(2,3)")
    assert len(outcome.jobs) == 2
    assert outcome.code == 1
    assert "failed: jobs 0, 1 of sweep; the others went on" in outcome.err
    assert "its result is None, not a held-out loss" in outcome.err
    assert "Traceback" not in outcome.err


def test_the_user_may_still_say_how_many_jobs_may_fail(planned: PlannedCommand) -> None:
    outcome = planned.run(*OPTUNA, "hydra.sweeper.n_jobs=1", "hydra.sweeper.max_failure_rate=0")
    assert len(outcome.jobs) == 1
    assert outcome.code == 1
