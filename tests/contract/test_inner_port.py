"""Serve's port for calls between replicas is one of those that are declared."""

from __future__ import annotations

import inspect
import socket
from typing import Any

import pytest
from ray._common import tls_utils
from ray.serve._private import replica

from hcna_ray.api import inner_port
from hcna_ray.api.inner_port import declared, keep_inner_port


def a_range(count: int) -> tuple[int, int]:
    """Return some ports of this machine at which nobody listens."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        first = one.getsockname()[1]
    first = min(first, 60_000)
    return first, first + count - 1


class Server:
    """Notes where it was told to listen, and does not at some ports."""

    def __init__(self, *refused: int) -> None:
        self.told: list[str] = []
        self.refused = refused

    def add(self, server: Any, address: str) -> int:
        assert server is self
        self.told.append(address)
        port = int(address.rpartition(":")[2])
        if port in self.refused:
            raise RuntimeError("bind failed")
        return port


def test_any_port_is_one_of_the_range_and_others_are_left_alone() -> None:
    first, last = a_range(5)
    server = Server()
    add = declared(server.add, first, last)

    assert first <= add(server, "[::]:0") <= last
    assert add(server, "0.0.0.0:1234") == 1234
    assert server.told[-1] == "0.0.0.0:1234"


def test_what_another_one_has_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen(1)
        taken = other.getsockname()[1]
        monkeypatch.setattr(inner_port.os, "getpid", lambda: 0)
        server = Server(taken + 1)
        add = declared(server.add, taken, taken + 9)

        assert taken + 1 < add(server, "[::]:0") <= taken + 9
        assert f"[::]:{taken}" not in server.told
        with pytest.raises(RuntimeError, match=r"replica_grpc_min"):
            declared(server.add, taken, taken)(server, "[::]:0")


def test_serve_asks_for_its_port_as_this_module_expects(monkeypatch: pytest.MonkeyPatch) -> None:
    original = replica.add_port_to_grpc_server
    assert original is tls_utils.add_port_to_grpc_server
    assert 'add_port_to_grpc_server(self._server, "[::]:0")' in inspect.getsource(replica)
    monkeypatch.setattr(replica, "add_port_to_grpc_server", original)
    keep_inner_port(*a_range(3))

    assert replica.add_port_to_grpc_server is not original
    monkeypatch.delattr(replica, "add_port_to_grpc_server")
    with pytest.raises(ImportError, match="add_port_to_grpc_server"):
        keep_inner_port(*a_range(3))
