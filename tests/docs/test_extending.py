"""Every patch of docs/extending.md applies, takes no more files than it says, and works."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.harness.commands import PlannedCommand
from tests.harness.processes import ROOT, CommandLine, rows
from tests.harness.tiny import MODEL, TRAINING

PAGE = (ROOT / "docs" / "extending.md").read_text()
SECTIONS = dict(section.split("\n", 1) for section in PAGE.split("\n## ")[1:])
PATCHES = {
    name: patch[1]
    for name, text in SECTIONS.items()
    if (patch := re.search(r"```diff\n(.*?)^```", text, re.M | re.S))
}
LIMITS = {name: int(count) for name, count in re.findall(r"^\| \[(.*?)\]\(.*?\) \| (\d) \|", PAGE, re.M)}
pytestmark = pytest.mark.slow


def test_each_patch_takes_at_most_the_files_that_the_table_says() -> None:
    files = {f"{name[0].lower()}{name[1:]}": patch.count("diff --git") for name, patch in PATCHES.items()}
    assert len(files) == 8
    assert {name: count for name, count in files.items() if count > LIMITS[name]} == {}


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with every patch applied."""
    copy = tmp_path_factory.mktemp("extended")
    for name in ("dsv3", "conf", "experiments"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train.py", copy)
    for patch in PATCHES.values():
        subprocess.run(["git", "apply", "-"], cwd=copy, input=patch, text=True, check=True)
    return copy


def run(program: Path, command_line: CommandLine, *arguments: str, path: str = "") -> str:
    """Run a train.py that must succeed; return what it printed."""
    done = subprocess.run(
        [sys.executable, str(program / "train.py"), *arguments],
        cwd=command_line.directory,
        env={**command_line.environment, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_all_patches_work_together(extended: Path, command_line: CommandLine) -> None:
    run_dir = command_line.directory / "run"
    printed = run(
        extended, command_line, *TRAINING, "model=mini", "schedule=inverse_square_root", "optimizer=lion",
        "data=by_suffix", f"data.path={command_line.text}", "data.suffixes=[.txt]", "logger=csv",
        "logger.separator=/", "parallel=offload", "train.steps=3", "train.log_every=1", f"run.dir={run_dir}",
    )  # fmt: skip
    assert "embedding moved by" in printed
    assert [line.split("/")[0] for line in (run_dir / "metrics.csv").read_text().splitlines()] == list("123")
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert (config["model"]["dim"], config["model"]["moe"]["num_shared_experts"]) == (192, 2)
    targets = [config[group]["_target_"].rpartition(".")[2] for group in ("schedule", "optimizer", "data")]
    assert targets == ["InverseSquareRoot", "Lion", "SuffixData"]
    assert config["parallel"]["offload"]["_target_"].endswith(".ActivationOffload")
    assert "optimizer 4" in (run_dir / "plan.txt").read_text()


def test_a_new_task_runs_and_explains_itself(extended: Path, command_line: CommandLine) -> None:
    assert run(extended, command_line, "task=count", "model=671b") == "682,636,472,320\n"
    assert "Count what one token uses." in run(extended, command_line, "task=count", "--help")
    # A recipe's learning rate is AdamW's.
    composed = yaml.safe_load(run(extended, command_line, "model=16b", "optimizer=lion", "--cfg", "job"))
    assert (composed["optimizer"]["lr"], composed["schedule"]["warmup_steps"]) == (3e-4, 2000)


def test_a_lab_outside_of_the_repository_has_presets_studies_and_classes(command_line: CommandLine) -> None:
    lab = command_line.directory / "lab"
    (lab / "conf" / "model").mkdir(parents=True)
    (lab / "conf" / "experiments").mkdir()
    (lab / "mylab.py").write_text(re.findall(r"```python\n(.*?)```", PAGE, re.S)[0])
    values: dict[str, Any] = {"num_dense_layers": 1, "moe": {"num_shared_experts": 1}}
    for override in MODEL:
        key, _, value = override.removeprefix("model.").partition("=")
        *nodes, name = key.split(".")
        node = values
        for inner in nodes:
            node = node.setdefault(inner, {})
        node[name] = yaml.safe_load(value)
    values["dim"] = 40
    preset = {"defaults": ["/schema/model@_here_", "_self_"], **values}
    (lab / "conf" / "model" / "tiny.yaml").write_text(yaml.safe_dump(preset, sort_keys=False))
    study = "# @package _global_\ndefaults:\n  - override /model: tiny\ntrain:\n  steps: 2\n"
    (lab / "conf" / "experiments" / "first.yaml").write_text(study)
    run_dir = command_line.directory / "run"
    printed = run(
        ROOT, command_line, "--config-dir", "lab/conf", *TRAINING, "experiments=first", "schedule=linear",
        "schedule.final=0.5", "run.allow_targets=[mylab]", "+train.callbacks.tell._target_=mylab.TellLoss",
        "+train.callbacks.tell.every=2", "data=text", f"data.path={command_line.text}", f"run.dir={run_dir}",
        "parallel=fsdp", "launch.nproc=2", path=str(lab),
    )  # fmt: skip
    assert "step 2: the loss is " in printed
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert (config["model"]["dim"], config["train"]["steps"]) == (40, 2)
    assert config["schedule"] == config["schedule"] | {"_target_": "mylab.Linear", "final": 0.5}
    explained = run(
        ROOT, command_line, "schedule=linear", "run.allow_targets=[mylab]", "--help", path=str(lab)
    )
    assert "Learning rate at the end, as a share of the peak." in explained


MINE = """
from dataclasses import dataclass

from dsv3.config.registry import schema
from dsv3.config.optimizer import AdamWConfig


@schema("optimizer/adamw")
@dataclass
class Mine(AdamWConfig):
    betas: tuple[float, float] = (0.1, 0.2)
"""
TELL = "train.callbacks.tell"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run.allow_targets=[nolab]"], "no module named 'nolab'; put its folder on PYTHONPATH"),
        (
            ["run.allow_targets=[mine]"],
            "mine.Mine: AdamWConfig is optimizer/adamw already; take another name",
        ),
        (["run.allow_targets=[torn]"], "torn cannot be imported: SyntaxError"),
        (["run.allow_targets=[needy]"], "needy imports 'nowhere', which is not there"),
        (["--config-dir=taken", "schedule=wsd"], "schedule=wsd is dsv3's own; rename the file"),
        ([f"+{TELL}._target_=os.system"], f"{TELL}._target_=os.system is refused"),
        ([f"+{TELL}.every=1"], f"{TELL} has no _target_"),
        ([f"+{TELL}._target_=dsv3.training.callbacks.CollectGarbage", f"+{TELL}.x=1"], "it takes no x"),
        ([f"+{TELL}._target_=dsv3.training.callbacks.CollectGarbage"], f"{TELL}.every is missing"),
    ],
)
def test_a_mistake_in_ones_own_classes_and_files_is_told(
    planned: PlannedCommand, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], words: str
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "torn.py").write_text("def (")
    (tmp_path / "needy.py").write_text("import nowhere")
    (tmp_path / "taken" / "schedule").mkdir(parents=True)
    (tmp_path / "taken" / "schedule" / "wsd.yaml").write_text("decay: 0.9")
    ended = planned.run(*MODEL, *arguments)
    assert (ended.code, len(ended.err.splitlines())) == (2, 1)
    assert words in ended.err


def test_a_class_that_is_no_callback_is_refused_and_a_resume_is_told_what_to_type_again(
    command_line: CommandLine,
) -> None:
    (command_line.directory / "mylab.py").write_text(re.findall(r"```python\n(.*?)```", PAGE, re.S)[0])
    command_line.environment["PYTHONPATH"] = str(command_line.directory)
    wrong = ["+train.callbacks.wrong._target_=dsv3.metrics.loggers.NoLogger", "train.steps=1"]
    refused = command_line.run(*command_line.training(command_line.directory / "wrong", *wrong))
    assert refused.code == 2
    assert "NoLogger is no dsv3.training.callbacks.Callback" in refused.err
    run_dir = command_line.directory / "run"
    mine = ["schedule=linear", "run.allow_targets=[mylab]", "train.steps=2", "train.stop_after=1"]
    stopped = command_line.run(*command_line.training(run_dir, *mine))
    assert stopped.code == 0, stopped.err
    (line,) = (line for line in (run_dir / "log.txt").read_text().splitlines() if "resume=" in line)
    again = command_line.run(*shlex.split(line)[2:])
    assert again.code == 0, again.err
    assert [row["step"] for row in rows(run_dir)] == [1, 2]
