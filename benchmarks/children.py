"""Children: started with the mark of this run, and ended by pid whatever happens."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.load import Done, Job
from benchmarks.machine import MARK, Meter, family, marked, processes

ROOT = Path(__file__).resolve().parents[1]
#: Everything that is built or written lies below it.
FOLDER = ROOT / "build" / "bench"
#: Variables of the caller that speak of a running instance or a database of theirs.
_DROPPED = ("HCNA_", "RAY_", "PG", "DATABASE_URL", "CELERY_", "DASK_", "PROCRASTINATE_", "REDIS_")
_TERM_S, _KILL_S = 20.0, 10.0
_PR_SET_PDEATHSIG = 1


class Trouble(Exception):
    """Something that is measured did not do what it should."""


class Children:
    """The processes of one system under test. `close` ends every one of them."""

    def __init__(self, logs: Path, extra: Mapping[str, str] | None = None) -> None:
        """Start nothing yet.

        Args:
            logs: Folder that gets what they print.
            extra: Variables that all of them get.
        """
        self.mark = secrets.token_hex(8)
        self._logs = logs
        self._logs.mkdir(parents=True, exist_ok=True)
        self._running: list[tuple[str, subprocess.Popen[bytes]]] = []
        kept = {name: value for name, value in os.environ.items() if not name.startswith(_DROPPED)}
        self.environment = {**kept, MARK: self.mark, "PYTHONPATH": str(ROOT), **(extra or {})}

    def start(
        self,
        name: str,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path = ROOT,
    ) -> subprocess.Popen[bytes]:
        """Start a process in a session of its own; it ends when this program is killed."""
        with (self._logs / f"{name}.log").open("ab") as log:
            child = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=cwd,
                env={**self.environment, **(env or {})},
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
        self._running.append((name, child))
        return child

    def call(self, name: str, command: Sequence[str], *, timeout_s: float, cwd: Path = ROOT) -> str:
        """Run a command to its end and return what it wrote to stdout.

        Raises:
            Trouble: it failed or took too long.
        """
        try:
            done = subprocess.run(
                list(command),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                cwd=cwd,
                env=self.environment,
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise Trouble(f"{name} took longer than {timeout_s:.0f} s") from None
        with (self._logs / f"{name}.log").open("a") as log:
            log.write(done.stdout + done.stderr)
        if done.returncode:
            raise Trouble(f"{name} exited with {done.returncode}: {done.stderr[-1500:]}")
        return done.stdout

    def until(self, ready: Callable[[], bool], what: str, patience_s: float = 60.0) -> None:
        """Wait until something is so.

        Raises:
            Trouble: it is not so in time, or a process that was started has ended.
        """
        end = time.monotonic() + patience_s
        while not ready():
            for name, child in self._running:
                if child.poll() is not None:
                    raise Trouble(f"{name} ended with {child.returncode}; see {self._logs}")
            if time.monotonic() > end:
                raise Trouble(f"{what} took longer than {patience_s:.0f} s; see {self._logs}")
            time.sleep(0.05)

    @property
    def roots(self) -> set[int]:
        """Pids of what was started directly."""
        return {child.pid for _, child in self._running}

    def metered(self) -> Meter:
        """Begin to meter all that was started."""
        return Meter(self.mark, self.roots)

    def close(self) -> None:
        """End everything that was started, last first, and whatever it left behind."""
        alive = processes()
        known = {pid: alive[pid].began for pid in family(self.mark, self.roots, alive)}
        for _, child in reversed(self._running):
            with contextlib.suppress(ProcessLookupError):
                child.terminate()
                os.killpg(child.pid, signal.SIGCONT)  # One that was paused cannot end.
        end = time.monotonic() + _TERM_S
        for _, child in self._running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=max(0.1, end - time.monotonic()))
        self._running.clear()
        self._kill(known)

    def _kill(self, known: Mapping[int, int]) -> None:
        """Kill what is left of processes, given by pid and beginning, or carries the mark."""
        end = time.monotonic() + _KILL_S
        while time.monotonic() < end:
            alive = processes()
            left = [
                pid
                for pid in marked(self.mark) | set(known)
                if pid in alive
                and not alive[pid].ended
                and alive[pid].began == known.get(pid, alive[pid].began)
            ]
            if not left:
                return
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def free_port() -> int:
    """Return a port on which nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def listening(port: int) -> bool:
    """Return whether somebody takes connections on a port of this machine."""
    with socket.socket() as tried:
        tried.settimeout(1.0)
        return tried.connect_ex(("127.0.0.1", port)) == 0


def do(job: Job) -> Done:
    """Have a load generator do a job.

    Raises:
        Trouble: the system under test refused, or fell silent.
    """
    child = subprocess.Popen(
        [sys.executable, "-E", "-m", "benchmarks.load"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        preexec_fn=_end_with_parent,
    )
    try:
        out, err = child.communicate(json.dumps(asdict(job)).encode(), timeout=900)
    except BaseException:
        child.kill()
        child.wait()
        raise
    if child.returncode:
        raise Trouble(f"{job.kind} {job.path}: {err.decode()[-500:]}")
    return Done(**json.loads(out))


@contextlib.contextmanager
def ended_whatever_happens(children: Children) -> Iterator[None]:
    """End the children when the block is left, also on Ctrl-C, which then waits its turn."""
    try:
        yield
    finally:
        before = {
            number: signal.signal(number, signal.SIG_IGN)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            children.close()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
