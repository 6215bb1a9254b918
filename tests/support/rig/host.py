"""One host, and what can be done to it."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from . import disk, network, processes
from .disk import ENVIRONMENT
from .processes import INIT_MODULE, HostProcess, enter, eventually
from .state import HostState, RigError

if TYPE_CHECKING:
    from .rig import Rig

#: Exit code of a command that had to be ended, as ``timeout`` has it.
TIMED_OUT = 124
HAS_TIME_NAMESPACES = Path("/proc/self/ns/time").exists()

_END_S = 20.0
_TIME = ["-T"] if HAS_TIME_NAMESPACES else []
_FILLER = ".hcna-rig-filler"


class CommandFailed(RigError):
    """A command on a host did not end well."""

    def __init__(self, host: str, command: str, done: Done) -> None:
        super().__init__(host, command, done)
        self.host, self.command, self.done = host, command, done

    def __str__(self) -> str:
        said = "\n".join(text for text in (self.done.out, self.done.err) if text).strip()
        ended = "timed out" if self.done.code == TIMED_OUT else f"exit code {self.done.code}"
        return f"{self.command} on {self.host}: {ended}\n{said}"


@dataclass(frozen=True, kw_only=True)
class Done:
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str
    took_s: float

    @property
    def ok(self) -> bool:
        """Whether its exit code is 0."""
        return self.code == 0

    @property
    def lines(self) -> list[str]:
        """The lines of its standard output."""
        return self.out.splitlines()


@dataclass(frozen=True, kw_only=True)
class Port:
    """A listening socket of a host."""

    protocol: str
    address: str
    number: int
    #: Name and number (in the host) of a process that has it; empty and 0 if nobody does.
    process: str
    pid: int

    @property
    def on_loopback(self) -> bool:
        """Whether no other host can reach it."""
        return self.address.startswith(("127.", "[::1]", "[::ffff:127."))


class Host:
    """One host of a rig. It keeps nothing itself, so any number of these may exist."""

    def __init__(self, rig: Rig, name: str) -> None:
        self.rig = rig
        self.name = name
        self._init: int | None = None

    def __repr__(self) -> str:
        return f"<Host {self.name} of {self.rig.name}>"

    # -- what it is --------------------------------------------------------------------------------

    @property
    def state(self) -> HostState:
        """What is known about it at this moment."""
        return self.rig.state.hosts[self.name]

    @property
    def address(self) -> str:
        """Its address, 10.77.0.N."""
        return self.state.address

    @property
    def second_address(self) -> str:
        """The address of its second card (`add_card`), 10.78.0.N."""
        return self.state.second_address

    @property
    def hostname(self) -> str:
        """Its name, ``hcna-`` and what it is called in the rig."""
        return self.state.hostname

    @property
    def init(self) -> int | None:
        """The number of its first process on this machine; ``None`` while it is off."""
        wanted = [str(self.rig.directory), self.name]
        if self._init is not None and processes.arguments(self._init)[5:] == wanted:
            return self._init
        self._init = None
        for pid, rest in processes.find_inits(INIT_MODULE):
            if rest == wanted:
                self._init = pid
        return self._init

    @property
    def is_up(self) -> bool:
        """Whether it has power."""
        return self.init is not None

    @property
    def is_paused(self) -> bool:
        """Whether it has power and sleeps."""
        return self.is_up and self.state.paused

    def processes(self) -> list[HostProcess]:
        """Return everything that runs on it, parents first; the first one is its init."""
        init = self.init
        return processes.members(init) if init else []

    def ports(self) -> list[Port]:
        """Return its listening sockets, TCP and UDP."""
        return [_port(line) for line in self.run("ss", "-H", "-l", "-t", "-u", "-n", "-p").lines]

    # -- running commands --------------------------------------------------------------------------

    def run(
        self,
        *command: str,
        user: str = "root",
        timeout_s: float = 60.0,
        check: bool = True,
        env: Mapping[str, str] | None = None,
        stdin: str = "",
    ) -> Done:
        """Run a program on the host, in the user's home, with nothing of the caller's environment.

        What it leaves running goes on. Its output may outlive it too: nothing waits for that.

        Raises:
            CommandFailed: Its exit code is not 0, and ``check`` is true. A program that takes
                longer than ``timeout_s`` is killed with its children; the code is then 124.
            RigError: The host is off or asleep.
        """
        started = time.monotonic()
        with (
            tempfile.TemporaryFile() as given,
            tempfile.TemporaryFile() as out,
            tempfile.TemporaryFile() as err,
        ):
            given.write(stdin.encode())
            given.seek(0)
            process = subprocess.Popen(
                self.command(*command, user=user, env=env),
                stdin=given,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
            try:
                code = process.wait(timeout_s)
            except BaseException as error:
                end_session(process)
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
                code = TIMED_OUT
            texts = []
            for file in (out, err):
                file.seek(0)
                texts.append(file.read().decode(errors="replace"))
        done = Done(code=code, out=texts[0], err=texts[1], took_s=time.monotonic() - started)
        if check and not done.ok:
            raise CommandFailed(self.name, shlex.join(command), done)
        return done

    def sh(
        self,
        script: str,
        *,
        user: str = "root",
        login: bool = False,
        timeout_s: float = 60.0,
        check: bool = True,
        env: Mapping[str, str] | None = None,
    ) -> Done:
        """Run lines of bash on the host; with ``login`` as a login shell runs them."""
        shell = ["bash", "--login", "-c"] if login else ["bash", "-c"]
        return self.run(*shell, script, user=user, timeout_s=timeout_s, check=check, env=env)

    def popen(
        self,
        *command: str,
        user: str = "root",
        env: Mapping[str, str] | None = None,
        stdin: int | None = subprocess.DEVNULL,
        stdout: int | None = subprocess.PIPE,
        stderr: int | None = subprocess.STDOUT,
    ) -> subprocess.Popen[str]:
        """Start a program on the host and return at once.

        What is returned stands for the program: it ends when the program does, with its exit code.
        Do not kill it, but the program: `end`. Or let `running` do that.
        """
        return subprocess.Popen(
            self.command(*command, user=user, env=env),
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            text=True,
            start_new_session=True,
        )

    @staticmethod
    def end(process: subprocess.Popen[str]) -> None:
        """Kill a program that `popen` started, and its children, and close its pipes."""
        end_session(process)
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()

    @contextmanager
    def running(
        self,
        *command: str,
        user: str = "root",
        env: Mapping[str, str] | None = None,
        stdin: int | None = subprocess.DEVNULL,
    ) -> Iterator[subprocess.Popen[str]]:
        """Have a program run on the host for a while; it is killed at the end, if need be."""
        process = self.popen(*command, user=user, env=env, stdin=stdin)
        try:
            yield process
        finally:
            self.end(process)

    def command(
        self, *command: str, user: str = "root", env: Mapping[str, str] | None = None
    ) -> list[str]:
        """Return the command line that runs a program on the host, for those who start it."""
        if self.state.paused:
            raise RigError(f"{self.name} is paused")
        init = self.init
        if init is None:
            raise RigError(f"{self.name} is off")
        home = "/root" if user == "root" else f"/home/{user}"
        variables = {
            **ENVIRONMENT,
            "HOME": home,
            "USER": user,
            "LOGNAME": user,
            "TERM": os.environ.get("TERM", "dumb"),
            **(env or {}),
        }
        become = (
            []
            if user == "root"
            else ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups"]
        )
        return [
            *enter(init, "-F", "-m", "-u", "-i", "-n", "-p", *_TIME),
            *("env", "-i", *(f"{name}={value}" for name, value in variables.items())),
            *become,
            # The waiting shell stays outside the PID namespace: its child is the first one inside.
            # nsenter itself would stop, for good if nobody wakes it, whenever its program is
            # stopped. `exit` keeps bash from becoming the program, and `env` keeps what bash has
            # itself, such as `kill`, from being run by the shell that is outside.
            *("bash", "-c", 'cd && env -- "$@"; exit $?', "bash", *command),
        ]

    # -- files -------------------------------------------------------------------------------------

    def file(self, path: str) -> Path:
        """Return where on this machine a file of the host is; do not follow absolute links there.

        What is on the host's disk (/etc, /root, /home, /data, /var/log, /var/tmp) is there while
        the host is off, too.
        """
        if stored := disk.on_disk(self.rig.inside(self.name, "disk"), path):
            return stored
        if not (init := self.init):
            raise RigError(f"{self.name} is off, and {path} is not on its disk")
        return Path(f"/proc/{init}/root") / path.lstrip("/")

    def read(self, path: str) -> str:
        """Return the text of a file of the host."""
        return self.file(path).read_text()

    def write(self, path: str, text: str, *, user: str = "root", mode: int = 0o644) -> None:
        """Write a file of the host, making its directories."""
        file = self.file(path)
        number = 0 if user == "root" else disk.ADMIN_NUMBER
        missing = [one for one in file.parents if not one.exists()]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(mode)
        for one in (file, *missing):
            os.chown(one, number, number)

    def at_boot(self, name: str, script: str) -> None:
        """Have lines of bash run as root whenever the host boots, as its service manager would.

        They get a session of their own; what they print goes to ``/var/log/boot.log``.
        """
        self.write(f"{disk.BOOT_SCRIPTS}/{name}.sh", script, mode=0o755)

    # -- power -------------------------------------------------------------------------------------

    def boot(self) -> None:
        """Switch it on, and wait until sshd answers and the boot scripts are started."""
        self.rig.boot([self.name])

    def unplug(self) -> None:
        """Pull the plug: everything on it is gone at once, and nobody is told.

        Its cable goes first, so that no connection is closed on its behalf. The disk stays; what
        was written but not yet synchronised stays as well, as this machine's kernel has it.
        """
        with self.rig.locked():
            init = self.init
            if init is None:
                raise RigError(f"{self.name} is off")
            own = {(kind, processes.namespace(init, kind)) for kind in ("pid", "net")}
            switch = self.rig.enter_switch()
            ports = [network.switch_port(self.state, second=False)]
            if self.state.second_card:
                ports.append(network.switch_port(self.state, second=True))
            for port in ports:
                network.command(["ip", "link", "set", port, "down"], enter=switch)
            processes.send([init], signal.SIGKILL)
            # Also who waits outside for a program of it is in its network.
            eventually(lambda: not processes.within(own), _END_S, f"{self.name} is dead")
            self._init = None
            for port in ports:
                with suppress(RigError):  # It goes with the host's network, which may be faster.
                    network.command(["ip", "link", "del", port], enter=switch)
            with self.rig.changing() as state:
                host = state.hosts[self.name]
                host.paused, host.stopped_before = False, []
                # Rules that somebody made on the host are lost with it.
                state.cuts = [cut for cut in state.cuts if not (cut.output and cut.a == self.name)]
            self.rig.inside(self.name, "ready").unlink(missing_ok=True)

    def reboot(self, *, off_s: float = 0.0) -> None:
        """Pull the plug, wait, boot: /tmp, /run and /dev/shm are empty, and the boot id is new."""
        self.unplug()
        time.sleep(off_s)
        self.boot()

    def pause(self) -> None:
        """Close the lid: no process of it runs any more, the first one included.

        Its clocks go on, and its network still takes packets in, as a suspended machine's does not.
        """
        with self.rig.locked():
            if not self.is_up:
                raise RigError(f"{self.name} is off")
            if self.state.paused:
                return
            before = [one.pid for one in self.processes() if one.state in "Tt"]
            with self.rig.changing() as state:
                state.hosts[self.name].paused = True
                state.hosts[self.name].stopped_before = before
            quiet = 0
            end = time.monotonic() + _END_S
            # A process may start another one before its turn comes, so look again until nothing is
            # new. Parents first: a shell must not notice that its children stop.
            while quiet < 2:
                awake = [one.pid for one in self.processes() if not one.stopped]
                processes.send(awake, signal.SIGSTOP)
                quiet = 0 if awake else quiet + 1
                if time.monotonic() > end:
                    raise RigError(f"{self.name} cannot be paused: {awake} go on")
                time.sleep(0.002)

    def resume(self) -> None:
        """Open the lid: what ran before it was paused runs on."""
        with self.rig.locked():
            host = self.state
            if not host.paused:
                return
            found = [one for one in self.processes() if one.pid not in host.stopped_before]
            processes.send([one.pid for one in reversed(found)], signal.SIGCONT)
            with self.rig.changing() as state:
                state.hosts[self.name].paused = False
                state.hosts[self.name].stopped_before = []

    # -- cards and disks ---------------------------------------------------------------------------

    def add_card(self) -> str:
        """Give it a second card (eth1) in the second net, for good, and return its address."""
        with self.rig.locked():
            host = self.state
            if not host.second_card:
                if init := self.init:
                    network.plug_in(
                        host,
                        second=True,
                        switch=f"/proc/{self.rig.keeper}/ns/net",
                        enter=network.in_net_of(init),
                    )
                with self.rig.changing() as state:
                    state.hosts[self.name].second_card = True
                self.rig.apply_cuts()
            return host.second_address

    def fill(self, path: str, *, leave: int = 0) -> int:
        """Fill the disk that ``path`` is on, but for ``leave`` bytes; return how many were free.

        Raises:
            RigError: It is this machine's own disk. Hosts get small ones by ``data_size``.
        """
        init = self.init
        if init is None:
            raise RigError(f"{self.name} is off")
        self.run("mkdir", "-p", path)
        where = self.run("findmnt", "-n", "-o", "FSTYPE,TARGET", "-T", path).out.split()
        if where[0] != "tmpfs":
            raise RigError(
                f"{path} of {self.name} is on this machine's own disk; give the host one of its "
                "own when the rig is made: data_size (--data-size 64m)"
            )
        filler = f"{path.rstrip('/')}/{_FILLER}"
        file = Path(f"/proc/{init}/root{filler}")
        figures = os.statvfs(file.parent)
        free = figures.f_bavail * figures.f_frsize
        with open(file, "ab") as out:
            already = out.tell()
            if free > leave:
                os.posix_fallocate(out.fileno(), already, free - leave)
        with self.rig.changing() as state:
            known = state.hosts[self.name].fillers
            if filler not in known:
                known.append(filler)
        return free

    def free(self) -> None:
        """Take away everything that `fill` put there."""
        with self.rig.changing() as state:
            for filler in state.hosts[self.name].fillers:
                with suppress(RigError):
                    self.file(filler).unlink(missing_ok=True)
            state.hosts[self.name].fillers = []


def end_session(process: subprocess.Popen[bytes] | subprocess.Popen[str]) -> None:
    """Kill what a waiting shell runs. It ends then; killed itself, it would leave an orphan."""
    end = time.monotonic() + _END_S
    while time.monotonic() < end:
        left = processes.of_session(process.pid)
        processes.send(left, signal.SIGKILL)
        if process.poll() is not None and not left:
            break
        time.sleep(0.005)


def _port(line: str) -> Port:
    """Read a line of ``ss -H -l -t -u -n -p``."""
    words = line.split()
    address, _, number = words[4].rpartition(":")
    name, pid = "", 0
    if len(words) > 6 and words[6].startswith("users:"):
        # users:(("sshd",pid=12,fd=3),...)
        name = words[6].split('"')[1]
        pid = int(words[6].split("pid=")[1].split(",")[0])
    return Port(
        protocol=words[0],
        address=address.partition("%")[0],
        number=int(number),
        process=name,
        pid=pid,
    )
