"""Run train.py and convert.py in this process: a new one takes seconds to import torch.

`TrainCommand` and `ConvertCommand` carry a command out, `PlannedCommand` stops before torch is imported.
tests/harness/processes.py runs the same commands as real processes.
"""

import copy
import functools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import pytest
import yaml
from hydra._internal.hydra import Hydra
from omegaconf import DictConfig, OmegaConf

from dsv3.cli.application import Application, report
from dsv3.config.registry import Stored
from dsv3.launch.checkpoint_defaults import Composition
from dsv3.launch.job import Job, SweepJob
from dsv3.launch.prepare import prepare_job
from dsv3.programs import CONVERT, TRAIN, check, start_conversion
from tests.harness.composing import compose, store_uncopied
from tests.harness.outcome import Outcome, succeeded
from tests.harness.tiny import MODEL, TRAINING

Carrier = Callable[..., float | None]


def run_here(program: Application, argv: list[str], execute: Carrier | None = None) -> int:
    """Run a program's command line in this process and return its exit code.

    `program` is TRAIN or CONVERT of dsv3/programs.py. A fresh Application, wired as the program's, keeps
    nothing of an earlier command. `execute` takes the place of the program's own.
    """
    application = Application(
        program.program, program.root, program.help_text, program.prepare, execute or program.execute
    )
    os.environ.pop("HYDRA_FULL_ERROR", None)
    handlers, level = logging.root.handlers[:], logging.root.level
    try:
        # Hydra composes a command twice, the first time to read hydra.mode, which is always null.
        with patch.object(Hydra, "get_mode", lambda *_, **__: None), store_uncopied():
            return application.run(argv)
    finally:
        os.environ.pop("HYDRA_FULL_ERROR", None)
        # Some flags let Hydra log to the stdout of now, which is closed after this test.
        logging.root.handlers[:] = handlers
        logging.root.setLevel(level)


class Command:
    """A program whose command lines run in this process, with captured output."""

    program: Application

    def __init__(self, capture: pytest.CaptureFixture[str]) -> None:
        self.capture = capture

    def run(self, *arguments: str) -> Outcome:
        """Run the command with exactly these arguments."""
        return self.captured(lambda: run_here(self.program, list(arguments)))

    def captured(self, function: Callable[[], int]) -> Outcome:
        """Call a function that returns an exit code; return the code and what it printed."""
        self.capture.readouterr()
        code = function()
        printed = self.capture.readouterr()
        return Outcome(code, printed.out, printed.err)


class TrainCommand(Command):
    """`python train.py ...`, carried out."""

    program = TRAIN

    def __init__(self, capture: pytest.CaptureFixture[str], text: Path) -> None:
        super().__init__(capture)
        self.text = text
        """A folder of short texts."""

    def must(self, *arguments: str) -> Outcome:
        """Run a command that has to end with 0."""
        return succeeded(self.run(*arguments))

    def train(self, run_dir: Path, *arguments: str) -> Outcome:
        """Train the tiny model in `run_dir` on the short texts; must succeed."""
        often = ["train.microbatch_size=4", "train.steps=8", "train.evaluate_every=3"]
        balance = "train.balance.bias_speed=0.01"
        settings = [*MODEL, *TRAINING, *often, balance, "data=text", f"data.path={self.text}"]
        merged = {argument.split("=")[0]: argument for argument in [*settings, *arguments]}
        return self.must(*merged.values(), f"run.dir={run_dir}")


@dataclass
class PlannedOutcome(Outcome):
    """What a planned command gave back; `jobs` are those that would have been started."""

    jobs: list[Job] = field(default_factory=list)

    @property
    def job(self) -> Job:
        """The one job of a command that must have succeeded."""
        assert self.code == 0, self.err
        (job,) = self.jobs
        return job


class PlannedCommand(Command):
    """`python train.py ...` up to the point where it would import torch."""

    program = TRAIN

    def run(self, *arguments: str) -> PlannedOutcome:
        """Run the command with exactly these arguments; collect its jobs instead of starting them."""
        jobs: list[Job] = []

        def keep(composed: DictConfig, sweep: SweepJob | None = None) -> None:
            job = prepare_job(composed, sweep)
            check(job)
            jobs.append(job)

        outcome = self.captured(lambda: run_here(self.program, list(arguments), keep))
        return PlannedOutcome(outcome.code, outcome.out, outcome.err, jobs)


class ConvertCommand(Command):
    """`python convert.py ...`, carried out."""

    program = CONVERT
    whole = False
    """Let Hydra compose every time, which takes half a second for a conversion of a blink."""

    def __call__(self, direction: str, source: Path | str, output: Path | str, *more: str) -> Outcome:
        """Convert `source` to `output`."""
        if self.whole:
            return self.run(f"direction={direction}", f"input={source}", f"output={output}", *more)
        command = Uncomposed([f"direction={direction}", f"input={source}", f"output={output}", *more])

        def carry_out() -> int:
            try:
                start_conversion(command.over(Stored()), command)
            except BaseException as error:
                return report(error, [])
            return 0

        return self.captured(carry_out)

    def must(self, direction: str, source: Path | str, output: Path | str, *more: str) -> Outcome:
        """Convert `source` to `output`; has to succeed."""
        return succeeded(self(direction, source, output, *more))


class Uncomposed(Composition):
    """A command of convert.py whose overrides are set one by one, in the place of Hydra."""

    def over(self, stored: Stored) -> DictConfig:
        """Return the config with the values of a checkpoint below the overrides."""
        config = copy.deepcopy(_composed())
        if stored.hf_model is not None:
            config.model = OmegaConf.structured(stored.hf_model)
        for key, _, value in (argument.partition("=") for argument in self.overrides):
            paths = ("input", "output")
            OmegaConf.update(config, key, value if key in paths else yaml.safe_load(value))
        return config


@functools.cache
def _composed() -> DictConfig:
    """Return the config of convert.py with nothing typed."""
    return compose([], "convert")
