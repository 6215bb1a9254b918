"""The load generator: one lean HTTP/1.1 client for every system, in a process of its own.

It speaks over raw sockets and ``epoll``, keeps its connections, has one request out on each, and
reads no more of an answer than it needs: about 20 us of CPU a request, so that on two cores it is
never what is measured. Its own CPU time is part of every result. Standard library only.

``python -m benchmarks.load`` reads a `Job` as JSON on stdin and writes its result to stdout.
"""

from __future__ import annotations

import json
import select
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

RECEIVE_BYTES = 1 << 16
#: Longest silence of a server before the run is given up, seconds.
SILENCE_S = 60.0
#: Pause between two looks at how many tasks have completed, seconds.
LOOK_S = 0.02
#: Ids that are kept of a run, evenly spread, to look at what became of those tasks.
KEPT = 2000


class Refused(Exception):
    """A server answered what no system under test should answer."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to do.

    ``kind`` is one of ``burst`` (as fast as answers come, on so many connections, then wait until
    all have completed), ``paced`` (an open loop of so many requests a second) and ``lone`` (one
    task at a time, from POST to the answer that it has completed).
    """

    kind: str
    port: int
    #: Further header lines, such as the key.
    headers: Sequence[str] = ()
    path: str = "/tasks"
    body: str = ""
    connections: int = 1
    #: Requests at most.
    requests: int = 1_000_000
    seconds: float = 60.0
    #: Tasks that one request submits.
    tasks: int = 1
    #: Requests a second, when paced.
    rate: float = 0.0
    #: Where to look how many have completed; the names lead to the number in its answer.
    #: No path: nothing completes, the answers themselves are what is measured.
    count_path: str = ""
    count_keys: Sequence[str] = ()
    #: Where a lone task is waited for; ``{}`` is its id.
    wait_path: str = "/tasks/{}?wait=30"
    #: How long to wait for the last to complete.
    patience_s: float = 120.0


@dataclass(kw_only=True)
class Done:
    """What came of a job. Times in seconds."""

    requests: int = 0
    accepted: int = 0
    completed: int = 0
    #: From the first request to the last answer, and to the last completion.
    accept_s: float = 0.0
    complete_s: float = 0.0
    #: From request to answer; of a lone task from POST to completed; paced, from when it was due.
    latencies_s: list[float] = field(default_factory=list)
    #: Of a lone task: from POST to its answer.
    accepts_s: list[float] = field(default_factory=list)
    #: CPU time of this process while it sent.
    cpu_s: float = 0.0
    #: Some ids, with the wall-clock instant at which they were sent.
    sent: list[tuple[str, float]] = field(default_factory=list)


class Connection:
    """One keep-alive connection with at most one request out."""

    __slots__ = ("_rest", "sent_at", "socket", "wall_at")

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=SILENCE_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._rest = b""
        self.sent_at = 0.0
        self.wall_at = 0.0

    def send(self, request: bytes) -> None:
        """Send a request; a loopback socket takes even a batch at once."""
        self.sent_at = time.perf_counter()
        self.socket.sendall(request)

    def receive(self) -> tuple[int, bytes] | None:
        """Return status and body if the answer is complete with what can be read now."""
        chunk = self.socket.recv(RECEIVE_BYTES)
        if not chunk:
            raise Refused("the server closed a connection")
        data = self._rest + chunk if self._rest else chunk
        end = data.find(b"\r\n\r\n")
        if end < 0:
            self._rest = data
            return None
        start = data.find(b"content-length:", 0, end)
        if start < 0:
            start = data[:end].lower().find(b"content-length:")
            if start < 0:
                raise Refused(f"an answer without Content-Length: {data[:200]!r}")
        stop = data.find(b"\r\n", start)
        whole = end + 4 + int(data[start + 15 : stop])
        if len(data) < whole:
            self._rest = data
            return None
        self._rest = data[whole:]
        return int(data[9:12]), data[end + 4 : whole]

    def ask(self, request: bytes) -> tuple[int, bytes]:
        """Send a request and wait for its answer."""
        self.send(request)
        while True:
            answer = self.receive()
            if answer is not None:
                return answer

    def close(self) -> None:
        """Drop the connection."""
        self.socket.close()


