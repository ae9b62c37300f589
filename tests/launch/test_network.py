"""Nobody gets in from the network: what a run listens on, and what an attacker's entries in its store do."""

import os
import pickle
import socket
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest

from dsv3.distributed import process_group
from dsv3.distributed.store import listen, rank_store, serve_store, stay_on_this_node
from dsv3.errors import RunFailed, UserError
from tests.harness.processes import KILL, CommandLine, gone
from tests.launch.test_launch import ENDLESS, TWO


class Payload:
    """A pickle that touches a file where it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch '{self.marker}'",)


def listening(processes: list[psutil.Process]) -> list[tuple[int, str, int]]:
    """Process, address and port of every socket of these processes that takes connections or datagrams."""
    return [
        (process.pid, connection.laddr.ip, connection.laddr.port)
        for process in processes
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
        or (connection.type == socket.SOCK_DGRAM and connection.laddr)
    ]


def other_addresses() -> list[str]:
    """Addresses of this machine that are none of the loopback's."""
    found = [each for name, addresses in psutil.net_if_addrs().items() if name != "lo" for each in addresses]
    return [each.address for each in found if each.family == socket.AF_INET]


def poison(port: int, marker: Path) -> None:
    """Put a pickle under every key that a launcher, an agent of torch or its c10d rendezvous reads."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    store = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=10))
    bare = ["attempt", "end", "left"]
    bare += [f"{attempt}: {name}" for attempt in (0, 1) for name in ("go", "failed", "node 0", "node 1")]
    agent = [f"torchelastic/{name}/0" for name in ("role_info", "assigned_ranks")]
    rendezvous = [f"torch.rendezvous.{run}" for run in ("dsv3", "dsv3-0", "dsv3-1", "none")]
    payload: Any = pickle.dumps(Payload(marker))
    for prefix in ("", "agent 0/", "agent 1/", "attempt 0/", "default_pg/"):
        for key in (*bare, *agent, *rendezvous):
            store.set(prefix + key, payload)


def test_a_run_of_one_node_listens_to_itself_unpickles_nothing_and_tells_of_a_killed_worker(
    command_line: CommandLine, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    process = command_line.start(*command_line.training(run_dir, ENDLESS, *TWO))
    process.wait_for_steps(run_dir, 1)
    launcher, workers = psutil.Process(process.popen.pid), process.workers()
    sockets = listening([launcher, *launcher.children(recursive=True)])
    assert {address for _, address, _ in sockets} <= {"127.0.0.1", "::1"}
    assert {pid for pid, _, _ in sockets} >= {launcher.pid, *(worker.pid for worker in workers)}
    for address in other_addresses()[:1]:
        for _, _, port in sockets:
            with pytest.raises(ConnectionRefusedError), socket.create_connection((address, port), 5):
                pass
    (port,) = [port for pid, _, port in sockets if pid == launcher.pid]
    poison(port, tmp_path / "marker")
    process.wait_for_steps(run_dir, 30)
    workers[1].send_signal(KILL)
    ended = process.wait()
    assert ended.code == 1
    assert f"rank 1 (pid {workers[1].pid}) was ended by SIGKILL" in ended.err
    assert "Traceback" not in ended.err
    assert gone(workers, 0)
    assert not (tmp_path / "marker").exists()


def test_transports_stay_on_the_node_unless_the_user_has_chosen() -> None:
    chosen = {"NCCL_SOCKET_IFNAME": "eth0"}
    stay_on_this_node(chosen)
    assert chosen == {"NCCL_SOCKET_IFNAME": "eth0", "GLOO_SOCKET_IFNAME": "lo"}


def test_a_store_listens_on_its_address_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of rank 0 under srun, where the process group makes its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name in ("TORCHELASTIC_USE_AGENT_STORE", "DSV3_ATTEMPT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    store = rank_store(0, timedelta(seconds=10))
    assert [(ip, p) for _, ip, p in listening([psutil.Process()]) if p == port] == [("127.0.0.1", port)]
    store.set("key", "value")
    assert rank_store(1, timedelta(seconds=10)).get("key") == b"value"


def test_an_address_that_cannot_be_listened_on_is_told_with_the_remedy() -> None:
    with listen("127.0.0.1", 0, "test") as taken:
        with pytest.raises(UserError) as told:
            listen("127.0.0.1", taken.getsockname()[1], "launch.rendezvous=a:1")
        assert str(told.value) == (
            "launch.rendezvous=a:1: the port is in use: give another one, the same on every node"
        )
    with pytest.raises(UserError, match=r"192\.0\.2\.77 is no address of this node"):
        listen("192.0.2.77", 0, "launch.rendezvous=192.0.2.77:1")
    with pytest.raises(UserError, match=r"no-such-host\.invalid is no address"):
        listen("no-such-host.invalid", 1, "launch.rendezvous=no-such-host.invalid:1")


def test_a_name_that_means_the_loopback_only_here_is_bound_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Debian's /etc/hosts has it of a machine's own name; other nodes know it by another address."""
    found = socket.getaddrinfo("127.0.1.1", 0, type=socket.SOCK_STREAM)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with listen("node0", 0, "test") as bound:
        assert bound.getsockname()[0] == "0.0.0.0"
    with listen("localhost", 0, "test") as bound:
        assert bound.getsockname()[0] == "127.0.1.1"


def test_ranks_that_do_not_meet_are_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks of srun, or started by hand; those of a launcher of ours leave it to that to say who died."""

    def fail(*_: object) -> None:
        raise RuntimeError("[c10d] the client socket has timed out\nmore")

    monkeypatch.setattr(process_group, "rank_store", fail)
    for name, value in {"RANK": "1", "WORLD_SIZE": "8", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(
            RunFailed, match=r"rank 1 did not meet the 7 others: \[c10d\] the client .* timed out$"
        ),
        process_group.join_process_group(1, on_cpu=True),
    ):
        pass


def test_a_served_store_takes_its_socket_over() -> None:
    bound = listen("127.0.0.1", 0, "test")
    port = bound.getsockname()[1]
    store = serve_store(bound, "127.0.0.1", timedelta(seconds=10))
    assert (bound.fileno(), store.port) == (-1, port)
