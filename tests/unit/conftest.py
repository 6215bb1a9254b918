"""Unit tests touch no Ray, no network, and never wait: whoever tries is told."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import pytest

REPOSITORY = Path(__file__).parents[2]
OURS = (str(REPOSITORY / "hcna_ray"), str(REPOSITORY / "tests"))

#: Folders whose subject is a boundary of the machine itself, and what they may do nevertheless.
EXCEPTIONS = {
    # Commands run against a fake C1, over real HTTP on this machine.
    "cli": "loopback",
    # Ending real child processes is what is tested; waiting for them cannot be faked. The gate and
    # the port checks are tested over real sockets on this machine.
    "supervisor": "loopback sleep",
}
ON_THIS_MACHINE = ("127.0.0.1", "::1", "localhost", "0.0.0.0")


def refuse_ray(*args: object, **options: object) -> NoReturn:
    """Stand in for ``ray.init``."""
    raise AssertionError("a unit test must not start Ray: hand in a fake, or move the test up")


def refuse_socket(*args: object, **options: object) -> NoReturn:
    """Stand in for everything that ties a socket to an address."""
    raise AssertionError("a unit test must not use the network: hand in a fake transport")


def only_on_loopback(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``method`` of a socket, restricted to addresses of this machine."""

    def guarded(self: socket.socket, address: Any, *rest: Any) -> Any:
        # To connect a datagram socket sends nothing: it asks the kernel for a route.
        silent = self.type == socket.SOCK_DGRAM and method.__name__ == "connect"
        here = self.family == socket.AF_UNIX or address[0] in ON_THIS_MACHINE
        if not here and not silent:
            refuse_socket()
        return method(self, address, *rest)

    return guarded


class _PatchingLoader(importlib.abc.Loader):
    """Loads Ray as usual, then takes ``ray.init`` away."""

    def __init__(self, inner: importlib.abc.Loader) -> None:
        self._inner = inner

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._inner.exec_module(module)
        vars(module)["init"] = refuse_ray

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class _RayWatcher(importlib.abc.MetaPathFinder):
    """Waits for the first import of Ray, so that the guard itself need not import it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "ray":
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _PatchingLoader(spec.loader)
        return spec


@pytest.fixture(autouse=True)
def no_ray_no_network_no_sleep(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Make ``ray.init``, addressed sockets and our own ``time.sleep`` raise."""
    folder = request.path.relative_to(Path(__file__).parent).parts[0]
    allowed = EXCEPTIONS.get(folder, "").split()
    sleep = time.sleep

    def refuse_our_sleep(seconds: float) -> None:
        # The standard library may: subprocess polls a child with it.
        if sys._getframe(1).f_code.co_filename.startswith(OURS):
            raise AssertionError(f"a unit test must not sleep ({seconds} s): hand in a clock")
        sleep(seconds)

    if "sleep" not in allowed:
        monkeypatch.setattr(time, "sleep", refuse_our_sleep)
    for name in ("connect", "connect_ex", "bind"):
        guarded = only_on_loopback(getattr(socket.socket, name))
        monkeypatch.setattr(
            socket.socket, name, guarded if "loopback" in allowed else refuse_socket
        )
    monkeypatch.setattr(socket.socket, "sendto", refuse_socket)
    if "ray" in sys.modules:
        monkeypatch.setattr(sys.modules["ray"], "init", refuse_ray)
    monkeypatch.setattr(sys, "meta_path", [_RayWatcher(), *sys.meta_path])
