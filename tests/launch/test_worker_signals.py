"""Signals of a launcher reach its workers, and end what has no workers yet."""

import os
import signal
import subprocess
import threading
from collections.abc import Iterator

import pytest

from dsv3.distributed.signals import SAVE_SIGNAL, STOP_SIGNALS
from dsv3.launch import worker_signals
from dsv3.launch.worker_signals import WorkerSignals, pass_signals_on
from tests.harness.processes import until

ALL = (*STOP_SIGNALS, SAVE_SIGNAL)


@pytest.fixture
def workers() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Two processes that any signal ends."""
    started = [subprocess.Popen(["sleep", "60"]) for _ in range(2)]
    yield started
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """What would have ended this process or its children, which have the signals of a shell's foreground."""
    acts: list[object] = []
    monkeypatch.setattr(worker_signals, "kill_children", lambda others: acts.append(set(others)))
    monkeypatch.setattr(worker_signals, "leave", acts.append)
    monkeypatch.setattr(worker_signals, "_GRACE", 0.05)
    found = {number: signal.signal(number, signal.SIG_DFL) for number in ALL}
    yield acts
    assert not [thread for thread in threading.enumerate() if thread.name in ("signals", "save request")]
    # One that is still there would end the tests themselves, once `leave` is what it was.
    until(lambda: not [thread for thread in threading.enumerate() if thread.name == "leaving"])
    for number, handler in found.items():
        signal.signal(number, handler)


def begin(signals: WorkerSignals, workers: list[subprocess.Popen[bytes]]) -> None:
    """Note the workers' process ids, as they do themselves."""
    signals.pids[:] = [worker.pid for worker in workers]


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_every_stop_reaches_every_worker_as_sigterm(
    workers: list[subprocess.Popen[bytes]], ended: list[object], number: int
) -> None:
    with pass_signals_on(2) as signals:
        begin(signals, workers)
        os.kill(os.getpid(), number)
        assert [worker.wait(20) for worker in workers] == [-signal.SIGTERM] * 2
        assert signals.asked
        assert ended == []
        os.kill(os.getpid(), signal.SIGINT if number != signal.SIGINT else signal.SIGHUP)
        until(lambda: len(ended) == 2)
    assert ended == [set(), ""]


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("begun", [0, 1])
def test_before_all_workers_have_begun_a_stop_ends_all_at_once(
    workers: list[subprocess.Popen[bytes]], ended: list[object], number: int, begun: int
) -> None:
    def launch() -> None:
        with pass_signals_on(2, [7], "nothing was saved") as signals:
            signals.pids[0] = workers[0].pid if begun else 0
            os.kill(os.getpid(), number)
            until(lambda: False)

    with pytest.raises(KeyboardInterrupt):
        launch()
    until(lambda: bool(ended))
    assert ended[0] == {7}
    assert all(worker.poll() is None for worker in workers)  # kill_children does it


def test_a_launcher_that_waits_in_c_leaves_by_itself_once_its_workers_are_killed(ended: list[object]) -> None:
    signals = WorkerSignals(2, words="nothing was saved")
    signals.hear(signal.SIGTERM)
    until(lambda: len(ended) == 2)
    assert ended == [set(), "nothing was saved"]


@pytest.mark.parametrize("begun", [True, False])
def test_sigusr1_reaches_one_worker_as_soon_as_there_is_one(
    workers: list[subprocess.Popen[bytes]], ended: list[object], begun: bool
) -> None:
    with pass_signals_on(2) as signals:
        if begun:
            begin(signals, workers)
        os.kill(os.getpid(), SAVE_SIGNAL)
        if not begun:
            until(lambda: any(thread.name == "save request" for thread in threading.enumerate()))
            begin(signals, workers)
        assert workers[0].wait(20) == -SAVE_SIGNAL
        assert workers[1].poll() is None
        assert not signals.asked
    until(lambda: not any(thread.name == "save request" for thread in threading.enumerate()))
    assert ended == []


def test_a_worker_that_has_ended_is_left_alone(ended: list[object]) -> None:
    with pass_signals_on(1) as signals:
        signals.pids[0] = os.getppid()  # the number is another process's by now
        os.kill(os.getpid(), signal.SIGTERM)
        until(lambda: signals.asked)
