"""A pool of gloo workers that lives as long as the test session: starting Python and torch costs seconds."""

import faulthandler
import gc
import multiprocessing
import os
import pickle
import tempfile
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

TIMEOUT = 110.0
# After so many layouts the workers are made anew: every process group has a thread in gloo that polls, and
# a few hundred of them take half of two cores.
RUNS = 6


class WorkerError(Exception):
    """A worker's exception, with its traceback as text."""


class WorkerLost(WorkerError):
    """Some workers died, or gave no answer though none has raised anything."""


class Died(str):
    """That a worker's process has ended."""


class Raised(str):
    """The text of an exception that a worker has raised."""


class Pool:
    """`size` processes in one process group, each running the function that it is sent."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []
        self._start()

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call a module-level `function(*arguments)` on every rank; the results by rank.

        After a failure the workers are started anew: those that waited for the one that failed are lost. A
        call in which a process died or fell silent is made once more, with a warning: on a machine short of
        memory or time that says nothing of the code, and code that does it will do it again.
        """
        try:
            return self._run(function, *arguments)
        except WorkerLost as lost:
            warnings.warn(f"called again after this: {lost}", stacklevel=2)
            return self._run(function, *arguments)

    def _run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        if self.runs == RUNS:
            self.close()
            self._start()
        self.runs += 1
        for pipe in self.pipes:
            _send(pipe, (function, arguments))
        answers: list[tuple[bool, Any]] = []
        patience = TIMEOUT
        for rank in range(self.size):
            answers.append(self._answer(rank, patience))
            # Where one rank fails the others wait for it in vain.
            patience = 1.0 if answers[rank][0] else patience
        failures = [f"rank {rank}: {text}" for rank, (failed, text) in enumerate(answers) if failed]
        if failures:
            self.close()
            self._start()
            texts = [text for failed, text in answers if failed]
            died = any(isinstance(text, Died) for text in texts)
            raised = any(isinstance(text, Raised) for text in texts)
            # Where one has died, others raise that it is gone; where one has raised, others fall silent.
            raise (WorkerError if raised and not died else WorkerLost)("\n".join(failures))
        return [result for _, result in answers]

    def close(self) -> None:
        """End the workers."""
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(0.5)
            process.kill()
            process.join()
        self.store.unlink(missing_ok=True)

    def _start(self) -> None:
        # Forked from a server that has imported everything: new workers cost nothing but their group.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.parallel.tiny_training"])
        self.runs = 0
        store = tempfile.NamedTemporaryFile(prefix="dsv3-pool-", delete=False)  # noqa: SIM115
        self.store = Path(store.name)
        self.pipes, self.processes = [], []
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.size, store.name, theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)
            theirs.close()  # so that the end of the process is the end of the pipe

    def _answer(self, rank: int, patience: float) -> tuple[bool, Any]:
        """Whether the rank failed, and its result or what went wrong."""
        if not self.pipes[rank].poll(patience):
            return True, f"gave no answer in {patience:.0f} s"
        try:
            answer: tuple[bool, Any] = pickle.loads(self.pipes[rank].recv_bytes())
        except EOFError:
            self.processes[rank].join(5)
            return True, Died(f"died with exit code {self.processes[rank].exitcode}")
        return answer


def _send(pipe: Connection, value: Any) -> None:
    """Send `value` whole: `pipe.send` would pass tensors as files in shared memory, which may be small."""
    pipe.send_bytes(pickle.dumps(value))


def _serve(rank: int, size: int, store: str, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    from dsv3.distributed.garbage import collect_rarely
    from dsv3.distributed.store import stay_on_this_node
    from dsv3.distributed.torch_private import shorten_gather_name

    stay_on_this_node(os.environ)
    faulthandler.enable()
    gc.freeze()  # what was there before the fork stays: no collection looks at it, and its pages stay shared
    collect_rarely()
    shorten_gather_name()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    while True:
        try:
            function, arguments = pickle.loads(pipe.recv_bytes())
        except EOFError:
            break
        # A rank that hangs tells where, before the test gives it up.
        faulthandler.dump_traceback_later(TIMEOUT - 10, exit=False)
        try:
            _send(pipe, (False, function(*arguments)))
        except Exception:
            _send(pipe, (True, Raised(traceback.format_exc())))
        faulthandler.cancel_dump_traceback_later()
    dist.destroy_process_group()
