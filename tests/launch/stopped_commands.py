"""Commands that get a signal in a phase of theirs: run by test_stops.py as a process of its own.

    python -m tests.launch.stopped_commands CASES.json

Each case is a fork of this process, which has imported everything, and runs the command from the first line
of start.py on. The results are a line of JSON each on stdout.
"""

import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import matplotlib.pyplot  # noqa: F401
import psutil
import torch
from hydra._internal.hydra import Hydra
from hydra.core.plugins import Plugins

import dsv3.convert.convert
import dsv3.programs
import dsv3.tasks.compare
import dsv3.tasks.evaluate
import dsv3.tasks.generate
import dsv3.tasks.prepare
import dsv3.tasks.train  # noqa: F401
from dsv3 import start
from dsv3.distributed.garbage import collect_rarely
from dsv3.documents.unit_pool import IN_PROCESS_BELOW
from dsv3.errors import KILLED
from dsv3.metrics import progress
from dsv3.tokens.prepare_shards import prepare_shards
from tests.harness.composing import store_uncopied

PATIENCE = 60.0
"""Seconds that a command may go on after a signal that has to end it at once."""

GOES_ON = 99


def carry_out(case: dict[str, Any]) -> int:
    """Run the command of a case; send its signals when the phase begins, and wait there where it must end.

    With `moves` the phase has to have made its first progress: processes that it uses have been started.
    """
    create, advance, sent = progress.Phase.__init__, progress.Phase.advance, list[str]()

    def begin(phase: progress.Phase, title: str, *rest: Any, **more: Any) -> None:
        create(phase, title, *rest, **more)
        if not case["moves"]:
            strike(title)

    def move(phase: progress.Phase, count: int = 1) -> None:
        advance(phase, count)
        if case["moves"]:
            strike(phase.title)

    def strike(title: str) -> None:
        if not title.startswith(case["phase"]) or sent:
            return
        sent.append(title)
        for number in case["signals"]:
            os.kill(os.getpid(), number)
            time.sleep(0.1)  # until the thread has heard it
        if case["code"] == KILLED:
            time.sleep(PATIENCE)
            os._exit(GOES_ON)

    progress.Phase.__init__ = begin  # type: ignore[method-assign,assignment]
    progress.Phase.advance = move  # type: ignore[method-assign,assignment]
    for number in case["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    sys.argv = [f"{case['program']}.py", *case["arguments"]]
    # As in tests/harness/commands.py: Hydra composes a command twice, the first time to read hydra.mode.
    with patch.object(Hydra, "get_mode", lambda *_, **__: None), store_uncopied():
        return start._start(case["program"])


def run(case: dict[str, Any]) -> dict[str, Any]:
    """Run a case in a fork; return its exit code, what it printed on stderr, and the processes it left."""
    with tempfile.TemporaryFile() as err:
        pid = os.fork()
        if pid == 0:
            os.setsid()
            os.dup2(err.fileno(), 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            code = 98
            try:
                code = carry_out(case)
            finally:
                sys.stderr.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        for _ in range(100):  # what was killed takes a moment
            if not (left := [each for each in psutil.pids() if _session(each) == pid]):
                break
            time.sleep(0.1)
        err.seek(0)
        return {"code": code, "err": err.read().decode(), "left": left}


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return 0


def main() -> None:
    """Run all cases."""
    collect_rarely()
    torch.set_num_threads(1)
    Plugins.instance()  # finds Hydra's plugins once
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)  # whatever has started this process
    # Let any size of input be worked on in processes.
    prepare_shards.__defaults__ = tuple(
        0 if each == IN_PROCESS_BELOW else each for each in prepare_shards.__defaults__ or ()
    )
    for case in json.loads(Path(sys.argv[1]).read_text()):
        print(json.dumps(run(case)), flush=True)


if __name__ == "__main__":
    main()
