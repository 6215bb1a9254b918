"""What ``ray up cluster.yaml`` asks of M1's machine: bring the workers up too, over SSH.

Ray's launcher starts the head over SSH and leaves the workers to the autoscaler on it. With the
local provider of Ray 2.60 the new autoscaler (on by default) never gets there: only the old one
records the head in the provider's state file, so the new one finds each machine it has started
terminated, gives it up and starts anew for ever (``local/node_provider.py``,
``record_local_head_state_if_needed``; ray#59905). So here the head's start command does the work
itself, in the foreground: `ray up` shows each machine's progress and fails when one fails.

The launcher leaves what is needed on the head: ``~/ray_bootstrap_config.yaml`` with the addresses
and ``~/ray_bootstrap_key.pem``. Names go by the order of ``worker_ips``; a machine that has joined
keeps its name.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hcna_ray.config import Settings
from hcna_ray.core.errors import HcnaError
from hcna_ray.durable import write_private
from hcna_ray.supervisor.invites import create_invite
from hcna_ray.supervisor.membership import Member, read_members

#: Life of the code that a worker's machine is given; it is used at once, and only once.
_INVITE_S = 900.0
#: Longest that one command on one worker's machine may take: its first one installs packages.
_COMMAND_S = 1200.0
_CHECKOUT = "~/hcna-ray"
#: What a checkout needs on another machine is neither its history nor its environment.
_NOT_COPIED = (".git", ".venv", ".tools", "build", "__pycache__", ".*_cache", ".hypothesis")

#: A machine's host key is taken on trust the first time and must be the same ever after: what is
#: sent lets its receiver join.
_SSH_OPTIONS = (
    "-o", "StrictHostKeyChecking=accept-new",
    "-o", "LogLevel=ERROR",
    "-o", "BatchMode=yes",
    "-o", "ConnectTimeout=10",
    "-o", "ServerAliveInterval=5",
    "-o", "ServerAliveCountMax=3",
)  # fmt: skip


class LauncherConfigBroken(HcnaError):
    """The launcher's configuration cannot be used. The text names the field."""

    code = "launcher_config"


class WorkersMissing(HcnaError):
    """Some machines did not come up. The text says which, why, and what helps."""

    code = "workers_missing"


@dataclass(frozen=True, kw_only=True)
class LauncherConfig:
    """What matters here of ``cluster.yaml`` as the launcher leaves it on the head."""

    head_ip: str
    worker_ips: tuple[str, ...]
    ssh_user: str
    ssh_private_key: str | None


