"""Children that a failed one leaves behind."""

import subprocess
import sys

import pytest

from dsv3.runtime.remains import end_what_hangs

STUBBORN = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(600)"


@pytest.fixture
def stubborn() -> "subprocess.Popen[bytes]":
    """A child that no request to stop ends."""
    return subprocess.Popen([sys.executable, "-c", STUBBORN])


@pytest.mark.parametrize("end", ["os._exit(1)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_a_child_that_hangs_is_killed_once_another_has_failed(
    stubborn: "subprocess.Popen[bytes]", end: str
) -> None:
    failed = subprocess.Popen([sys.executable, "-c", f"import os, signal\n{end}"])
    try:
        with end_what_hangs(grace=0.1):
            assert stubborn.wait(60) == -9
    finally:
        stubborn.kill()
        failed.wait()


@pytest.mark.parametrize("code", [0, 75])
def test_a_child_that_has_finished_or_stopped_costs_the_others_nothing(
    stubborn: "subprocess.Popen[bytes]", code: int
) -> None:
    finished = subprocess.Popen([sys.executable, "-c", f"import os\nos._exit({code})"])
    try:
        with end_what_hangs(grace=0.1), pytest.raises(subprocess.TimeoutExpired):
            stubborn.wait(1.5)
        assert finished.wait() == code
    finally:
        stubborn.kill()
        stubborn.wait()
