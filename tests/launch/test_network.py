"""Nobody gets in from the network: which address a store listens on. An attack: test_three_accidents.py."""

import socket
from datetime import timedelta

import psutil
import pytest

from dsv3.distributed import process_group
from dsv3.distributed.store import listen, rank_store, serve_store, stay_on_this_node
from dsv3.errors import RunFailed, UserError
from tests.launch.attacker import listening


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
