"""Where the launchers of a run's nodes meet: in a store on node 0, once for each attempt at the run.

Node 0 serves the store for as long as its launcher lives, on the address of launch.rendezvous; a run of one
node has a store of its own on 127.0.0.1. What launchers write there is JSON, and is checked when it is read.
An attempt begins when node 0 says which nodes take part. Nodes that it does without wait for the next one,
and so does one that comes late, such as the replacement of a lost machine.
"""

import contextlib
import json
import platform
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from dsv3.config.launch import LaunchConfig
from dsv3.distributed.store import LOOPBACK, connect_store, listen, serve_store
from dsv3.errors import RunFailed, UserError, comma_separated, quoted
from dsv3.metrics.progress import phase

if TYPE_CHECKING:
    from torch.distributed.elastic.rendezvous import RendezvousHandler

BACKEND = "dsv3"
"""Name of our rendezvous among those of torch's agent."""

_REQUEST = timedelta(seconds=60)
"""Seconds that one request to the store may take: it is answered at once, or node 0 is gone."""

# Seconds between two looks for the others; that node 0 takes to decide, beyond launch.timeout, with a pause;
# and that it waits for the others to learn of the end.
_LOOK_EVERY, _DECIDES, _FAREWELL = 0.2, 600.0, 10.0

_WATCH_EVERY = 1.0
"""Seconds between two looks for the failure of another node: 256 nodes make as many requests a second."""

_MOST_BYTES = 1 << 16
"""Bytes of an entry of a launcher."""

_DONE = "done"


@dataclass(frozen=True)
class Attempt:
    """A decision of node 0: who takes part in an attempt, and where the run stands."""

    number: int
    nodes: tuple[int, ...]
    """By launch.node_rank, in the order of their ranks."""
    told: Mapping[str, Any]
    """What else node 0 tells: its run directory, and why there is another attempt."""


