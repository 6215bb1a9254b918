"""What a host keeps over reboots: its /etc, homes, /data and /var/log, below one directory."""

from __future__ import annotations

import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from . import kernel, network
from .state import HostState, RigError, State

#: A user who may log in everywhere and become root by sudo, as on a laptop.
ADMIN = "hcna-admin"
ADMIN_NUMBER = 1777
#: What a process of a host gets that nobody has logged in for.
ENVIRONMENT = {
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "SHELL": "/bin/bash",
    "USER": "root",
    "LOGNAME": "root",
}
#: Name of the checkout in each home.
CHECKOUT = "hcna-ray"
#: Scripts that a booting host runs.
BOOT_SCRIPTS = "/etc/boot.d"
KEY = "id_ed25519"

_SSH_CONFIG = """\
Host *
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
  ConnectTimeout 10
"""
_SSHD_CONFIG = """\
Port 22
HostKey /etc/ssh/ssh_host_ed25519_key
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
UseDNS no
PrintMotd no
MaxStartups 100
MaxSessions 100
Subsystem sftp internal-sftp
"""
_HOSTS_HEAD = "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n"
_BASHRC = "# Nothing: what a login prints here, scripts would have to read.\n"
_PROFILE = '[ -n "$BASH_VERSION" ] && [ -f ~/.bashrc ] && . ~/.bashrc\n'


def own_directories(root: Path, own: Path) -> Iterator[tuple[Path, Path]]:
    """Yield where each directory of a host's disk is shown, and the directory."""
    for name in ("data", "etc", "home", "root"):
        yield root / name, own / name
    yield root / "var" / "log", own / "log"
    yield root / "var" / "tmp", own / "vartmp"


def on_disk(own: Path, path: str) -> Path | None:
    """Return where on a host's disk a file of the host is; ``None`` if it is not on it."""
    for shown, stored in own_directories(Path("/"), own):
        with suppress(ValueError):
            return stored / Path(path).relative_to(shown)
    return None


def make(state: State, host: HostState, own: Path, keys: Path) -> None:
    """Lay out the disk of a new host."""
    for name, mode in (("data", 0o777), ("home", 0o755), ("root", 0o755), ("vartmp", 0o1777)):
        _directory(own / name, mode)
    _directory(own / "log", 0o755)
    network.command(["cp", "-a", "/etc", str(own)])
    etc = own / "etc"
    _directory(etc / "boot.d", 0o755)
    _write(etc / "hostname", host.hostname + "\n")
    _write(etc / "machine-id", uuid.uuid4().hex + "\n")
    # No name server: what is not in the hosts file is unknown at once.
    _write(etc / "resolv.conf", "")
    _write(etc / "hosts", hosts_file(state))
    _add_users(etc)
    ssh = etc / "ssh"
    shutil.rmtree(ssh, ignore_errors=True)
    _directory(ssh, 0o755)
    _write(ssh / "ssh_config", _SSH_CONFIG)
    _write(ssh / "sshd_config", _SSHD_CONFIG)
    make_key(ssh / "ssh_host_ed25519_key", host.hostname)
    if (etc / "sudoers.d").is_dir():
        _write(etc / "sudoers.d" / "hcna-rig", f"{ADMIN} ALL=(ALL) NOPASSWD: ALL\n", 0o440)
    _make_home(own / "root", keys, 0)
    _make_home(own / "home" / ADMIN, keys, ADMIN_NUMBER)


def hosts_file(state: State) -> str:
    """Return ``/etc/hosts``, the same on every host."""
    lines = [
        f"{one.address} {one.hostname}.local {one.hostname} {one.name}\n"
        for one in state.hosts.values()
    ]
    return _HOSTS_HEAD + "".join(lines)


def make_key(path: Path, comment: str) -> None:
    """Make a key pair without a passphrase."""
    network.command(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", str(path)])


def shared_paths(repository: Path) -> list[str]:
    """Return what a host must see to run the code: checkout, environment, interpreter.

    An interpreter is often reached over links, and looks for its library from where it was called.
    """
    found = [repository, Path(sys.prefix), Path(sys.base_prefix)]
    for start in (repository / ".venv" / "bin" / "python", Path(sys.executable)):
        python = start
        while python.is_symlink():
            python = Path(os.path.normpath(python.parent / os.readlink(python)))
            library = python.parent.parent / "lib"
            found.append(library.parent if any(library.glob("python3*")) else python.parent)
    found += [path.resolve() for path in found]
    shown: list[str] = []
    for path in sorted(set(found)):
        inside = any(path.is_relative_to(other) for other in shown)
        if path.is_dir() and path != Path("/usr") and not inside:
            shown.append(str(path))
    return shown


def remove_directory(directory: Path) -> None:
    """Remove a rig's directory, and nothing that may still be mounted there.

    Raises:
        RigError: Something is, and cannot be unmounted.
    """
    for _ in range(3):
        mounts = mounts_below(directory)
        for mounted in reversed(mounts):
            with suppress(OSError):
                kernel.unmount(mounted)
        if not mounts:
            shutil.rmtree(directory, ignore_errors=True)
            return
    raise RigError(f"still mounted, so not removed: {mounts_below(directory)}")


def mounts_below(directory: Path, process: int | str = "self") -> list[Path]:
    """Return what is mounted at or below a directory, as this process sees it."""
    found = []
    for line in Path(f"/proc/{process}/mountinfo").read_text().splitlines():
        point = Path(line.split()[4].encode().decode("unicode_escape"))
        if point.is_relative_to(directory):
            found.append(point)
    return found


def _directory(path: Path, mode: int) -> None:
    path.mkdir(exist_ok=True)
    path.chmod(mode)


def _write(path: Path, text: str, mode: int = 0o644) -> None:
    path.unlink(missing_ok=True)  # It may be a link to where it must not be written.
    path.write_text(text)
    path.chmod(mode)


def _add_users(etc: Path) -> None:
    users = [
        line
        for line in (etc / "passwd").read_text().splitlines()
        if line.split(":")[0] not in ("root", ADMIN)
    ]
    users.insert(0, "root:x:0:0:root:/root:/bin/bash")
    users.append(f"{ADMIN}:x:{ADMIN_NUMBER}:{ADMIN_NUMBER}::/home/{ADMIN}:/bin/bash")
    if not any(line.startswith("sshd:") for line in users):
        users.append("sshd:x:102:65534::/run/sshd:/usr/sbin/nologin")
    _write(etc / "passwd", "\n".join([*users, ""]))
    with open(etc / "group", "a") as groups:
        groups.write(f"{ADMIN}:x:{ADMIN_NUMBER}:\n")
    # No password, which is not the same as locked: keys are what counts.
    shadow = [
        line
        for line in (etc / "shadow").read_text().splitlines()
        if line.split(":")[0] not in ("root", ADMIN)
    ]
    _write(
        etc / "shadow",
        "\n".join([*shadow, *(f"{name}:*:19000:0:99999:7:::" for name in ("root", ADMIN)), ""]),
        0o640,
    )


def _make_home(home: Path, keys: Path, number: int) -> None:
    home.mkdir(exist_ok=True)
    _write(home / ".bashrc", _BASHRC)
    _write(home / ".profile", _PROFILE)
    ssh = home / ".ssh"
    _directory(ssh, 0o700)
    _write(ssh / KEY, (keys / KEY).read_text(), 0o600)
    public = (keys / f"{KEY}.pub").read_text()
    _write(ssh / f"{KEY}.pub", public)
    _write(ssh / "authorized_keys", public, 0o600)
    for path in (home, *home.rglob("*")):
        os.chown(path, number, number)
