"""Runs that break or hang end soon, report the reason, and leave no process behind."""

import json
import socket
from pathlib import Path

import psutil

from dsv3.checkpoint.directory import complete_steps
from tests.harness.processes import KILL, STOP, CommandLine, gone, rows, until
from tests.launch.test_launch import ENDLESS, TWO

TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node=2"]


def faulty(name: str) -> list[str]:
    """The optimizer of faults.py that goes wrong in step 2."""
    return [f"optimizer._target_=tests.launch.faults.{name}", "run.allow_targets=[tests.launch.faults]"]


def test_a_rank_that_raises_ends_those_that_hang_and_is_told(
    command_line: CommandLine, tmp_path: Path
) -> None:
    process = command_line.start(
        *command_line.training(
            tmp_path / "run", ENDLESS, *TWO, *faulty("Raising"), "train.checkpoint_every=1"
        )
    )
    process.wait_for_steps(tmp_path / "run", 0)
    workers = process.workers()
    ended = process.wait()
    assert ended.code == 1
    # The traceback of the rank that raised, then the message; nothing of the other before it.
    assert ended.err.splitlines()[-1].startswith("failed: rank 1 failed: ValueError: rank 1 has had enough")
    assert "oversleep" not in ended.err
    assert gone(workers, 0)


def test_a_stop_in_the_first_step_ends_every_rank_at_once_in_whatever_it_waits(
    command_line: CommandLine, tmp_path: Path
) -> None:
    """Rank 1 sleeps in Python and rank 0 waits for it in a collective, in C++."""
    arguments = command_line.training(tmp_path / "run", ENDLESS, *TWO, *faulty("Asleep"))
    process = command_line.start(*arguments)
    until((command_line.directory / "asleep").exists)
    workers = process.workers()
    assert len(workers) == 2
    process.send(STOP)
    ended = process.wait()
    assert (ended.code, ended.err) == (130, "stopped before the first step; nothing was saved\n")
    assert gone(workers, 0)
    assert complete_steps(tmp_path / "run") == []


def test_a_rank_that_hangs_is_found_with_every_stack_and_the_run_goes_on(
    command_line: CommandLine, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    saved = ["train.steps=2", "train.checkpoint_every=1", "checkpoint.async_save=false"]
    more = ["launch.timeout=6", "launch.max_restarts=1", *faulty("HangingOnce")]
    ended = command_line.run(*command_line.training(run_dir, *saved, *TWO, *more))
    assert ended.code == 0
    told = "restart 1 of 1 from step 1: no progress for 6 s (launch.timeout); stacks: stacks-1/"
    assert ended.err.splitlines()[-1] == told
    assert sorted(path.name for path in (run_dir / "stacks-1").iterdir()) == ["rank-0.txt", "rank-1.txt"]
    (entry,) = map(json.loads, (run_dir / "accidents.jsonl").read_text().splitlines())
    first, *where = entry["reason"].splitlines()
    assert first == "no progress for 6 s (launch.timeout)"
    (hung,) = [line for line in where if line.startswith("rank 1 at ")]
    assert hung.endswith("in oversleep")
    assert "faults.py" in hung
    assert len([line for line in where if line.startswith("rank 0 at ")]) == 1
    assert [row["step"] for row in rows(run_dir)] == [1, 2]


def test_ranks_do_not_outlive_a_killed_torchrun(command_line: CommandLine, tmp_path: Path) -> None:
    alone = [*TORCHRUN[:-1], "--nproc-per-node=1"]
    process = command_line.start(*command_line.training(tmp_path / "run", ENDLESS), launcher=alone)
    process.wait_for_steps(tmp_path / "run", 1)
    ranks = psutil.Process(process.popen.pid).children()
    assert len(ranks) == 1
    process.send(KILL)
    assert process.wait().code == -KILL
    assert gone(ranks, 10)


def test_ranks_of_torchrun_make_one_run_and_stop_as_one(command_line: CommandLine) -> None:
    arguments = command_line.training(Path("unused"), ENDLESS, "parallel=fsdp")[:-1]
    process = command_line.start(*arguments, launcher=TORCHRUN)
    outputs = command_line.directory / "outputs"
    until(lambda: any(len(rows(run_dir)) > 1 for run_dir in outputs.glob("*")))
    process.send(STOP)
    stopped = process.wait()
    assert stopped.err.count("go on: python train.py resume=") == 1
    (run_dir,) = outputs.iterdir()
    steps = [row["step"] for row in rows(run_dir)]
    assert steps == list(range(1, len(steps) + 1))
    assert [step.name for step in complete_steps(run_dir)] == [f"step-{len(steps)}"]
    assert 'world_size": 2' in (run_dir / "environment.json").read_text()


def test_two_nodes_started_by_hand_make_one_run_and_restart_together(
    command_line: CommandLine, tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        rendezvous = f"localhost:{free.getsockname()[1]}"
    layout = ["parallel=fsdp", "launch.nproc=1", "launch.nnodes=2", f"launch.rendezvous={rendezvous}"]
    often = ["train.steps=60", "train.checkpoint_every=5", "launch.max_restarts=2"]
    run_dir = tmp_path / "run"
    arguments = command_line.training(run_dir, *often, *layout)
    nodes = []
    for rank in (1, 0):  # the second may come first
        (tmp_path / str(rank)).mkdir()
        node = CommandLine(tmp_path / str(rank), tmp_path, command_line.text)
        node.environment = command_line.environment
        nodes.append(node.start(*arguments, f"launch.node_rank={rank}"))
    command_line.started += nodes
    nodes[0].wait_for_steps(run_dir, 7)
    (killed,) = nodes[0].workers()
    killed.send_signal(KILL)
    cause = f"rank 1 (pid {killed.pid}) was ended by SIGKILL; the other workers were stopped"
    for ended in (node.wait() for node in nodes):
        assert ended.code == 0, ended.err
        (told,) = [line for line in ended.err.splitlines() if line.startswith("restart 1 of 2 from step ")]
        assert told.endswith(cause)
    assert [row["step"] for row in rows(run_dir)] == list(range(1, 61))
    assert '"world_size": 2' in (run_dir / "environment.json").read_text()
    assert complete_steps(run_dir)[-1].name == "step-60"
