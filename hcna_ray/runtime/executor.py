"""The processes in which handlers run: forked from a clean one, without Ray, keys or store in them.

A slot's host starts one *nursery*: a fresh interpreter that has imported the task types and does
nothing but fork. Each child is an *executor*: it runs what its host sends it, one attempt after the
other, in a process group of its own, and dies with its host. Forking takes milliseconds, so a slot
whose executor turned out to be busy for long simply goes on with the next one.
"""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import os
import random
import re
import select
import signal
import socket
import sys
import threading
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hcna_ray import failpoints
from hcna_ray.core.clock import SystemClock
from hcna_ray.core.errors import HcnaError, NotFound
from hcna_ray.handlers import load_registry
from hcna_ray.handlers.registry import Registry
from hcna_ray.observability import logs
from hcna_ray.observability.traces import TracesPlan, open_traces
from hcna_ray.runtime import channel
from hcna_ray.runtime.channel import BlockingChannel, ChannelClosed, Frame
from hcna_ray.runtime.journal import RunnerFiles
from hcna_ray.runtime.messages import AttemptKey, Report
from hcna_ray.runtime.output import OutputSettings, OutputTap
from hcna_ray.runtime.runner import Runner, RunnerSettings

if TYPE_CHECKING:
    from hcna_ray.observability.spans import Traces

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
#: Handlers give way to the moderator, C1 and the agents, which share machines with them.
NICENESS = 10
#: What a handler's process is not told about the cluster around it: Ray and its token, keys and
#: passphrases, settings (one may hold the password of the database), and what libpq reads.
_HIDDEN = re.compile(
    r"RAY_|HCNA_(?:API_KEY|BACKUP_PASSPHRASE|CONFIG|STORE)|HCNA_\w*__|PG[A-Z]+\Z", re.ASCII
)
_POSTGRES = ("postgres://", "postgresql://")
#: What answers `IDLE` (``RUN`` or ``END``), and the kinds of frames that are waited for.
_ORDERS = "orders"
_ANSWERS = frozenset({_ORDERS, channel.ACK, channel.FILE})
#: Time for the last reports of an executor that ends.
_FLUSH_S = 5.0


def nursery_environment(base: dict[str, str]) -> dict[str, str]:
    """Return the environment of handlers: the machine's, less what opens the cluster.

    A ``DATABASE_URL`` that names PostgreSQL may be that of the task store. ``HCNA_HOME`` stays: by
    it processes that were left behind are found.
    """
    return {
        name: value
        for name, value in base.items()
        if not _HIDDEN.match(name) and not (name == "DATABASE_URL" and value.startswith(_POSTGRES))
    }


def die_with_parent() -> None:
    """Have the kernel end this process with its parent (Linux; elsewhere the socket tells)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _adopt_orphans() -> None:
    """Have what handlers leave behind become this process's children, so that it knows of them."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1)


# -- the nursery -----------------------------------------------------------------------------------


def main(argv: list[str]) -> int:
    """Fork executors until the host closes the control socket.

    Args:
        argv: File descriptor of the control socket, and what executors need to know as JSON.
    """
    die_with_parent()
    os.nice(max(0, NICENESS - os.nice(0)))
    control = socket.socket(fileno=int(argv[0]))
    facts: dict[str, Any] = json.loads(argv[1])
    logs.configure(Path(facts["log"]), fields={"node": facts["worker"]}, rotate=False)
    registry = load_registry()
    traces = open_traces(TracesPlan.from_json(facts["traces"]) if "traces" in facts else None)
    if traces is not None:
        traces.offer_to_handlers()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
    gc.freeze()  # What is shared with the children stays untouched, hence shared.
    control.send(json.dumps({"ready": os.getpid()}).encode())
    while True:
        readable, _, _ = select.select([control.fileno(), woken], [], [])
        if woken in readable:
            os.read(woken, 4096)
            _tell_exits(control)
        if control.fileno() in readable:
            raw, descriptors, _, _ = socket.recv_fds(control, 65536, 1)
            if not raw:
                return 0
            order = json.loads(raw)
            child = os.fork()
            if child == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for descriptor in (woken, wake):
                    os.close(descriptor)
                control.close()
                _be_executor(descriptors[0], str(order["name"]), facts, registry, traces)
            os.close(descriptors[0])
            failpoints.hit("nursery.executor.forked")
            control.send(json.dumps({"forked": child, "name": order["name"]}).encode())


def _tell_exits(control: socket.socket) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        control.send(json.dumps({"exited": pid, "status": status}).encode())


# -- an executor -----------------------------------------------------------------------------------


