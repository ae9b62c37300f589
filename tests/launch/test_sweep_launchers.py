"""Sweeps: every launcher runs jobs with workers of their own, and none sinks with one of them."""

import importlib.util
from pathlib import Path

import pytest

from dsv3.distributed.directory_lock import DirectoryLock
from tests.harness.outcome import Outcome
from tests.harness.processes import KILL, CommandLine, gone, rows
from tests.launch import stubs
from tests.launch.test_launch import ENDLESS, TWO

PLUGINS = ("hydra_joblib_launcher", "hydra_submitit_launcher")
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
    assert gone([job], 10)  # a process of the pool without a job leaves by itself later
    with DirectoryLock(directory / "0", "run.dir=RUN"):  # a resume waits until its workers are gone
        assert gone(workers, 0)


def test_submitit_submits_jobs_to_slurm(command_line: CommandLine, tmp_path: Path) -> None:
    """Nothing of ours tells hydra/launcher=submitit_local, which runs the same jobs here, from this one."""
    stubs.install(tmp_path / "bin")
    command_line.environment["PATH"] = f"{tmp_path / 'bin'}:/usr/bin:/bin"
    swept = sweep(command_line, tmp_path / "sweep", "hydra/launcher=submitit_slurm", "train.steps=0,2")
    assert_one_ran_and_one_failed(swept, tmp_path / "sweep")
