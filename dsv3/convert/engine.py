"""Writes the files of a conversion: some threads make pieces, others put them into files in order.

Threads, not processes: reading, PyTorch's operators, digests and writing all leave Python's lock, and
one PyTorch takes a quarter of a GiB. Memory is the buffers of the pieces under way, whatever the size of
the model. A file counts once its bytes are on the disk.


What a conversion is to write.
"""

import queue
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch
from torch import Tensor

from dsv3.checkpoint.manifest import FileEntry
from dsv3.convert.destination import Finished, Journal
from dsv3.convert.output_file import PIECE, Interrupted, Output, Piece, Sink

LANES = 8
"""Files under way at once at most; each has a thread that digests and writes, and one or more that make."""

_MAKERS = 3
"""Threads that make for one file at most: enough to keep a disk busy, and memory within bounds."""

_PATIENCE = 0.1
"""Seconds until a wish to stop is noticed."""


class Engine:
    """Runs conversions with `workers` threads that compute; `report` is told of bytes written or kept.

    `asked` says whether the user wants it to stop.
    """

    def __init__(
        self,
        directory: Path,
        journal: Journal,
        workers: int,
        report: Callable[[int], None],
        asked: Callable[[], bool] = lambda: False,
    ) -> None:
        self.directory = directory
        self.journal = journal
        self.report = report
        self.asked = asked
        self.lanes = min(workers, LANES)
        # One more than cores: reads go past the page cache, so nothing is read ahead while one computes.
        self.makers = min(-(-workers // self.lanes) + 1, _MAKERS)
        self._stop = Event()
        self._failure: BaseException | None = None

    def run(self, outputs: Sequence[Output]) -> list[Finished]:
        """Write all that is not there yet; what each file has become, in order.

        The first error of any thread ends all of them and is raised, Interrupted where the user wanted it;
        finished files stay.
        """
        waiting: queue.SimpleQueue[tuple[int, Output]] = queue.SimpleQueue()
        for number, output in enumerate(outputs):
            waiting.put((number, output))
        done: dict[int, Finished] = {}
        lanes = min(self.lanes, len(outputs))
        threads = [Thread(target=self._lane, args=(waiting, done)) for _ in range(lanes)]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                while thread.is_alive() and not self.asked():
                    thread.join(_PATIENCE)
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()
        if self._failure is not None:
            raise self._failure
        if len(done) < len(outputs):
            raise Interrupted
        return [done[number] for number in range(len(outputs))]

    def _kept(self, name: str) -> Finished | None:
        """What an earlier call has finished, read again and found unchanged."""

        def report(count: int) -> None:
            if self._stop.is_set():
                raise Interrupted
            self.report(count)

        return self.journal.intact(name, report)

    def _lane(self, waiting: "queue.SimpleQueue[tuple[int, Output]]", done: dict[int, Finished]) -> None:
        """Write one file after another, while the one before is still on its way to the disk."""
        torch.set_num_threads(1)
        with (
            ThreadPoolExecutor(self.makers, initializer=torch.set_num_threads, initargs=(1,)) as makers,
            ThreadPoolExecutor(1) as closing,
        ):
            last: Future[None] | None = None
            try:
                buffers = [torch.empty(PIECE, dtype=torch.uint8) for _ in range(self.makers + 1)]
                while not self._stop.is_set():
                    try:
                        number, output = waiting.get_nowait()
                    except queue.Empty:
                        break
                    kept = self._kept(output.name)
                    if kept is not None:
                        done[number] = kept
                        continue
                    sink, records = self._write(output, makers, buffers)
                    _await(last, sink)
                    last = closing.submit(self._close, number, output.name, sink, records, done)
                if last is not None:
                    last.result()
            except Interrupted:
                pass
            except BaseException as error:
                self._failure = self._failure or error
                self._stop.set()

    def _write(
        self, output: Output, makers: ThreadPoolExecutor, buffers: list[Tensor]
    ) -> tuple[Sink, list[Any]]:
        """Put the pieces into the file in order, each made ahead into a buffer that is free again."""
        path = self.directory / output.name
        path.parent.mkdir(parents=True, exist_ok=True)
        sink = Sink(path, self.report, self._stop)
        made: list[Future[Any]] = []
        records = []
        try:
            for number, piece in enumerate(output.pieces):
                while len(made) < min(number + len(buffers), len(output.pieces)):
                    ahead = len(made)
                    buffer = buffers[ahead % len(buffers)]
                    made.append(makers.submit(_make, output.pieces[ahead], buffer, self._stop))
                records.append(piece.put(made[number].result(), sink))
                made[number] = Future()  # let go of what it has made
        except BaseException:
            for future in made:
                future.cancel()
            sink.discard()
            if sink.failure is not None:
                raise sink.failure from None
            raise
        return sink, records

    def _close(
        self, number: int, name: str, sink: Sink, records: list[Any], done: dict[int, Finished]
    ) -> None:
        """Let a file count: its bytes are on the disk and the journal knows of it, or it goes."""
        try:
            entry = FileEntry(sink.position, sink.finish())
            finished = Finished(name, entry, [record for record in records if record is not None])
            self.journal.add(finished)
        except BaseException:
            sink.discard()
            raise
        done[number] = finished


def _await(last: "Future[None] | None", sink: Sink) -> None:
    """Wait until the file before is on the disk; where it fails, the one behind goes too."""
    try:
        if last is not None:
            last.result()
    except BaseException:
        sink.discard()
        raise


def _make(piece: Piece, buffer: Tensor, stop: Event) -> Any:
    if stop.is_set():
        raise Interrupted
    return piece.make(buffer)


@dataclass(frozen=True)
class Work:
    """The files, and what adds the small ones that need all of them to be there."""

    outputs: list[Output]
    complete: Callable[[Path, list[Finished]], None]

    @property
    def nbytes(self) -> int:
        """Bytes to be written."""
        return sum(output.nbytes for output in self.outputs)
