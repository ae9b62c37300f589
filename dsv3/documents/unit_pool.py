"""Do the same work on many units, in this process or in several, and go on with it after a kill.

A journal has a line per unit that is done, with its result; the first line says what the work is. A process
of the pool is killed with the one that started it.
"""

import contextlib
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

from dsv3.distributed.garbage import collect_rarely
from dsv3.distributed.signals import die_with_parent
from dsv3.documents.byte_blocks import Report
from dsv3.documents.input_files import Unit
from dsv3.errors import RunFailed, UserError
from dsv3.metrics.jsonl import append_line, read_whole_lines
from dsv3.metrics.progress import Phase

JOURNAL_FILE = "journal.jsonl"

IN_PROCESS_BELOW = 64 << 20
"""Bytes of input that are not worth the start of processes, which takes a second each."""

_TELL = 0.25
"""Seconds between two reports of a process on how far it is."""

_PARALLEL = "TOKENIZERS_PARALLELISM"


@dataclass(frozen=True)
class WorkPlace:
    """The surroundings of the work on a unit.

    Attributes:
        directory: where it may leave files, for itself or as its result.
        report: to be called with the bytes of input that were read.
    """

    directory: Path
    report: Report


class Work(Protocol):
    """The work on a unit: an object that can be pickled, and returns what JSON can hold."""

    def __call__(self, unit: Unit, place: WorkPlace) -> dict[str, Any]:
        """Do the work; UserError for what the user can mend."""


class Journal:
    """The results of the units that are done.

    Args:
        identity: what the work is, by aspect; a journal of other work is refused.

    Raises:
        UserError: the directory holds other work, or cannot be written.
    """

    def __init__(self, directory: Path, identity: dict[str, str]) -> None:
        self.path = directory / JOURNAL_FILE
        self.results: dict[int, dict[str, Any]] = {}
        first, *lines = read_whole_lines(self.path) or [None]
        if first is None:
            self.path.write_bytes(b"")
            append_line(self.path, identity)
        elif first != identity:
            told = ", ".join(
                f"{key}: {first.get(key)} there, {identity.get(key)} now"
                for key in dict.fromkeys((*identity, *first))
                if first.get(key) != identity.get(key)
            )
            raise UserError(
                f"{directory} holds unfinished work of another command ({told})\n"
                f"Repeat that command to go on with it, or remove what it has done: rm -r {directory}"
            )
        for line in lines:
            if line is not None and isinstance(line.get("unit"), int):
                self.results[line["unit"]] = line["result"]

    def add(self, number: int, result: dict[str, Any]) -> None:
        """Note that a unit is done; its files are on the disk."""
        append_line(self.path, {"unit": number, "result": result})
        self.results[number] = result


