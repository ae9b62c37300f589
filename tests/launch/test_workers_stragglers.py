"""Children that survive a failed one are killed."""

import os
import subprocess
import sys
import time

import pytest

from dsv3.launch.workers import kill_stragglers

pytestmark = pytest.mark.slow

STUBBORN = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(600)"


def start(code: str) -> "subprocess.Popen[bytes]":
    """A child that runs `code`."""
    return subprocess.Popen([sys.executable, "-c", code])


@pytest.mark.parametrize("allowed", [True, False])
@pytest.mark.parametrize("end", ["os._exit(1)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_a_child_that_hangs_is_killed_once_another_has_failed(
    end: str, allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(pid: int) -> int:
        raise PermissionError("pidfd_open")

    if not allowed:  # as in containers whose system calls are filtered
        monkeypatch.setattr(os, "pidfd_open", forbidden)
    with kill_stragglers(grace=0.1):
        stubborn, failed = start(STUBBORN), start(f"import os, signal\n{end}")
        try:
            assert stubborn.wait(60) == -9
        finally:
            stubborn.kill()
            failed.wait()


def test_a_failure_is_seen_though_the_agent_reaps_what_has_failed() -> None:
    """Five times, at most one of them missed: between a child's end and a look at it the agent may be first.

    This agent looks ten times as often as torch's. A watcher that only looks now and then misses most.
    """
    missed = 0
    for _ in range(5):
        with kill_stragglers(grace=0.1):
            stubborn, failed = start(STUBBORN), start("import os, time\ntime.sleep(0.5)\nos._exit(1)")
            try:
                while failed.poll() is None:
                    time.sleep(0.02)
                assert stubborn.wait(5) == -9
            except subprocess.TimeoutExpired:
                missed += 1
            finally:
                stubborn.kill()
                stubborn.wait()
    assert missed <= 1


@pytest.mark.parametrize("code", [0, 75])
def test_a_child_that_has_finished_or_stopped_costs_the_others_nothing(code: int) -> None:
    with kill_stragglers(grace=0.1):
        stubborn, finished = start(STUBBORN), start(f"import os\nos._exit({code})")
        try:
            with pytest.raises(subprocess.TimeoutExpired):
                stubborn.wait(1.5)
            assert finished.wait() == code
        finally:
            stubborn.kill()
            stubborn.wait()


def test_what_ran_before_is_neither_looked_at_nor_killed() -> None:
    before, failed_before = start(STUBBORN), start("import os\nos._exit(1)")
    try:
        with kill_stragglers(grace=0.1):
            stubborn, failed = start(STUBBORN), start("import os\nos._exit(1)")
            assert stubborn.wait(60) == -9
            assert before.poll() is None
    finally:
        before.kill()
        before.wait()
        failed.wait()
        failed_before.wait()
