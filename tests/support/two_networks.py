"""Two machines with nothing but a cable between them, to see what firewall rules let through.

``python -m tests.support.two_networks`` runs in a network namespace of its own, which is ``here``,
and makes another one, which is ``there``. It reads one JSON object and prints one::

    {"listen": [PORT, ...], "elsewhere": SCRIPT, "sources": {NAME: ADDRESS, ...},
     "steps": [{"script": SCRIPT, "reach": {NAME: [PORT, ...]}}, ...], "own_port": PORT}

For each step the script is given to ``nft -f``, and every source connects to every port: ``there``
is at ``sources`` and ``here`` at `HERE4` and `HERE6`. What is expected is waited for; what is not
gets a moment. Told are the ports that were reached, the rules after each step, whether connections
of the first step still carry bytes, and whether ``here`` hears an answer on its ``own_port``.
"""

from __future__ import annotations

import json
import select
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from typing import Any

HERE4, HERE6 = "10.99.0.1", "fd99::1"
#: Longest wait for what is expected, and the moment for what is not.
_PATIENCE_S, _MOMENT_S = 15.0, 0.3

Json = dict[str, Any]


def entered(pid: int, *command: str) -> list[str]:
    """Return a command inside the other network."""
    return ["nsenter", f"--net=/proc/{pid}/ns/net", "--", *command]


def sh(*command: str, text: str = "") -> str:
    """Run a command; what it says if it fails is the error."""
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (command, done.stderr)
    return done.stdout


def reached(source: str, ports: list[int], expected: list[int]) -> list[int]:
    """Connect from an address to all ports of ``here`` at once; return those that answer."""
    six = ":" in source
    family, target = (socket.AF_INET6, HERE6) if six else (socket.AF_INET, HERE4)
    asking: dict[int, socket.socket] = {}
    open_: set[int] = set()
    with ExitStack() as stack:
        for port in ports:
            asking[port] = one = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
            one.setblocking(False)
            one.bind((source, 0))
            one.connect_ex((target, port))
        until = time.monotonic() + _PATIENCE_S
        while time.monotonic() < until:
            if open_ >= set(expected):
                until = min(until, time.monotonic() + _MOMENT_S)
            left = [one for port, one in asking.items() if port not in open_]
            _, ready, _ = select.select([], left, [], 0.05)
            for port, one in asking.items():
                if one in ready:
                    error = one.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                    assert error == 0, (source, port, error)
                    open_.add(port)
    return sorted(open_)


def listen_on(ports: list[int]) -> list[socket.socket]:
    """Listen on all addresses, as Ray does."""
    found = []
    for port in ports:
        one = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
        one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        one.bind(("::", port))
        one.listen(64)
        found.append(one)
    return found


def lay_cable(pid: int, sources: list[str]) -> None:
    """Connect the two networks and give both their addresses."""
    sh("ip", "link", "set", "lo", "up")
    sh("ip", "link", "add", "here", "type", "veth", "peer", "name", "there", "netns", str(pid))
    for address in (f"{HERE4}/16", f"{HERE6}/64"):
        sh("ip", "addr", "add", address, "dev", "here", *(["nodad"] if ":" in address else []))
    sh("ip", "link", "set", "here", "up")
    for source in sources:
        size, more = ("64", ["nodad"]) if ":" in source else ("16", [])
        sh(*entered(pid, "ip", "addr", "add", f"{source}/{size}", "dev", "there", *more))
    sh(*entered(pid, "ip", "link", "set", "there", "up"))