class Rendezvous:
    """The meeting place of one run; use it as a context manager.

    Args:
        ranks: of each node.
    """

    def __init__(self, launch: LaunchConfig, ranks: int) -> None:
        self.launch = launch
        self.ranks = ranks
        self.node = launch.node_rank
        self.id = secrets.token_hex(8)
        """Tells two launchers apart that have been given the same number."""
        self.store: Any = None
        self.host, self.port = LOOPBACK, 0
        if launch.nnodes > 1:
            assert launch.rendezvous is not None  # planned so
            host, _, port = launch.rendezvous.rpartition(":")
            self.host, self.port = host.strip("[]"), int(port)

    def __enter__(self) -> "Rendezvous":
        """Serve or find the store; UserError where its address cannot be had, or node 0 does not come."""
        if self.node == 0:
            source = f"launch.rendezvous={self.launch.rendezvous}" if self.launch.nnodes > 1 else LOOPBACK
            bound = listen(self.host, self.port, source)
            self.port = bound.getsockname()[1]
            self.store = serve_store(bound, self.host, _REQUEST)
            self._write("attempt", {"number": 0})
        else:
            self._find()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        """Tell the other nodes that this was the last attempt, where node 0 has not told them a reason."""
        if self.launch.nnodes == 1:
            return
        with contextlib.suppress(RuntimeError, RunFailed):  # of a node 0 that is gone
            if self.node == 0:
                if not self.store.check(["end"]):
                    stopped = None if kind is None else RunFailed("node 0 was stopped, and with it the run")
                    self.end(error if isinstance(error, UserError | RunFailed) else stopped)
                deadline = time.monotonic() + _FAREWELL
                while int(self.store.add("left", 0)) < self._nodes_seen() and time.monotonic() < deadline:
                    time.sleep(_LOOK_EVERY)
            else:
                self.store.add("left", 1)

    def meet(
        self, number: int, failure: BaseException | None = None, patience: float = 0.0
    ) -> dict[int, dict[str, Any]]:
        """Come to attempt `number`; on node 0 return the others by node, as far as they come in time.

        All must come to the first attempt: UserError that names those that are missing.

        Args:
            failure: how the attempt before has ended here.
            patience: seconds that node 0 waits for the others, where that is not launch.timeout.
        """
        own = {"ranks": self.ranks, "nnodes": self.launch.nnodes, "host": platform.node(), "id": self.id}
        if failure is not None:
            own |= {"failure": type(failure).__name__, "text": str(failure)}
        if self.launch.nnodes == 1:
            return {0: own}
        key = f"{number}: node {self.node}"
        if self._write_first(key, own) != own and number == 0:
            raise UserError(
                f"launch.node_rank={self.node} is another launcher's: each node has a number of its own"
            )
        self._write(key, own)
        if self.node > 0:
            return {}
        self._write("attempt", {"number": number})
        here, deadline = {0: own}, time.monotonic() + (patience or self.launch.timeout)
        with phase("waiting for the other nodes"):
            while len(here) < self.launch.nnodes and time.monotonic() < deadline:
                for node in range(1, self.launch.nnodes):
                    if node not in here and (found := self._read(f"{number}: node {node}")) is not None:
                        here[node] = found
                        self._check_same(node, found)
                if len(here) < self.launch.nnodes:
                    time.sleep(_LOOK_EVERY)
        missing = sorted({*range(self.launch.nnodes)} - {*here})
        if missing and number == 0:
            nodes = f"node{'s' if len(missing) > 1 else ''} {comma_separated(missing[:8])}"
            more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
            raise UserError(
                f"launch.rendezvous={self.launch.rendezvous}: {nodes}{more} of {self.launch.nnodes} did not "
                f"come in {self.launch.timeout} s (launch.timeout): start the same command there with its "
                "launch.node_rank"
            )
        return here

    def begin(self, attempt: Attempt) -> None:
        """Let an attempt begin, on node 0: tell the others who takes part, and how."""
        if self.launch.nnodes > 1:
            self._write(f"{attempt.number}: go", {"nodes": list(attempt.nodes), **attempt.told})

    def wait(self, number: int) -> Attempt | None:
        """Return what node 0 has decided of attempt `number`; None where the run is at its end by now.

        Raises:
            UserError, RunFailed: what node 0 says of a run that does not go on.
        """
        deadline = time.monotonic() + self.launch.timeout + _DECIDES
        with phase("waiting for node 0", each_node=True):
            while (found := self._read(f"{number}: go")) is None:
                if (end := self._read("end")) is not None:
                    if end.get("failure") == _DONE:
                        return None
                    raise _as_error(end)
                if time.monotonic() > deadline:
                    raise RunFailed(
                        f"node 0 says nothing: is launch.rendezvous={self.launch.rendezvous} its own?"
                    )
                time.sleep(_LOOK_EVERY)
        nodes = found.pop("nodes", None)
        known = range(self.launch.nnodes)
        if not isinstance(nodes, list) or not nodes or not all(type(n) is int and n in known for n in nodes):
            raise RunFailed(f"launch.rendezvous={self.launch.rendezvous} holds what node 0 has not written")
        return Attempt(number, tuple(nodes), found)

    def end(self, reason: BaseException | None) -> None:
        """Say on node 0 that there is no further attempt, and why."""
        kind = type(reason).__name__ if reason is not None else _DONE
        self._write("end", {"failure": kind, "text": str(reason or "")})

    def current_attempt(self) -> int:
        """Return the number of the attempt to come to: a launcher that comes late begins with a later one."""
        if self.node == 0:
            return 0
        number = (self._read("attempt") or {}).get("number", 0)
        number = number if type(number) is int and number >= 0 else 0
        return number + int(self._read(f"{number}: go") is not None)

    @contextlib.contextmanager
    def watch(self, number: int, end_workers: Callable[[], None]) -> Iterator[Callable[[], bool]]:
        """End this node's workers once another node has failed; yield whether one has.

        Where this node fails in the body it tells the others. gloo fails on its own when a rank is gone; NCCL
        waits for launch.timeout.
        """
        if self.launch.nnodes == 1:
            yield lambda: False
            return
        key, done, seen = f"{number}: failed", threading.Event(), threading.Event()
        store = self.store.clone()  # the agent may wait in the other connection

        def look() -> None:
            with contextlib.suppress(RuntimeError):
                while not done.wait(_WATCH_EVERY):
                    if store.check([key]):
                        seen.set()
                        end_workers()
                        return
                return
            if not done.is_set():  # node 0 is gone, and with it the store of the workers
                seen.set()
                end_workers()

        thread = threading.Thread(target=look, name="other nodes", daemon=True)
        thread.start()
        try:
            yield seen.is_set
        except Exception:
            with contextlib.suppress(RunFailed):
                self._write(key, {"node": self.node})
            raise
        finally:
            done.set()
            thread.join()

    def handler(self, attempt: Attempt) -> "RendezvousHandler":
        """Return what torch's agent asks for the place of its node; the nodes have met already."""
        from torch.distributed import PrefixStore  # type: ignore[attr-defined]
        from torch.distributed.elastic.rendezvous import (
            RendezvousHandler,
            RendezvousInfo,
            RendezvousStoreInfo,
        )

        store = PrefixStore(f"agent {attempt.number}", self.store)
        place, count = attempt.nodes.index(self.node), len(attempt.nodes)
        bootstrap = RendezvousStoreInfo(self.host, self.port)

        class Met(RendezvousHandler):
            """A rendezvous that is over."""

            use_agent_store = True

            def get_backend(self) -> str:
                return BACKEND

            def next_rendezvous(self) -> RendezvousInfo:
                return RendezvousInfo(store, place, count, bootstrap)

            def is_closed(self) -> bool:
                return False

            def set_closed(self) -> None:
                """Do nothing: the launchers say the end."""

            def num_nodes_waiting(self) -> int:
                return 0

            def get_run_id(self) -> str:
                return f"dsv3-{attempt.number}"

            def shutdown(self) -> bool:
                return True

        return Met()

    def _find(self) -> None:
        """Connect to the store of node 0, which may come later than this node.

        The waiting is Python's, so that a signal is heard in it.
        """
        deadline, timeout = time.monotonic() + self.launch.timeout, self.launch.timeout
        with phase("waiting for node 0", each_node=True):
            while True:
                try:
                    socket.create_connection((self.host, self.port), 5.0).close()
                    break
                except OSError as error:
                    if time.monotonic() > deadline:
                        raise UserError(
                            f"launch.rendezvous={self.launch.rendezvous} did not answer in {timeout} s "
                            f"(launch.timeout): {error.strerror or error}; start the same command on node 0 "
                            "with launch.node_rank=0"
                        ) from None
                    time.sleep(_LOOK_EVERY)
        try:
            self.store = connect_store(self.host, self.port, _REQUEST)
            self.store.set_timeout(_REQUEST)
        except RuntimeError:
            raise UserError(
                f"launch.rendezvous={self.launch.rendezvous} is answered by something else than node 0: "
                "give a port that is free there"
            ) from None

    def _check_same(self, node: int, found: Mapping[str, Any]) -> None:
        """Raise UserError where a node has been told of another world than this one."""
        for key, name in (("nnodes", "launch.nnodes"), ("ranks", "launch.nproc")):
            own = self.launch.nnodes if key == "nnodes" else self.ranks
            if found.get(key) != own:
                raise UserError(
                    f"{name}: node {node} has {quoted(found.get(key))}, node 0 has {own}: "
                    "type the same on every node"
                )

    def _nodes_seen(self) -> int:
        return sum(self.store.check([f"0: node {node}"]) for node in range(1, self.launch.nnodes))

    def _write(self, key: str, value: Mapping[str, Any]) -> None:
        with self._found():
            self.store.set(key, json.dumps(value))

    def _write_first(self, key: str, value: Mapping[str, Any]) -> Any:
        """Write an entry unless there is one; return the one that is there then."""
        with self._found():
            return _parsed(self.store.compare_set(key, "", json.dumps(value)))

    def _read(self, key: str) -> dict[str, Any] | None:
        """Return an entry, None where there is none."""
        with self._found():
            return _parsed(self.store.get(key)) if self.store.check([key]) else None

    @contextlib.contextmanager
    def _found(self) -> Iterator[None]:
        """Raise RunFailed where a request of the body finds no node 0 any more."""
        try:
            yield
        except RuntimeError:
            where = f"launch.rendezvous={self.launch.rendezvous}"
            raise RunFailed(f"the launcher of node 0 has ended ({where})") from None


def _parsed(raw: bytes) -> dict[str, Any]:
    """Return an entry of a launcher; an empty one for what is none."""
    try:
        value = json.loads(raw) if len(raw) <= _MOST_BYTES else None
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {}


def _as_error(end: Mapping[str, Any]) -> Exception:
    """Return the end that node 0 has told as this node raises it."""
    text = str(end.get("text", ""))[:2000]
    if end.get("failure") in ("UserError", "InvalidValue"):
        return UserError(text)
    return RunFailed(text or "node 0 has ended the run")


def as_failure(record: Mapping[str, Any]) -> tuple[str, str]:
    """Return kind and reason of the failure that a node has come with; two empty texts for none."""
    return str(record.get("failure", "")), str(record.get("text", ""))[:2000]
