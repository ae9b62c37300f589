"""The phases of whole commands: nothing that takes long at real size goes by without a word."""

import io
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from dsv3.metrics import progress
from tests.harness.commands import ConvertCommand, TrainCommand

LOADING = ["verifying STEP", "waiting for the other ranks to verify theirs", "comparing the checkpoint with"]

PHASES = {
    "train": [
        "composing the configuration",
        "planning",
        "importing torch",
        "setting up device and process group",
        "preparing the data",
        "looking at the files of TEXT",
        "reading TEXT",
        "training the tokenizer on 8",  # thousand characters
        "tokenizing the held-out text",
        "tokenizing the training text",
        "building the model",
        "initializing weights",
        "making the run directory",
        "removing what unfinished saves have left",
        "starting the logger",
        "taking step 1",
        "computing the held-out loss",
        "sampling",
        "exporting HF",
        "waiting for the checkpoint before to be written",
        "saving step 1",
        "computing digests of STEP",
        "drawing loss.png",
        "finishing the logger",
    ],
    "resume": [
        "verifying STEP",
        "waiting for the other ranks to verify theirs",
        "making room for the optimizer's state",
        "loading STEP",
        "taking step 2",
    ],
    "evaluate": [
        "planning",
        "importing torch",
        "looking at the files of TEXT",
        *LOADING,
        "building the model",
        "loading STEP",
        "computing the held-out loss",
    ],
    "convert": [
        "composing the configuration",
        "reading the description of the input",
        "importing torch",
        "planning the files to write",
        "verifying STEP",
        "writing out",
        "verifying OUT",
    ],
    "import": [
        "planning the files to write",
        "reading the headers of OUT",
        "checking the scales",
        "comparing what MTP layers share",
        "writing dcp",
    ],
}


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """Return a function that returns what was shown since it was called last, as if every phase were long."""
    stream = io.StringIO()
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=stream))
    monkeypatch.delenv(progress.SETTING)
    for name, seconds in (("QUIET", 0.0), ("BRIEF", 0.0), ("REPEAT", 3600.0)):
        monkeypatch.setattr(progress, name, seconds)

    def take() -> str:
        text = stream.getvalue()
        stream.seek(0)
        stream.truncate()
        return text

    return take


def test_commands_say_what_they_are_doing(
    shown: Callable[[], str],
    commands: TrainCommand,
    convert: ConvertCommand,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    monkeypatch.setenv("DSV3_CACHE", str(tmp_path / "cache"))
    convert.whole = True
    told: dict[str, str] = {}
    often = [f"train.{name}_every=1" for name in ("evaluate", "generate", "export_hf")]
    commands.train(run, "train.steps=2", "train.stop_after=1", *often)
    told["train"] = shown()
    commands.must(f"resume={run}")
    told["resume"] = shown()
    commands.must("task=evaluate", f"checkpoint.load={run}")
    told["evaluate"] = shown()
    convert.must("dcp_to_hf", run, out, "verify=true")
    told["convert"] = shown()
    convert.must("hf_to_dcp", out, tmp_path / "dcp")
    told["import"] = shown()

    names = {f"{run}/checkpoints/": "STEP", f"{run}/hf/": "HF", str(commands.text): "TEXT"}
    names[str(out)] = "OUT"
    for command, phases in PHASES.items():
        lines = told[command]
        for place, name in names.items():
            lines = lines.replace(place, name)
        rest = iter(lines.splitlines())
        for phase in phases:  # each after the one before
            assert any(line.startswith(phase) for line in rest), (command, phase, lines)
        totals = re.findall(r"^(\w+) .*: \d+ % of (?:[1-9][\d.,]*|0\.\d*[1-9]\d*) (\w+)", lines, re.MULTILINE)
        assert totals, lines
