"""Finds a run of several ranks that hangs: writes every rank's stacks and ends it with where each one is."""

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

# What the others get to write their stacks, in seconds, before rank 0 tells what it found ...
_GRACE = 5.0

# ... and before they end by themselves where rank 0 does not.
_PATIENCE = 20.0

# NCCL's flight recorder: how many collectives it remembers, and to write them at a timeout of its own.
_RECORDER = {"TORCH_FR_BUFFER_SIZE": "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}


def record_collectives(environment: MutableMapping[str, str]) -> None:
    """Switch NCCL's flight recorder on where the user has not set it; before the process group is made."""
    for name, value in _RECORDER.items():
        environment.setdefault(name, value)


class Watchdog:
    """A thread of one rank that wants a beat at least every `timeout` seconds.

    All ranks beat together, with every reduction of a step, so that all of them notice; rank 0 speaks for
    all. One that holds the interpreter's lock cannot write its stacks and is named as missing.
    """

    def __init__(self, rank: int, world: int, timeout: float) -> None:
        self.rank = rank
        self.world = world
        self.timeout = timeout
        self._done = threading.Event()
        self._last = time.monotonic()

    def start(self, folder: Path, cuda: bool = False) -> None:
        """Begin to watch; stacks will go to `folder`, which is made only then."""
        self.folder, self.cuda = folder, cuda
        if cuda:  # where NCCL's own watchdog would dump what it recorded
            os.environ["TORCH_FR_DUMP_TEMP_FILE"] = str(folder / "nccl-rank-")
        (folder / f"rank-{self.rank}.txt").unlink(missing_ok=True)  # of a run that was gone on with
        self.beat()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self) -> None:
        """Tell that this rank has got on."""
        self._last = time.monotonic()

    def stop(self) -> None:
        """Watch no longer."""
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
        unfinished.write_text(stacks())
        unfinished.replace(path)
        if self.cuda:
            with contextlib.suppress(Exception):  # not every build records
                from torch._C import _distributed_c10d

                trace: bytes = _distributed_c10d._dump_nccl_trace()  # type: ignore[attr-defined]
                (self.folder / f"nccl-rank-{self.rank}.pickle").write_bytes(trace)

    def _end(self) -> None:
        """End the run: rank 0 once all have written, the others when it has not."""
        files = [self.folder / f"rank-{rank}.txt" for rank in range(self.world)]
        deadline = time.monotonic() + (_GRACE if self.rank == 0 else _PATIENCE)
        while time.monotonic() < deadline and (self.rank or not all(map(Path.exists, files))):
            time.sleep(0.1)
        _fail(RunFailed(f"no step for {self.timeout:g} s (launch.timeout)\n{places(files)}"))


def stacks() -> str:
    """Every thread's stack as text; the first line is where the main thread is."""
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


def places(files: list[Path]) -> str:
    """Which ranks are where, by the stacks they have written, and the folder of these."""
    ranks = defaultdict(list)
    for rank, path in enumerate(files):
        where = (
            path.read_text().partition("\n")[0] if path.exists() else "an unknown place: it wrote no stack"
        )
        ranks[where].append(str(rank))
    lines = [
        f"rank{'s' if len(found) > 1 else ''} {_some(found)} at {where}" for where, found in ranks.items()
    ]
    return "\n".join([*lines, f"stacks of all threads: {files[0].parent}/rank-N.txt"])


def _some(ranks: list[str], shown: int = 8) -> str:
    more = f" and {len(ranks) - shown} more" if len(ranks) > shown else ""
    return ", ".join(ranks[:shown]) + more


def _fail(error: RunFailed) -> None:
    """End this process with `error` told: in the agent's error file, or on stderr under torchrun and srun."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)
    if multiprocessing.parent_process() is None:
        print(f"failed: {error}", file=sys.stderr, flush=True)
    os._exit(1)
