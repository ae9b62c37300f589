"""Starts what a job needs: nothing, this process, or workers of its own; torch is imported only then."""

import contextlib
import ctypes
import logging
import os
import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING, Any

from dsv3.config import build
from dsv3.planning.report import require_fits
from dsv3.runtime.commandline import under_launcher
from dsv3.runtime.errors import RunFailed, UserError
from dsv3.runtime.job import Job
from dsv3.runtime.rundir import check_run_dir, check_same_run
from dsv3.runtime.signals import KILLED, STOPPED, Stopped

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

_PR_SET_PDEATHSIG = 1
# What a worker may take to save after a stop signal before it is killed, in seconds.
_SHUTDOWN_TIMEOUT = 600


def launch(job: Job) -> float | None:
    """Run the job's task here or in workers started for it; rank 0's result."""
    check(job)
    task = job.config.task
    if not task.uses_model or job.plan.world_size == 1 or under_launcher():
        return build(task).run(job)  # type: ignore[no-any-return]
    return _start_workers(job)


def check(job: Job) -> None:
    """The last checks before anything starts: UserError for a run directory or a plan that cannot do."""
    if job.config.task.writes_run and job.named_run_dir:
        check_run_dir(job.run_dir, job.config.run.resume)
        if job.config.run.resume:
            check_same_run(job.config, job.run_dir)
    if job.config.task.must_fit:
        require_fits(job.plan)


def _start_workers(job: Job) -> float | None:
    """Start one process a rank with torch's elastic agent and wait for all of them.

    The first worker that fails ends the others. SIGTERM and Ctrl-C reach the workers as SIGTERM.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _silence_agent()
    nodes = job.config.launch.nnodes
    options: dict[str, Any] = {
        "min_nodes": nodes,
        "max_nodes": nodes,
        "nproc_per_node": job.plan.world_size // nodes,
        "run_id": f"dsv3-{os.getpid()}",
        "rdzv_backend": "c10d",
        "rdzv_endpoint": "localhost:0",
        "max_restarts": 0,
        "monitor_interval": 0.1,
        "start_method": "spawn",
        "signals_to_handle": "SIGHUP,SIGQUIT",
        "shutdown_timeout": _SHUTDOWN_TIMEOUT,
    }
    known = LaunchConfig.__dataclass_fields__  # shutdown_timeout is newer than torch 2.11
    config = LaunchConfig(**{name: value for name, value in options.items() if name in known})
    try:
        with _signals_as_exceptions():
            results: dict[int, Any] = elastic_launch(config, _work)(job, os.getpid())
    except ChildFailedError as error:
        raise _first_failure(error) from None
    except SignalException:
        raise Stopped("") from None  # rank 0 has said what it saved
    return results[0]  # type: ignore[no-any-return]


def _silence_agent() -> None:
    """Keep the agent from reporting a stop or a failure in logs of its own; ours is one message."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(
            ("torch.distributed.elastic", "torch.multiprocessing")
        ):  # each of its modules sets its own level
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)


def _work(job: Job, launcher: int) -> float | None:
    """One worker's life, which a kill -9 of its launcher ends as well."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:
        os._exit(1)
    try:
        return build(job.config.task).run(job)  # type: ignore[no-any-return]
    except Stopped as stopped:
        if os.environ["RANK"] == "0":
            print(stopped.message, file=sys.stderr, flush=True)
        raise


@contextlib.contextmanager
def _signals_as_exceptions() -> Any:
    """The first SIGTERM or Ctrl-C makes the agent stop its workers; a second one ends all at once."""
    from torch.distributed.elastic.multiprocessing.api import SignalException

    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) == 1:
            raise SignalException("stopped by a signal", sigval=signal.SIGTERM)
        _kill_children()
        os._exit(KILLED)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _kill_children() -> None:
    import psutil

    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


def _first_failure(error: "ChildFailedError") -> BaseException:
    """The error of the worker that failed first, as it would have been raised in this process."""
    rank, failure = error.get_first_failure()
    if failure.exitcode == STOPPED:
        return Stopped("")
    # A worker's exception comes as {message, extraInfo}; a worker that was ended, as a text.
    reported: Any = failure.message
    reported = reported if isinstance(reported, dict) else {"message": reported}
    kind, _, text = str(reported["message"]).partition(": ")
    if kind in ("UserError", "InvalidValue"):
        return UserError(text)
    if kind == "RunFailed":
        return RunFailed(text)
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        return RunFailed(
            f"rank {rank} (pid {failure.pid}) was ended by {name}; the other workers were stopped"
        )
    print(reported.get("extraInfo", {}).get("py_callstack", ""), file=sys.stderr)
    return RunFailed(f"rank {rank} failed: {kind}: {text}; the other workers were stopped")
