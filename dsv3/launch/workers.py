"""Workers of this command: started with torch's elastic agent, stopped and ended together.

The agent waits half a minute for the others after one worker has failed; here they get some seconds and are
killed then.
"""

import contextlib
import logging
import multiprocessing
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing.synchronize import Event
from types import FrameType
from typing import TYPE_CHECKING, Any

from dsv3.config.launch import WEEK
from dsv3.config.strict import build
from dsv3.distributed.garbage import collect_rarely
from dsv3.distributed.signals import (
    NOTHING_SAVED,
    Stopped,
    die_with_parent,
    kill_children,
    leave_on_signal,
)
from dsv3.distributed.streams import outlive_readers
from dsv3.errors import KILLED, STOPPED, RunFailed, UserError
from dsv3.launch.job import Job, is_first_on_node
from dsv3.metrics.progress import phase

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

# Seconds that a worker may take to save after a stop signal before it is killed: as many as it needs, for the
# watchdog ends one that hangs.
_SHUTDOWN_TIMEOUT = WEEK

# Seconds between two looks for new children, and those that the others have after a failure.
_LOOK_EVERY = 0.1

_GRACE = 3.0


@contextlib.contextmanager
def kill_stragglers(grace: float = _GRACE) -> Iterator[None]:
    """Kill the children that this process starts meanwhile, `grace` seconds after one of them has failed.

    The agent asks the others to stop and waits half a minute, in vain where one is stuck in a collective.
    """
    import psutil

    done = threading.Event()
    others = {child.pid for child in psutil.Process().children(recursive=True)}
    threading.Thread(target=_watch, args=(done, grace, others), daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _watch(done: threading.Event, grace: float, others: set[int]) -> None:
    with contextlib.ExitStack() as stack:
        exits = _ChildExits(stack)
        while not done.is_set():
            if exits.any_failed(others):
                if not done.wait(grace):
                    kill_children(others)
                return


class _ChildExits:
    """The ends of children, seen as they happen: the agent reaps a child as soon as it looks."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self.stack = stack
        self.poll = select.poll()
        self.pids: dict[int, int] = {}
        """Processes by the file descriptors that become readable when they end."""
        self.silent: set[int] = set()
        """Processes without such a descriptor, which some containers forbid; they are polled."""

    def any_failed(self, others: set[int]) -> bool:
        """Return True if a child other than `others` fails within the next moment."""
        import psutil

        known = {*others, *self.pids.values(), *self.silent}
        for child in psutil.Process().children():
            if child.pid not in known:
                self._listen(child.pid)
        for ending, _ in self.poll.poll(1000 * _LOOK_EVERY):
            self.poll.unregister(ending)
            if _failed(self.pids[ending]):
                return True
        return any(map(_failed, self.silent))

    def _listen(self, pid: int) -> None:
        try:
            ending = os.pidfd_open(pid)
        except ProcessLookupError:
            return
        except OSError:
            self.silent.add(pid)
            return
        self.stack.callback(os.close, ending)
        self.pids[ending] = pid
        self.poll.register(ending, select.POLLIN)


def _failed(pid: int) -> bool:
    """Return True if a child has ended other than by finishing or by a stop; leave it to be reaped."""
    try:
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return ended is not None and (ended.si_code != os.CLD_EXITED or ended.si_status not in (0, STOPPED))


def start_workers(job: Job) -> float | None:
    """Start one process per rank of this node and wait for all; return rank 0's result where it is here.

    The first worker that fails ends the others. SIGTERM and Ctrl-C reach the workers as SIGTERM.
    """
    untouched = job.config.task.writes_run and job.sweep is None
    with leave_on_signal(lambda: NOTHING_SAVED if untouched else ""), phase("importing torch"):
        from torch.distributed.elastic.multiprocessing.api import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _silence_agent()
    count = job.plan.world_size // job.config.launch.nnodes
    options = {**_rendezvous(job), "nproc_per_node": count}
    spawned = multiprocessing.get_context("spawn")
    started = spawned.Event()  # set by the first worker, which speaks from there
    trained = spawned.Event()  # set by a worker that has stopped or ended of itself: it may have saved
    known = LaunchConfig.__dataclass_fields__  # shutdown_timeout is newer than torch 2.11
    config = LaunchConfig(**{name: value for name, value in options.items() if name in known})
    try:
        with (
            _signals_as_exceptions(),
            _spawning(),
            kill_stragglers(),
            phase(f"starting {count} workers", until=started.is_set),
        ):
            results: dict[int, Any] = elastic_launch(config, _work)(job, os.getpid(), started, trained)
    except ChildFailedError as error:
        raise _first_failure(error) from None
    except SignalException:
        if not trained.is_set():
            raise KeyboardInterrupt from None
        raise Stopped("") from None  # rank 0 has said what it saved
    return results.get(0)


def _rendezvous(job: Job) -> dict[str, Any]:
    """Return how the agents of all nodes find each other, and how each treats its workers."""
    launch = job.config.launch
    options: dict[str, Any] = {
        "min_nodes": launch.nnodes,
        "max_nodes": launch.nnodes,
        "run_id": f"dsv3-{os.getpid()}",
        "rdzv_backend": "c10d",
        "rdzv_endpoint": "localhost:0",
        "max_restarts": 0,
        "monitor_interval": 0.2,
        "start_method": "spawn",
        "signals_to_handle": "SIGHUP,SIGQUIT",
        "shutdown_timeout": _SHUTDOWN_TIMEOUT,
    }
    if launch.rendezvous is not None:  # static: node 0 is where the user says, and ranks follow node_rank
        options |= {"run_id": "dsv3", "rdzv_backend": "static", "rdzv_endpoint": launch.rendezvous}
        options["rdzv_configs"] = {"rank": launch.node_rank, "timeout": launch.timeout}
    return options


def _silence_agent() -> None:
    """Keep the agent from logging a stop or a failure itself; ours is one message."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(
            ("torch.distributed.elastic", "torch.multiprocessing")
        ):  # each of its modules sets its own level
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)


