"""Every signal in every phase of a command: it ends at once and says so, or it saves."""

import json
import re
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pytest

from dsv3.checkpoint.directory import complete_steps
from dsv3.distributed.signals import NOTHING_SAVED
from tests.harness.processes import ROOT, environment
from tests.harness.tiny import MODEL, TRAINING

TERM, INT, HUP, QUIT, SAVE = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1

pytestmark = pytest.mark.slow


@dataclass
class Case:
    """A command, and the signals that it gets in a phase.

    `said` is a pattern of what it prints on stderr; with `moves` the phase has begun to move.
    """

    phase: str
    signals: list[int]
    code: int
    said: str
    arguments: list[str] = field(default_factory=list)
    program: str = "train"
    moves: bool = False
    ignored: list[int] = field(default_factory=list)


SAVED = r"stopped after step {} and saved; go on: .*resume=.*"

FIRST = [
    Case("composing the configuration", [TERM], 130, NOTHING_SAVED),
    Case("planning", [HUP], 130, NOTHING_SAVED),
    Case("training the tokenizer", [INT], 130, NOTHING_SAVED),
    Case("tokenizing the training text", [QUIT], 130, NOTHING_SAVED, moves=True),
    Case("building the model", [QUIT], 130, NOTHING_SAVED),
    Case("making the run directory", [TERM], 130, NOTHING_SAVED),
    Case("taking step 1", [INT], 130, NOTHING_SAVED),
]
LATER = [
    Case("computing the held-out loss", [HUP], 75, SAVED.format(2)),
    Case("saving step 2", [QUIT], 75, SAVED.format("[23]")),
    Case("computing the held-out loss", [TERM, QUIT], 130, ""),
    Case("drawing loss.png", [TERM], 0, ""),
    Case("finishing the logger", [INT, SAVE], 0, ""),
    # nohup's SIGHUP, and SIGUSR1 long before there is anything to save.
    Case("composing", [HUP, SAVE], 0, "SIGUSR1: the run will save after its first step", ignored=[HUP]),
]
RUN = ["checkpoint.load=RUN"]
OTHER_TASKS = [
    Case("planning", [HUP], 130, "stopped", ["task=plan"]),
    Case(
        "loading",
        [SAVE, INT],
        130,
        "SIGUSR1: .* only training saves checkpoints\nstopped",
        ["task=generate", *RUN],
    ),
    Case(
        "preparing",
        [TERM],
        130,
        "stopped; the same command goes on where it was",
        ["task=prepare"],
        moves=True,
    ),
    Case("planning the files", [QUIT], 130, "stopped", program="convert"),
    Case("writing", [HUP], 75, "stopped: .*", program="convert"),
    Case("verifying OUT", [TERM], 130, "stopped", program="convert"),
]
CASES = [*FIRST, *LATER, *OTHER_TASKS]


def arguments(case: Case, place: Path, text: Path, number: int) -> list[str]:
    """Return the whole command of a case, whose output is `place`/NUMBER."""
    out, run = place / str(number), place / "run"
    if case.program == "convert":
        return ["direction=dcp_to_hf", f"input={run}", f"output={out}", "verify=true"]
    if case.arguments:
        inputs = [f"task.input={text}", f"task.output={out}", "task.workers=2", "tokenizer.vocab_size=300"]
        return [each.replace("RUN", str(run)) for each in case.arguments] + inputs * (
            "task=prepare" in case.arguments
        )
    often = ["train.steps=4", "train.checkpoint_every=2", "train.evaluate_every=2", "train.generate_every=0"]
    data = ["data=text", f"data.path={text}", "train.microbatch_size=4", "train.evaluate_tokens=64"]
    cache = [f"data.cache_dir={out}-cache"] * (case in FIRST)
    if case is LATER[-1]:
        return [*MODEL, *TRAINING, *often, *data, "train.checkpoint_every=100", f"run.dir={run}"]
    return [*MODEL, *TRAINING, *often, *data, *cache, f"run.dir={out}"]


def test_every_signal_in_every_phase_ends_the_command_at_once_or_saves(
    tmp_path: Path, text: Path, cache: Path
) -> None:
    """The cases run in one process, in forks that have imported torch."""
    ordered = [
        LATER[-1],
        *(case for case in CASES if case is not LATER[-1]),
    ]  # it makes the run of the other tasks
    commands = []
    for number, case in enumerate(ordered):
        phase = case.phase.replace("OUT", str(tmp_path / str(number)))
        commands.append(asdict(case) | {"phase": phase, "arguments": arguments(case, tmp_path, text, number)})
    (tmp_path / "cases.json").write_text(json.dumps(commands))
    done = subprocess.run(
        [sys.executable, "-m", "tests.launch.stopped_commands", str(tmp_path / "cases.json")],
        cwd=tmp_path,
        env=environment(PYTHONPATH=str(ROOT), DSV3_CACHE=str(cache), OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == len(CASES)
    for number, (case, result) in enumerate(zip(ordered, results, strict=True)):
        out, where = tmp_path / str(number), (case.phase, case.signals, result)
        assert result["code"] == case.code, where
        expected = f"{case.said}\n" if case.said else ""
        assert re.fullmatch(expected, result["err"]), where
        assert result["left"] == [], where
        saved = [step.name for step in complete_steps(out)]
        if case in FIRST or case in OTHER_TASKS:
            assert saved == [], where
            assert not (out / "metrics.jsonl").exists() or case.phase == "taking step 1", where
        if case in FIRST[:-1]:
            assert not out.exists(), where
        if case.code == 75 and case.program == "train":
            assert saved[-1] == f"step-{re.findall('after step (.)', result['err'])[0]}", where
        if case.code == 0 and case is not LATER[-1]:
            assert saved[-1] == "step-4", where
        if case.program == "convert":
            assert out.exists() == (case.phase == "verifying OUT"), where
    run = tmp_path / "run"
    assert "SIGUSR1: saving step 1\n" in (run / "log.txt").read_text()
    assert [step.name for step in complete_steps(run)] == ["step-1", "step-4"]
