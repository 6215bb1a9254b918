"""All hosts together: making them, removing them, and what goes on between them."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from . import disk, network, processes
from .disk import ENVIRONMENT
from .host import HAS_TIME_NAMESPACES, Done, Host
from .processes import INIT_MODULE, KEEPER_MODULE, PYTHON_OPTIONS, enter, eventually
from .state import PREFIX, Cut, RigError, RigUnavailable, State, load, lock, save

REPOSITORY = Path(__file__).resolve().parents[3]
DEFAULT_HOSTS = ("m1", "w1", "w2", "client")

_TOOLS = ("sshd", "ssh", "ssh-keygen", "nft", "ip", "rsync", "nsenter", "unshare", "setpriv", "ss")
_BOOT_S = 20.0
_END_S = 20.0


class Rig:
    """Separate hosts on this machine, with one switch between them.

    It owns one directory and one process, the keeper, whose death ends everything else. Made with
    ``owned`` (the default), it goes when the process that made it goes, in whatever way.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._hosts: dict[str, Host] = {}
        self._keeper: int | None = None
        self._wrapper: subprocess.Popen[bytes] | None = None
        self._made_by: int | None = None
        self._lock_depth = 0
        self._mutex = threading.RLock()

    def __repr__(self) -> str:
        return f"<Rig {self.name}>"

    def __getitem__(self, name: str) -> Host:
        if name not in self.state.hosts:
            raise RigError(f"there is no host {name}; there are {', '.join(self.state.hosts)}")
        return self._hosts.setdefault(name, Host(self, name))

    def __iter__(self) -> Iterator[Host]:
        return iter([self[name] for name in self.state.hosts])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.down()

    # -- making, finding, removing -----------------------------------------------------------------

    @classmethod
    def up(
        cls,
        hosts: Iterable[str] = DEFAULT_HOSTS,
        *,
        name: str | None = None,
        owned: bool = True,
        data_size: str | Mapping[str, str] | None = None,
        tmp_size: str = "1g",
        shm_size: str = "1g",
        share: Iterable[str | Path] = (),
        base: Path | None = None,
        boot: bool = True,
    ) -> Rig:
        """Make a rig and boot its hosts.

        Args:
            hosts: What they are called.
            name: What the rig is called; made up if not given.
            owned: It ends with this process. Otherwise somebody has to take it down.
            data_size: Size of the hosts' disks (``64m``), of all or by host. Without it they share
                the disk of this machine.
            tmp_size: Size of each host's /tmp, in memory as it is used.
            shm_size: Size of each host's /dev/shm, the same.
            share: More paths of this machine that hosts see, read-only, at their own places.
            base: Where the rig's directory is made; the place for temporary files if not given.
            boot: Whether hosts are switched on.

        Raises:
            RigUnavailable: This machine cannot hold one.
        """
        check_machine()
        name = name or uuid.uuid4().hex[:8]
        directory = _base(base) / f"{PREFIX}{name}"
        try:
            directory.mkdir(mode=0o700, parents=True)
        except FileExistsError:
            raise RigError(f"there is a rig {name} already: {directory}") from None
        rig = cls(directory)
        rig._made_by = os.getpid()
        try:
            with rig.locked():
                shared = [*disk.shared_paths(REPOSITORY), *(str(Path(one)) for one in share)]
                state = State(name=name, repository=str(REPOSITORY), share=shared)
                save(directory, state)
                (directory / "keys").mkdir()
                disk.make_key(directory / "keys" / disk.KEY, f"rig {name}")
                rig._start_keeper(owned)
                for host in hosts:
                    size = (
                        data_size
                        if data_size is None or isinstance(data_size, str)
                        else (data_size.get(host))
                    )
                    rig._lay_out(host, size, tmp_size, shm_size)
                rig._write_hosts_files()
                if boot:
                    rig.boot()
        except BaseException:
            rig.down()
            raise
        if owned:
            atexit.register(rig._down_at_exit)
        return rig

    @classmethod
    def find(cls, name: str | None = None, *, base: Path | None = None) -> Rig:
        """Return a rig that was made before: the one of that name, or the only one there is."""
        found = cls.all(base=base)
        if name is not None:
            found = [rig for rig in found if rig.name == name]
        if len(found) != 1:
            names = ", ".join(rig.name for rig in cls.all(base=base)) or "none"
            raise RigError(f"which rig? There are: {names}")
        return found[0]

    @classmethod
    def all(cls, *, base: Path | None = None) -> list[Rig]:
        """Return every rig of which there is still something."""
        return [cls(path) for path in sorted(_directories(_base(base)))]

    @classmethod
    def sweep(cls, *, base: Path | None = None, running: bool = False) -> list[str]:
        """Clear away what crashed rigs left, or, if told so, running ones too; return names."""
        swept = []
        for rig in cls.all(base=base):
            if not running and (rig.is_running or not rig._is_abandoned()):
                continue
            rig.down()
            swept.append(rig.name)
        return swept

    @property
    def name(self) -> str:
        """What it is called."""
        return self.directory.name.removeprefix(PREFIX)

    @property
    def state(self) -> State:
        """What is known about it at this moment."""
        return load(self.directory)

    @property
    def keeper(self) -> int | None:
        """The number of the process that it lives with; ``None`` if that is gone."""
        wanted = str(self.directory)
        if self._keeper is None or wanted not in processes.arguments(self._keeper):
            self._keeper = None
            for pid, rest in processes.find_inits(KEEPER_MODULE):
                if rest[:1] == [wanted]:
                    self._keeper = pid
        return self._keeper

    @property
    def is_running(self) -> bool:
        """Whether its keeper is there."""
        return self.keeper is not None

    def down(self) -> None:
        """End every process of it and remove its directory. Harmless when that is done already."""
        keeper = self.keeper
        if keeper is not None:
            waiting = processes.parent_of(keeper)
            wanted = str(self.directory)
            found = processes.find_inits(INIT_MODULE)
            firsts = [keeper, *(pid for pid, rest in found if rest[:1] == [wanted])]
            networks = {("net", processes.namespace(pid, "net")) for pid in firsts}
            processes.send([keeper], signal.SIGKILL)

            def ended() -> bool:
                # All of it has to end before the last of it does; then who started that, and who
                # waits outside for a program of a host.
                if processes.namespace(keeper, "pid") is not None or processes.within(networks):
                    return False
                return not any(wanted in processes.arguments(pid) for pid in (keeper, waiting))

            eventually(ended, _END_S, f"the end of rig {self.name}")
        self._keeper = None
        if self._wrapper is not None:
            self._wrapper.wait(_END_S)
            self._wrapper = None
        if self.directory.exists():
            disk.remove_directory(self.directory)
        atexit.unregister(self._down_at_exit)

    def _down_at_exit(self) -> None:
        if self._made_by == os.getpid():  # Not in a fork of the process that made it.
            self.down()

    def _is_abandoned(self) -> bool:
        """Whether nobody is busy with it: it may be just being made."""
        try:
            with lock(self.directory, wait=False):
                begun = time.time() - self.directory.stat().st_mtime > _BOOT_S
                return begun or (self.directory / "rig.json").exists()
        except (FileNotFoundError, BlockingIOError):
            return False

    def _start_keeper(self, owned: bool) -> None:
        owner = [os.pidfd_open(os.getpid())] if owned else []
        try:
            with open(self.directory / "keeper.log", "wb") as log:
                self._wrapper = subprocess.Popen(
                    [
                        *("unshare", "-m", "-u", "-n", "-p", "-f", "--kill-child", "--mount-proc"),
                        *("--propagation", "private", "--"),
                        *_python(KEEPER_MODULE, str(self.directory), *map(str, owner)),
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=_python_environment(),
                    cwd="/",
                    pass_fds=owner,
                    start_new_session=True,
                )
        finally:
            for descriptor in owner:
                os.close(descriptor)
        wrapper = self._wrapper

        def ready() -> bool:
            if wrapper.poll() is not None:
                said = (self.directory / "keeper.log").read_text()
                raise RigUnavailable(f"no network or namespaces for a rig here: {said.strip()}")
            return (self.directory / "keeper.ready").exists() and self.is_running

        eventually(ready, _BOOT_S, "the switch is there")

    def _lay_out(self, name: str, data_size: str | None, tmp_size: str, shm_size: str) -> None:
        with self.changing() as state:
            state.add_host(name, data_size=data_size, tmp_size=tmp_size, shm_size=shm_size)
        place = self.directory / "hosts" / name
        for part in ("disk", "root"):
            (place / part).mkdir(parents=True)
        keeper = self.keeper
        assert keeper is not None, "a host is laid out while the keeper runs"
        # Some file systems are slow where much was just removed, and /etc is a thousand files: so
        # it is in memory, which lives as long as the keeper.
        small, size = ("disk", data_size) if data_size else ("disk/etc", "64m")
        (place / small).mkdir(exist_ok=True)
        options = f"size={size},mode=755"
        network.command(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place / small)],
            enter=enter(keeper, "-m"),
        )
        state = self.state
        disk.make(state, state.hosts[name], self.inside(name, "disk"), self.directory / "keys")

    def _write_hosts_files(self) -> None:
        state = self.state
        for name in state.hosts:
            (self.inside(name, "disk") / "etc" / "hosts").write_text(disk.hosts_file(state))

    # -- all hosts ---------------------------------------------------------------------------------

    def add(
        self,
        name: str,
        *,
        data_size: str | None = None,
        tmp_size: str = "1g",
        shm_size: str = "1g",
        boot: bool = True,
    ) -> Host:
        """Put another host beside the others; all know its name."""
        with self.locked():
            self._lay_out(name, data_size, tmp_size, shm_size)
            self._write_hosts_files()
            if boot:
                self.boot([name])
        return self[name]

    def boot(self, names: Iterable[str] | None = None) -> None:
        """Switch hosts on, all that are off if none is named, at the same time."""
        with self.locked():
            hosts = (
                [self[name] for name in names]
                if names is not None
                else ([host for host in self if not host.is_up])
            )
            for host in hosts:
                if host.is_up:
                    raise RigError(f"{host.name} is on")
            expected: dict[str, str] = {}
            with self.changing() as state:
                for host in hosts:
                    expected[host.name] = str(uuid.uuid4())
                    state.hosts[host.name].boot_id = expected[host.name]
            for host in hosts:
                self._start_init(host.name)
            for host in hosts:
                self._wait_ready(host, expected[host.name])

    def _start_init(self, name: str) -> None:
        keeper = self.keeper
        if keeper is None:
            raise RigError(f"rig {self.name} is down")
        place = self.directory / "hosts" / name
        self.inside(name, "ready").unlink(missing_ok=True)
        new_clock = []
        if HAS_TIME_NAMESPACES:
            up_s = int(time.clock_gettime(time.CLOCK_BOOTTIME))
            new_clock = ["-T", f"--boottime=-{up_s}", f"--monotonic=-{int(time.monotonic())}"]
        with open(place / "init.log", "ab") as log:
            # setsid's parent is inside, so the keeper inherits what setsid leaves behind.
            subprocess.run(
                [
                    *enter(keeper, "-m", "-n", "-p"),
                    *("setsid", "--fork", "unshare", "-m", "-u", "-i", "-n", "-p", *new_clock),
                    *("-f", "--kill-child", "--propagation", "private", "--"),
                    *_python(INIT_MODULE, str(self.directory), name),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=_python_environment(),
                check=True,
                timeout=_BOOT_S,
            )

    def _wait_ready(self, host: Host, boot_id: str) -> None:
        ready = self.directory / "hosts" / host.name / "ready"
        end = time.monotonic() + _BOOT_S
        while not (ready.exists() and ready.read_text() == boot_id and host.is_up):
            if time.monotonic() > end:
                log = (self.directory / "hosts" / host.name / "init.log").read_text()
                raise RigError(f"{host.name} does not boot: {log.strip()}")
            time.sleep(0.005)

    def ssh(
        self,
        sender: str,
        receiver: str,
        command: str,
        *,
        user: str = "root",
        timeout_s: float = 60.0,
        check: bool = True,
        tty: bool = False,
    ) -> Done:
        """Run a command line on one host from another one, over SSH, as the same user on both."""
        flags = ["-tt"] if tty else []
        target = self[receiver].hostname
        return self[sender].run(
            "ssh", *flags, target, command, user=user, timeout_s=timeout_s, check=check
        )

    def status(self) -> str:
        """Describe the rig in lines."""
        lines = [f"rig {self.name} in {self.directory}, {'running' if self.is_running else 'down'}"]
        for host in self:
            state = host.state
            power = "paused" if host.is_paused else "up" if host.is_up else "off"
            count = len(host.processes())
            lines.append(
                f"  {host.name:<10} {' '.join(state.addresses):<24} {power:<7} "
                f"{count:4} processes  init {host.init or '-'}"
            )
        return "\n".join([*lines, *(f"  cut {cut}" for cut in self.state.cuts)])

    # -- partitions --------------------------------------------------------------------------------

    def partition(
        self,
        a: str,
        b: str,
        *,
        one_way: bool = False,
        port: int | None = None,
        reject: bool = False,
        output: bool = False,
    ) -> Cut:
        """Cut two hosts off from each other, silently, until they are healed or rebooted.

        Packets are dropped where they arrive, so that neither end learns of it; hosts that reboot
        are as deaf as before.

        Args:
            a: One host.
            b: The other host.
            one_way: Only what ``a`` sends to ``b`` is lost.
            port: Only what concerns this port; one way: only what is addressed to it on ``b``.
            reject: Refuse (TCP reset) instead of dropping.
            output: Only ``a`` gets a rule, ``iptables -A OUTPUT -d B -j DROP``, as a person would
                do it; it is lost in a reboot of ``a``.
        """
        cut = Cut(a=a, b=b, one_way=one_way, port=port, reject=reject, output=output)
        with self.locked():
            hosts = self[a], self[b]
            if output:
                self._iptables("-A", cut, hosts[0], hosts[1])
            with self.changing() as state:
                state.cuts.append(cut)
            self.apply_cuts([a, b])
        return cut

    def heal(self, a: str | None = None, b: str | None = None) -> None:
        """Undo cuts: all, all of one host, or those between two hosts."""
        named = {name for name in (a, b) if name is not None}
        with self.locked():
            healed = [cut for cut in self.state.cuts if named <= {cut.a, cut.b}]
            for cut in healed:
                if cut.output and self[cut.a].is_up:
                    with suppress(RigError):  # `iptables -F` or a reboot may have been faster.
                        self._iptables("-D", cut, self[cut.a], self[cut.b])
            with self.changing() as state:
                state.cuts = [cut for cut in state.cuts if cut not in healed]
            self.apply_cuts({name for cut in healed for name in (cut.a, cut.b)})

    @contextmanager
    def partitioned(self, a: str, b: str, **options: bool | int) -> Iterator[None]:
        """Keep two hosts apart for a while; takes what `partition` takes."""
        self.partition(a, b, **options)  # type: ignore[arg-type]
        try:
            yield
        finally:
            self.heal(a, b)

    def apply_cuts(self, names: Iterable[str] | None = None) -> None:
        """Make hosts that are on deaf as the state says."""
        state = self.state
        for name in state.hosts if names is None else names:
            if init := self[name].init:
                network.command(
                    ["nft", "-f", "-"],
                    text=network.rules(state, name),
                    enter=network.in_net_of(init),
                )

    @staticmethod
    def _iptables(verb: str, cut: Cut, sender: Host, receiver: Host) -> None:
        if not (init := sender.init):
            raise RigError(f"{sender.name} is off")
        for rule in network.output_rules(cut, receiver.state):
            # As a person on that host would do it, with the lock file that is there.
            network.command(["iptables", verb, *rule], enter=enter(init, "-m", "-n"))

    # -- for hosts ---------------------------------------------------------------------------------

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Do several things to the rig that belong together; no thread or command comes between."""
        with self._mutex:
            outermost = lock(self.directory) if self._lock_depth == 0 else nullcontext()
            with outermost:
                self._lock_depth += 1
                try:
                    yield
                finally:
                    self._lock_depth -= 1

    @contextmanager
    def changing(self) -> Iterator[State]:
        """Change the state, all of it or, when that fails, nothing."""
        with self.locked():
            state = self.state
            yield state
            save(self.directory, state)

    def inside(self, host: str, part: str) -> Path:
        """Return a path in a host's part of the directory, small disks included."""
        keeper = self.keeper
        root = f"/proc/{keeper}/root" if keeper else ""
        return Path(f"{root}{self.directory}") / "hosts" / host / part

    def enter_switch(self) -> list[str]:
        """Return the start of a command that runs on the switch."""
        keeper = self.keeper
        if keeper is None:
            raise RigError(f"rig {self.name} is down")
        return network.in_net_of(keeper)


def check_machine() -> None:
    """Raise `RigUnavailable`, with all reasons, if this machine cannot hold a rig."""
    reasons = []
    if sys.platform != "linux":
        reasons.append("this is not Linux")
    elif os.geteuid() != 0:
        reasons.append("not root")
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    if missing := [tool for tool in _TOOLS if not shutil.which(tool, path=path)]:
        reasons.append(f"missing: {' '.join(missing)} (scripts/system_packages.sh)")
    if reasons:
        raise RigUnavailable("no hosts on this machine: " + "; ".join(reasons))


def _base(base: Path | None) -> Path:
    return (base or Path(tempfile.gettempdir())).resolve()


def _directories(base: Path) -> set[Path]:
    found = {path for path in base.glob(f"{PREFIX}*") if path.is_dir()}
    for _, rest in processes.find_inits(KEEPER_MODULE):  # Also whose directory somebody deleted.
        if rest and Path(rest[0]).parent == base:
            found.add(Path(rest[0]))
    return found


def _python(module: str, *rest: str) -> list[str]:
    return [sys.executable, *PYTHON_OPTIONS, module, *rest]


def _python_environment() -> dict[str, str]:
    return {**ENVIRONMENT, "PYTHONPATH": str(REPOSITORY)}
