"""A command from its arguments to its exit code, where no job is reached."""

import os
import pickle
import signal
from collections.abc import Sequence

import pytest

from dsv3.runtime.application import Application
from dsv3.runtime.commandline import flags_first
from dsv3.runtime.groups import train_help
from dsv3.runtime.signals import STOPPED, Stopped


def test_a_stop_signal_before_training_ends_the_command_without_a_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stopped(argv: Sequence[str]) -> list[str]:
        os.kill(os.getpid(), signal.SIGTERM)
        return list(argv)

    before = signal.getsignal(signal.SIGTERM)
    application = Application("train.py", train_help, stopped, lambda config: None)
    assert application.run(lambda: None, []) == 130
    assert capsys.readouterr().err == ""
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


def test_a_stop_keeps_its_message_and_code_on_the_way_from_another_process() -> None:
    stopped = pickle.loads(pickle.dumps(Stopped("go on with resume=x")))
    assert (stopped.message, stopped.code) == ("go on with resume=x", STOPPED)
