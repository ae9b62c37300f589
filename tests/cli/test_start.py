"""The ends of a command: Ctrl-C at once, a reader that leaves, a full disk."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import pytest

from dsv3.distributed.streams import LenientStream
from dsv3.programs import CONVERT, TRAIN
from tests.harness.commands import run_here
from tests.harness.processes import ROOT, environment

INTERRUPTED_IMPORT = """
import os, signal, sys
module, how = sys.argv[1:]
class Interrupt:
    def find_spec(self, name, *rest):
        if name == module:
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except BaseException:
                pass
sys.meta_path.insert(0, Interrupt())
# As a shell starts a command in the foreground, or in the background.
signal.signal(signal.SIGINT, signal.SIG_IGN if how == "ignored" else signal.default_int_handler)
from dsv3.start import train
sys.argv[1:] = ["--version"]
sys.exit(train())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "ignored", "code"),
    [("dsv3.programs", "", 130), ("hydra", "", 130), ("dsv3.cli.flags", "", 130), ("hydra", "ignored", 0)],
)
def test_ctrl_c_during_the_imports_ends_the_command_at_once(module: str, ignored: str, code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_IMPORT, module, ignored],
        env=environment(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (code, "")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_while_torch_is_imported_ends_the_command_at_once(here: Path, number: int) -> None:
    # The signal falls into an import that hides every exception, as torch has some.
    source = INTERRUPTED_IMPORT.replace("getpid(), signal.SIGINT", f"getpid(), {int(number)}")
    done = subprocess.run(
        [sys.executable, "-c", source.replace('["--version"]', '["logger=none"]'), "torch.nn", ""],
        env=environment(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (130, "stopped before the first step; nothing was saved\n")
    assert not list(here.glob("runs/*"))


@pytest.mark.slow
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_command_whose_reader_leaves_ends_as_if_it_had_stayed(here: Path, stream: str) -> None:
    arguments = ["task=plan", "logger=none"] if stream == "stdout" else ["modle=debug"]
    reading, writing = os.pipe()
    os.close(reading)
    other = "stderr" if stream == "stdout" else "stdout"
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *arguments],
        env=environment(),
        text=True,
        **{stream: writing, other: subprocess.PIPE},  # type: ignore[call-overload]
    )
    os.close(writing)
    assert done.returncode == (0 if stream == "stdout" else 2)
    assert "BrokenPipe" not in getattr(done, other)
    assert "Traceback" not in getattr(done, other)


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> Iterator[TextIO]:
    """A stdout whose reader has left, as start.py wraps it."""
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as stream:  # noqa: PTH123  # a descriptor, not a path
        monkeypatch.setattr("sys.stdout", LenientStream(stream))
        yield stream


@pytest.mark.parametrize("argument", ["--help", "--version", "--cfg=job", "--info", "-sc install=bash"])
def test_whatever_a_command_prints_may_go_unread(here: Path, unread: TextIO, argument: str) -> None:
    assert run_here(TRAIN, argument.split(" ")) == 0
    print("more", flush=True)  # and what comes later, too


def test_the_summary_of_a_conversion_may_go_unread(here: Path, unread: TextIO) -> None:
    assert run_here(CONVERT, ["direction=hf_to_dcp", "model=671b", "plan=true"]) == 0


def test_a_full_disk_under_stdout_is_told(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr("sys.stdout", LenientStream(full))
        assert run_here(TRAIN, ["--version"]) == 1
    assert capsys.readouterr().err == "failed: stdout cannot be written: No space left on device\n"
