"""A run's names in wandb: what the command says of it, unless they are typed, and the same on a resume."""

import shlex
from typing import Any

import yaml

from dsv3.launch.slurm import batch_script
from tests.harness.commands import PlannedCommand
from tests.harness.runs import StoredRun

STUDY = ("experiments=learning_rate", "logger=wandb", "run.dir=out/my sweep")


def test_a_job_of_a_sweep_is_named_grouped_and_tagged(planned: PlannedCommand) -> None:
    swept = planned.run("-m", "optimizer.lr=1e-3,3e-3", *STUDY)
    assert swept.code == 0, swept.err
    logger: Any = swept.jobs[1].config.logger
    assert (logger.name, logger.group, logger.job_type) == ("lr=0.003", "my sweep", "sweep")
    assert logger.tags == ["debug", "none", "fp32", "learning_rate"]
    assert "optimizer.lr=0.003" in logger.notes


def test_a_single_run_is_tagged_and_typed_names_win(planned: PlannedCommand) -> None:
    logger: Any = planned.run("precision=bf16", "data.held_out=0.2").job.config.logger
    assert (logger.name, logger.group, logger.job_type) == (None, None, "train")
    assert logger.tags == ["debug", "none", "bf16"]
    assert logger.notes == "precision=bf16 data.held_out=0.2"
    typed = {"name": "n", "group": "g", "job_type": "j", "notes": "", "tags": ["a", "b"]}
    arguments = [
        "logger.name=n",
        "logger.group=g",
        "logger.job_type=j",
        "logger.notes=''",
        "logger.tags=[a,b]",
    ]
    swept: Any = planned.run("-m", "train.steps=1,2", *arguments).jobs[0].config.logger
    assert {key: getattr(swept, key) for key in typed} == typed
    assert planned.run("logger.tags=[]").job.config.logger.tags == []  # type: ignore[attr-defined]


def test_a_resumed_job_keeps_its_names(planned: PlannedCommand, stored: StoredRun) -> None:
    directory = stored.store("optimizer.lr=1e-3")
    config = yaml.safe_load((directory / "config.yaml").read_text())
    own = {"name": "lr=0.001", "group": "a sweep", "job_type": "sweep", "tags": ["x"], "notes": "as typed"}
    config["logger"] |= own
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    for again in ([], ["logger=wandb"]):
        resumed = planned.run(f"resume={directory}", *again).job
        assert {key: getattr(resumed.config.logger, key) for key in own} == own
        assert not [note for note in resumed.notes if "logger" in note]
    assert planned.run(f"resume={directory}", "logger.name=mine").job.config.logger.name == "mine"  # type: ignore[attr-defined]


def test_a_job_step_of_slurm_is_told_the_names_that_its_sweep_gave(planned: PlannedCommand) -> None:
    swept = planned.run("-m", "launch=slurm", "train.steps=1,2", "logger.group=mine", "run.dir=my sweep")
    *_, started = (line for line in batch_script(swept.jobs[1]).splitlines() if "program=(" in line)
    told = shlex.split(started.strip().removeprefix("program=(").removesuffix(")"))
    typed = [argument for argument in told if argument.startswith("logger.")]
    assert typed == ["logger.group='mine'", "logger.name='steps=2'", "logger.job_type='sweep'"]
    assert planned.run("launch=slurm", *typed).job.config.logger.name == "steps=2"  # type: ignore[attr-defined]
