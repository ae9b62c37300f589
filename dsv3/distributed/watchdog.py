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
from typing import Protocol

from dsv3.distributed.heartbeat import HEARTBEAT, Heartbeat
from dsv3.errors import RunFailed

STACKS_DIR = "stacks"
"""Folder of a run directory for the stacks of a hang, a file per rank."""

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


# Looks at the progress per launch.timeout, and the most seconds between two.
_LOOKS, _LONGEST_LOOK = 60, 10.0

# A rank that has found the run hung adds this to the count of all ranks' progress.
_HUNG = 1 << 40


class Store(Protocol):
    """The store of a process group, as far as it is used here."""

    def add(self, key: str, amount: int, /) -> int:
        """Add to a number that all ranks share; return it."""


class Watchdog:
    """A thread of one rank that ends the run once no rank of it has made progress for `timeout` seconds.

    Progress is what Heartbeat counts, not time: a slow load lives as long as it moves, and so do the ranks
    that wait for it. Every few seconds (`timeout` / 60, at most 10) each rank adds to a number in the `store`
    whether it has moved. On 2,048 ranks that makes 200 requests a second. The first rank that finds the run
    hung tells the others; each writes its stacks, and rank 0 reports for all. A rank that holds the
    interpreter's lock cannot write its stacks and is named as missing.
    """

    def __init__(
        self,
        rank: int,
        world: int,
        timeout: float,
        store: Store | None = None,
        heartbeat: Heartbeat = HEARTBEAT,
    ) -> None:
        self.rank = rank
        self.world = world
        self.timeout = timeout
        self.store = store
        """None: this rank's own progress alone counts."""
        self.heartbeat = heartbeat
        self.every = min(timeout / _LOOKS, _LONGEST_LOOK)
        self._done = threading.Event()
        self._seen, self._moved = -1, 0.0
        self._total, self._last = 0, time.monotonic()

    def start(self, folder: Path, cuda: bool = False) -> None:
        """Begin to watch; stacks go to `folder`, which is made only when the run hangs."""
        self.cuda = cuda
        self.write_to(folder)
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def write_to(self, folder: Path) -> None:
        """Write stacks to `folder` from now on."""
        self.folder = folder
        if self.cuda:  # the file to which NCCL's own watchdog writes its recording
            os.environ["TORCH_FR_DUMP_TEMP_FILE"] = str(folder / "nccl-rank-")
        (folder / f"rank-{self.rank}.txt").unlink(missing_ok=True)  # left by a run that was resumed

    def stop(self) -> None:
        """End the watch."""
        self._done.set()

    def is_hung(self, now: float) -> bool:
        """Look at the progress at the time `now`, in seconds; return True once the run counts as hung."""
        if self.heartbeat.count != self._seen:
            self._seen, self._moved = self.heartbeat.count, now
        moves = now - self._moved < max(self.heartbeat.patience, self.every)
        total = self._share(int(moves))
        if moves or total != self._total:
            self._total, self._last = total, now
        if total < _HUNG and now - self._last > self.timeout:
            total = self._share(_HUNG)
        return total >= _HUNG

    def _share(self, amount: int) -> int:
        """Add to what all ranks have moved; return the sum."""
        if self.store is not None:
            # The process that holds the store may have ended: this rank then looks after itself.
            with contextlib.suppress(RuntimeError):
                return self.store.add("watchdog: progress", amount)
        return self._total + amount

    def _watch(self) -> None:
        while not self._done.wait(self.every):
            if self.is_hung(time.monotonic()):
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
        deadline = time.monotonic() + 2 * self.every + (_GRACE if self.rank == 0 else _PATIENCE)
        while time.monotonic() < deadline and (self.rank or not all(map(Path.exists, files))):
            time.sleep(0.1)
        _fail(RunFailed(f"no progress for {self.timeout:g} s (launch.timeout)\n{summarize_stacks(files)}"))


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
