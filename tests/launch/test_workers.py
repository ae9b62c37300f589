"""Workers and signals: the processes that start, those that stop, and the exit codes."""

import signal
from types import SimpleNamespace
from typing import Any, cast

import pytest

from dsv3.distributed.signals import Stopped
from dsv3.errors import RunFailed, UserError
from dsv3.launch.workers import _first_failure


def failed(message: Any, exitcode: int) -> BaseException:
    failure = SimpleNamespace(message=message, exitcode=exitcode, pid=7)
    return _first_failure(cast(Any, SimpleNamespace(get_first_failure=lambda: (1, failure))))


@pytest.mark.parametrize("exitcode", [1, -signal.SIGABRT])
def test_what_a_worker_raised_is_told_however_its_process_ended(
    exitcode: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def raised(kind: str) -> dict[str, Any]:
        return {"message": f"{kind}: why: it was", "extraInfo": {"py_callstack": "where it was"}}

    told = failed(raised("ValueError"), exitcode)
    assert str(told) == "rank 1 failed: ValueError: why: it was; the other workers were stopped"
    assert capsys.readouterr().err == "where it was\n"
    for kind, expected in (("RunFailed", RunFailed), ("UserError", UserError), ("InvalidValue", UserError)):
        told = failed(raised(kind), exitcode)
        assert type(told) is expected
        assert str(told) == "why: it was"
    assert capsys.readouterr().err == ""


def test_a_worker_that_was_ended_is_named_with_its_signal() -> None:
    told = failed("Signal 9 (SIGKILL) received by PID 7", -signal.SIGKILL)
    assert str(told) == "rank 1 (pid 7) was ended by SIGKILL; the other workers were stopped"


def test_a_worker_that_has_saved_stops_the_command() -> None:
    assert isinstance(failed("", 75), Stopped)
