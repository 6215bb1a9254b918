"""Units for service managers: systemd on Linux, launchd on macOS. Pure: text in, text out.

``hcna-m1`` (or ``hcna-w2``, whatever this machine is) is the machine's supervisor. ``hcna-c1``
stands for C1, which lives inside M1: it follows C1 and shows its lines. A unit says where the
settings are and holds none, nor any secret.
"""

from __future__ import annotations

import plistlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hcna_ray.supervisor.ports import FILES_MAX

#: A second instance of one home would end at once with this code; trying again helps nobody.
_EXIT_ALREADY_RUNNING = 3
_EXIT_USAGE = 2
_RESTART_S = 5
#: On top of what each Ray node gets: the goodbye of a worker, the machines that M1 tells to stop.
_STOP_MARGIN_S = 45


@dataclass(frozen=True, kw_only=True)
class Host:
    """What the units of a machine are made from."""

    #: Short name: ``M1``, or that of the worker.
    name: str
    #: The ``hcna`` script, absolute.
    program: Path
    home: Path
    #: Settings file if it is not the one in the home.
    config: Path | None
    user: str
    group: str
    #: ``ray.stop_s``: how long each Ray node is given to end.
    stop_s: float

    @property
    def is_head(self) -> bool:
        """Whether this is M1's machine."""
        return self.name.upper().startswith("M")

    @property
    def stop_timeout_s(self) -> int:
        """How long the supervisor may take for an orderly stop."""
        return int(3 * self.stop_s) + _STOP_MARGIN_S

    def environment(self) -> dict[str, str]:
        """Return the variables that a unit sets: where the settings are, nothing else."""
        found = {"HCNA_HOME": str(self.home)}
        if self.config is not None:
            found["HCNA_CONFIG"] = str(self.config)
        return found


def systemd_units(host: Host, *, of_user: bool = False) -> dict[str, str]:
    """Return the text of every unit of this machine, by file name.

    Args:
        host: The machine.
        of_user: For the user's own service manager (``systemctl --user``) instead of the system's.
    """
    role = host.name.lower()
    units = {f"hcna-{role}.service": _machine_unit(host, role, of_user=of_user)}
    if host.is_head:
        units["hcna-c1.service"] = _composite_unit(host, role, of_user=of_user)
    return units


def launchd_plists(host: Host) -> dict[str, bytes]:
    """Return every property list of this machine, by file name."""
    roles = [host.name.lower(), "c1"] if host.is_head else [host.name.lower()]
    return {f"org.hcna-ray.{role}.plist": _plist(host, role) for role in roles}


# -- systemd ---------------------------------------------------------------------------------------


def _machine_unit(host: Host, role: str, *, of_user: bool) -> str:
    return _unit(
        {
            "Description": f"hcna-ray {host.name}, supervisor of this machine",
            **_network(of_user),
        },
        {
            **_service(host, role, of_user=of_user),
            # SIGTERM to the supervisor alone: it stops the others in order. What then is left of
            # them goes by SIGKILL.
            "KillMode": "mixed",
            "TimeoutStopSec": str(host.stop_timeout_s),
            "LimitNOFILE": str(FILES_MAX),
            "TasksMax": "infinity",
            # A task that ran out of memory is one failed task, not the end of the machine's part.
            "OOMPolicy": "continue",
            **_hardening(of_user),
        },
        wanted_by="default.target" if of_user else "multi-user.target",
    )


def _composite_unit(host: Host, role: str, *, of_user: bool) -> str:
    return _unit(
        {
            "Description": "hcna-ray C1, as it lives inside M1",
            "After": f"hcna-{role}.service",
            # Stops and starts with it, whoever stops or starts that.
            "BindsTo": f"hcna-{role}.service",
            "PartOf": f"hcna-{role}.service",
        },
        {
            **_service(host, "c1", of_user=of_user),
            "TimeoutStopSec": "10",
            **_hardening(of_user),
        },
        wanted_by=f"hcna-{role}.service",
    )


def _network(of_user: bool) -> dict[str, str]:
    # A user's manager knows no such target; the supervisor waits for the network by itself.
    if of_user:
        return {}
    return {"Wants": "network-online.target", "After": "network-online.target"}


def _service(host: Host, role: str, *, of_user: bool) -> dict[str, str]:
    environment = " ".join(
        quoted(f"{name}={value}") for name, value in sorted(host.environment().items())
    )
    identity = {} if of_user else {"User": host.user, "Group": host.group}
    return {
        "Type": "exec",
        **identity,
        "Environment": environment,
        "WorkingDirectory": f"-{_escaped(str(host.home))}",  # The supervisor makes it.
        "ExecStart": f"{quoted(str(host.program))} supervise {role}",
        "Restart": "on-failure",
        "RestartSec": str(_RESTART_S),
        "RestartPreventExitStatus": f"{_EXIT_USAGE} {_EXIT_ALREADY_RUNNING}",
    }


def _hardening(of_user: bool) -> dict[str, str]:
    """Return restrictions that neither Ray nor handlers mind.

    No PrivateTmp: Ray's sockets are below /tmp, and commands outside the unit need them. No
    RestrictNamespaces: sandboxes are made of them. ProtectHome would hide $HCNA_HOME.
    """
    shared = {
        "NoNewPrivileges": "yes",
        "RestrictSUIDSGID": "yes",
        "RestrictRealtime": "yes",
        "LockPersonality": "yes",
    }
    if of_user:
        return shared
    return shared | {
        "ProtectSystem": "full",
        "ProtectKernelTunables": "yes",
        "ProtectKernelModules": "yes",
        "ProtectControlGroups": "yes",
    }


def _unit(unit: Mapping[str, str], service: Mapping[str, str], *, wanted_by: str) -> str:
    sections: dict[str, Mapping[str, str]] = {
        "Unit": {**unit, "StartLimitIntervalSec": "0"},  # However often a start fails, try again.
        "Service": service,
        "Install": {"WantedBy": wanted_by},
    }
    lines = ["# Written by `hcna units`; write it anew after hcna-ray or its home has moved."]
    for title, fields in sections.items():
        lines += ["", f"[{title}]", *(f"{name}={value}" for name, value in fields.items())]
    return "\n".join(lines) + "\n"


def quoted(word: str) -> str:
    """Return a word for a command line or ``Environment=`` of a unit, quoted if it has to be."""
    text = _escaped(word.replace("\\", "\\\\").replace('"', '\\"'))
    return f'"{text}"' if any(sign in word for sign in " \t';\\\"") else text


def _escaped(text: str) -> str:
    """Return a text in which systemd finds no specifier."""
    return text.replace("%", "%%")


# -- launchd ---------------------------------------------------------------------------------------


def _plist(host: Host, role: str) -> bytes:
    output = str(host.home / "logs" / f"launchd-{role}.out")
    return plistlib.dumps(
        {
            "Label": f"org.hcna-ray.{role}",
            "ProgramArguments": [str(host.program), "supervise", role],
            "EnvironmentVariables": host.environment(),
            "WorkingDirectory": str(host.home),
            "RunAtLoad": True,
            # Again after a failure, not after an orderly end (`hcna down`).
            "KeepAlive": {"SuccessfulExit": False},
            "ThrottleInterval": 10,
            "ExitTimeOut": host.stop_timeout_s,
            "SoftResourceLimits": {"NumberOfFiles": FILES_MAX},
            "HardResourceLimits": {"NumberOfFiles": FILES_MAX},
            "StandardOutPath": output,
            "StandardErrorPath": output,
            "ProcessType": "Standard",
        }
    )
