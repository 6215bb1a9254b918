"""Prometheus, Alertmanager and Grafana beside a cluster: found, started where installed, stopped.

They are no part of the cluster and outlive it, or nobody would see that it is down. What was
started here is in ``processes.json`` of their folder, and nothing else is ever stopped; what was
asked for is in ``options.json``.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import httpx

from hcna_ray.core.errors import HcnaError
from hcna_ray.durable import make_private_dir, write_private
from hcna_ray.observability import monitoring
from hcna_ray.supervisor.processes import (
    ProcessRef,
    identify,
    is_alive,
    reap,
    send,
    stop,
)

#: How long a program may take until it answers.
READY_S = 90.0
#: How much of the disk Prometheus may take; the oldest goes first.
PROMETHEUS_KEEPS = "2GB"
_ANSWER_S = 3.0
#: C1 waits for Ray before it says what to scrape.
_TARGETS_S = 10.0
_END_S = 20.0
_LOOK_S = 0.1
_RECORD = "processes.json"
_OPTIONS, _OPTIONS_VERSION = "options.json", 1
#: Where packages put programs and shells of users do not look.
_MORE_PATH = ("/usr/sbin", "/usr/local/sbin", "/usr/local/bin", "/usr/share/grafana/bin")
#: Variables that would make a program one of the cluster's, or tell it a key that it need not know.
_NOT_HANDED_ON = ("HCNA_", "RAY_", "GRAFANA_", "GF_")

Outcome = Literal["started", "running", "found", "foreign", "missing", "stopped"]


class ObserverFailed(HcnaError):
    """A program that is installed does not come up or end, or a file of ours cannot be read."""

    code = "observer_failed"

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name} {self.reason}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """A program that looks at clusters."""

    name: str
    #: What it is called where it is installed.
    commands: tuple[str, ...]
    #: Where it answers 200 when it is ready.
    ready: str
    #: What to type where it is not installed.
    install: str


PROMETHEUS = Program(
    name="Prometheus",
    commands=("prometheus",),
    ready="/-/ready",
    install="sudo apt-get install prometheus, or https://prometheus.io/download",
)
ALERTMANAGER = Program(
    name="Alertmanager",
    commands=("prometheus-alertmanager", "alertmanager"),
    ready="/-/ready",
    install="sudo apt-get install prometheus-alertmanager, or https://prometheus.io/download",
)
GRAFANA = Program(
    name="Grafana",
    commands=("grafana", "grafana-server"),
    ready="/api/health",
    install="https://grafana.com/docs/grafana/latest/setup-grafana/installation",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Observer:
    """One program at one address, and what became of it.

    ``started`` just now, ``running`` since an earlier time, ``found`` though not started here,
    ``foreign`` if it knows nothing of this cluster, ``missing`` if it is not installed,
    ``stopped`` because it is not asked for any more.
    """

    name: str
    url: str
    outcome: Outcome
    #: What to type, if something is left to do.
    then: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """What ``hcna observe up`` is asked for: its options, each at its default unless told."""

    grafana: str = "http://127.0.0.1:3000"
    prometheus: str = monitoring.PROMETHEUS_URL
    alertmanager: str = monitoring.ALERTMANAGER_URL
    #: Who is told of alerts; empty: nobody.
    webhook: str = ""
    #: Where Grafana reaches Loki; empty: there is none.
    loki: str = ""
    #: Where Prometheus reaches C1; empty: where C1 is on this machine.
    c1: str = ""
    #: Path of a file with a key for C1, never the key; empty: C1 asks for none.
    key_file: str = ""
    every: int = monitoring.EVERY_S
    #: Grafana's.
    user: str = "admin"
    without_grafana: bool = False

    def told(self) -> dict[str, Any]:
        """Return what is not at its default."""
        usual = asdict(Wanted())
        return {name: value for name, value in asdict(self).items() if value != usual[name]}


class Observers:
    """The programs of one folder. Every call may be made twice."""

    def __init__(self, folder: Path) -> None:
        """Name the folder that holds their configuration, data and logs."""
        self.folder = folder

    def write(self, files: Mapping[str, str]) -> bool:
        """Write configuration; return whether anything of it is new."""
        changed = False
        make_private_dir(self.folder)
        for name, text in files.items():
            path = self.folder / name
            if path.is_file() and path.read_text("utf-8") == text:
                continue
            changed = True
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8")
        return changed

    def remember(self, wanted: Wanted) -> None:
        """Write down what was asked for, for the next run."""
        told = {"version": _OPTIONS_VERSION, "options": wanted.told()}
        write_private(self.folder / _OPTIONS, json.dumps(told, indent=2) + "\n")

    def remembered(self) -> Wanted:
        """Return what the last run was asked for.

        Raises:
            ObserverFailed: That is written down, and cannot be read: to go on would drop it.
        """
        path = self.folder / _OPTIONS
        try:
            told = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            return Wanted()
        except (OSError, ValueError):
            told = None
        options = told.get("options") if isinstance(told, dict) else None
        kinds = {name: type(value) for name, value in asdict(Wanted()).items()}
        if (
            not isinstance(options, dict)
            or told.get("version") != _OPTIONS_VERSION
            or any(kinds.get(name) is not type(value) for name, value in options.items())
        ):
            raise ObserverFailed(
                str(path), "does not hold what was asked for last: delete it, and name every option"
            )
        return Wanted(**options)

    def prometheus(self, url: str, *, changed: bool) -> Observer:
        """Have Prometheus scrape the cluster.

        Args:
            url: Where it is to be reached.
            changed: Whether its configuration is new.

        Raises:
            ObserverFailed: It is installed and does not come up.
        """
        options = [
            f"--config.file={self.folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={self.folder / 'prometheus'}",
            f"--storage.tsdb.retention.size={PROMETHEUS_KEEPS}",
            f"--web.listen-address={_listens(url)}",
        ]
        one = self._ensure(PROMETHEUS, url, lambda program: [program, *options], changed=changed)
        if one.outcome == "found" and not _scrapes_us(url):
            return Observer(
                name=one.name,
                url=url,
                outcome="foreign",
                then=f"add what is in {self.folder / 'prometheus.yml'} to its own configuration, "
                "or stop it (Debian starts one: sudo systemctl disable --now prometheus)",
            )
        return one

    def alertmanager(self, url: str, *, changed: bool) -> Observer:
        """Have Alertmanager tell the webhook of alerts. Arguments as those of `prometheus`."""
        options = [
            f"--config.file={self.folder / 'alertmanager.yml'}",
            f"--storage.path={self.folder / 'alertmanager'}",
            f"--web.listen-address={_listens(url)}",
            "--cluster.listen-address=",
        ]
        return self._ensure(ALERTMANAGER, url, lambda program: [program, *options], changed=changed)

    def grafana(self, url: str) -> Observer:
        """Have a Grafana; one that is started here has the password of `grafana_password`."""
        parts = urlsplit(url)
        data = self.folder / "grafana-data"
        settings = {
            "GF_SERVER_HTTP_ADDR": parts.hostname or "",
            "GF_SERVER_HTTP_PORT": str(parts.port or 80),
            "GF_PATHS_DATA": str(data),
            "GF_PATHS_LOGS": str(data / "log"),
            "GF_PATHS_PLUGINS": str(data / "plugins"),
            "GF_ANALYTICS_REPORTING_ENABLED": "false",
            "GF_ANALYTICS_CHECK_FOR_UPDATES": "false",
            "GF_ANALYTICS_CHECK_FOR_PLUGIN_UPDATES": "false",
        }

        def command(program: str) -> list[str]:
            settings["GF_SECURITY_ADMIN_PASSWORD"] = self._make_grafana_password()
            said = [program, "server"] if Path(program).name == "grafana" else [program]
            home = _home_of_grafana(Path(program))
            return [*said, *(["--homepath", str(home)] if home else [])]

        return self._ensure(GRAFANA, url, command, env=settings)

    @property
    def grafana_password(self) -> str | None:
        """The password of ``admin`` in the Grafana that was started here."""
        path = self.folder / "grafana.password"
        return path.read_text("utf-8").strip() if path.is_file() else None

    def down(self, *only: Program) -> list[str]:
        """Stop what was started here, or ``only`` these of it; return the names of what it was.

        Raises:
            ObserverFailed: Something does not end.
        """
        recorded = self._recorded()
        names = {one.name for one in only} or set(recorded)
        stopped = []
        for name in [one for one in recorded if one in names]:
            process, _ = recorded.pop(name)
            if not is_alive(process):
                continue
            if stop([process], term_s=_END_S):
                raise ObserverFailed(name, f"(process {process.pid}) does not end")
            stopped.append(name)
        if recorded:
            self._write_record(recorded)
        else:
            (self.folder / _RECORD).unlink(missing_ok=True)
        return stopped

    # -- one program -------------------------------------------------------------------------------

    def _ensure(
        self,
        program: Program,
        url: str,
        command: Callable[[str], list[str]],
        *,
        changed: bool = False,
        env: Mapping[str, str] | None = None,
    ) -> Observer:
        process, where = self._recorded().get(program.name, (None, ""))
        if process is not None and is_alive(process):
            if where == url:
                if changed:
                    send(process, signal.SIGHUP)
                self._wait(program, url, process)
                return Observer(name=program.name, url=url, outcome="running")
            if stop([process], term_s=_END_S):
                raise ObserverFailed(program.name, f"(process {process.pid}) does not end")
        if _answers(url, program.ready):
            return Observer(name=program.name, url=url, outcome="found")
        found = _installed(program)
        if found is None or not is_here(url):
            then = program.install if found is None else f"start it there: {url} does not answer"
            return Observer(name=program.name, url=url, outcome="missing", then=then)
        arguments = command(found)
        process = self._start(program, arguments, env or {})
        self._record(program.name, process, url)
        self._wait(program, url, process)
        return Observer(name=program.name, url=url, outcome="started")

    def _start(
        self, program: Program, arguments: Sequence[str], env: Mapping[str, str]
    ) -> ProcessRef:
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(_NOT_HANDED_ON)
        }
        with self._log(program).open("wb") as log:
            child = subprocess.Popen(
                list(arguments),
                cwd=self.folder,
                env=kept | dict(env),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        process = identify(child.pid)
        child.returncode = 0  # It outlives us; `reap` collects it if it ends before that.
        if process is None:
            raise ObserverFailed(program.name, f"ended at once: {self._last_line(program)}")
        return process

    def _wait(self, program: Program, url: str, process: ProcessRef) -> None:
        end = time.monotonic() + READY_S
        while not _answers(url, program.ready):
            reap(process.pid)
            if not is_alive(process):
                raise ObserverFailed(program.name, f"ended: {self._last_line(program)}")
            if time.monotonic() > end:
                raise ObserverFailed(
                    program.name, f"is not ready after {READY_S:g} s, see {self._log(program)}"
                )
            time.sleep(_LOOK_S)

    def _log(self, program: Program) -> Path:
        return self.folder / f"{program.name.lower()}.log"

    def _last_line(self, program: Program) -> str:
        lines = self._log(program).read_text("utf-8", "replace").strip().splitlines()
        return f"{lines[-1][:300] if lines else 'it said nothing'} ({self._log(program)})"

    # -- what is remembered ------------------------------------------------------------------------

    def _recorded(self) -> dict[str, tuple[ProcessRef, str]]:
        try:
            told = json.loads((self.folder / _RECORD).read_text("utf-8"))
            return {
                name: (ProcessRef(one["pid"], one["started_ticks"]), one["url"])
                for name, one in told.items()
            }
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return {}  # Nobody knows what was started: it is found by its address.

    def _record(self, name: str, process: ProcessRef, url: str) -> None:
        self._write_record({**self._recorded(), name: (process, url)})

    def _write_record(self, every: Mapping[str, tuple[ProcessRef, str]]) -> None:
        told = {known: asdict(ref) | {"url": at} for known, (ref, at) in every.items()}
        write_private(self.folder / _RECORD, json.dumps(told, indent=2) + "\n")

    def _make_grafana_password(self) -> str:
        """Return the password; made once, because Grafana takes it at its first start only."""
        known = self.grafana_password
        if known:
            return known
        made = secrets.token_urlsafe(18)
        write_private(self.folder / "grafana.password", made + "\n")
        return made


def shows_figures(c1_url: str, key: str) -> bool | None:
    """Whether C1 tells Prometheus what to scrape; ``None`` if it answers neither yes nor no.

    Args:
        c1_url: Where Prometheus reaches C1.
        key: What Prometheus would show it; empty if it has none.
    """
    try:
        reply = httpx.get(
            f"{c1_url.rstrip('/')}/metrics/targets?job=hcna",
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=_TARGETS_S,
            trust_env=False,
        )
    except (httpx.HTTPError, httpx.InvalidURL):
        return None
    return {200: True, 401: False, 403: False}.get(reply.status_code)


def is_here(url: str) -> bool:
    """Whether a program of that address may be started on this machine."""
    parts = urlsplit(url)
    return parts.scheme == "http" and parts.hostname in ("127.0.0.1", "::1", "localhost")


def _answers(url: str, path: str) -> bool:
    try:
        reply = httpx.get(f"{url.rstrip('/')}{path}", timeout=_ANSWER_S, trust_env=False)
    except httpx.HTTPError:
        return False
    return reply.status_code == 200


def _scrapes_us(url: str) -> bool:
    """Whether a Prometheus has our job in its configuration."""
    try:
        reply = httpx.get(
            f"{url.rstrip('/')}/api/v1/status/config", timeout=_ANSWER_S, trust_env=False
        )
    except httpx.HTTPError:
        return False
    return reply.status_code == 200 and "/metrics/targets" in reply.text


def _installed(program: Program) -> str | None:
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), *_MORE_PATH))
    return next(filter(None, (shutil.which(one, path=path) for one in program.commands)), None)


def _listens(url: str) -> str:
    parts = urlsplit(url)
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    return f"{host}:{parts.port or 80}"


def _home_of_grafana(program: Path) -> Path | None:
    """Return the folder of what belongs to it: beside the program, or where its package puts it."""
    for place in (program.resolve().parent.parent, Path("/usr/share/grafana")):
        if (place / "conf" / "defaults.ini").is_file():
            return place
    return None
