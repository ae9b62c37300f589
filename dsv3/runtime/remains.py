"""Workers that a failed one leaves behind: given some seconds to end by themselves, then killed."""

import contextlib
import os
import select
import threading
from collections.abc import Collection, Iterator

from dsv3.runtime.signals import STOPPED

# How often new children are looked for, and what others get after a failure; both in seconds.
_LOOK_EVERY = 0.1
_GRACE = 3.0


@contextlib.contextmanager
def end_what_hangs(grace: float = _GRACE) -> Iterator[None]:
    """Kill the children that this process starts meanwhile `grace` seconds after one of them has failed.

    The agent asks the others to stop and waits half a minute, in vain where one is stuck in a
    collective or in whatever made it hang.
    """
    import psutil

    done = threading.Event()
    others = {child.pid for child in psutil.Process().children(recursive=True)}
    threading.Thread(target=_watch, args=(done, grace, others), daemon=True).start()
    try:
        yield
    finally:
        done.set()


def kill_children(others: Collection[int] = ()) -> None:
    """Kill every process below this one, but for `others` and multiprocessing's own that cleans up."""
    import psutil

    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            own = any("resource_tracker" in argument for argument in child.cmdline())
            if not own and child.pid not in others:
                child.kill()


def _watch(done: threading.Event, grace: float, others: set[int]) -> None:
    with contextlib.ExitStack() as opened:
        ends = _Ends(opened)
        while not done.is_set():
            if ends.a_failure(others):
                if not done.wait(grace):
                    kill_children(others)
                return


class _Ends:
    """The ends of children, seen when they come: the agent reaps a child as soon as it looks."""

    def __init__(self, opened: contextlib.ExitStack) -> None:
        self.opened = opened
        self.poll = select.poll()
        self.pids: dict[int, int] = {}
        """By the file descriptors that become readable when they end."""
        self.silent: set[int] = set()
        """Those that give no such descriptor, which some containers forbid: looked at now and then."""

    def a_failure(self, others: set[int]) -> bool:
        """Whether a child other than `others` has failed within the next moment."""
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
        self.opened.callback(os.close, ending)
        self.pids[ending] = pid
        self.poll.register(ending, select.POLLIN)


def _failed(pid: int) -> bool:
    """Whether a child has ended otherwise than by finishing or by a stop; leaves it to be reaped."""
    try:
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return ended is not None and (ended.si_code != os.CLD_EXITED or ended.si_status not in (0, STOPPED))
