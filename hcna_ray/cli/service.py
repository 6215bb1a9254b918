"""``supervise``, ``units``, ``memory``: this machine's part under a service manager, and its size.

``supervise`` becomes the supervisor itself (exec): the service manager watches one process, and
none of the command line's modules stay in memory.
"""

from __future__ import annotations

import grp
import json
import os
import pwd
import shlex
import shutil
import signal
import sys
import threading
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hcna_ray.cli.terminal import AsJson, CommandFailed, UsageProblem, print_json

if TYPE_CHECKING:
    from hcna_ray.config import Settings
    from hcna_ray.supervisor.memory import Memory
    from hcna_ray.supervisor.units import Host

#: `hcna supervise c1` gives up when M1 has been away for this long.
M1_AWAY_S = 60.0
_LOOK_S = 1.0

_MIB = 1024 * 1024


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command()(supervise)
    app.command()(units)
    app.command()(memory)


def supervise(
    role: Annotated[
        str, typer.Argument(help="m1, w1 ...: what this machine is; c1: follow C1.")
    ] = "",
) -> None:
    """Run this machine's part in the foreground, for a service manager; its lines go to stdout.

    SIGTERM stops this machine in good order; the others wait for it. With c1 it only follows C1,
    which lives inside M1: it shows C1's lines, and stopping it stops nothing.
    """
    from hcna_ray.config import load_settings
    from hcna_ray.supervisor import machine_settings
    from hcna_ray.supervisor.membership import read_membership

    settings = load_settings()
    membership = read_membership(settings.cluster_dir)
    here = membership.name if membership else settings.moderator.name
    settings = machine_settings(settings)
    if role.upper() == settings.composite.name and membership is None:
        _follow(settings)
        return
    if role and role.upper() != here.upper():
        raise UsageProblem(
            f"this machine is {here}, not {role.upper()}", f"hcna supervise {here.lower()}"
        )
    _become_supervisor(settings, joined=membership is not None)


def _become_supervisor(settings: Settings, *, joined: bool) -> None:
    from hcna_ray.durable import make_private_dir
    from hcna_ray.security.keys import ensure_owner_key
    from hcna_ray.supervisor import process_environment
    from hcna_ray.supervisor.state import RunLock, read_state, recorded_process, write_settings

    make_private_dir(settings.run_dir)
    make_private_dir(settings.logs_dir)
    if not joined:
        ensure_owner_key(settings.keys_dir, now=time.time())
    state = read_state(settings.run_dir)
    adopts = any(recorded_process(state, name) for name in state.get("members", {}))
    if RunLock(settings.run_dir).is_free() and not adopts:
        write_settings(settings)
    os.chdir(settings.home)
    command = [sys.executable, "-m", "hcna_ray.supervisor", "--relay"]
    os.execve(sys.executable, command, process_environment(settings, os.environ))


def _follow(settings: Settings) -> None:
    """Show C1's lines until SIGTERM, or until M1 was stopped in good order.

    Raises:
        CommandFailed: M1's supervisor has not been running for a minute.
    """
    from hcna_ray.supervisor import probe
    from hcna_ray.supervisor.relay import Relay
    from hcna_ray.supervisor.state import read_supervisor

    stopping = threading.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: stopping.set())
    relay = Relay([settings.logs_dir / "composite.log"], sys.stdout.buffer)
    relay.start()
    seen_at, was_ready, met = time.monotonic(), False, False
    try:
        while not stopping.is_set():
            now = time.monotonic()
            if read_supervisor(settings.run_dir) is not None:
                seen_at, met = now, True
            elif met and not (settings.run_dir / "supervisor.pid").exists():
                return  # It has cleared away after itself: nobody is to come.
            elif now - seen_at >= M1_AWAY_S:
                raise CommandFailed(
                    f"M1's supervisor has not been running for {M1_AWAY_S:g} s",
                    "systemctl status hcna-m1",
                )
            ready = probe.is_ready(settings.serve_host, settings.serve_port)
            if ready != was_ready:
                was_ready = ready
                relay.take(
                    _line("C1 is ready", "composite.ready")
                    if ready
                    else _line("C1 does not answer", "composite.away")
                )
            stopping.wait(_LOOK_S)
    finally:
        relay.stop()


def _line(message: str, action: str) -> bytes:
    at = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    line = {"at": at, "level": "info", "logger": __name__, "message": message, "action": action}
    return json.dumps(line).encode()


# -- units -----------------------------------------------------------------------------------------


