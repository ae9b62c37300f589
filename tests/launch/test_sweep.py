"""Sweeps: every launcher and sweeper runs jobs with workers of their own, and none sinks with one of them."""

import importlib.util
import json
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig

from dsv3.launch.sweep import Sweep, mark_failed, read_failure
from tests.harness.commands import PlannedCommand
from tests.harness.outcome import Outcome
from tests.harness.processes import KILL, CommandLine, gone, rows
from tests.launch import stubs
from tests.launch.test_launch import ENDLESS, TWO

PLUGINS = ("hydra_joblib_launcher", "hydra_optuna_sweeper", "hydra_submitit_launcher")
pytestmark = [
    pytest.mark.slow,
    *(
        pytest.mark.skipif(
            importlib.util.find_spec("hydra_plugins") is None
            or importlib.util.find_spec(f"hydra_plugins.{plugin}") is None,
            reason=f"{plugin} is not installed",
        )
        for plugin in PLUGINS
    ),
]


def sweep(command_line: CommandLine, directory: Path, *arguments: str) -> Outcome:
    """A sweep over the small model, two workers a job, whose jobs go below `directory`."""
    return command_line.run("-m", *command_line.training(directory, *TWO, *arguments))


def assert_one_ran_and_one_failed(swept: Outcome, directory: Path) -> None:
    """Of train.steps=0,2 job 1 has run on two ranks and job 0 is told."""
    assert swept.code == 1
    assert "Traceback" not in swept.err
    failed, *reasons = swept.err[swept.err.rindex("failed: job ") :].splitlines()
    assert failed == f"failed: job 0 of {directory}; the others went on"
    assert reasons == ["job 0: train.steps=0 is not possible: must be above 0"]
    assert [row["step"] for row in rows(directory / "1")] == [1, 2]
    assert '"world_size": 2' in (directory / "1" / "environment.json").read_text()
    assert not (directory / "0" / "config.yaml").exists()


def test_joblib_runs_jobs_side_by_side(command_line: CommandLine, tmp_path: Path) -> None:
    directory = tmp_path / "a sweep (it's)"
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    swept = sweep(command_line, directory, *launcher, "train.steps=0,2")
    assert_one_ran_and_one_failed(swept, directory)
    jobs, _, ranking = swept.out.partition(f"\nJobs of {directory}\n")
    assert all(line.startswith(("[0] ", "[1] ")) for line in jobs.splitlines()), jobs
    assert "[1] job 1 (2 of 2): train.steps=2" in jobs
    assert "[1] step 2/2" in jobs  # a worker's
    assert "task=compare" in ranking
    assert "[0] job 0 failed: train.steps=0" in swept.err


def test_the_jobs_of_a_killed_sweep_do_not_go_on(command_line: CommandLine, tmp_path: Path) -> None:
    directory = tmp_path / "sweep"
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", ENDLESS]
    process = command_line.start("-m", *command_line.training(directory, *TWO, *launcher))
    process.wait_for_steps(directory / "0", 1)
    workers = process.workers()
    assert len(workers) == 2
    job = workers[0].parent()
    assert job is not None
    assert job.pid != process.popen.pid
    process.send(KILL)
    assert process.wait().code == -KILL
    assert gone([job, *workers], 10)  # a process of the pool without a job leaves by itself later


def test_submitit_runs_jobs_as_processes_of_their_own(command_line: CommandLine, tmp_path: Path) -> None:
    swept = sweep(command_line, tmp_path / "sweep", "hydra/launcher=submitit_local", "train.steps=0,2")
    assert_one_ran_and_one_failed(swept, tmp_path / "sweep")


def test_submitit_submits_jobs_to_slurm(command_line: CommandLine, tmp_path: Path) -> None:
    stubs.install(tmp_path / "bin")
    command_line.environment["PATH"] = f"{tmp_path / 'bin'}:/usr/bin:/bin"
    swept = sweep(command_line, tmp_path / "sweep", "hydra/launcher=submitit_slurm", "train.steps=0,2")
    assert_one_ran_and_one_failed(swept, tmp_path / "sweep")


def test_optuna_searches_for_the_held_out_loss_and_remembers_it(
    command_line: CommandLine, tmp_path: Path
) -> None:
    database = tmp_path / "study.db"
    study = ["hydra/sweeper=optuna", "hydra/sweeper/sampler=grid", "hydra.sweeper.n_jobs=1"]
    study += [f"hydra.sweeper.storage=sqlite:///{database}", "hydra.sweeper.study_name=steps"]
    swept = sweep(command_line, tmp_path / "sweep", *study, "train.steps=choice(0,2)")
    with sqlite3.connect(database) as opened:
        states = dict(opened.execute("select number, state from trials").fetchall())
        values = opened.execute("select value from trial_values").fetchall()
    assert sorted(states.values()) == ["COMPLETE", "FAIL"]
    ran, failed = (next(n for n, state in states.items() if state == s) for s in ("COMPLETE", "FAIL"))
    (last,) = [row for row in rows(tmp_path / "sweep" / str(ran)) if row["evaluation_loss"] is not None]
    assert values == [(last["evaluation_loss"],)]
    assert swept.code == 1
    assert f"failed: job {failed} of {tmp_path / 'sweep'}; the others went on" in swept.err
    assert "Traceback" not in swept.err


OPTUNA = ("-m", "task=plan", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "run.dir=sweep")


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


def test_the_directory_of_a_sweep_is_set_by_run_dir_alone(planned: PlannedCommand) -> None:
    HydraConfig.instance().cfg = None  # what another test composed
    outcome = planned.run("-m", "task=plan", "train.steps=1,2", "hydra.sweep.dir=elsewhere")
    assert outcome.code == 2
    assert "run.dir=DIR" in outcome.err
    for arguments in (["train.steps=0,1"], ["train.steps=1,2"]):  # an earlier failure is not this one's
        outcome = planned.run("-m", "task=plan", "run.dir=sweep", *arguments)
        assert outcome.code == ("0" in arguments[0])
    assert json.loads(Path("sweep/0/failed.json").read_text())["overrides"][-1] == "train.steps=0"
    assert HydraConfig.instance().cfg is None


def test_two_sweeps_in_one_second_have_two_directories(here: Path) -> None:
    with ThreadPoolExecutor(8) as threads:
        chosen = list(threads.map(lambda _: Sweep(arguments=["-m"]).choose(None), range(24)))
    assert len(set(chosen)) == 24
    assert {str(path) for path in Path("multirun").iterdir()} == set(chosen)


def test_more_failures_than_are_shown_are_counted(tmp_path: Path) -> None:
    made = Sweep()
    assert made.choose(str(tmp_path)) == made.choose(None) == str(tmp_path)
    assert made.failure() is None
    for number in range(12):
        mark_failed(tmp_path / str(number), f"reason {number}", ["train.steps=0", "data.path=here"])
    first, *reasons = str(made.failure()).splitlines()
    assert first.startswith(f"jobs {', '.join(map(str, range(12)))} of {tmp_path}")
    assert reasons[4:] == ["job 4: reason 4", "and 7 more: failed.json in each tells why"]
    assert Sweep().failure() is None
    later = Sweep()
    later.choose(str(tmp_path))
    assert later.failure() is None


def test_a_damaged_mark_has_no_reason(tmp_path: Path) -> None:
    assert read_failure(tmp_path) == ("", [])
    (tmp_path / "failed.json").write_text("[1")
    assert read_failure(tmp_path) == ("", [])
