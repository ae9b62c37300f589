"""Watchdog of a run of several ranks: if they hang, write every rank's stacks and end the run."""

import contextlib
import multiprocessing
import os
import sys
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import MutableMapping
from pathlib import Path

from dsv3.errors import RunFailed

# Seconds that the other ranks have to write their stacks before rank 0 reports ...
_GRACE = 5.0

# ... and before they exit by themselves where rank 0 does not.
_PATIENCE = 20.0

# Ranks of one place that a message names.
_SHOWN = 8

# NCCL's flight recorder: the number of collectives to remember, and to write them at its own timeout.
_RECORDER = {"TORCH_FR_BUFFER_SIZE": "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}


def enable_flight_recorder(environment: MutableMapping[str, str]) -> None:
    """Switch NCCL's flight recorder on, unless the user has set it; call before the process group is made."""
    for name, value in _RECORDER.items():
        environment.setdefault(name, value)


class Watchdog:
    """A thread of one rank that expects a beat at least every `timeout` seconds.

    All ranks beat together, with every reduction of a step, so all of them notice a hang; rank 0 reports for
    all. A rank that holds the interpreter's lock cannot write its stacks and is named as missing.
    """

    def __init__(self, rank: int, world: int, timeout: float) -> None:
        self.rank = rank
        self.world = world
        self.timeout = timeout
        self._done = threading.Event()
        self._last = time.monotonic()

    def start(self, folder: Path, cuda: bool = False) -> None:
        """Begin to watch; stacks go to `folder`, which is made only when the run hangs."""
        self.folder, self.cuda = folder, cuda
        if cuda:  # the file to which NCCL's own watchdog writes its recording
            os.environ["TORCH_FR_DUMP_TEMP_FILE"] = str(folder / "nccl-rank-")
        (folder / f"rank-{self.rank}.txt").unlink(missing_ok=True)  # left by a run that was resumed
        self.beat()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self) -> None:
        """Report progress of this rank."""
        self._last = time.monotonic()

    def stop(self) -> None:
        """End the watch."""
        self._done.set()

    def _watch(self) -> None:
        while not self._done.wait(min(1.0, self.timeout / 10)):
            if time.monotonic() - self._last > self.timeout:
                self._dump()
                self._end()

    def _dump(self) -> None:
        """Write this rank's stacks, the main thread's first and its place in the first line."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"rank-{self.rank}.txt"
        unfinished = path.with_suffix(".tmp")
        unfinished.write_text(format_stacks())
        unfinished.replace(path)
        if self.cuda:
            with contextlib.suppress(Exception):  # not every build records
                from dsv3.distributed.torch_private import nccl_trace

                (self.folder / f"nccl-rank-{self.rank}.pickle").write_bytes(nccl_trace())

    def _end(self) -> None:
        """End the run: rank 0 once all have written, the others when rank 0 has not."""
        files = [self.folder / f"rank-{rank}.txt" for rank in range(self.world)]
        deadline = time.monotonic() + (_GRACE if self.rank == 0 else _PATIENCE)
        while time.monotonic() < deadline and (self.rank or not all(map(Path.exists, files))):
            time.sleep(0.1)
        _fail(RunFailed(f"no step for {self.timeout:g} s (launch.timeout)\n{summarize_stacks(files)}"))


def format_stacks() -> str:
    """Return every thread's stack as text; the first line is the place of the main thread."""
    frames = sys._current_frames()
    main = threading.main_thread()
    others = [thread for thread in threading.enumerate() if thread not in (main, threading.current_thread())]
    parts = []
    for thread in (main, *others):
        if frame := frames.get(thread.ident or 0):
            lines = traceback.format_stack(frame)
            parts.append(f"thread {thread.name}\n{''.join(lines)}")
    place = frames[main.ident or 0]
    first = f"{place.f_code.co_filename}:{place.f_lineno} in {place.f_code.co_name}"
    return "\n".join([first, "", *parts])


def summarize_stacks(files: list[Path]) -> str:
    """Return the ranks by the place where they wait, from the stacks they wrote, and the stacks' folder."""
    ranks = defaultdict(list)
    for rank, path in enumerate(files):
        where = (
            path.read_text().partition("\n")[0] if path.exists() else "an unknown place: it wrote no stack"
        )
        ranks[where].append(str(rank))
    lines = []
    for where, found in ranks.items():
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        lines.append(f"rank{'s' if len(found) > 1 else ''} {', '.join(found[:_SHOWN])}{more} at {where}")
    return "\n".join([*lines, f"stacks of all threads: {files[0].parent}/rank-N.txt"])


def _fail(error: RunFailed) -> None:
    """End this process; report `error` in the agent's error file, or on stderr under torchrun and srun."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)
    if multiprocessing.parent_process() is None:
        print(f"failed: {error}", file=sys.stderr, flush=True)
    os._exit(1)
