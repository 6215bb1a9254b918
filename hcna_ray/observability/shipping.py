"""Shipping spans from the spool to a collector, by OTLP over HTTP. One shipper a machine.

    200                          taken: the files go (of a part that was refused, the log tells)
    400, 413, 422                refused for what is in them: the files go, the log tells
    anything else, or no answer  not now: tried again, after Retry-After or a growing pause
    500, again and again         of one and the same body: it goes too, or nothing else would

The collector's clock is nobody else's: no task, and no process that runs one, waits for this.
"""

from __future__ import annotations

import gzip
import logging
import ssl
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import NamedTuple

import httpx

from hcna_ray.config import ConfigError, TracingSettings
from hcna_ray.observability.spool import Spool

log = logging.getLogger(__name__)

#: One request carries this much, unless a single file has more.
BODY_BYTES_MAX = 1 << 20
#: Pause between two looks at an empty spool.
LOOK_S = 1.0
#: Pause after a failure, doubled by each further one up to the maximum.
RETRY_S = 1.0
RETRY_MAX_S = 15.0
#: A collector that asks for more patience than this is asked again all the same.
RETRY_AFTER_MAX_S = 300.0
#: Longest wait for an answer; when this machine stops, the last try has less.
ANSWER_S = 10.0
#: Statuses that say that the spans themselves are the trouble.
_REFUSED = frozenset({400, 413, 422})
#: May say so, or that the collector is in trouble: after so many in a row, spans are given up.
_DOUBTFUL = 500
DOUBTS_MAX = 20
#: How long `stop` waits for what is under way.
_STOP_S = 3.0
_HEADERS_BYTES_MAX = 64 << 10


class Verdict(Enum):
    """What became of one request."""

    TAKEN = "taken"
    REFUSED = "refused"
    LATER = "later"


class Answer(NamedTuple):
    """A verdict, in words, and how long the collector wants to be left alone."""

    verdict: Verdict
    why: str = ""
    retry_after_s: float | None = None
    #: Whether the spans themselves may be the trouble.
    doubtful: bool = False


Send = Callable[[bytes], Answer]


@dataclass(slots=True)
class _Outage:
    failures: int = 0
    #: Of these, how many in a row may be the spans' own fault.
    doubts: int = 0
    why: str = ""