def units(
    directory: Annotated[
        Path | None,
        typer.Option("--dir", help="Write the files there instead of only naming them."),
    ] = None,
    user_units: Annotated[
        bool, typer.Option("--user-units", help="For systemctl --user, without root.")
    ] = False,
    launchd: Annotated[
        bool, typer.Option("--launchd", help="For macOS (the default there) instead of systemd.")
    ] = sys.platform == "darwin",
) -> None:
    """Write the units that start this machine's part at boot: hcna-m1 and hcna-c1, or hcna-wN.

    Without --dir it says what there is to do. The files hold no settings and no secrets.
    """
    from hcna_ray.supervisor.units import launchd_plists, systemd_units

    host = _host()
    files: dict[str, bytes]
    if launchd:
        files = launchd_plists(host)
    else:
        texts = systemd_units(host, of_user=user_units)
        files = {name: text.encode() for name, text in texts.items()}
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (directory / name).write_bytes(content)
            typer.echo(str(directory / name))
    for line in _steps(list(files), directory, of_user=user_units, launchd=launchd):
        typer.echo(line, err=directory is not None)
    for variable in _settings_in_environment():
        typer.echo(
            f"note: {variable} is set here but will not be in the unit; put it into "
            f"{host.home / 'hcna.yaml'}",
            err=True,
        )


def _host() -> Host:
    from hcna_ray.config import load_settings
    from hcna_ray.supervisor.membership import read_membership
    from hcna_ray.supervisor.units import Host

    settings = load_settings()
    membership = read_membership(settings.cluster_dir)
    config = settings.source
    account = pwd.getpwuid(os.getuid())
    return Host(
        name=membership.name if membership else settings.moderator.name,
        program=_program(),
        home=settings.home,
        config=config if config != settings.home / "hcna.yaml" else None,
        user=account.pw_name,
        group=grp.getgrgid(account.pw_gid).gr_name,
        stop_s=settings.ray.stop_s,
    )


def _program() -> Path:
    """Return the script of this environment, by the path that leads there.

    Raises:
        CommandFailed: There is none.
    """
    beside = Path(sys.executable).absolute().with_name("hcna")
    found = str(beside) if beside.exists() else shutil.which("hcna")
    if found is None:
        raise CommandFailed(
            "the hcna script is not in this environment", "uv sync in the folder of hcna-ray"
        )
    return Path(found).absolute()


def _steps(names: list[str], directory: Path | None, *, of_user: bool, launchd: bool) -> list[str]:
    """Return what to type, one command a line."""
    folder = directory or Path("units")
    flag = " --launchd" if launchd else (" --user-units" if of_user else "")
    steps = [] if directory else [f"hcna units --dir {folder}{flag}"]
    paths = " ".join(shlex.quote(str(folder / name)) for name in names)
    if launchd:
        steps += [f"cp {paths} ~/Library/LaunchAgents/"]
        steps += [f"launchctl load -w ~/Library/LaunchAgents/{name}" for name in names]
        return steps
    plain = " ".join(name.removesuffix(".service") for name in names)
    if of_user:
        return [
            *steps,
            f"install -D -m 644 -t ~/.config/systemd/user {paths}",
            "systemctl --user daemon-reload",
            f"systemctl --user enable --now {plain}",
            "loginctl enable-linger   # so that they start at boot, not at login",
        ]
    return [
        *steps,
        f"sudo install -m 644 -t /etc/systemd/system {paths}",
        "sudo systemctl daemon-reload",
        f"sudo systemctl enable --now {plain}",
    ]


def _settings_in_environment() -> list[str]:
    return sorted(name for name in os.environ if name.startswith("HCNA_") and "__" in name)


# -- memory ----------------------------------------------------------------------------------------


def memory(as_json: AsJson = False) -> None:
    """Print what this machine's processes take in memory (PSS), by what they are for."""
    from hcna_ray.config import load_settings
    from hcna_ray.supervisor.membership import read_membership
    from hcna_ray.supervisor.memory import can_measure, measure
    from hcna_ray.supervisor.ports import marker_of
    from hcna_ray.supervisor.processes import scan

    if not can_measure():
        raise CommandFailed(
            "this system does not tell what a process takes", "run it on Linux, as the same user"
        )
    settings = load_settings()
    membership = read_membership(settings.cluster_dir)
    own = membership.name if membership else settings.moderator.name
    found = measure([process.pid for process in scan(marker_of(settings))], own_node=own)
    if as_json:
        print_json(asdict(found))
        return
    if not found.count:
        raise CommandFailed(f"nothing of {settings.home} is running", "hcna up")
    for line in memory_lines(found):
        typer.echo(line)


def memory_lines(found: Memory) -> list[str]:
    """The figures for people: MiB, largest first."""
    lines = []
    for node in found.nodes:
        lines.append(f"{node.node:<34}{node.count:>5}{node.pss_bytes / _MIB:>9.1f} MiB")
        lines += [
            f"  {group.kind:<32}{group.count:>5}{group.pss_bytes / _MIB:>9.1f}"
            for group in node.groups
        ]
    lines.append(f"{'total':<34}{found.count:>5}{found.pss_bytes / _MIB:>9.1f} MiB")
    if found.unreadable:
        lines.append(f"not counted: {found.unreadable} processes of another user")
    return lines
