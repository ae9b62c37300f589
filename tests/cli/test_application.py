"""A command from its arguments to its exit code, where no job is reached."""

import os
import pickle
import signal
from collections.abc import Sequence

import pytest

from dsv3.cli.application import Application
from dsv3.cli.arguments import flags_first
from dsv3.cli.help import train_help
from dsv3.distributed.signals import Stopped
from dsv3.errors import STOPPED
from tests.harness.commands import PlannedCommand


def test_a_stop_signal_before_training_ends_the_command_without_a_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stopped(argv: Sequence[str]) -> list[str]:
        os.kill(os.getpid(), signal.SIGTERM)
        return list(argv)

    before = signal.getsignal(signal.SIGTERM)
    application = Application("train", "config", train_help, stopped, lambda config: None)
    assert application.run([]) == 130
    assert capsys.readouterr().err == "stopped before the first step; nothing was saved\n"
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        (["task=plan", "--info"], ["--info=all", "task=plan"]),
        (["--info", "task=plan", "-m"], ["--info=all", "-m", "task=plan"]),
        (["--info", "config", "task=plan"], ["--info", "config", "task=plan"]),
        (["task=plan", "--cfg", "job", "train.steps=7"], ["--cfg", "job", "task=plan", "train.steps=7"]),
    ],
)
def test_flags_come_to_stand_before_overrides(typed: list[str], read: list[str]) -> None:
    assert flags_first(typed) == read


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["task=train"], "stopped before the first step; nothing was saved\n"),
        (["task=plan"], ""),  # takes no steps
        (["-m", "train.steps=1,2"], ""),  # earlier jobs may have saved
    ],
)
def test_a_stop_before_a_job_has_begun_tells_what_was_not_saved(
    planned: PlannedCommand, monkeypatch: pytest.MonkeyPatch, arguments: list[str], told: str
) -> None:
    def stopped(job: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("tests.harness.commands.check", stopped)
    outcome = planned.run(*arguments, "logger=none")
    assert (outcome.code, outcome.err) == (130, told)


@pytest.mark.parametrize(("rank", "local_rank", "told"), [(0, 0, True), (1, 1, False), (8, 0, True)])
@pytest.mark.parametrize("mistake", ["modle=debug", "model.dim=7", "train.steps=abc"])
def test_a_mistake_is_told_once_a_node(
    planned: PlannedCommand,
    monkeypatch: pytest.MonkeyPatch,
    mistake: str,
    rank: int,
    local_rank: int,
    told: bool,
) -> None:
    for name, value in (("RANK", rank), ("LOCAL_RANK", local_rank), ("WORLD_SIZE", 16)):
        monkeypatch.setenv(name, str(value))
    waited: list[float] = []
    monkeypatch.setattr("dsv3.cli.application.time.sleep", waited.append)
    outcome = planned.run(mistake)
    assert (outcome.code, outcome.out, bool(outcome.err)) == (2, "", told)
    assert bool(waited) is not told  # or torchrun would end the first rank before it has spoken


def test_a_stop_keeps_its_message_and_code_on_the_way_from_another_process() -> None:
    stopped = pickle.loads(pickle.dumps(Stopped("go on with resume=x")))
    assert (stopped.message, stopped.code) == ("go on with resume=x", STOPPED)
