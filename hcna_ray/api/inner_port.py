"""Where Serve's replica listens for calls of other deployments: at a port that is declared.

Serve 2.60 has each replica listen for them on every address, at a port that the kernel chooses, so
no rule for ports can name it (`ray.serve._private.replica`, ``_on_initialized``). Whoever connects
there must show a certificate of the cluster's authority; here it is also put where the firewall's
rules close it to other machines. C1 is one deployment, and nobody calls it there.
"""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

#: What Serve asks for: any port, on every address.
_ANY = "[::]:0"

AddPort = Callable[[Any, str], int]


def keep_inner_port(first: int, last: int) -> None:
    """Have the replica of this process listen at one of these ports. Called before it listens.

    Raises:
        ImportError: This Serve opens its port in another way; look for where, and mend this.
    """
    from ray.serve._private import replica

    add = getattr(replica, "add_port_to_grpc_server", None)
    if add is None:
        raise ImportError("ray.serve._private.replica has no add_port_to_grpc_server")
    vars(replica)["add_port_to_grpc_server"] = declared(add, first, last)


def declared(add: AddPort, first: int, last: int) -> AddPort:
    """Return ``add`` with a port out of a range instead of any.

    Args:
        add: Makes a gRPC server listen at an address, and returns the port.
        first: The first port of the range.
        last: The last one.
    """

    def add_port(server: Any, address: str) -> int:
        if address != _ANY:
            return add(server, address)
        for port in _free(first, last):
            try:
                return add(server, f"[::]:{port}")
            except RuntimeError:  # Somebody was faster.
                continue
        raise RuntimeError(
            f"no port from {first} to {last} is free for C1's replica: see ports.replica_grpc_min"
        )

    return add_port


def _free(first: int, last: int) -> Iterator[int]:
    """Return the ports at which nobody listens, beginning somewhere else in each process.

    gRPC itself would share a port with another replica that has it already, and not say so.
    """
    ports = range(first, last + 1)
    begin = os.getpid() % len(ports)
    for port in itertools.chain(ports[begin:], ports[:begin]):
        if not _is_taken(port):
            yield port


def _is_taken(port: int) -> bool:
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    with socket.socket(family) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        try:
            one.bind(("", port))
            one.listen(1)
        except OSError:
            return True
    return False
