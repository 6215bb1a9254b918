"""A task store that is away is waited for: deploying M1 and C1 again would bring none back."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from hcna_ray.api.routes.probes import M1_WAITS, STORE_AWAY
from hcna_ray.config import CompositeSettings, Settings
from hcna_ray.supervisor import probe
from hcna_ray.supervisor.control import _tell_reasons
from hcna_ray.supervisor.daemon import Bootstrap, Supervisor

DEAF = "M1 does not answer"


class PaperC1:
    """Answers ``GET /ready`` as it is told."""

    def __init__(self) -> None:
        """Listen on a port of its own."""
        c1 = self
        self.status = 503
        self.body = b"{}"

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(c1.status)
                self.send_header("Content-Length", str(len(c1.body)))
                self.end_headers()
                self.wfile.write(c1.body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.port = int(self.server.server_address[1])

    def says(self, *reasons: str) -> None:
        """Be ready, or not for these reasons."""
        self.status = 503 if reasons else 200
        self.body = json.dumps({"ready": not reasons, "reasons": reasons}).encode()


@pytest.fixture
def c1() -> Iterator[PaperC1]:
    paper = PaperC1()
    thread = threading.Thread(target=paper.server.serve_forever, args=(0.01,))
    thread.start()
    yield paper
    paper.server.shutdown()
    thread.join()
    paper.server.server_close()


@pytest.fixture
def settings(c1: PaperC1, tmp_path: Path) -> Settings:
    return Settings(home=tmp_path, composite=CompositeSettings(api_port=c1.port))


@pytest.fixture
def supervisor(settings: Settings) -> Supervisor:
    """One without members, whose M1 and C1 were deployed."""
    assert settings.api_host == "127.0.0.1"
    log = logging.getLogger("test.supervisor")
    return Supervisor(settings=settings, log=log, bootstrap=Bootstrap(wanted=False))


class TestReasons:
    def test_they_are_c1s_own_words(self) -> None:
        assert {M1_WAITS, STORE_AWAY} == probe.STORE_REASONS

    def test_none_from_who_is_ready(self, c1: PaperC1) -> None:
        c1.says()
        assert probe.why_not_ready("127.0.0.1", c1.port) == ()
        assert probe.is_ready("127.0.0.1", c1.port)

    def test_as_they_were_given(self, c1: PaperC1) -> None:
        c1.says(STORE_AWAY, DEAF)
        assert probe.why_not_ready("127.0.0.1", c1.port) == (STORE_AWAY, DEAF)
        assert not probe.is_ready("127.0.0.1", c1.port)

    @pytest.mark.parametrize("body", [b"", b"[]", b"no JSON", b'{"reasons": "one"}', b"{}"])
    def test_none_from_an_answer_that_is_no_list(self, c1: PaperC1, body: bytes) -> None:
        c1.body = body
        assert probe.why_not_ready("127.0.0.1", c1.port) == ()

    def test_none_from_nobody(self, c1: PaperC1) -> None:
        c1.server.server_close()
        assert probe.why_not_ready("127.0.0.1", c1.port, timeout_s=0.2) == ()


class TestSupervisor:
    def checked(self, supervisor: Supervisor, times: int) -> bool:
        """Look so often; return whether M1 and C1 shall be deployed again."""
        for _ in range(times):
            supervisor._check(0.0)
        return supervisor.bootstrap.wanted

    @pytest.mark.parametrize("reasons", [(M1_WAITS,), (STORE_AWAY,), (M1_WAITS, STORE_AWAY)])
    def test_waits_as_long_as_it_is_the_store_alone(
        self,
        c1: PaperC1,
        supervisor: Supervisor,
        reasons: tuple[str, ...],
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        c1.says(*reasons)
        with caplog.at_level(logging.INFO):
            assert not self.checked(supervisor, 9)
        told = [one for one in caplog.records if getattr(one, "action", "") == "store.away"]
        assert len(told) == 1, "it is said once"
        assert reasons[0] in told[0].getMessage()
        c1.says()
        assert not self.checked(supervisor, 1)
        assert supervisor.ready
        c1.says(*reasons)
        with caplog.at_level(logging.INFO):
            assert not self.checked(supervisor, 9)
        told = [one for one in caplog.records if getattr(one, "action", "") == "store.away"]
        assert len(told) == 2, "it is said again when it is away again"

    @pytest.mark.parametrize("reasons", [(DEAF,), (STORE_AWAY, DEAF)])
    def test_deploys_again_when_it_is_something_else(
        self, c1: PaperC1, supervisor: Supervisor, reasons: tuple[str, ...]
    ) -> None:
        c1.says(*reasons)
        assert not self.checked(supervisor, 1)
        assert self.checked(supervisor, 1)

    def test_deploys_again_when_nobody_answers(self, c1: PaperC1, supervisor: Supervisor) -> None:
        c1.server.server_close()
        assert self.checked(supervisor, 2)

    def test_deploys_again_when_it_becomes_something_else(
        self, c1: PaperC1, supervisor: Supervisor
    ) -> None:
        c1.says(STORE_AWAY)
        assert not self.checked(supervisor, 5)
        c1.says(DEAF)
        assert self.checked(supervisor, 1)


class TestUp:
    def test_tells_each_reason_once(self, c1: PaperC1, settings: Settings) -> None:
        steps: list[str] = []
        told: tuple[str, ...] = ()
        for reasons in ((), (M1_WAITS,), (M1_WAITS,), (STORE_AWAY,), (STORE_AWAY, DEAF), ()):
            c1.says(*reasons)
            told = _tell_reasons(settings, told, steps.append)
        assert steps == [
            f"not ready yet: {M1_WAITS} (see hcna status)",
            f"not ready yet: {STORE_AWAY} (see hcna status)",
        ]
