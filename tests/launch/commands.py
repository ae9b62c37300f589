"""train.py's way from arguments to a planned job, in this process and without torch."""

import os
from dataclasses import dataclass, field

import hydra
import pytest
from omegaconf import DictConfig

from dsv3.cli.application import Application
from dsv3.cli.arguments import prepare
from dsv3.cli.help import train_help
from dsv3.config.root import CONF
from dsv3.launch.job import Job
from dsv3.launch.launch import check
from dsv3.launch.prepare import prepare_job


@dataclass
class Outcome:
    """What a command gave back; `jobs` are those that would have been started."""

    code: int
    out: str
    err: str
    jobs: list[Job] = field(default_factory=list)

    @property
    def job(self) -> Job:
        """The one job of a command that must have succeeded."""
        assert self.code == 0, self.err
        (job,) = self.jobs
        return job


class Commands:
    """Runs train.py up to the point where it would import torch."""

    def __init__(self, capture: pytest.CaptureFixture[str]) -> None:
        self.capture = capture

    def run(self, *arguments: str) -> Outcome:
        """A command with exactly these arguments."""
        jobs: list[Job] = []

        def carry_out(composed: DictConfig) -> None:
            job = prepare_job(composed)
            check(job)
            jobs.append(job)

        application = Application("train.py", train_help, prepare, carry_out)
        main = hydra.main(version_base=None, config_path=str(CONF), config_name="config")(application.job)
        os.environ.pop("HYDRA_FULL_ERROR", None)
        self.capture.readouterr()
        try:
            code = application.run(main, list(arguments))
        finally:
            os.environ.pop("HYDRA_FULL_ERROR", None)
        said = self.capture.readouterr()
        return Outcome(code, said.out, said.err, jobs)
