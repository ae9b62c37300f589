"""A run of two ranks with a nan, a spike and a killed rank ends by itself as the one that had none of them.

The other run passes over the two batches by means of its own: PassOver takes no step on them. On the way:
what a run listens on, what an attacker's pickles in its store do, and a stop behind the last step.
"""

import json
import re
from pathlib import Path
from typing import Any

import psutil
import pytest

from dsv3.checkpoint.directory import complete_steps
from tests.harness.accidents import injected
from tests.harness.checkpoints import last_tensors
from tests.harness.processes import STOP, CommandLine, Process, gone, until
from tests.harness.runs import rows
from tests.launch.attacker import listening, other_addresses, poison, refuses
from tests.launch.test_launch import TWO

pytestmark = pytest.mark.slow

BATCH, STEPS = 4, 12
EXPERT = "layers.1.ffn.experts.gate_up_proj"
NAN, SPIKE, KILL = 3 * BATCH, 8 * BATCH, 9 * BATCH
"""The first sequences of steps 4, 9 and 10. Step 5 is saved: the spike is met again behind the kill."""
FAULTS: dict[int, dict[str, Any]] = {
    NAN: {"kind": "nan", "parameter": EXPERT, "expert": 2},
    SPIKE: {"kind": "spike", "factor": 300},
    KILL: {"kind": "kill", "rank": 1},
}
SETTINGS = [*TWO, f"train.steps={STEPS}", "train.accidents.spike_window=3", "train.evaluate_every=3"]
OF_ACCIDENTS = ("loss", "grad_norm", "skipped")
"""Columns that tell of an accident; those of the bad steps are compared apart."""


def started(command_line: CommandLine, run: Path, *more: str) -> Process:
    """Start a run of both in a directory of its own, where its workers are."""
    run.parent.mkdir()
    return command_line.start(*command_line.training(run, *SETTINGS, *more))


def test_three_accidents_cost_no_step_and_no_loss_and_nobody_gets_in(
    command_line: CommandLine, tmp_path: Path
) -> None:
    without, run = tmp_path / "without" / "run", tmp_path / "with" / "run"
    process = started(command_line, without, "train.accidents.skip=false", *injected({}, [NAN, SPIKE]))
    until(lambda: bool(complete_steps(without)))  # the sample, the plot, the logger, the workers follow
    workers = process.workers()
    process.send(STOP)
    ended = process.wait()
    assert ended.code == 0, ended.err
    assert "Done" in ended.out
    assert gone(workers, 0)

    kept = ["train.checkpoint_every=5", "launch.max_restarts=3", *injected(FAULTS)]
    process = started(command_line, run, *kept)
    process.wait_for_steps(run, 8)  # rank 1 waits for its end
    launcher, workers = psutil.Process(process.popen.pid), process.workers()
    sockets = listening([launcher, *launcher.children(recursive=True)])
    assert {address for _, address, _ in sockets} <= {"127.0.0.1", "::1"}
    assert {pid for pid, _, _ in sockets} >= {launcher.pid, *(worker.pid for worker in workers)}
    assert all(refuses(address, port) for address in other_addresses()[:1] for _, _, port in sockets)
    (port,) = [port for pid, _, port in sockets if pid == launcher.pid]
    poison(port, tmp_path / "marker")
    (run.parent / "may-die").touch()
    ended = process.wait()
    assert ended.code == 0, ended.err
    assert "Traceback" not in ended.err
    assert gone(workers, 0)
    assert not (tmp_path / "marker").exists()

    entries = [json.loads(line) for line in (run / "accidents.jsonl").read_text().splitlines()]
    check_told(run, ended.err, entries, workers[1].pid)
    check_rows(run, without)
    assert last_tensors(run) == last_tensors(without)
    assert [step.name for step in complete_steps(run)] == ["step-10", "step-12"]


def check_rows(run: Path, without: Path) -> None:
    """Of each step all that is recorded is equal, but for the numbers of the two batches themselves."""
    found, sound = rows(run), rows(without)
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    for row, other in zip(found, sound, strict=True):
        bad = row["step"] in (4, 9)
        dropped = OF_ACCIDENTS if bad else ("skipped",)
        assert {key: row[key] for key in row if key not in dropped} == {
            key: other[key] for key in other if key not in dropped
        }
    assert [row["skipped"] for row in found] == [0] * 3 + [1] * 5 + [2] * 4
    assert [row["skipped"] for row in sound] == [0] * STEPS
    assert (found[3]["loss"], found[3]["grad_norm"]) == (sound[3]["loss"], None)
    assert found[8]["loss"] == sound[8]["loss"]
    assert found[8]["grad_norm"] == pytest.approx(300 * sound[8]["grad_norm"], rel=1e-4)


def check_told(run: Path, err: str, entries: list[dict[str, Any]], killed: int) -> None:
    """Each accident is listed once, with its data and place, and told in log and summary."""
    nan, restart, spike = entries
    assert (nan["kind"], nan["step"], nan["seed"], nan["samples"]) == ("nonfinite", 4, 0, [NAN, NAN + BATCH])
    assert (nan["parameter"], nan["expert"], nan["layer"]) == (EXPERT, 2, "layers.1")
    assert (nan["parameters"], nan["nonfinite_parameters"]) == ([f"{EXPERT}[2]"], 1)
    assert nan["grad_norm"] == "nan"
    assert nan["skipped"] is spike["skipped"] is True
    assert (spike["kind"], spike["step"], spike["samples"]) == ("spike", 9, [SPIKE, SPIKE + BATCH])
    assert spike["grad_norm"] > spike["limit"] > 0
    assert len(spike["parameters"]) == 8
    assert (restart["kind"], restart["step"], restart["restart"], restart["of"]) == ("restart", 5, 1, 3)
    assert restart["reason"].startswith(f"rank 1 (pid {killed}) was ended by SIGKILL")
    log = (run / "log.txt").read_text()
    line = f"restart 1 of 3 from step 5: rank 1 (pid {killed}) was ended by SIGKILL"
    assert line in err
    assert line in log
    loss = rows(run)[3]["loss"]
    assert f"step 4 is skipped: loss {loss}, grad_norm nan, at {EXPERT}[2]; sequences 12 to 15" in log
    assert "step 9 is skipped: its gradient norm" in log
    assert "1 nonfinite, 1 restart, 1 spike: accidents.jsonl" in log
    assert re.search(r"skipped steps +2 of 12", log)
