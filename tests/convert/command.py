"""convert.py in this process, or in one of its own."""

import copy
import functools
import os
import subprocess
import sys
from pathlib import Path

import hydra
import pytest
import yaml
from omegaconf import DictConfig, OmegaConf

import convert
from dsv3.cli.application import report
from dsv3.config.convert import Direction
from dsv3.config.root import CONF
from tests.checkpoint.running import Outcome
from tests.composing import compose

PROGRAM = Path(convert.__file__)


# Hydra finds the `conf` of convert.main by the file of the program, which here is pytest.
@hydra.main(version_base=None, config_path=str(CONF), config_name="convert")
def main(config: DictConfig) -> float | None:
    """What convert.py does with a composed config."""
    return convert.application.job(config)


class Convert:
    """`python convert.py ...` without the seconds that a new process takes to import torch."""

    def __init__(self, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]) -> None:
        self.patch = patch
        self.capture = capture
        self.whole = False
        """Whether Hydra shall compose every time: half a second for a conversion of a blink."""

    def run(self, *arguments: str) -> Outcome:
        """The command with exactly these arguments."""
        self.patch.delenv("HYDRA_FULL_ERROR", raising=False)
        self.patch.setattr(convert.application, "failure", None)
        self.patch.setattr(convert.application, "composed", False)
        self.capture.readouterr()
        try:
            code = convert.application.run(main, list(arguments))
        finally:
            os.environ.pop("HYDRA_FULL_ERROR", None)
        said = self.capture.readouterr()
        return Outcome(code, said.out, said.err)

    def __call__(self, direction: str, source: Path | str, output: Path | str, *more: str) -> Outcome:
        """A conversion."""
        if self.whole:
            return self.run(f"direction={direction}", f"input={source}", f"output={output}", *more)
        config = copy.deepcopy(composed())
        config.direction, config.input, config.output = Direction[direction], str(source), str(output)
        for key, _, value in (argument.partition("=") for argument in more):
            OmegaConf.update(config, key, yaml.safe_load(value))
        self.capture.readouterr()
        try:
            convert.carry_out(config)
            code = 0
        except BaseException as error:
            code = report(error, [])
        said = self.capture.readouterr()
        return Outcome(code, said.out, said.err)

    def must(self, direction: str, source: Path | str, output: Path | str, *more: str) -> Outcome:
        """A conversion that has to succeed."""
        outcome = self(direction, source, output, *more)
        assert outcome.code == 0, outcome.err
        return outcome


@functools.cache
def composed() -> DictConfig:
    """The config of convert.py with nothing typed."""
    return compose([], "convert")


def environment() -> dict[str, str]:
    """For a process of its own."""
    return {name: value for name, value in os.environ.items() if name != "HYDRA_FULL_ERROR"}


def process(*arguments: str, cwd: Path | None = None) -> Outcome:
    """The real command."""
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *arguments],
        capture_output=True,
        text=True,
        env=environment(),
        cwd=cwd,
        check=False,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def refused(outcome: Outcome, *said: str, code: int = 2) -> None:
    """One or two lines on stderr that hold all of `said`, no traceback."""
    assert outcome.code == code, outcome.err
    assert 1 <= len(outcome.err.strip().splitlines()) <= 2, outcome.err
    assert "Traceback" not in outcome.err
    assert outcome.out == ""
    for text in said:
        assert text in outcome.err, outcome.err


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below a directory by its relative path."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
