"""Prefetching: a thread makes the batches of the coming steps while the current one is computed.

One thread per rank is enough: a core makes more than 20 million tokens per second from token shards
(benchmarks/data.py), far beyond what a rank trains on, and numpy releases the interpreter's lock while it
copies or waits for the disk. Processes would have to send the batches and to be ended; more threads would
gain nothing, and rows would be read in no order.

The thread holds no state: the batches are those that the loader would return in the step, bit for bit, and a
resume starts from the count of consumed samples. A row is therefore read ahead of its step, in another thread
than the rows of an evaluation.
"""

import threading
from queue import SimpleQueue

import torch

from dsv3.data.batch import Batch
from dsv3.data.loader import DataLoader
from dsv3.planning.batch_schedule import BatchSchedule

_PATIENCE = 5.0
"""Seconds to wait for the thread's last read at the end of a run; then it is left to the process's end."""


class Prefetcher:
    """Hand out the batches of one step after another, which a thread makes ahead.

    Args:
        loader: makes the batches.
        depth: steps that are made ahead at most, all that is held in memory; 0 makes each in its own step.
        device: that of the rank. Pinned memory belongs to a GPU, and a new thread uses the first one.
    """

    def __init__(self, loader: DataLoader, depth: int, device: torch.device) -> None:
        self._loader, self._depth, self._device = loader, depth, device
        self._room = threading.Semaphore(depth)
        self._ready: SimpleQueue[tuple[int, list[Batch] | BaseException]] = SimpleQueue()
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._to_make, self._next_sample = 0, 0
        """Steps whose batches are still to be made, and the first sequence of the next of them."""
        self._thread: threading.Thread | None = None

    @property
    def batch(self) -> BatchSchedule:
        """Return the batch size of every step."""
        return self._loader.batch

    def start(self, first_sample: int, steps: int) -> None:
        """Begin to make the batches of `steps` steps, the first of which begins at `first_sample`."""
        if self._depth > 0:
            self._next_sample = first_sample
            self.go_on(steps)

    def go_on(self, steps: int) -> None:
        """Make the batches of so many more steps: the run has gone back, and its data has not."""
        with self._lock:
            begins = self._depth > 0 and self._to_make == 0
            self._to_make += steps
        if begins:
            # A thread that has made all of its batches has ended, or does so now without touching anything.
            self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)
            self._thread.start()

    def microbatches(self, first_sample: int) -> list[Batch]:
        """Return the microbatches of the next step, waiting until they are there.

        An error of the thread is raised here as itself, in the step whose batch it is.
        """
        if self._thread is None:
            return self._loader.microbatches(first_sample)
        made_for, made = self._ready.get()
        if isinstance(made, BaseException):
            self._ready.put((made_for, made))  # whoever asks again must not wait for a thread that has ended
            raise made
        assert made_for == first_sample, "steps follow one another"
        self._room.release()
        return made

    def close(self) -> None:
        """End the thread; a second call does nothing."""
        self._stopping.set()
        self._room.release()
        if self._thread is not None:
            self._thread.join(_PATIENCE)

    def _work(self) -> None:
        """Make one step's batches after another as room is left."""
        first_sample = self._next_sample
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)
            while self._to_make > 0:
                self._room.acquire()
                if self._stopping.is_set():
                    return
                made = self._loader.microbatches(first_sample)
                with self._lock:
                    self._ready.put((first_sample, made))
                    first_sample += self._loader.batch.size(first_sample)
                    self._next_sample = first_sample
                    self._to_make -= 1
                    if self._to_make == 0:
                        return
        except BaseException as error:
            self._ready.put((first_sample, error))
