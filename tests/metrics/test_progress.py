"""Phases: what is said while a command works, on a terminal and in a pipe."""

import ctypes
import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from dsv3.metrics import progress
from dsv3.metrics.console import Console
from dsv3.metrics.progress import Phase, amount, duration, phase

ROOT = Path(__file__).parents[2]
PATIENCE = 30.0
SLEEP_IN_C = "ctypes.CDLL(None).usleep(ctypes.c_uint(400_000))"


@pytest.fixture
def err(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """Stderr as a pipe would be, with phases that may speak and seconds that are short."""
    stream = io.StringIO()
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=stream))  # pytest puts its own into sys
    monkeypatch.delenv(progress.SETTING)
    for variable in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(variable, raising=False)
    for name, seconds in (("QUIET", 0.1), ("BRIEF", 0.05), ("REPEAT", 0.1), ("GAP", 0.0)):
        monkeypatch.setattr(progress, name, seconds)
    yield stream
    assert [thread for thread in threading.enumerate() if thread.name == "progress"] == []


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.01)


def test_a_phase_that_is_short_says_nothing(err: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "QUIET", 3600.0)
    with phase("loading weights", 10) as work:
        work.advance(10)
    assert err.getvalue() == ""


def test_a_pipe_gets_a_line_and_then_others_with_the_share_and_the_seconds(err: io.StringIO) -> None:
    with phase("loading weights", 4_000_000_000) as work:
        _until(lambda: "\n" in err.getvalue())
        work.advance(1_000_000_000)
        _until(lambda: err.getvalue().count("\n") >= 2)
    first, second = err.getvalue().splitlines()[:2]
    assert first == "loading weights: 0 % of 4 GB"
    assert re.fullmatch(r"loading weights: 25 % of 4 GB, \d+ s, \d+ s left", second)


def test_a_call_that_blocks_in_c_speaks_and_speaks_again(err: io.StringIO) -> None:
    with phase("training the tokenizer"):
        ctypes.CDLL(None).usleep(ctypes.c_uint(500_000))
    first, *more = err.getvalue().splitlines()
    assert first == "training the tokenizer"
    assert more
    assert all(re.fullmatch(r"still training the tokenizer, \d+ s", line) for line in more)


def test_the_innermost_phase_is_shown_and_then_the_outer_one_again(
    err: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "BRIEF", 0.0)
    monkeypatch.setattr(progress, "QUIET", 0.0)
    with phase("outer"):
        with phase("inner"):
            pass
        _until(lambda: "still outer" in err.getvalue())
    assert err.getvalue().splitlines()[:3] == ["outer", "inner", "still outer, 0 s"]


def test_phases_in_a_row_are_one_silence(err: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "QUIET", 1.0)  # so long that no part fills it, on a busy machine either
    monkeypatch.setattr(progress, "GAP", 10.0)
    monkeypatch.setattr(progress, "BRIEF", 0.0)
    for number in range(1000):
        with phase(f"part {number}"):
            time.sleep(0.01)
        if err.getvalue():
            break
    assert re.fullmatch(r"part [1-9]\d*\n", err.getvalue())  # none of them is as long as QUIET


def test_a_phase_ends_with_its_until(err: io.StringIO) -> None:
    over = threading.Event()
    with phase("starting workers", until=over.is_set):
        _until(lambda: bool(err.getvalue()))
        over.set()
        before = err.getvalue()
        time.sleep(0.3)
    assert err.getvalue() == before


@pytest.mark.parametrize(
    ("variables", "each_node", "told"),
    [
        ({}, False, "reading\n"),
        ({"RANK": "0", "LOCAL_RANK": "0"}, False, "reading\n"),
        ({"RANK": "1", "LOCAL_RANK": "1"}, False, ""),
        ({"RANK": "8", "LOCAL_RANK": "0"}, False, ""),
        ({"RANK": "8", "LOCAL_RANK": "0"}, True, "rank 8: reading\n"),
        ({"RANK": "9", "LOCAL_RANK": "1"}, True, ""),
        ({progress.SETTING: "off"}, False, ""),
    ],
)
def test_one_process_speaks(
    err: io.StringIO,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    each_node: bool,
    told: str,
) -> None:
    for name in ("QUIET", "BRIEF"):
        monkeypatch.setattr(progress, name, 0.0)
    monkeypatch.setattr(progress, "REPEAT", 3600.0)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with phase("reading", each_node=each_node):
        pass
    assert err.getvalue() == told