def main(asked: Json) -> Json:
    """Do what the module says."""
    told: Json = {"steps": []}
    with ExitStack() as stack:
        other = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", "echo ready; exec sleep 600"],
            stdout=subprocess.PIPE,
            text=True,
        )
        stack.callback(other.wait)
        stack.callback(other.kill)
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        lay_cable(other.pid, list(asked["sources"].values()))
        listeners = [stack.enter_context(one) for one in listen_on(asked["listen"])]
        sh("nft", "-f", "-", text=asked["elsewhere"])
        kept: dict[str, Kept] = {}
        for step in asked["steps"]:
            sh("nft", "-c", "-f", "-", text=step["script"])
            sh("nft", "-f", "-", text=step["script"])
            found = {
                name: ask(other.pid, source, asked["listen"], step["reach"].get(name, []))
                for name, source in asked["sources"].items()
            }
            if not kept:
                for name, at in asked["keep"].items():
                    listener = listeners[asked["listen"].index(at)]
                    kept[name] = Kept(other.pid, asked["sources"][name], at, listener)
                    stack.callback(kept[name].close)
            told["steps"].append(
                {
                    "reached": found,
                    "kept": {name: one.carries(name in step["kept"]) for name, one in kept.items()},
                    "own": reached_here(asked["listen"]),
                    "ruleset": sh("nft", "-s", "list", "ruleset"),
                }
            )
        told["answered"] = answered(other.pid, asked["own_port"], asked["sources"])
    return told


def ask(pid: int, source: str, ports: list[int], expected: list[int]) -> list[int]:
    """Have ``there`` connect from one of its addresses."""
    words = json.dumps([source, ports, expected])
    return list(json.loads(sh(*entered(pid, sys.executable, "-m", __spec__.name, "reach", words))))


def reached_here(ports: list[int]) -> list[int]:
    """Return the ports that this machine reaches itself, by loopback and by its own addresses."""
    found = set(ports)
    for host in ("127.0.0.1", "::1", HERE4, HERE6):
        for port in ports:
            try:
                socket.create_connection((host, port), timeout=5).close()
            except OSError:
                found.discard(port)
    return sorted(found)


class Kept:
    """A connection from ``there`` that stays open over several steps."""

    def __init__(self, pid: int, source: str, port: int, listener: socket.socket) -> None:
        """Open it."""
        # What came from the tries before is not it.
        listener.setblocking(False)
        while True:
            try:
                listener.accept()[0].close()
            except BlockingIOError:
                break
        listener.setblocking(True)
        listener.settimeout(_PATIENCE_S)
        code = (
            "import socket,sys;"
            f"s=socket.create_connection(({HERE4!r},{port}),15,({source!r},0));"
            "[s.sendall(b'x') for line in sys.stdin]"
        )
        command = entered(pid, sys.executable, "-u", "-c", code)
        self._there = subprocess.Popen(command, stdin=subprocess.PIPE, text=True)
        self._here, _ = listener.accept()

    def carries(self, expected: bool) -> bool:
        """Whether a byte that is sent there arrives here."""
        assert self._there.stdin is not None
        self._there.stdin.write("\n")
        self._there.stdin.flush()
        self._here.settimeout(_PATIENCE_S if expected else _MOMENT_S)
        try:
            return self._here.recv(1) == b"x"
        except TimeoutError:
            return False

    def close(self) -> None:
        """End both sides."""
        self._there.kill()
        self._there.communicate()
        self._here.close()


def answered(pid: int, own_port: int, sources: dict[str, str]) -> bool:
    """Whether an answer comes back to a connection that ``here`` opens from one of its ports."""
    there = sources["stranger"]
    code = (
        f"import socket;s=socket.create_server(({there!r},5000));print('ready',flush=True);"
        "c,_=s.accept();c.sendall(b'answer')"
    )
    with subprocess.Popen(
        entered(pid, sys.executable, "-c", code), stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == "ready\n"
            with socket.create_connection(
                (there, 5000), timeout=_PATIENCE_S, source_address=(HERE4, own_port)
            ) as one:
                return one.recv(6) == b"answer"
        except OSError:
            return False
        finally:
            server.kill()


if __name__ == "__main__":
    if sys.argv[1:2] == ["reach"]:
        print(json.dumps(reached(*json.loads(sys.argv[2]))))  # noqa: T201
    else:
        print(json.dumps(main(json.load(sys.stdin))))  # noqa: T201