def run_units(
    units: Sequence[Unit],
    work: Work,
    directory: Path,
    identity: dict[str, str],
    workers: int | None = None,
    progress: Phase | None = None,
    in_process_below: int = IN_PROCESS_BELOW,
    is_intact: Callable[[dict[str, Any]], bool] = lambda result: True,
    on_result: Callable[[dict[str, Any]], None] = lambda result: None,
) -> list[dict[str, Any]]:
    """Return the result of `work` on each unit, in the order of the units.

    Units that the journal in `directory` has are not done again.

    Args:
        identity: what decides the results, by aspect.
        workers: cores to use; None: all that this process may use.
        progress: is advanced by the bytes of the units that are still to be done.
        in_process_below: bytes of input that are read in this process.
        is_intact: judges a result of the journal; one that is not is made again.
        on_result: gets each result once, those of the journal first; may raise.

    Raises:
        UserError: of the work, or the directory holds other work.
        RunFailed: a process died.
    """
    directory.mkdir(parents=True, exist_ok=True)
    journal = Journal(directory, identity)
    for number, result in list(journal.results.items()):
        if number >= len(units) or not is_intact(result):
            del journal.results[number]
        else:
            on_result(result)
    left = [unit for unit in units if unit.number not in journal.results]
    size = sum(unit.nbytes for unit in left)
    if progress is not None:
        progress.total = size or None
    advance: Report = (lambda nbytes: None) if progress is None else progress.advance
    cores = workers or len(os.sched_getaffinity(0))
    processes = min(cores, len(left)) if size >= in_process_below else 1
    if processes > 1:
        done = _run_in_processes(left, work, directory, advance, processes, cores // processes)
    else:
        done = _run_here(left, work, directory, advance, cores)
    with contextlib.closing(done):
        for number, result in done:
            journal.add(number, result)
            on_result(result)
    return [journal.results[unit.number] for unit in units]


Done = Iterator[tuple[int, dict[str, Any]]]


def _run_here(units: Sequence[Unit], work: Work, directory: Path, advance: Report, cores: int) -> Any:
    before = os.environ.get(_PARALLEL)
    if cores == 1:
        os.environ[_PARALLEL] = "false"
    try:
        for unit in units:
            yield unit.number, work(unit, WorkPlace(directory, advance))
    finally:
        os.environ.pop(_PARALLEL, None)
        if before is not None:
            os.environ[_PARALLEL] = before


def _run_in_processes(
    units: Sequence[Unit], work: Work, directory: Path, advance: Report, processes: int, threads: int
) -> Any:
    """Yield (unit number, result) as processes finish units."""
    context = multiprocessing.get_context("spawn")
    # The largest first: one that is begun last would be waited for alone.
    waiting = iter(sorted(units, key=lambda unit: -unit.nbytes))
    busy: dict[Connection, tuple[BaseProcess, Unit]] = {}
    everyone: list[BaseProcess] = []
    try:
        for unit in islice(waiting, processes):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(there, os.getpid(), work, directory, threads), daemon=True
            )
            process.start()
            there.close()
            everyone.append(process)
            here.send(unit)
            busy[here] = process, unit
        while busy:
            ready = [pipe for pipe in wait(list(busy), timeout=1.0) if isinstance(pipe, Connection)]
            advance(0)  # a beat: the process is well, and waits
            for pipe in ready:
                reader, unit = busy[pipe]
                try:
                    kind, value = pipe.recv()
                except (EOFError, OSError):
                    reader.join(5)
                    raise RunFailed(_died(reader, unit)) from None
                if kind == "read":
                    advance(value)
                elif kind == "mistake":
                    raise UserError(value)
                elif kind == "files":
                    raise OSError(*value)
                elif kind == "error":
                    raise RunFailed(f"the work on {unit.name} failed:\n{value}")
                else:
                    following = next(waiting, None)
                    if following is None:
                        del busy[pipe]
                        pipe.close()
                    else:
                        pipe.send(following)
                        busy[pipe] = reader, following
                    yield unit.number, value
    finally:
        for pipe in busy:
            pipe.close()
        for each in everyone:
            if busy:
                each.kill()
            each.join()


def _died(process: BaseProcess, unit: Unit) -> str:
    code = process.exitcode
    how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with code {code}"
    memory = ", perhaps for want of memory" if code == -signal.SIGKILL else ""
    return (
        f"a process that read {unit.name} {how}{memory}; the same command goes on where it was "
        "(task.workers=N with fewer processes takes less memory)"
    )


def _serve(pipe: Connection, parent: int, work: Work, directory: Path, threads: int) -> None:
    """Do the work on units that come through a pipe, until it is closed."""
    die_with_parent()
    if os.getppid() != parent:  # it was gone before the line above
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends this process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    collect_rarely()
    os.environ[_PARALLEL] = "true" if threads > 1 else "false"
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    told = time.monotonic()
    untold = 0

    def report(nbytes: int) -> None:
        nonlocal told, untold
        untold += nbytes
        if (now := time.monotonic()) - told > _TELL:
            pipe.send(("read", untold))
            told, untold = now, 0

    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            unit = pipe.recv()
            try:
                answer = ("done", work(unit, WorkPlace(directory, report)))
            except UserError as error:
                answer = ("mistake", str(error))  # type: ignore[assignment]
            except BrokenPipeError:
                raise
            except OSError as error:  # such as a full disk, which the parent tells of as of its own
                answer = ("files", (error.errno, error.strerror, error.filename))  # type: ignore[assignment]
            except Exception:
                answer = ("error", traceback.format_exc())  # type: ignore[assignment]
            pipe.send(("read", untold))
            untold = 0
            pipe.send(answer)
