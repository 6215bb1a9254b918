"""TLS handshakes: between two contexts over a socket pair, and with whoever listens here."""

from __future__ import annotations

import socket
import ssl
import threading
from dataclasses import dataclass


@dataclass(frozen=True)
class Handshake:
    """How two sides met. An error is what that side itself found wrong; '' for none."""

    server_error: str
    client_error: str
    version: str

    @property
    def agreed(self) -> bool:
        """Whether both went through and a byte came across in each direction."""
        return not self.server_error and not self.client_error


def connect_here(
    context: ssl.SSLContext, port: int, called: str, *, timeout_s: float
) -> ssl.SSLSocket:
    """Return a connection to a loopback port, its handshake done; the server is called so."""
    # Wrapped before it connects: Python leaves a socket open that was reset before.
    connection = context.wrap_socket(socket.socket(), server_hostname=called)
    try:
        connection.settimeout(timeout_s)
        connection.connect(("127.0.0.1", port))
    except BaseException:
        connection.close()
        raise
    return connection


def shake_hands(server: ssl.SSLContext, client: ssl.SSLContext, called: str) -> Handshake:
    """Let the two meet; the client calls the server by a name or address."""
    here, there = socket.socketpair()
    here.settimeout(10.0)
    there.settimeout(10.0)
    failed: list[str] = []

    def serve() -> None:
        try:
            with server.wrap_socket(here, server_side=True) as connection:
                connection.sendall(connection.recv(1))
        except (OSError, ssl.SSLError) as error:
            failed.append(str(error) or repr(error))
        finally:
            here.close()

    thread = threading.Thread(target=serve)
    thread.start()
    client_error = version = ""
    try:
        with client.wrap_socket(there, server_hostname=called) as connection:
            connection.sendall(b"x")
            if connection.recv(1) != b"x":
                client_error = "the server left"
            version = connection.version() or ""
    except (OSError, ssl.SSLError) as error:
        client_error = str(error) or repr(error)
    finally:
        there.close()
        thread.join(timeout=20.0)
    return Handshake(failed[0] if failed else "", client_error, version)
