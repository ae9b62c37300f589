"""The store in which ranks meet: it listens on the address that was given, on one node on 127.0.0.1 alone.

PyTorch's TCPStore has no password and listens on every interface, whatever host it is told. Here it is made
from a socket that is bound already. Nothing that dsv3 reads from a store is unpickled.
"""

import errno
import ipaddress
import os
import socket
from collections.abc import MutableMapping
from datetime import timedelta
from typing import Any

from dsv3.errors import UserError

LOOPBACK = "127.0.0.1"

ATTEMPT = "DSV3_ATTEMPT"
"""Environment variable of workers: the prefix of their keys in a store that outlives them."""

# Interfaces of the transports of collectives. NCCL takes names as prefixes unless told otherwise.
_INTERFACES = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "=lo"}


def stay_on_this_node(environment: MutableMapping[str, str]) -> None:
    """Let gloo and NCCL listen on the loopback interface alone, unless the user has chosen another one."""
    if "lo" in (name for _, name in socket.if_nameindex()):
        for variable, interface in _INTERFACES.items():
            environment.setdefault(variable, interface)


def listen(host: str, port: int, source: str) -> socket.socket:
    """Return a socket that is bound to `host`, and to `port` or, where that is 0, to a free one.

    A name that means the loopback on its own host (127.0.1.1 in Debian's /etc/hosts) means another address on
    every other node. Which one is not known here, so that such a name is bound to all of them.

    Args:
        source: what the user has given, as messages name it.

    Raises:
        UserError: the address is taken, or is none of this node.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{source}: {host} is no address ({reason})") from None
    family, kind, protocol, _, given = found[0]
    address: tuple[Any, ...] = given
    place = str(address[0])
    loops = ipaddress.ip_address(place.partition("%")[0]).is_loopback
    if loops and not _is_local_name(host):
        address = ("::" if ":" in place else "0.0.0.0", port)
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(1024)  # or another one could take the port before the store listens
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            why = "the port is in use: give another one, the same on every node"
        elif error.errno == errno.EADDRNOTAVAIL:
            why = f"{place} is no address of this node: give one of node 0 that the others reach"
        else:
            why = f"the address cannot be listened on ({error.strerror})"
        raise UserError(f"{source}: {why}") from None
    return bound


def _is_local_name(host: str) -> bool:
    """Return True for a host that means the loopback on every machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def serve_store(bound: socket.socket, host: str, timeout: timedelta) -> Any:
    """Return a store whose server listens on the socket, and which takes the socket over."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    port = bound.getsockname()[1]
    return TCPStore(
        host, port, is_master=True, timeout=timeout, wait_for_workers=False, master_listen_fd=bound.detach()
    )


def connect_store(host: str, port: int, timeout: timedelta) -> Any:
    """Return a store whose server is elsewhere; DistStoreError where none answers in time."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    return TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)


def rank_store(rank: int, timeout: timedelta) -> Any:
    """Return the store that the environment describes, for init_process_group; None where it describes none.

    Workers of this command and of torchrun find the store in their launcher, which may restart them: each
    attempt has keys of its own. Under srun, and where the user has set RANK and the other variables, rank 0
    serves the store on MASTER_ADDR.
    """
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError):
        return None  # init_process_group says which variable is missing
    if rank > 0 or served:
        store = connect_store(host, port, timeout)
    else:
        store = serve_store(listen(host, port, f"MASTER_ADDR={host} MASTER_PORT={port}"), host, timeout)
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(os.environ.get(ATTEMPT, f"ranks {restarts}"), store)