@contextlib.contextmanager
def _spawning() -> Iterator[None]:
    """Spawn plain processes from a job of joblib's too, whose own start method a worker would not know."""
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("spawn", force=True)
    try:
        yield
    finally:
        multiprocessing.set_start_method(before, force=True)


def _work(job: Job, launcher: int, started: Event, trained: Event) -> float | None:
    """Run the task in one worker, which a kill -9 of its launcher ends as well."""
    die_with_parent()
    if os.getppid() != launcher:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C reaches the launcher, which sends SIGTERM
    outlive_readers()
    collect_rarely()
    if is_first_on_node():
        started.set()
    try:
        with phase("importing torch"):
            task = build(job.config.task)
        result: float | None = task.run(job)
        trained.set()
        return result
    except Stopped as stopped:
        trained.set()
        if os.environ["RANK"] == "0":
            print(stopped.message, file=sys.stderr, flush=True)
        raise


@contextlib.contextmanager
def _signals_as_exceptions() -> Iterator[None]:
    """Let the first SIGTERM or Ctrl-C make the agent stop its workers, and a second one end all at once."""
    from torch.distributed.elastic.multiprocessing.api import SignalException

    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) == 1:
            raise SignalException("stopped by a signal", sigval=signal.SIGTERM)
        kill_children()
        os._exit(KILLED)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _first_failure(error: "ChildFailedError") -> BaseException:
    """Return the error of the worker that failed first, as it would have been raised in this process."""
    rank, failure = error.get_first_failure()
    if failure.exitcode == STOPPED:
        return Stopped("")
    # A worker's exception comes as {message, extraInfo}; a worker that was ended, as a text. One that raised
    # may end by a signal all the same, as threads of a process group sometimes do not survive its exit.
    raised: Any = failure.message
    reported = raised if isinstance(raised, dict) else {"message": raised}
    kind, _, text = str(reported["message"]).partition(": ")
    if kind in ("UserError", "InvalidValue"):
        return UserError(text)
    if kind == "RunFailed":
        return RunFailed(text)
    if failure.exitcode < 0 and reported is not raised:
        name = signal.Signals(-failure.exitcode).name
        return RunFailed(
            f"rank {rank} (pid {failure.pid}) was ended by {name}; the other workers were stopped"
        )
    print(reported.get("extraInfo", {}).get("py_callstack", ""), file=sys.stderr)
    return RunFailed(f"rank {rank} failed: {kind}: {text}; the other workers were stopped")
