"""What a rig is made of, kept in one file: every command finds it as the last one left it."""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

#: Directories of rigs are called so, plus the rig's name.
PREFIX = "hcna-hosts-"
NET = "10.77.0"
#: The net of second cards.
SECOND_NET = "10.78.0"
#: The part of an address that the first host gets.
FIRST_NUMBER = 11
_NAME = re.compile(r"[a-z][a-z0-9-]{0,9}")


class RigError(Exception):
    """The rig cannot do what it was asked to."""


class RigUnavailable(RigError):
    """This machine cannot hold a rig, and why."""


@dataclass(kw_only=True)
class Cut:
    """A partition between two hosts; packets from ``a`` to ``b`` and, unless one-way, back."""

    a: str
    b: str
    one_way: bool = False
    port: int | None = None
    reject: bool = False
    #: Made by iptables on ``a`` as packets leave, not by the receiver.
    output: bool = False

    def __str__(self) -> str:
        arrow = "->" if self.one_way or self.output else "<->"
        port = f" port {self.port}" if self.port else ""
        return (
            f"{self.a} {arrow} {self.b}{port}"
            + (" refused" if self.reject else " silent")
            + (" (OUTPUT)" if self.output else "")
        )


@dataclass(kw_only=True)
class HostState:
    """One host: what it is, and what was done to it."""

    name: str
    number: int
    #: The machine's name on the network.
    hostname: str
    #: It has a card in the second net.
    second_card: bool = False
    #: Bytes of its disk, as mount understands them; ``None`` for as much as this machine has.
    data_size: str | None = None
    tmp_size: str = "1g"
    shm_size: str = "1g"
    #: Made anew at each boot.
    boot_id: str = ""
    paused: bool = False
    #: Processes that were stopped already when it was paused, by their number outside.
    stopped_before: list[int] = field(default_factory=list)
    #: Files that only take up space.
    fillers: list[str] = field(default_factory=list)

    @property
    def address(self) -> str:
        """Address of the first card."""
        return f"{NET}.{self.number}"

    @property
    def second_address(self) -> str:
        """Address of the second card, if there is one."""
        return f"{SECOND_NET}.{self.number}"

    @property
    def addresses(self) -> list[str]:
        """Every address it has."""
        return [self.address, *([self.second_address] if self.second_card else [])]


@dataclass(kw_only=True)
class State:
    """A rig."""

    name: str
    #: The checkout that all hosts see.
    repository: str
    #: Paths of this machine that hosts see read-only wherever they lie.
    share: list[str]
    hosts: dict[str, HostState] = field(default_factory=dict)
    cuts: list[Cut] = field(default_factory=list)

    def add_host(self, name: str, *, data_size: str | None, tmp_size: str, shm_size: str) -> None:
        """Give a new host its place in the net."""
        if not _NAME.fullmatch(name):
            raise RigError(f"{name!r} cannot be a host: at most ten of a-z, 0-9 and -")
        if name in self.hosts:
            raise RigError(f"there is a host {name} already")
        self.hosts[name] = HostState(
            name=name,
            number=max((one.number for one in self.hosts.values()), default=FIRST_NUMBER - 1) + 1,
            hostname=f"hcna-{name}",
            data_size=data_size,
            tmp_size=tmp_size,
            shm_size=shm_size,
        )


def load(directory: Path) -> State:
    """Read a rig's state."""
    try:
        raw = json.loads((directory / "rig.json").read_text())
    except FileNotFoundError:
        raise RigError(f"there is no rig in {directory}") from None
    return State(
        name=raw["name"],
        repository=raw["repository"],
        share=raw["share"],
        hosts={name: HostState(**one) for name, one in raw["hosts"].items()},
        cuts=[Cut(**one) for one in raw["cuts"]],
    )


def save(directory: Path, state: State) -> None:
    """Write a rig's state; readers see the old or the new one."""
    new = directory / "rig.json.new"
    new.write_text(json.dumps(asdict(state), indent=1))
    os.replace(new, directory / "rig.json")


@contextmanager
def lock(directory: Path, *, wait: bool = True) -> Iterator[None]:
    """Keep other commands from changing the rig meanwhile.

    Raises:
        BlockingIOError: Somebody else has it, and ``wait`` is false.
    """
    descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)