def _be_executor(
    descriptor: int,
    name: str,
    facts: dict[str, Any],
    registry: Registry,
    traces: Traces | None,
) -> None:
    """Live as an executor; never returns."""
    status = 1
    try:
        die_with_parent()
        os.setpgid(0, 0)
        random.seed()
        settings = RunnerSettings(
            worker=facts["worker"],
            node_id=facts["node_id"],
            disk_path=Path(facts["disk_path"]),
            scratch_root=Path(facts["scratch_root"]),
            long_s=facts["long_s"],
            report_s=facts["report_s"],
            result_bytes_max=facts["result_bytes_max"],
            spans_first=facts.get("once", False),
        )
        files = RunnerFiles(Path(facts["outbox"]), name)
        sock = socket.socket(fileno=descriptor)
        if traces is not None:
            traces.start()
        Executor(sock, settings, files, registry, _tap_output(facts), traces).serve()
        status = 0
    finally:
        if traces is not None:
            traces.close()
        logging.shutdown()
        os._exit(status)


def _tap_output(facts: dict[str, Any]) -> OutputTap | None:
    """Take standard output and error over, unless nobody wants them."""
    if "outputs" not in facts:
        return None
    _adopt_orphans()
    settings = OutputSettings(
        folder=Path(facts["outputs"]),
        bytes_max=facts["output_bytes"],
        total_bytes_max=facts["outputs_bytes_max"],
    )
    try:
        return OutputTap(settings)
    except OSError as error:
        logging.getLogger(__name__).error(
            "what handlers print is not kept",
            extra={"action": "output.failed", "error": str(error)},
        )
        return None


class Executor:
    """Carries frames between a `Runner` and its host."""

    def __init__(
        self,
        sock: socket.socket,
        settings: RunnerSettings,
        files: RunnerFiles,
        registry: Registry,
        output: OutputTap | None = None,
        traces: Traces | None = None,
    ) -> None:
        """Wire a runner to the socket."""
        self._channel = BlockingChannel(sock)
        #: What has come and nobody has taken: each thread takes its own kind.
        self._come: dict[str, deque[Frame]] = {kind: deque() for kind in _ANSWERS}
        self._news = threading.Condition()
        self._reading = self._closed = False
        self._asking = threading.Lock()
        self._runner = Runner(settings, registry, files, self, self, SystemClock(), output, traces)

    def serve(self) -> None:
        """Run what the host sends until it says ``END``, or is gone."""
        with self._runner.serving():
            while not self._runner.must_end:
                reports = self._runner.take_unconfirmed()
                failpoints.hit("executor.idle.before")
                self._channel.send(Frame(channel.IDLE, reports))
                order = self._receive(_ORDERS)
                if order is None:
                    return  # The host is gone; the kernel is about to end this process too.
                self._runner.confirm(reports)
                if order.kind == channel.END:
                    return
                self._runner.run(order.offers)
            self._runner.flush(_FLUSH_S)

    def _receive(self, kind: str) -> Frame | None:
        """Wait for a frame of a kind; ``None`` when the host is gone.

        Every frame answers something, so whoever waits for one reads, and lays aside what is for
        others: a thread that only reads would have to be woken for each frame, and wake another.
        """
        mine = self._come[kind]
        with self._news:
            while not mine and not self._closed:
                if self._reading:
                    self._news.wait()
                else:
                    self._read_one()
            return mine.popleft() if mine else None

    def _read_one(self) -> None:
        """Read a frame, for whomever it is; the lock is held, but not while nothing comes."""
        self._reading = True
        self._news.release()
        frame = None
        try:
            frame = self._channel.receive()
        except ChannelClosed:
            pass
        finally:
            self._news.acquire()
            self._reading = False
            self._news.notify_all()
        if frame is None:
            self._closed = True
        else:
            self._come[_kind_of(frame)].append(frame)

    # `hcna_ray.runtime.runner.ReportLink`

    def report(self, reports: tuple[Report, ...]) -> bool:
        """Pass reports to the host; return whether the moderator confirmed them."""
        try:
            self._channel.send(Frame(channel.REPORTS, reports))
        except ChannelClosed:
            return False
        answer = self._receive(channel.ACK)
        return answer is not None and bool(answer.number)

    # `hcna_ray.runtime.runner.ArtifactLink`

    def put(self, path: Path, attempt: AttemptKey) -> tuple[str, int]:
        """Have the host store a file."""
        frame = self._ask(Frame(channel.PUT, text=str(path.resolve()), attempt=attempt))
        return frame.text, frame.number

    def get(self, sha256: str, attempt: AttemptKey) -> Path:
        """Have the host find an artifact. Raises `NotFound`."""
        frame = self._ask(Frame(channel.GET, text=sha256, attempt=attempt))
        if not frame.text:
            raise NotFound("artifact", sha256)
        return Path(frame.text)

    def _ask(self, question: Frame) -> Frame:
        with self._asking:  # Handlers may have threads of their own; answers come in order.
            self._channel.send(question)
            answer = self._receive(channel.FILE)
        if answer is None:
            raise HcnaError("the slot's host is gone")
        if answer.number < 0:
            raise HcnaError(answer.text)
        return answer


def _kind_of(frame: Frame) -> str:
    return frame.kind if frame.kind in _ANSWERS else _ORDERS


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