class Shipper:
    """Empties a spool. `step` does one thing; the thread does it again and again."""

    def __init__(self, spool: Spool, send: Send, say: logging.Logger = log) -> None:
        """Name the ends.

        Args:
            spool: What to ship.
            send: Delivers one body; never raises.
            say: Where it tells what happens.
        """
        self._spool, self._send, self._say = spool, send, say
        self._outage = _Outage()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="hcna-traces", daemon=True)

    def start(self) -> None:
        """Ship, in a thread, until `stop`."""
        self._thread.start()

    def stop(self) -> None:
        """Ship what is there if the collector takes it, and end."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(_STOP_S)

    def step(self) -> float:
        """Ship the oldest spans; return the seconds until there is something to do again."""
        self._spool.prune()
        files = self._spool.oldest(BODY_BYTES_MAX)
        if not files:
            return LOOK_S
        body = self._spool.read(files)
        answer = self._send(body) if body else Answer(Verdict.TAKEN)
        self._outage.doubts = self._outage.doubts + 1 if answer.doubtful else 0
        if answer.verdict is Verdict.LATER and self._outage.doubts < DOUBTS_MAX:
            self._spool.put_together(files, body)
            return self._wait(answer)
        self._spool.remove(files)
        if answer.verdict is not Verdict.TAKEN:
            self._say.error(
                "the collector refused spans for good: %s",
                answer.why,
                extra={"action": "traces.refused", "bytes": len(body)},
            )
            if answer.verdict is Verdict.LATER:  # Others may fare better; that is not sure.
                self._outage.doubts = 0
                return RETRY_MAX_S
        elif answer.why:
            self._say.warning(
                "the collector refused some spans: %s",
                answer.why,
                extra={"action": "traces.refused_in_part"},
            )
        self._over()
        # What comes in a trickle goes in one request a look.
        return 0.0 if len(body) > BODY_BYTES_MAX // 2 else LOOK_S

    def _wait(self, answer: Answer) -> float:
        outage = self._outage
        outage.failures += 1
        if answer.why != outage.why:
            outage.why = answer.why
            self._say.warning(
                "spans wait for the collector: %s",
                answer.why,
                extra={"action": "traces.waiting", "folder": str(self._spool.folder)},
            )
        if answer.retry_after_s is not None:
            return min(max(answer.retry_after_s, RETRY_S), RETRY_AFTER_MAX_S)
        return float(min(RETRY_S * 2.0 ** min(outage.failures - 1, 10), RETRY_MAX_S))

    def _over(self) -> None:
        if self._outage.failures:
            self._outage = _Outage()
            self._say.info("the collector takes spans again", extra={"action": "traces.taken"})

    def _loop(self) -> None:
        while not self._stopping.is_set():
            self._stopping.wait(self._guarded_step())
        # The processes of this machine have ended: what they wrote last goes out, or stays here.
        while not self._outage.failures and self._spool.oldest(1):
            if self._guarded_step() > 0:
                return

    def _guarded_step(self) -> float:
        try:
            return self.step()
        except OSError as error:  # The disk: spans are not worth more than the rest of the machine.
            self._outage.failures += 1
            if str(error) != self._outage.why:
                self._outage.why = str(error)
                self._say.error(
                    "the spool of spans cannot be read",
                    extra={"action": "traces.spool_failed", "error": str(error)},
                )
            return RETRY_MAX_S


class HttpSender:
    """Posts bodies to a collector (`Send`)."""

    def __init__(
        self, settings: TracingSettings, transport: httpx.BaseTransport | None = None
    ) -> None:
        """Open a client.

        Args:
            settings: Where to, and what to show there.
            transport: Replaces the network, for tests.

        Raises:
            ConfigError: a file that the settings name cannot be used.
        """
        assert settings.endpoint is not None
        self._url = f"{settings.endpoint}/v1/traces"
        self._headers = {
            "Content-Type": "application/x-protobuf",
            "Content-Encoding": "gzip",
            "User-Agent": "hcna-ray",
            **_read_headers(settings.headers_file),
        }
        self._http = httpx.Client(
            transport=transport,
            trust_env=False,
            timeout=ANSWER_S,
            verify=_trust(settings.ca_path),
        )

    def __call__(self, body: bytes) -> Answer:
        """Post one body."""
        try:
            response = self._http.post(
                self._url, content=gzip.compress(body, 5, mtime=0), headers=self._headers
            )
        except httpx.HTTPError as error:
            return Answer(Verdict.LATER, f"{self._url}: {error or type(error).__name__}")
        if response.status_code == 200:
            return Answer(Verdict.TAKEN, _refused_in_part(response.content))
        why = f"{self._url} answered {response.status_code}"
        if response.status_code in _REFUSED:
            return Answer(Verdict.REFUSED, why)
        told = response.headers.get("retry-after", "")
        wait_s = float(told) if told.isdecimal() else None
        return Answer(Verdict.LATER, why, wait_s, response.status_code == _DOUBTFUL)


def _refused_in_part(raw: bytes) -> str:
    """Return what a collector that took the rest says of spans that it refused."""
    if not raw:
        return ""
    from google.protobuf.message import DecodeError
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

    try:
        told = ExportTraceServiceResponse.FromString(raw).partial_success
    except DecodeError:  # A proxy's own page: taken is taken.
        return ""
    if not told.rejected_spans and not told.error_message:
        return ""
    return f"{told.rejected_spans} refused: {told.error_message[:200]}"


def _read_headers(path: Path | None) -> Mapping[str, str]:
    if path is None:
        return {}
    headers: dict[str, str] = {}
    try:
        if path.stat().st_mode & 0o077:
            raise ConfigError(f"{path}: others can read it; chmod 600 {path}", "tracing")
        if path.stat().st_size > _HEADERS_BYTES_MAX:
            raise ConfigError(f"{path}: too long for a file of headers", "tracing")
        lines = path.read_text("ascii").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"headers_file {path} cannot be read: {error}", "tracing") from None
    for line in filter(None, map(str.strip, lines)):
        name, colon, value = line.partition(":")
        if not colon or not name.strip():
            raise ConfigError(f"{path}: a line is not 'Name: value'", "tracing")
        headers[name.strip()] = value.strip()
    return headers


def _trust(path: Path | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=path)
    except OSError as error:  # Also what is wrong with its content: ssl.SSLError is one.
        raise ConfigError(f"ca_path {path} cannot be used: {error}", "tracing") from None
