"""Workers and signals: who is started, who is stopped, and with which exit code."""

import os
from pathlib import Path

from dsv3.checkpoint.directory import complete_steps
from tests.harness.processes import QUIT, SAVE, STOP, CommandLine, gone, rows, until

TWO = ("parallel=fsdp", "launch.nproc=2")
ENDLESS = "train.steps=1000000"


def test_a_stopped_run_saves_exits_75_and_goes_on_where_it_stopped_on_another_layout_too(
    command_line: CommandLine, tmp_path: Path
) -> None:
    run_dir = tmp_path / "a run, it's"
    arguments, steps = command_line.training(run_dir, ENDLESS, *TWO), 0
    for ranks, number in ((2, STOP), (1, QUIT)):
        process = command_line.start(*arguments)
        process.wait_for_steps(run_dir, steps + 1)
        workers = process.workers()
        assert len(workers) == (2 if ranks == 2 else 0)
        saved = complete_steps(run_dir)
        process.send(SAVE)
        until(lambda saved=saved: complete_steps(run_dir) != saved)  # type: ignore[misc]
        process.wait_for_steps(run_dir, len(rows(run_dir)))  # it goes on
        os.killpg(process.popen.pid, number)  # as `timeout` and systemd do, and a terminal
        stopped = process.wait()
        assert stopped.code == 75
        assert len(stopped.err.splitlines()) == 1
        assert "resume=" in stopped.err
        assert gone(workers, 0)
        before, steps = steps, len(rows(run_dir))
        assert complete_steps(run_dir)[-1].name == f"step-{steps}"
        assert steps > before
        assert [row["step"] for row in rows(run_dir)] == list(range(1, steps + 1))
        arguments = [f"resume={run_dir}", ENDLESS, "parallel=none", "launch.nproc=null"]


def test_a_mistake_that_a_worker_finds_is_told_as_anywhere_else(
    command_line: CommandLine, tmp_path: Path
) -> None:
    arguments = command_line.training(tmp_path / "run", ENDLESS, *TWO, "data.path=/nope, it's=not")
    ended = command_line.run(*arguments)
    assert ended.code == 2
    assert ended.err.startswith('error: data.path="/nope, it\'s=not" does not exist')
    assert len(ended.err.splitlines()) == 1
    assert not (tmp_path / "run").exists()
