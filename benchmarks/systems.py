"""The systems under test: hcna-ray and its peers, each started as its users start it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from benchmarks.children import (
    FOLDER,
    ROOT,
    Children,
    Trouble,
    ended_whatever_happens,
    free_port,
    listening,
)
from benchmarks.load import Job

#: Of our own instance; far from the default ports and from those of the tests.
PORTS_OFFSET = 21500
#: Where Ray keeps what it writes, by default; `hcna down` leaves the logs there.
RAY_FOLDER = Path(f"/tmp/hcna-{os.getuid()}-{PORTS_OFFSET}")
PEERS = FOLDER / "peers" / "bin"
PROGRAMS = ROOT / "benchmarks" / "peers"
CORES = os.cpu_count() or 1
#: What every process of a peer needs to find those programs.
AS_PEER = {"PYTHONPATH": str(PROGRAMS)}


@dataclass(frozen=True, kw_only=True)
class Target:
    """A running system and how to talk to it."""

    children: Children
    #: What every request to it has in common.
    job: Job
    #: A task and a batch of a thousand, as it wants them.
    body: str
    batch_body: str
    #: Its state directory, where the disk is.
    folder: Path
    #: Have it start nothing of what it accepts, and again what it has accepted.
    pause: Callable[[], None]
    resume: Callable[[], None]
    #: Of hcna-ray alone: the pid of its moderator, and its home.
    moderator: Callable[[], int] | None = None
    home: Path | None = None

    def asked(self, **changes: object) -> Job:
        """Return a job for it that submits single tasks."""
        return replace(self.job, **{"body": self.body, **changes})  # type: ignore[arg-type]

    def batched(self, tasks: int, **changes: object) -> Job:
        """Return a job for it that submits so many tasks a request."""
        fields: dict[str, object] = {
            "body": self.batch_body.replace('"@"', ",".join([self.body] * tasks)),
            "path": "/tasks/batch",
            "tasks": tasks,
        }
        return replace(self.job, **{**fields, **changes})  # type: ignore[arg-type]


class System(Protocol):
    """Something that takes tasks over HTTP."""

    name: str
    title: str
    #: Whether what was accepted survives a crash of the machine, in a word or two.
    durable: str

    def running(
        self, folder: Path, extra: Mapping[str, str]
    ) -> contextlib.AbstractContextManager[Target]:
        """Start it with an empty state in a folder; end it when the block is left.

        Args:
            folder: Made anew.
            extra: Variables for all of its processes.
        """


#: The same work for everybody.
TASK = '{"task_type":"echo","payload":{"message":"measure"}}'
#: The same, telling when it began.
STAMPED = '{"task_type":"echo","payload":{"message":"measure","stamp":true}}'
BATCH = '{"tasks":["@"]}'


class Hcna:
    """hcna-ray through its own commands, with keys, as it is by default."""

    name = "hcna"
    title = "hcna-ray"
    durable = "yes"

    @contextlib.contextmanager
    def running(self, folder: Path, extra: Mapping[str, str]) -> Iterator[Target]:
        """``hcna up`` in a home of its own, ``hcna down`` at the end."""
        home = emptied(folder) / "home"
        hcna = str(Path(sys.executable).parent / "hcna")
        named = {"HCNA_HOME": str(home), "HCNA_PORTS__OFFSET": str(PORTS_OFFSET)}
        children = Children(folder / "logs", {**named, **extra})
        with ended_whatever_happens(children):
            try:
                children.call("up", [hcna, "up", "--wait", "180"], timeout_s=200)
                told = children.call("env", [hcna, "env", "--json"], timeout_s=30)
                known = json.loads(told)
                url, key = known["HCNA_URL"], known["HCNA_API_KEY"]
                job = Job(
                    kind="burst",
                    port=int(url.rsplit(":", 1)[1].strip("/")),
                    headers=(f"Authorization: Bearer {key}",),
                    count_path="/status",
                    count_keys=("queues", "default", "completed"),
                )
                queue = "/admin/queues/default"
                yield Target(
                    children=children,
                    job=job,
                    body=TASK,
                    batch_body=BATCH,
                    folder=folder,
                    pause=lambda: _told(job, "POST", f"{queue}/pause"),
                    resume=lambda: _told(job, "POST", f"{queue}/resume"),
                    moderator=lambda: int(_asked(job, "GET", "/status")["moderator"]["pid"]),
                    home=home,
                )
            finally:
                children.call("down", [hcna, "down"], timeout_s=120)
                shutil.rmtree(RAY_FOLDER, ignore_errors=True)


class Celery:
    """FastAPI, Celery and Redis."""

    name = "celery"
    title = "FastAPI + Celery + Redis"
    durable = "no (1 s window)"

    @contextlib.contextmanager
    def running(self, folder: Path, extra: Mapping[str, str]) -> Iterator[Target]:
        """Redis, a Celery worker with its defaults, and the web workers."""
        emptied(folder)
        redis, web = free_port(), free_port()
        children = Children(folder / "logs", {"REDIS_PORT": str(redis), **AS_PEER, **extra})
        with ended_whatever_happens(children):
            start_redis(children, folder, redis)
            worker = children.start(
                "worker",
                [
                    str(PEERS / "celery"),
                    "-A",
                    "celery_app:celery",
                    "worker",
                    "--loglevel",
                    "WARNING",
                ],
                cwd=PROGRAMS,
            )
            start_web(children, "celery_app:app", web, workers=CORES)
            yield peer(children, web, folder, worker)


class Procrastinate:
    """FastAPI, Procrastinate and PostgreSQL."""

    name = "procrastinate"
    title = "FastAPI + Procrastinate + PostgreSQL"
    durable = "yes"
    #: Jobs that its worker runs at once: ``--concurrency``, of which it says no number.
    concurrency = 30

    @contextlib.contextmanager
    def running(self, folder: Path, extra: Mapping[str, str]) -> Iterator[Target]:
        """PostgreSQL with its defaults, a worker, and the web workers."""
        emptied(folder)
        web = free_port()
        children = Children(folder / "logs", {**AS_PEER, **extra})
        with ended_whatever_happens(children):
            url = start_postgres(children, folder)
            children.environment |= {"POSTGRES_URL": url}
            program = [str(PEERS / "procrastinate"), "--log-level", "warning"]
            program += ["--app", "procrastinate_app.procrastinate"]
            children.call("schema", [*program, "schema", "--apply"], timeout_s=60, cwd=PROGRAMS)
            worker = children.start(
                "worker",
                [*program, "worker", "--concurrency", str(self.concurrency)],
                cwd=PROGRAMS,
            )
            start_web(children, "procrastinate_app:app", web, workers=CORES)
            yield peer(children, web, folder, worker)


class Dask:
    """FastAPI and Dask distributed."""

    name = "dask"
    title = "FastAPI + Dask distributed"
    durable = "no"

    @contextlib.contextmanager
    def running(self, folder: Path, extra: Mapping[str, str]) -> Iterator[Target]:
        """A scheduler, a worker process for each core, and one web worker, which holds futures."""
        emptied(folder)
        scheduler, web = free_port(), free_port()
        address = f"tcp://127.0.0.1:{scheduler}"
        children = Children(folder / "logs", {"DASK_SCHEDULER": address, **AS_PEER, **extra})
        with ended_whatever_happens(children):
            dask = str(PEERS / "dask")
            children.start(
                "scheduler",
                [
                    *(dask, "scheduler", "--host", "127.0.0.1", "--port", str(scheduler)),
                    *("--no-dashboard", "--no-show"),
                ],
                cwd=PROGRAMS,
            )
            children.until(lambda: listening(scheduler), "the start of the scheduler")
            worker = children.start(
                "worker",
                [
                    *(dask, "worker", address, "--nworkers", str(CORES)),
                    *("--nthreads", "1", "--no-dashboard"),
                    *("--local-directory", str(folder / "dask")),
                ],
                cwd=PROGRAMS,
            )
            start_web(children, "dask_app:app", web, workers=1)
            yield peer(children, web, folder, worker)


def _asked(job: Job, method: str, path: str) -> Any:
    """Ask something of C1's API once.

    Raises:
        Trouble: it was refused.
    """
    connection = http.client.HTTPConnection("127.0.0.1", job.port, timeout=30)
    try:
        headers = dict(line.split(": ", 1) for line in job.headers)
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        body = answer.read()
    finally:
        connection.close()
    if answer.status >= 300:
        raise Trouble(f"{method} {path}: {answer.status} {body[:200]!r}")
    return json.loads(body)


def _told(job: Job, method: str, path: str) -> None:
    _asked(job, method, path)


def peer(children: Children, port: int, folder: Path, worker: subprocess.Popen[bytes]) -> Target:
    """Return a peer's application as a target. It pauses by its worker being stopped in its tracks.

    Args:
        children: Its processes.
        port: Of its web workers.
        folder: Its state.
        worker: The process whose group runs the tasks.
    """
    return Target(
        children=children,
        job=Job(kind="burst", port=port, count_path="/completed", count_keys=("completed",)),
        body=TASK,
        batch_body=BATCH,
        folder=folder,
        pause=lambda: os.killpg(worker.pid, signal.SIGSTOP),
        resume=lambda: os.killpg(worker.pid, signal.SIGCONT),
    )


def start_redis(children: Children, folder: Path, port: int) -> None:
    """Start a Redis that appends to a file, fsynced each second."""
    program = shutil.which("redis-server")
    if program is None:
        raise Trouble("redis-server is missing; as root: scripts/system_packages.sh benchmarks")
    (folder / "redis").mkdir()
    options = {"appendonly": "yes", "appendfsync": "everysec", "bind": "127.0.0.1"}
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    children.start("redis", [program, "--port", str(port), "--dir", str(folder / "redis"), *words])
    children.until(lambda: listening(port), "the start of Redis")


#: Of PostgreSQL: its defaults, of which what makes it durable is written out, and room for the
#: pools of connections.
_POSTGRES = """
listen_addresses = '127.0.0.1'
port = {port}
unix_socket_directories = ''
fsync = on
synchronous_commit = on
full_page_writes = on
max_connections = 100
"""


def start_postgres(children: Children, folder: Path) -> str:
    """Start a PostgreSQL server with an empty database; return its URL."""
    programs = sorted(
        Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parts[-2])
    )
    found = shutil.which("initdb")
    if found is not None:
        programs.append(Path(found).resolve().parent)
    if not programs:
        raise Trouble("initdb is missing; as root: scripts/system_packages.sh benchmarks")
    port, data = free_port(), folder / "postgres"
    data.mkdir()
    runner: list[str] = []
    if os.geteuid() == 0:  # Which it refuses to run as.
        account = pwd.getpwnam("postgres")
        os.chown(data, account.pw_uid, account.pw_gid)
        # `setpriv` becomes the server, so that there is no one between it and its end.
        runner = ["setpriv", "--reuid", "postgres", "--regid", "postgres", "--init-groups"]
        runner.append("--")
    create = ["--username", "bench", "--auth", "trust", "--encoding", "UTF8", "--locale", "C.UTF-8"]
    program = [*runner, str(programs[-1] / "initdb"), "--pgdata", str(data)]
    children.call("initdb", [*program, *create], timeout_s=60, cwd=data)
    with (data / "postgresql.conf").open("a") as file:
        file.write(_POSTGRES.format(port=port))
    server = [*runner, str(programs[-1] / "postgres"), "-D", str(data)]
    children.start("postgres", server, cwd=data)
    children.until(lambda: listening(port), "the start of PostgreSQL")
    return f"postgresql://bench@127.0.0.1:{port}/postgres"


def start_web(children: Children, app: str, port: int, *, workers: int) -> None:
    """Start uvicorn with uvloop and httptools, without a log of requests."""
    children.start(
        "web",
        [
            *(str(PEERS / "uvicorn"), app, "--port", str(port), "--workers", str(workers)),
            *("--no-access-log", "--log-level", "warning"),
        ],
        cwd=PROGRAMS,
    )
    children.until(lambda: listening(port), "the start of the web workers")


def emptied(folder: Path) -> Path:
    """Make a folder anew."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


SYSTEMS: Sequence[System] = (Hcna(), Celery(), Procrastinate(), Dask())


def chosen(names: Sequence[str]) -> list[System]:
    """Return systems by name, all of them for no names.

    Raises:
        LookupError: there is none of that name.
    """
    known = {one.name: one for one in SYSTEMS}
    if unknown := [name for name in names if name not in known]:
        raise LookupError(f"no system {unknown[0]}; there are {', '.join(known)}")
    return [one for one in SYSTEMS if not names or one.name in names]


def see_peers() -> None:
    """See early that the peers can be started.

    Raises:
        Trouble: their environment is missing.
    """
    if not (PEERS / "python").exists():
        raise Trouble("the peers' environment is missing: make bench")
