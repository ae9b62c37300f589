"""A command from its arguments to its exit code, where no job is reached."""

import os
import pickle
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from dsv3.cli.application import Application
from dsv3.cli.flags import flags_first
from dsv3.cli.help import train_help
from dsv3.distributed.signals import STOP_SIGNALS, Stopped
from dsv3.errors import STOPPED
from dsv3.programs import TRAIN
from tests.harness.commands import ConvertCommand, PlannedCommand, run_here
from tests.harness.outcome import refused


def test_a_stop_signal_before_training_ends_the_command_without_a_traceback(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(argv: Sequence[str]) -> list[str]:
        os.kill(os.getpid(), signal.SIGTERM)
        return list(argv)

    monkeypatch.setattr("os._exit", sys.exit)
    monkeypatch.setattr("dsv3.distributed.signals.kill_children", lambda: None)  # the tests have some
    before = signal.getsignal(signal.SIGTERM)
    application = Application("train", "config", train_help, stopped, lambda config: None)
    application.run([])
    assert capfd.readouterr().err == "stopped before the first step; nothing was saved\n"
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_stopped_sweep_of_jobs_elsewhere_does_not_say_that_nothing_was_saved(
    planned: PlannedCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    def jobs_of_other_processes(**_: object) -> Callable[[object], Callable[[], None]]:
        def interrupted() -> None:
            raise KeyboardInterrupt

        return lambda job: interrupted

    monkeypatch.setattr("hydra.main", jobs_of_other_processes)
    outcome = planned.run("-m", "train.steps=1,2", "logger=none")
    assert (outcome.code, outcome.err) == (130, "")


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
        (["task=train"], "stopped before the first step; nothing was saved"),
        (["task=plan"], "stopped"),  # takes no steps
        (["-m", "train.steps=1,2"], r"job 1 of multirun/\S+ was not run\n"),  # earlier jobs may have saved
    ],
)
@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_a_stop_before_a_job_has_begun_tells_what_was_not_saved(
    planned: PlannedCommand, monkeypatch: pytest.MonkeyPatch, arguments: list[str], told: str, number: int
) -> None:
    said: list[str] = []

    def stopped(job: object) -> None:
        os.kill(os.getpid(), number)

    def leave(message: str) -> None:
        said.append(message)
        raise KeyboardInterrupt

    found = signal.signal(number, signal.SIG_DFL)  # whatever has started the tests
    monkeypatch.setattr("tests.harness.commands.check", stopped)
    monkeypatch.setattr("dsv3.distributed.signals.leave", leave)
    monkeypatch.setattr("dsv3.distributed.signals.kill_children", lambda: None)
    try:
        outcome = planned.run(*arguments, "logger=none")
    finally:
        signal.signal(number, found)
    assert outcome.code == 130
    assert re.fullmatch(told, said[0] if said else outcome.err)
    assert bool(said) == ("-m" not in arguments)


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


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("model=16", "model=16b\n"),
        ("train.step", "train.steps=\n"),
        ("task=generate task.pro", "task.prompt=\n"),
        ("model=nope train.step", "\n"),
        ("--foo train.step", ""),
        ("-m=3 ", ""),
        ("task.prompt='a b", ""),
    ],
)
def test_the_shell_is_given_what_completes_a_word_and_no_message(
    planned: PlannedCommand, monkeypatch: pytest.MonkeyPatch, line: str, found: str
) -> None:
    monkeypatch.setenv("COMP_LINE", f"python train.py {line}")
    outcome = planned.run("-sc", "query=bash")
    assert (outcome.code, outcome.out, outcome.err) == (0, found, "")


def test_a_query_of_the_shells_is_not_for_people(planned: PlannedCommand) -> None:
    told = 'after eval "$(python train.py -sc install=bash)"'
    outcome = planned.captured(lambda: run_here(TRAIN, ["-sc", "query=bash"]))
    assert (outcome.code, outcome.out) == (2, "")
    assert told in outcome.err
    assert "complete -o nospace" in planned.captured(lambda: run_here(TRAIN, ["-sc", "install=bash"])).out


@pytest.mark.parametrize("crash", ["raise KeyError('x')", "raise TypeError('x')", "open('/nope')"])
def test_only_what_hydra_and_its_files_raise_is_the_users_mistake(
    here: Path, capsys: pytest.CaptureFixture[str], crash: str
) -> None:
    def crashing(argv: Sequence[str]) -> list[str]:
        exec(crash)
        return list(argv)

    code = run_here(Application("train", "config", train_help, crashing, lambda config: None), [])
    err = capsys.readouterr().err
    assert (code, "Traceback" in err) == ((2, False) if "open" in crash else (1, True))


def test_a_conversion_is_not_swept(convert: ConvertCommand) -> None:
    refused(convert.run("-m", "direction=hf_to_dcp,dcp_to_hf", "output=x"), "-m: python convert.py makes one")


def test_groups_of_train_are_none_of_convert(convert: ConvertCommand) -> None:
    refused(convert.run("task=plan"), "task=plan: there is no config group 'task'. Groups: model")
    refused(convert.run("modle=hf", "--help"), "there is no 'modle'. Did you mean 'model'?")


def test_a_text_that_holds_an_interpolation_is_told_once(planned: PlannedCommand) -> None:
    outcome = planned.run("task=plan", "logger=none", "run.dir=${model.dim}/x")
    assert outcome.job.config.run.dir == "${model.dim}/x"
    assert outcome.err.count("is taken literally") == 1
