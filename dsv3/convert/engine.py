"""Writes the files of a conversion: some threads make pieces, others put them into files in order.

Threads, not processes: reading, PyTorch's operators, digests and writing all leave Python's lock, and
one PyTorch takes a quarter of a GiB. Memory is the buffers of the pieces under way, whatever the size of
the model. A file counts once its bytes are on the disk.
"""

import queue
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch
from torch import Tensor

from dsv3.checkpoint.manifest import FileEntry
from dsv3.convert.journal import Finished, Journal
from dsv3.convert.pieces import PIECE, Output, Piece
from dsv3.convert.sink import Interrupted, Sink

MAKERS = 4
"""Threads that make pieces for one file at most: one thread that writes keeps no more of them busy."""


class Engine:
    """Runs conversions with `workers` threads that compute; `report` is told of bytes written or kept."""

    def __init__(
        self, directory: Path, journal: Journal, workers: int, report: Callable[[int], None]
    ) -> None:
        self.directory = directory
        self.journal = journal
        self.report = report
        self.lanes = -(-workers // MAKERS)
        self.makers = -(-workers // self.lanes)
        self._stop = Event()
        self._failure: BaseException | None = None

    def run(self, outputs: Sequence[Output]) -> list[Finished]:
        """Write all that is not there yet; what each file has become, in order.

        The first error of any thread ends all of them and is raised; finished files stay.
        """
        waiting: queue.SimpleQueue[tuple[int, Output]] = queue.SimpleQueue()
        for number, output in enumerate(outputs):
            waiting.put((number, output))
        done: dict[int, Finished] = {}
        threads = [Thread(target=self._lane, args=(waiting, done)) for _ in range(self.lanes)]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        finally:
            self._stop.set()  # Ctrl-C comes to the thread that waits
            for thread in threads:
                thread.join()
        if self._failure is not None:
            raise self._failure
        return [done[number] for number in range(len(outputs))]

    def _lane(self, waiting: "queue.SimpleQueue[tuple[int, Output]]", done: dict[int, Finished]) -> None:
        """Write one file after another, while the one before is still on its way to the disk."""
        torch.set_num_threads(1)
        with (
            ThreadPoolExecutor(self.makers, initializer=torch.set_num_threads, initargs=(1,)) as makers,
            ThreadPoolExecutor(1) as closing,
        ):
            buffers = [torch.empty(PIECE, dtype=torch.uint8) for _ in range(self.makers + 1)]
            last: Future[None] | None = None
            try:
                while not self._stop.is_set():
                    try:
                        number, output = waiting.get_nowait()
                    except queue.Empty:
                        break
                    kept = self.journal.intact(output.name, self.report)
                    if kept is not None:
                        done[number] = kept
                        continue
                    sink, records = self._write(output, makers, buffers)
                    if last is not None:
                        last.result()
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
            raise
        return sink, records

    def _close(
        self, number: int, name: str, sink: Sink, records: list[Any], done: dict[int, Finished]
    ) -> None:
        size, digest = sink.position, sink.finish()
        finished = Finished(
            name, FileEntry(size, digest), [record for record in records if record is not None]
        )
        self.journal.add(finished)
        done[number] = finished


def _make(piece: Piece, buffer: Tensor, stop: Event) -> Any:
    if stop.is_set():
        raise Interrupted
    return piece.make(buffer)
