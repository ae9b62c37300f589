"""Workers of this command: started with torch's elastic agent, stopped and ended together.

The agent waits half a minute for the others after one worker has failed; here they get some seconds and are
killed then. This file is one attempt at a run; restarts.py makes another one where that is wanted.
"""

import contextlib
import logging
import multiprocessing
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
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
    obey_launcher_alone,
)
from dsv3.distributed.store import ATTEMPT
from dsv3.distributed.streams import outlive_readers
from dsv3.errors import KILLED, STOPPED, RunFailed, RunOver, UserError, refused_by_system
from dsv3.launch.job import Job
from dsv3.launch.rendezvous import BACKEND, Attempt, Rendezvous
from dsv3.launch.worker_signals import WorkerSignals, pass_signals_on
from dsv3.metrics.progress import phase

if TYPE_CHECKING:
    import psutil
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters

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


class RankRaised(RunFailed):
    """A rank ended with an error that nobody foresaw: often that another rank was gone."""


class EndedElsewhere(RunFailed):
    """The workers of this node were ended because those of another node had failed."""


def start_workers(
    job: Job, rendezvous: Rendezvous, attempt: Attempt, on_run_dir: Callable[[Path], None] | None = None
) -> float | None:
    """Start one process per rank of this node and wait for all; return rank 0's result where it is here.

    The first worker that fails ends the others. A stop of the launcher reaches the workers as SIGTERM.

    Args:
        on_run_dir: is told the run directory once rank 0 has made it, where that is on this node.
    """
    words = "" if job.sweep is not None else NOTHING_SAVED if job.config.task.writes_run else "stopped"
    with leave_on_signal(lambda: words), phase("importing torch"):
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _silence_agent()
    count = job.plan.world_size // len(attempt.nodes)
    options = {**_agent_options(rendezvous, attempt), "nproc_per_node": count}
    spawned = multiprocessing.get_context("spawn")
    run_dir, telling = spawned.Pipe(duplex=False)
    known = LaunchConfig.__dataclass_fields__  # shutdown_timeout is newer than torch 2.11
    config = LaunchConfig(**{name: value for name, value in options.items() if name in known})
    before = {child.pid for child in _children()}
    try:
        with (
            pass_signals_on(count, before, words) as signals,
            _spawning(),
            _agent_environment(attempt),
            rendezvous.watch(attempt.number, lambda: kill_children(before)) as failed_elsewhere,
            kill_stragglers(),
            phase(f"starting {count} workers", until=lambda: signals.first_has_begun),
        ):
            launch = elastic_launch(config, _work)
            try:
                results: dict[int, Any] = launch(job, os.getpid(), signals.pids, telling)
            except ChildFailedError as error:
                if signals.asked and _was_stopped(error, signals):
                    raise KeyboardInterrupt from None
                failure = _first_failure(error)
                if isinstance(failure, RunFailed) and failed_elsewhere():
                    raise EndedElsewhere(
                        "the workers of another node failed, and with them the run"
                    ) from None
                raise failure from None
    finally:
        if run_dir.poll() and on_run_dir is not None:
            on_run_dir(Path(os.fsdecode(run_dir.recv_bytes())))
        run_dir.close()
        telling.close()
    if any(isinstance(result, Stopped) for result in results.values()):
        raise results.get(0, Stopped(""))  # rank 0 says what it saved
    return results.get(0)


def _children() -> "list[psutil.Process]":
    """Return the processes below this one."""
    import psutil

    return psutil.Process().children(recursive=True)


def _agent_options(rendezvous: Rendezvous, attempt: Attempt) -> dict[str, Any]:
    """Return how the agent of this node finds the others, and how it treats its workers."""
    from torch.distributed.elastic.rendezvous import rendezvous_handler_registry

    rendezvous_handler_registry.register(BACKEND, _met)
    return {
        "min_nodes": len(attempt.nodes),
        "max_nodes": len(attempt.nodes),
        "run_id": f"dsv3-{attempt.number}",
        "rdzv_backend": BACKEND,
        "rdzv_endpoint": "",
        "rdzv_configs": {"handler": rendezvous.handler(attempt)},
        "max_restarts": 0,
        "monitor_interval": 0.2,
        "start_method": "spawn",
        "signals_to_handle": "none",  # ours are
        "shutdown_timeout": _SHUTDOWN_TIMEOUT,
    }


def _met(parameters: "RendezvousParameters") -> "RendezvousHandler":
    """Return the rendezvous that the launchers have made already."""
    handler: RendezvousHandler = parameters.config["handler"]
    return handler


@contextlib.contextmanager
def _agent_environment(attempt: Attempt) -> Iterator[None]:
    """Tell the workers which keys of the store are theirs, and the agent to compute ranks by itself.

    Without the second the agents would tell each other through the store what launchers know already.
    """
    own = {ATTEMPT: f"attempt {attempt.number}", "TORCH_ELASTIC_WORKER_IDENTICAL": "1"}
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


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


def _work(job: Job, launcher: int, pids: Any, telling: Connection) -> float | Stopped | None:
    """Run the task in one worker, which a kill -9 of its launcher ends as well.

    A stop is returned like any other result: an error would make the agent end the others.
    """
    die_with_parent()
    if os.getppid() != launcher:
        os._exit(1)
    obey_launcher_alone()
    pids[int(os.environ["LOCAL_RANK"])] = os.getpid()
    outlive_readers()
    collect_rarely()
    if os.environ["RANK"] == "0":
        job.on_run_dir = lambda directory: telling.send_bytes(os.fsencode(directory))
    try:
        with phase("importing torch"):
            task = build(job.config.task)
        result: float | None = task.run(job)
        return result
    except Stopped as stopped:
        return stopped
    except OSError as error:  # a full disk is the same mistake here as in a process that is alone
        if mistake := refused_by_system(error):
            raise mistake from error
        raise


def _was_stopped(error: "ChildFailedError", signals: WorkerSignals) -> bool:
    """Return True where a worker has failed because the launcher was asked to stop."""
    _, failure = error.get_first_failure()
    return not signals.had_begun() or failure.exitcode in (KILLED, -signal.SIGTERM)


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
    if kind in ("RunFailed", "RunOver"):
        return RunOver(text) if kind == "RunOver" else RunFailed(text)
    if failure.exitcode < 0 and reported is not raised:
        name = signal.Signals(-failure.exitcode).name
        return RunFailed(
            f"rank {rank} (pid {failure.pid}) was ended by {name}; the other workers were stopped"
        )
    print(reported.get("extraInfo", {}).get("py_callstack", ""), file=sys.stderr)
    return RankRaised(f"rank {rank} failed: {kind}: {text}; the other workers were stopped")
