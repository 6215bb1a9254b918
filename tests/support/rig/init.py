"""The first process of a host: it wires the host, builds its file tree, starts sshd and reaps.

It runs in new mount, UTS, IPC, network, PID and (where there are any) time namespaces. The root is
a new tree: this machine's directories, read-only, with the host's own in their place where a host
has its own. When this process dies, the host is dead.

Run as ``python -S -B -m tests.support.rig.init DIRECTORY HOST``.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

from . import disk, kernel, network
from .disk import ENVIRONMENT
from .state import HostState, State, load

#: Top directories that a host has of its own, or gets a new kind of.
OWN_TOPS = frozenset(
    {"data", "dev", "etc", "home", "lost+found", "proc", "root", "run", "sys", "tmp"}
)
_KEEPER_NET = "/proc/1/ns/net"
_LISTENING = "0A"


def main(directory: Path, name: str) -> NoReturn:
    """Boot the host and stay."""
    # The kernel keeps signals without a handler from a namespace's first process.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    state = load(directory)
    host = state.hosts[name]
    wire(state, host)
    place = directory / "hosts" / name
    ready = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    build_tree(state, host, place)
    socket.sethostname(host.hostname)
    os.umask(0o022)
    sshd = start_sshd()
    # Before anything else runs, the host answers; whoever waits for it may log in.
    while not listening(22):
        time.sleep(0.005)
    descriptor = os.open("ready", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600, dir_fd=ready)
    os.write(descriptor, host.boot_id.encode())
    os.close(descriptor)
    os.close(ready)
    run_boot_scripts()
    while True:
        ended, _ = os.waitpid(-1, 0)
        if ended == sshd.pid:
            time.sleep(0.5)
            sshd = start_sshd()


def wire(state: State, host: HostState) -> None:
    """Plug in the host's cards; it is as deaf from the start as it was before."""
    # One address family, so that a cut is a cut.
    Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("1")
    Path("/proc/sys/net/ipv4/ping_group_range").write_text("0 2147483647")
    network.command(["ip", "link", "set", "lo", "up"])
    network.command(["nft", "-f", "-"], text=network.rules(state, host.name))
    # This /proc is still the keeper's, where it is number 1.
    network.plug_in(host, second=False, switch=_KEEPER_NET)
    if host.second_card:
        network.plug_in(host, second=True, switch=_KEEPER_NET)


def build_tree(state: State, host: HostState, place: Path) -> None:
    """Build the host's file tree and make it the root."""
    own = place / "disk"
    root = place / "root"
    kernel.tmpfs(root, size="16m")
    for entry in os.scandir("/"):
        if entry.name in OWN_TOPS:
            continue
        target = root / entry.name
        if entry.is_symlink():
            target.symlink_to(os.readlink(entry.path))
        elif entry.is_dir():
            target.mkdir()
            kernel.bind(Path(entry.path), target, read_only=True)
    for target, source in disk.own_directories(root, own):
        target.mkdir(exist_ok=True)
        kernel.bind(source, target)
    for target, size, mode in (
        (root / "tmp", host.tmp_size, 0o1777),
        (root / "run", "64m", 0o755),
    ):
        target.mkdir()
        kernel.tmpfs(target, size=size, mode=mode)
    (root / "dev").mkdir()
    kernel.bind(Path("/dev"), root / "dev")
    kernel.tmpfs(root / "dev" / "shm", size=host.shm_size, mode=0o1777)
    (root / "sys").mkdir()
    kernel.mount("sysfs", root / "sys", "sysfs")
    if Path("/sys/fs/cgroup").is_dir():
        kernel.bind(Path("/sys/fs/cgroup"), root / "sys" / "fs" / "cgroup")
    show_shared(state, root)
    (root / "proc").mkdir()
    kernel.mount("proc", root / "proc", "proc")
    boot_id = root / "run" / "boot_id"
    boot_id.write_text(host.boot_id + "\n")
    kernel.bind(boot_id, root / "proc/sys/kernel/random/boot_id", read_only=True)

    old = root / ".old"
    old.mkdir()
    network.command(["pivot_root", str(root), str(old)])
    os.chdir("/")
    kernel.unmount(Path("/.old"))
    os.rmdir("/.old")


def show_shared(state: State, root: Path) -> None:
    """Show code and interpreter at their own paths, also below what the host has of its own."""
    for path in map(Path, state.share):
        target = root / path.relative_to("/")
        if target.exists() and os.path.samestat(target.stat(), path.stat()):
            continue
        target.mkdir(parents=True, exist_ok=True)
        kernel.bind(path, target, read_only=True)
    for home in (root / "root", root / "home" / disk.ADMIN):
        checkout = home / disk.CHECKOUT
        checkout.mkdir(exist_ok=True)
        kernel.bind(Path(state.repository), checkout, read_only=True)


def start_sshd() -> subprocess.Popen[bytes]:
    """Start the server that people and Ray's launcher log in to."""
    Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    path = shutil.which("sshd", path=ENVIRONMENT["PATH"])
    assert path, "sshd was there when the rig was made"
    return subprocess.Popen([path, "-D", "-E", "/var/log/sshd.log"], env=ENVIRONMENT, cwd="/")


def listening(port: int) -> bool:
    """Whether something listens on a TCP port."""
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        words = line.split()
        if words[3] == _LISTENING and int(words[1].rpartition(":")[2], 16) == port:
            return True
    return False


def run_boot_scripts() -> None:
    """Start what the service manager would, everything in a session of its own."""
    with open("/var/log/boot.log", "ab") as log:
        for script in sorted(Path(disk.BOOT_SCRIPTS).glob("*.sh")):
            subprocess.Popen(
                ["bash", str(script)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=ENVIRONMENT,
                cwd="/",
                start_new_session=True,
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