def read_config(path: Path) -> LauncherConfig:
    """Read ``~/ray_bootstrap_config.yaml``.

    Raises:
        LauncherConfigBroken: It is missing, is no YAML, or lacks an address.
    """
    try:
        data = yaml.safe_load(path.expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise LauncherConfigBroken(f"{path} cannot be read: {error}") from None
    provider = _mapping(data, "provider", path)
    auth = _mapping(data, "auth", path)
    head_ip, worker_ips = provider.get("head_ip"), provider.get("worker_ips") or []
    if not isinstance(head_ip, str) or not head_ip:
        raise LauncherConfigBroken(f"{path}: provider.head_ip is missing")
    if not isinstance(worker_ips, list) or not all(isinstance(ip, str) for ip in worker_ips):
        raise LauncherConfigBroken(f"{path}: provider.worker_ips must be a list of addresses")
    doubled = {ip for ip in worker_ips if worker_ips.count(ip) > 1 or ip == head_ip}
    if doubled:
        raise LauncherConfigBroken(
            f"{path}: {', '.join(sorted(doubled))} is named twice in provider; the head works by "
            "itself as long as provider.worker_ips is empty"
        )
    key = auth.get("ssh_private_key")
    return LauncherConfig(
        head_ip=head_ip,
        worker_ips=tuple(worker_ips),
        ssh_user=str(auth.get("ssh_user") or ""),
        ssh_private_key=str(key) if key else None,
    )


def head_address(settings: Settings) -> str | None:
    """Return M1's address as the launcher knows it, or None if it never started this machine."""
    head_ip = _launched(settings).get("head_ip")
    return str(head_ip) if head_ip else None


def with_address(settings: Settings, address: str) -> Settings:
    """Return M1's settings with the address that the launcher knows it by."""
    ray = settings.ray.model_copy(update={"node_address": address})
    return settings.model_copy(update={"ray": ray})


def remember(settings: Settings, config: LauncherConfig) -> tuple[str, ...]:
    """Note what the launcher said; return the workers that it named before and no longer does."""
    before = tuple(_launched(settings).get("worker_ips", ()))
    data = {"head_ip": config.head_ip, "worker_ips": list(config.worker_ips)}
    write_private(settings.cluster_dir / "launcher.json", json.dumps(data) + "\n")
    return tuple(ip for ip in before if ip not in config.worker_ips)


def plan_names(worker_ips: Sequence[str], members: Sequence[Member]) -> dict[str, str]:
    """Return each machine's name by address: the one it has, else the lowest that is free."""
    names = {member.address: member.name for member in members}
    taken = set(names.values())
    planned: dict[str, str] = {}
    for ip in worker_ips:
        if ip in names:
            planned[ip] = names[ip]
            continue
        number = 1
        while f"W{number}" in taken:
            number += 1
        planned[ip] = f"W{number}"
        taken.add(planned[ip])
    return planned


def bring_workers(
    settings: Settings, config: LauncherConfig, *, now: float, on_step: Callable[[str], None]
) -> None:
    """Have every listed machine join and run; those no longer listed leave.

    Args:
        settings: Of M1's machine, whose supervisor runs.
        config: What the launcher said.
        now: Seconds since the epoch.
        on_step: Told each step in a few words, from several threads.

    Raises:
        WorkersMissing: At least one machine did not come up. The others did.
    """
    removed = remember(settings, config)
    members = read_members(settings.cluster_dir)
    names = plan_names(config.worker_ips, members)
    lock = threading.Lock()

    def say(text: str) -> None:
        with lock:
            on_step(text)

    def one(ip: str) -> str | None:
        try:
            return bring(ip)
        except (OSError, subprocess.SubprocessError) as error:
            return f"{names[ip]} ({ip}): {error}"

    def bring(ip: str) -> str | None:
        name = names[ip]
        code, _ = create_invite(
            settings, addresses=(config.head_ip,), lifetime_s=_INVITE_S, uses=1, name=name, now=now
        )
        script = f"{_ready(config, ip, say)}exec .venv/bin/hcna join --code-file - --name {name} "
        script += f"--address {shlex.quote(ip)}"
        return _run(config, ip, script, stdin=code + "\n", label=name, say=say)

    with ThreadPoolExecutor(max_workers=16) as pool:
        leaving = [pool.submit(_leave, config, ip, say) for ip in removed]
        troubles = [trouble for trouble in pool.map(one, config.worker_ips) if trouble]
        for job in leaving:
            job.result()
    if troubles:
        raise WorkersMissing("; ".join(troubles))


def _leave(config: LauncherConfig, ip: str, say: Callable[[str], None]) -> None:
    script = f"cd {_CHECKOUT} && exec .venv/bin/hcna leave"
    trouble = _run(config, ip, script, stdin="", label=ip, say=say)
    if trouble:
        say(f"{trouble} (it is no longer listed; forget it with: hcna workers forget NAME)")


def _ready(config: LauncherConfig, ip: str, say: Callable[[str], None]) -> str:
    """Return the commands that make the checkout on a machine usable; copy it there if missing."""
    present = subprocess.run(
        [*_ssh(config, ip), f"test -d {_CHECKOUT}/hcna_ray"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        check=False,
    )
    if present.returncode == 1:
        say(f"{ip}: copying the checkout to {_CHECKOUT}")
        root = Path(__file__).resolve().parents[2]
        excludes = [f"--exclude={name}" for name in _NOT_COPIED]
        target = f"{config.ssh_user}@{ip}" if config.ssh_user else ip
        shell = shlex.join(_ssh(config, ip)[:-1])
        subprocess.run(
            ["rsync", "-a", *excludes, "-e", shell, f"{root}/", f"{target}:hcna-ray/"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_COMMAND_S,
            check=False,
        )
    return f"cd {_CHECKOUT} && scripts/prepare.sh && "


def _run(
    config: LauncherConfig,
    ip: str,
    script: str,
    *,
    stdin: str,
    label: str,
    say: Callable[[str], None],
) -> str | None:
    """Run a script on a machine; pass on what it says; return what went wrong, if anything did."""
    child = subprocess.Popen(
        [*_ssh(config, ip), script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    timer = threading.Timer(_COMMAND_S, child.kill)
    timer.start()
    last = ""
    try:
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdin.write(stdin)
            child.stdin.close()
        except BrokenPipeError:
            pass  # It ended before it read; its words say why.
        for line in child.stdout:
            if line.strip():
                last = line.strip()
                say(f"{label} {ip}: {last}")
        code = child.wait()
    finally:
        timer.cancel()
    if code == 0:
        return None
    if code == 255:
        user = config.ssh_user or "you"
        return (
            f"{label} ({ip}) cannot be reached over SSH from M1: {last or 'no answer'}; "
            f"check with: ssh -i ~/ray_bootstrap_key.pem {user}@{ip}"
        )
    return f"{label} ({ip}) did not join, exit code {code}: {last}"


def _ssh(config: LauncherConfig, ip: str) -> list[str]:
    """Return the command up to the script: everything but what is to be run."""
    key = []
    if config.ssh_private_key:
        key = ["-i", str(Path(config.ssh_private_key).expanduser()), "-o", "IdentitiesOnly=yes"]
    return ["ssh", *_SSH_OPTIONS, *key, f"{config.ssh_user}@{ip}" if config.ssh_user else ip]


def _launched(settings: Settings) -> dict[str, Any]:
    try:
        data = json.loads((settings.cluster_dir / "launcher.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _mapping(data: object, key: str, path: Path) -> Mapping[str, Any]:
    found = data.get(key) if isinstance(data, dict) else None
    if not isinstance(found, dict):
        raise LauncherConfigBroken(f"{path}: section {key!r} is missing")
    return found