def test_work_in_the_background_says_nothing(err: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("QUIET", "BRIEF"):
        monkeypatch.setattr(progress, name, 0.0)

    def save() -> None:
        with phase("saving", 1) as work:
            work.advance()

    thread = threading.Thread(target=save)
    thread.start()
    thread.join()
    assert err.getvalue() == ""


def test_an_exception_ends_a_phase_and_its_thread(err: io.StringIO) -> None:
    with pytest.raises(KeyboardInterrupt), phase("loading"), phase("reading"):
        raise KeyboardInterrupt
    before = err.getvalue()
    time.sleep(0.3)
    assert err.getvalue() == before


def test_a_stream_that_somebody_closed_is_no_error(err: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "QUIET", 0.0)
    monkeypatch.setattr(progress, "BRIEF", 0.0)
    err.close()
    with phase("loading"), phase("reading"):
        pass


def test_a_line_of_the_run_ends_the_silence(err: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    console = Console(file=out)
    monkeypatch.setattr(progress, "QUIET", 0.2)
    with phase("computing the held-out loss"):
        deadline = time.monotonic() + 0.6
        while time.monotonic() < deadline:
            console.message("step")
            time.sleep(0.01)
        during = err.getvalue()
        _until(lambda: bool(err.getvalue()))
    assert during == ""


class _SlowInt(int):
    """A number whose sum takes so long that another thread comes in between."""

    def __add__(self, other: int) -> "_SlowInt":
        time.sleep(0.002)
        return _SlowInt(int(self) + other)


def test_many_threads_advance_one_phase_and_none_is_lost() -> None:
    work = Phase("writing", 40, "bytes")
    work.done = _SlowInt(0)

    def write() -> None:
        for _ in range(10):
            work.advance()

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert work.done == 40


def test_advance_adds_and_does_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(progress.SETTING)
    calls: list[str] = []

    def count(frame: object, event: str, argument: object) -> None:
        if event in ("call", "c_call"):
            calls.append(event)

    with phase("writing", 1000) as work:
        sys.setprofile(count)
        for _ in range(1000):
            work.advance()
        sys.setprofile(None)
    assert work.done == 1000
    assert len(calls) <= 3 * 1000 + 2  # itself, and the lock's two ends; no clock and no drawing


@pytest.mark.parametrize(
    ("count", "unit", "text"),
    [
        (512, "bytes", "0.512 kB"),
        (12_345_678, "bytes", "12.3 MB"),
        (1_340_000_000_000, "bytes", "1.34 TB"),
        (2_500_000_000_000_000, "bytes", "2,500 TB"),
        (1, "files", "1 file"),
        (1234, "files", "1,234 files"),
        (12_345_678, "characters", "12.3 million characters"),
        (671_026_404_352, "parameters", "671 billion parameters"),
    ],
)
def test_amounts_are_as_people_read_them(count: int, unit: str, text: str) -> None:
    assert amount(count, unit) == text


def test_durations_are_as_people_say_them() -> None:
    assert [duration(seconds) for seconds in (0.4, 20, 119, 130, 7500)] == [
        "0 s",
        "20 s",
        "119 s",
        "2 min",
        "2 h 5 min",
    ]


_FAST = """
import ctypes, os, sys, time
from dsv3.metrics import progress
progress.QUIET, progress.BRIEF, progress.REPEAT = 0.1, 0.05, 0.1
"""


def _process(code: str, before: str = "", **streams: object) -> "subprocess.Popen[bytes]":
    environment = {name: value for name, value in os.environ.items() if name != progress.SETTING}
    environment |= {"PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "100"}
    settings: dict[str, object] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
    return subprocess.Popen([sys.executable, "-c", before + _FAST + code], env=environment, **settings)  # type: ignore[call-overload, no-any-return]


def _on_a_terminal(code: str, **variables: str) -> tuple[str, bytes]:
    """Run code whose stderr is a terminal; return what appeared there, and its stdout."""
    controller, terminal = pty.openpty()
    setting = "".join(f"os.environ[{name!r}] = {value!r}\n" for name, value in variables.items())
    with _process(setting + code, stderr=terminal) as process:
        os.close(terminal)
        shown = b""
        while process.poll() is None or select.select([controller], [], [], 0)[0]:
            if select.select([controller], [], [], 0.1)[0]:
                try:
                    shown += os.read(controller, 65536)
                except OSError:  # the other end is closed
                    break
        assert process.stdout is not None
        out = process.stdout.read()
    os.close(controller)
    assert process.returncode == 0, shown
    return shown.decode(), out


_LOADING = f"""
with progress.phase("loading weights", 100) as work:
    work.advance(34)
    {SLEEP_IN_C}
    print("a warning", file=sys.stderr)
    print("a part")
with progress.phase("sampling", 3, "tokens"):
    {SLEEP_IN_C}
print("result")
"""


def test_a_terminal_gets_a_bar_that_leaves_nothing_behind() -> None:
    shown, out = _on_a_terminal(_LOADING)
    assert "loading weights" in shown
    assert "34 % of 0.1 kB" in shown
    assert "0 % of 3 tokens" in shown
    assert "\u2501" in shown or "\u2578" in shown or "-----" in shown
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert "a warning\r\n" in plain
    assert shown.rstrip().endswith("\x1b[2K"), "the bar is wiped away"
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h"), "the cursor is there again"
    assert out == b"a part\nresult\n"


@pytest.mark.parametrize("variables", [{"TERM": "dumb"}, {progress.SETTING: "lines"}])
def test_a_terminal_that_shows_no_bars_gets_lines(variables: dict[str, str]) -> None:
    shown, _ = _on_a_terminal(_LOADING, **variables)
    assert shown.startswith("loading weights: 34 % of 0.1 kB\r\n")
    assert "\x1b" not in shown


def test_no_color_is_respected() -> None:
    shown, _ = _on_a_terminal(_LOADING, NO_COLOR="1")
    assert "34 % of 0.1 kB" in shown
    assert not re.search(r"\x1b\[(3\d|38;[0-9;]*|9\d)m", shown)


def test_beside_a_training_bar_phases_are_lines_above_it() -> None:
    code = f"""
from dsv3.metrics.console import Console
console = Console(stderr=True)
console.start(5)
with progress.phase("computing the held-out loss", 4, "batches"):
    {SLEEP_IN_C}
console.close()
with progress.phase("saving"):
    {SLEEP_IN_C}
"""
    shown, _ = _on_a_terminal(code)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert "computing the held-out loss: 0 % of 4 batches\r\n" in plain
    before, _, after = plain.partition("saving")
    assert before.count("step 0/5") >= 2, "the bar is drawn below the lines"
    assert "step 0/5" not in after


def test_a_reader_that_goes_away_ends_the_lines_and_not_the_command() -> None:
    code = f"""
with progress.phase("loading"):
    {SLEEP_IN_C}
    {SLEEP_IN_C}
print("result", flush=True)
"""
    with _process(code) as process:
        assert process.stderr is not None
        assert process.stdout is not None
        process.stderr.close()
        assert process.stdout.read() == b"result\n"
    assert process.returncode == 0


def test_ctrl_c_ends_a_phase_cleanly() -> None:
    code = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts without it
try:
    with progress.phase("loading"):
        time.sleep(60)
except KeyboardInterrupt:
    sys.exit(130)
"""
    with _process(code) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == b"loading\n"
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 130
    assert all(line.startswith(b"still loading, ") for line in rest.splitlines())


def test_an_interpreter_that_ends_within_a_phase_ends_quietly() -> None:
    code = f"""
left_open = progress.phase("loading")
left_open.__enter__()
{SLEEP_IN_C}
"""
    left_by_then = """
import atexit, os, threading
atexit.register(lambda: os.write(1, b" ".join(thread.name.encode() for thread in threading.enumerate())))
"""
    with _process(code, left_by_then) as process:
        assert process.stderr is not None
        assert process.stdout is not None
        told, threads = process.stderr.read().splitlines(), process.stdout.read()
    assert (process.returncode, threads) == (0, b"MainThread")
    assert told[0] == b"loading"
    assert all(line.startswith(b"still loading, ") for line in told[1:])
