"""Write the files of a conversion: some threads load slices, others append them to the files in order.

Threads, not processes: reading, PyTorch's operators, hashing and writing all release Python's lock, and
one PyTorch takes a quarter of a GiB. Memory is the buffers of the slices under way, whatever the size of
the model. A file counts as finished once its bytes are on the disk.
"""

import queue
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch
from torch import Tensor

from dsv3.convert.destination import Finished, Journal
from dsv3.convert.output_file import SLICE_BYTES, HashingWriter, Interrupted, OutputFile, OutputSlice
from dsv3.tokens.file_digests import FileEntry

MAX_FILES = 8
"""Files under way at once at most; each has a thread that hashes and writes, and loaders of its own."""

_MAX_LOADERS = 3
"""Loader threads per file at most: enough to keep a disk busy, and memory within bounds."""

_POLL_SECONDS = 0.1
"""Seconds until a request to stop is noticed."""


def count_threads(workers: int) -> tuple[int, int]:
    """Return the files under way at once, and the loader threads of each."""
    files = min(workers, MAX_FILES)
    # One more than cores: reads go past the page cache, so nothing is read ahead while one computes.
    return files, min(-(-workers // files) + 1, _MAX_LOADERS)


_Numbered = tuple[int, OutputFile]
"""A file and its place in the order of the conversion's files."""


@dataclass(frozen=True)
class Conversion:
    """The files of a conversion, and a function that adds the small ones once these are all finished."""

    files: list[OutputFile]
    complete: Callable[[Path, list[Finished]], None]
    warnings: Sequence[str] = ()
    """Lines that the user needs to know before the output is written."""

    @property
    def nbytes(self) -> int:
        """Return the bytes to be written."""
        return sum(file.nbytes for file in self.files)


class ConversionEngine:
    """Writes files into `directory` with about `workers` threads that load slices.

    `report` gets the bytes of each write, and of each read of a file that an earlier call has finished.
    `stop_requested` says whether the user asks to stop.
    """

    def __init__(
        self,
        directory: Path,
        journal: Journal,
        workers: int,
        report: Callable[[int], None],
        stop_requested: Callable[[], bool],
    ) -> None:
        self.directory = directory
        self.journal = journal
        self.report = report
        self.stop_requested = stop_requested
        self.max_files, self.loaders = count_threads(workers)
        self._stop = Event()
        self._failure: BaseException | None = None

    def run(self, files: Sequence[OutputFile]) -> list[Finished]:
        """Write all files that are not there yet; return what each has become, in order.

        The first error of any thread ends all of them and is raised, Interrupted where the user asked to
        stop; finished files stay.
        """
        waiting: queue.SimpleQueue[_Numbered] = queue.SimpleQueue()
        for numbered in enumerate(files):
            waiting.put(numbered)
        finished: dict[int, Finished] = {}
        count = min(self.max_files, len(files))
        threads = [Thread(target=self._write_files, args=(waiting, finished)) for _ in range(count)]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                while thread.is_alive() and not self.stop_requested():
                    thread.join(_POLL_SECONDS)
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()
        if self._failure is not None:
            raise self._failure
        if len(finished) < len(files):
            raise Interrupted
        return [finished[number] for number in range(len(files))]

    def _write_files(self, waiting: "queue.SimpleQueue[_Numbered]", finished: dict[int, Finished]) -> None:
        """Write one waiting file after another; each is synced to the disk while the next one is written."""
        torch.set_num_threads(1)
        with (
            ThreadPoolExecutor(self.loaders, initializer=torch.set_num_threads, initargs=(1,)) as loaders,
            ThreadPoolExecutor(1) as syncer,
            self._stop_all_on_error(),  # before the pools wait for their threads
        ):
            buffers = [torch.empty(SLICE_BYTES, dtype=torch.uint8) for _ in range(self.loaders + 1)]
            syncing: Future[None] | None = None
            for number, file in self._take_unfinished(waiting, finished):
                writer, records = self._write_slices(file, loaders, buffers)
                with _discard_on_error(writer):
                    if syncing is not None:
                        syncing.result()
                syncing = syncer.submit(self._finish, number, file.name, writer, records, finished)
            if syncing is not None:
                syncing.result()

    @contextmanager
    def _stop_all_on_error(self) -> Iterator[None]:
        """Keep the first error of any thread for `run` and stop the others."""
        try:
            yield
        except Interrupted:
            pass
        except BaseException as error:
            self._failure = self._failure or error
            self._stop.set()

    def _take_unfinished(
        self, waiting: "queue.SimpleQueue[_Numbered]", finished: dict[int, Finished]
    ) -> Iterator[_Numbered]:
        """Yield the waiting files that must be written.

        Those that an earlier call has finished go to `finished`.
        """

        def report(count: int) -> None:
            if self._stop.is_set():
                raise Interrupted
            self.report(count)

        while not self._stop.is_set():
            try:
                number, file = waiting.get_nowait()
            except queue.Empty:
                return
            kept = self.journal.intact(file.name, report)
            if kept is None:
                yield number, file
            else:
                finished[number] = kept

    def _write_slices(
        self, file: OutputFile, loaders: ThreadPoolExecutor, buffers: list[Tensor]
    ) -> tuple[HashingWriter, list[Any]]:
        """Append the slices of a file in order, each loaded ahead into a buffer that is free again.

        Return the writer, whose bytes are not synced yet, and the records of the slices.
        """
        path = self.directory / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        writer = HashingWriter(path, self.report, self._stop)
        loading: list[Future[Any]] = []
        records = []
        try:
            with _discard_on_error(writer):
                for number, output_slice in enumerate(file.slices):
                    while len(loading) < min(number + len(buffers), len(file.slices)):
                        ahead = len(loading)
                        buffer = buffers[ahead % len(buffers)]
                        loading.append(loaders.submit(self._load, file.slices[ahead], buffer))
                    records.append(output_slice.write(loading[number].result(), writer))
                    loading[number] = Future()  # lets go of what was loaded
        except BaseException:
            for future in loading:
                future.cancel()
            raise
        return writer, records

    def _load(self, output_slice: OutputSlice, buffer: Tensor) -> Any:
        if self._stop.is_set():
            raise Interrupted
        return output_slice.load(buffer)

    def _finish(
        self, number: int, name: str, writer: HashingWriter, records: list[Any], finished: dict[int, Finished]
    ) -> None:
        """Sync a file to the disk and note it in the journal, or remove it."""
        with _discard_on_error(writer):
            entry = FileEntry(writer.position, writer.finish())
            file = Finished(name, entry, [record for record in records if record is not None])
            self.journal.add(file)
        finished[number] = file


@contextmanager
def _discard_on_error(writer: HashingWriter) -> Iterator[None]:
    """Remove a file that an error leaves unfinished; raise the writer's own error, if it has one."""
    try:
        yield
    except BaseException:
        writer.discard()
        if writer.failure is not None:
            raise writer.failure from None
        raise