def run(job: Job) -> Done:
    """Do a job."""
    kinds: dict[str, Callable[[Job], Done]] = {"burst": burst, "paced": paced, "lone": lone}
    return kinds[job.kind](job)


def post(job: Job) -> bytes:
    """Return the bytes of the job's request."""
    body = job.body.encode()
    lines = [
        f"POST {job.path} HTTP/1.1",
        f"Host: 127.0.0.1:{job.port}",
        *job.headers,
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def get(job: Job, path: str) -> bytes:
    """Return the bytes of a GET."""
    lines = [f"GET {path} HTTP/1.1", f"Host: 127.0.0.1:{job.port}", *job.headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


def completed(job: Job, connection: Connection | None = None) -> int:
    """Return how many tasks have completed since the system was started."""
    if connection is None:  # Some servers close one that is idle for seconds.
        connection = Connection(job.port)
        try:
            return completed(job, connection)
        finally:
            connection.close()
    status, body = connection.ask(get(job, job.count_path))
    if status != 200:
        raise Refused(f"{job.count_path} answered {status}: {body[:200]!r}")
    found: Any = json.loads(body)
    for name in job.count_keys:
        found = found.get(name, 0) if isinstance(found, dict) else 0
    return int(found or 0)


def await_completed(job: Job, done: Done, before: int, start: float) -> None:
    """Look until all that was accepted has completed, or for too long."""
    if not job.count_path:
        return
    end = time.perf_counter() + job.patience_s
    looking = Connection(job.port)
    try:
        while True:
            done.completed = completed(job, looking) - before
            now = time.perf_counter()
            if done.completed >= done.accepted or now > end:
                done.complete_s = now - start
                return
            time.sleep(LOOK_S)
    finally:
        looking.close()


def task_id(body: bytes) -> str:
    """Return the id in an answer, without parsing the rest of it."""
    at = body.find(b'"task_id":')
    if at < 0:
        return ""
    first = body.find(b'"', at + 10) + 1
    return body[first : body.find(b'"', first)].decode()


class _Traffic:
    """The connections of one run, and what came of its requests."""

    def __init__(self, job: Job) -> None:
        """Connect; the clock begins to run."""
        self._job, self._request = job, post(job)
        self._done, self._kept = Done(), _Kept()
        self._before = completed(job) if job.count_path else 0
        self.opened = [Connection(job.port) for _ in range(job.connections)]
        self._by_number = {one.socket.fileno(): one for one in self.opened}
        self._poll = select.epoll()
        for number in self._by_number:
            self._poll.register(number, select.EPOLLIN)
        self.sent = 0
        self._cpu = time.process_time()
        #: When the run began, and when the last answer came.
        self.start = self.last = time.perf_counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._poll.close()
        for one in self.opened:
            one.close()

    def send(self, one: Connection) -> None:
        """Send the request on a connection that is free."""
        one.wall_at = time.time()
        one.send(self._request)
        self.sent += 1

    def answered(self, pause_s: float = SILENCE_S) -> Iterator[Connection]:
        """Wait for answers, but no longer than a pause; yield the connections that are free again.

        Raises:
            Refused: An answer was none, or none came for too long.
        """
        ready = self._poll.poll(pause_s)
        if not ready and pause_s >= SILENCE_S:
            raise Refused(f"no answer for {SILENCE_S:.0f} s")
        for number, _ in ready:
            one = self._by_number[number]
            answer = one.receive()
            if answer is None:
                continue
            self.last = time.perf_counter()
            self._done.latencies_s.append(self.last - one.sent_at)
            status, body = answer
            _require_accepted(self._job, status, body)
            self._done.accepted += self._job.tasks
            self._kept.offer(body, one.wall_at)
            yield one

    def finish(self) -> Done:
        """Wait until all has completed; return what came of the run."""
        done = self._done
        done.accept_s = self.last - self.start
        done.cpu_s = time.process_time() - self._cpu
        done.requests = self.sent
        await_completed(self._job, done, self._before, self.start)
        done.sent = self._kept.ids()
        return done


def _require_accepted(job: Job, status: int, body: bytes) -> None:
    if status not in (200, 202):
        raise Refused(f"{job.path} answered {status}: {body[:200]!r}")


def burst(job: Job) -> Done:
    """Submit as fast as the answers come."""
    with _Traffic(job) as traffic:
        end = traffic.start + job.seconds
        for one in traffic.opened:
            traffic.send(one)
        out = len(traffic.opened)
        while out:
            for one in traffic.answered():
                if traffic.last < end and traffic.sent < job.requests:
                    traffic.send(one)
                else:
                    out -= 1
        return traffic.finish()


def paced(job: Job) -> Done:
    """Submit at a steady rate whatever the answers do; a request that finds no connection waits."""
    step = 1 / job.rate
    total = min(job.requests, int(job.seconds * job.rate))
    with _Traffic(job) as traffic:
        idle, answers = list(traffic.opened), 0
        while answers < total:
            now = time.perf_counter()
            while traffic.sent < total and idle and traffic.start + traffic.sent * step <= now:
                one = idle.pop()
                due = traffic.start + traffic.sent * step
                traffic.send(one)
                one.sent_at = due
            pause = SILENCE_S
            if traffic.sent < total and idle:
                pause = max(0.0, traffic.start + traffic.sent * step - time.perf_counter())
            for one in traffic.answered(pause):
                answers += 1
                idle.append(one)
        return traffic.finish()


def lone(job: Job) -> Done:
    """Submit one task at a time and wait for it on the same connection."""
    done, request = Done(), post(job)
    connection = Connection(job.port)
    cpu, start = time.process_time(), time.perf_counter()
    try:
        for _ in range(job.requests):
            wall_at = time.time()
            begun = time.perf_counter()
            status, body = connection.ask(request)
            _require_accepted(job, status, body)
            known = task_id(body)
            done.accepts_s.append(time.perf_counter() - begun)
            status, body = connection.ask(get(job, job.wait_path.format(known)))
            done.latencies_s.append(time.perf_counter() - begun)
            if status != 200 or b'"completed"' not in body:
                raise Refused(f"task {known} did not complete: {status} {body[:200]!r}")
            done.sent.append((known, wall_at))
            if time.perf_counter() - start > job.seconds:
                break
        done.accept_s = done.complete_s = time.perf_counter() - start
        done.cpu_s = time.process_time() - cpu
        done.requests = done.accepted = done.completed = len(done.latencies_s)
    finally:
        connection.close()
    return done


class _Kept:
    """Some of the ids of a run of unknown length: every n-th, n doubling as it grows."""

    def __init__(self) -> None:
        self._kept: list[tuple[bytes, float]] = []
        self._every = 1
        self._count = 0

    def offer(self, body: bytes, wall_at: float) -> None:
        """Keep an answer, perhaps."""
        self._count += 1
        if self._count % self._every:
            return
        self._kept.append((body, wall_at))
        if len(self._kept) >= 2 * KEPT:
            self._kept = self._kept[::2]
            self._every *= 2

    def ids(self) -> list[tuple[str, float]]:
        """Return the ids and when they were sent."""
        return [(task_id(body), wall_at) for body, wall_at in self._kept]


def main() -> int:
    """Do the job on stdin."""
    job = Job(**json.load(sys.stdin))
    try:
        done = run(job)
    except (OSError, Refused) as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 1
    json.dump(asdict(done), sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
