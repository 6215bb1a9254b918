"""Shipping to a real collector on this machine: down first, then up; and files that are wrong."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from hcna_ray.config import ConfigError, Settings, TracingSettings
from hcna_ray.core.models import Token
from hcna_ray.observability import spans as spans_module
from hcna_ray.observability.shipping import Answer, HttpSender, Shipper, Verdict
from hcna_ray.observability.spool import Spool
from hcna_ray.observability.traces import Ran, TracesPlan, open_traces
from hcna_ray.supervisor.tracing import ship_traces
from tests.support.otlp import Collector

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
LOG = logging.getLogger("hcna_ray.supervisor")
PATIENCE_S = 20.0


@pytest.fixture(autouse=True)
def no_haste(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine of the tests may be slow."""
    monkeypatch.setattr(spans_module, "CLOSE_S", 60.0)


def write_spans(settings: Settings, *tasks: str) -> None:
    """Have spans written as a worker does."""
    traces = open_traces(TracesPlan.of(settings, "hcna-worker", "HCNA-W1--test"))
    assert traces is not None
    traces.start()
    traces.tell(
        Ran(one, "echo", f"00-{TRACE}-00f067aa0ba902b7-01", Token(1, 1), "W1", 1.0, 2.0, "lost")
        for one in tasks
    )
    traces.close()


def settings_of(home: Path, endpoint: str, **more: object) -> Settings:
    tracing = TracingSettings.model_validate({"endpoint": endpoint, **more})
    return Settings(home=home, tracing=tracing)


def test_a_collector_that_is_down_first_gets_everything_when_it_is_up(tmp_path: Path) -> None:
    down = Collector()
    port = down.port
    down.close()
    settings = settings_of(tmp_path, f"http://127.0.0.1:{port}")
    write_spans(settings, "t1")
    shipper = Shipper(
        Spool(settings.traces_dir, settings.tracing.spool_bytes), HttpSender(settings.tracing)
    )
    pauses = [shipper.step()]
    write_spans(settings, "t2", "t3")
    pauses.append(shipper.step())

    up = Collector(port)
    shipper.step()
    up.close()

    assert pauses == [1.0, 2.0]
    assert [one.attributes["messaging.message.id"] for one in up.spans] == ["t1", "t2", "t3"]
    assert {one.trace_id for one in up.spans} == {TRACE}
    assert len(up.heads) == 1
    assert list(settings.traces_dir.iterdir()) == []


@pytest.mark.parametrize(
    ("status", "verdict"),
    [
        (200, Verdict.TAKEN),
        (400, Verdict.REFUSED),
        (413, Verdict.REFUSED),
        (500, Verdict.LATER),
        (401, Verdict.LATER),
        (404, Verdict.LATER),
        (429, Verdict.LATER),
        (503, Verdict.LATER),
    ],
)
def test_what_an_answer_means(status: int, verdict: Verdict) -> None:
    collector = Collector()
    collector.status = status
    send = HttpSender(TracingSettings(endpoint=collector.endpoint))
    answer = send(b"")
    collector.close()

    assert answer.verdict is verdict
    assert (str(status) in answer.why) is (status != 200)
    assert answer.doubtful is (status == 500)


def test_the_collectors_wish_and_its_words_arrive(tmp_path: Path) -> None:
    collector = Collector()
    send = HttpSender(TracingSettings(endpoint=collector.endpoint + "/v1/traces"))
    collector.rejected = 2
    partly = send(b"")
    collector.status, collector.retry_after = 503, "17"
    later = send(b"")
    collector.close()

    assert partly == Answer(Verdict.TAKEN, "2 refused: too old")
    assert later.retry_after_s == 17.0


def test_the_headers_of_the_file_go_along(tmp_path: Path) -> None:
    file = tmp_path / "headers"
    file.write_text("Authorization: Bearer let-me-in\n\nX-Scope: home\n")
    file.chmod(0o600)
    collector = Collector()
    HttpSender(TracingSettings(endpoint=collector.endpoint, headers_file=file))(b"")
    collector.close()

    (head,) = collector.heads
    assert head["Authorization"] == "Bearer let-me-in"
    assert head["X-Scope"] == "home"
    assert head["Content-Encoding"] == "gzip"


@pytest.mark.parametrize(
    ("text", "mode", "told"),
    [
        ("Authorization: x", 0o644, "chmod 600"),
        ("no colon", 0o600, "Name: value"),
        ("X: " + "x" * 70_000, 0o600, "too long"),
        (None, 0o600, "cannot be read"),
    ],
)
def test_a_file_of_headers_that_is_wrong_is_named(
    tmp_path: Path, text: str | None, mode: int, told: str
) -> None:
    file = tmp_path / "headers"
    if text is not None:
        file.write_text(text)
        file.chmod(mode)

    with pytest.raises(ConfigError, match=told):
        HttpSender(TracingSettings(endpoint="http://127.0.0.1:1", headers_file=file))


def test_an_authority_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("no certificate")
    for name in ("ca.pem", "absent.pem"):
        with pytest.raises(ConfigError, match="ca_path"):
            HttpSender(TracingSettings(endpoint="https://x", ca_path=tmp_path / name))


def test_a_machine_ships_while_its_supervisor_lives(tmp_path: Path) -> None:
    collector = Collector()
    settings = settings_of(tmp_path, collector.endpoint)
    shipper = ship_traces(settings, LOG)
    assert shipper is not None
    write_spans(settings, "t1")
    collector.wait_for(lambda spans: len(spans) == 1, PATIENCE_S)
    write_spans(settings, "t2")
    shipper.stop()
    collector.close()

    assert [one.attributes["messaging.message.id"] for one in collector.spans] == ["t1", "t2"]


def test_without_a_collector_nothing_is_shipped_and_with_wrong_files_the_log_tells(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert ship_traces(Settings(home=tmp_path), LOG) is None
    wrong = settings_of(tmp_path, "http://127.0.0.1:1", headers_file=tmp_path / "absent")
    LOG.propagate = True
    with caplog.at_level(logging.ERROR):
        assert ship_traces(wrong, LOG) is None

    assert [one.action for one in caplog.records] == ["traces.misconfigured"]  # type: ignore[attr-defined]
