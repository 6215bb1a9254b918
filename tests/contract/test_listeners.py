"""The kernel's own table of sockets, with a real program of another user."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from hcna_ray.listeners import stranger_at

NOBODY = 65534
LISTENS = """
import os, socket, sys
os.setuid(int(sys.argv[1]))
server = socket.create_server(("127.0.0.1", 0))
print(server.getsockname()[1], flush=True)
sys.stdin.read()
"""


def test_ones_own_socket_is_no_strangers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert stranger_at("127.0.0.1", server.getsockname()[1], os.getuid()) is None


@pytest.mark.skipif(os.getuid() != 0, reason="only root may start a program of another user")
def test_another_users_socket_is() -> None:
    program = subprocess.Popen(
        [sys.executable, "-I", "-c", LISTENS, str(NOBODY)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with program:
        assert program.stdout is not None
        port = int(program.stdout.readline())
        assert stranger_at("127.0.0.1", port, os.getuid()) == NOBODY
        assert stranger_at("127.0.0.1", port, NOBODY) is None
