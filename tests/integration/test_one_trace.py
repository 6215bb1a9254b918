"""A trace through all but Ray: client, C1, moderator, executors, spool, shipper, collector."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

from hcna_ray.client import AsyncClient
from hcna_ray.config import TracingSettings
from hcna_ray.core.models import Token
from hcna_ray.core.tracing import attempt_span_id
from hcna_ray.observability.shipping import HttpSender, Shipper
from hcna_ray.observability.spans import Traces
from hcna_ray.observability.spool import Spool
from hcna_ray.observability.traces import TracesPlan
from tests.support.c1 import ADMIN_KEY, URL, a_composite
from tests.support.otlp import Collector, spooled
from tests.support.workshop import Workshop


def traces_of(home: Path, service: str) -> Traces:
    plan = TracesPlan(
        folder=home / "traces", bytes_max=1 << 20, sample_ratio=1.0, service=service, node_id="M1"
    )
    return Traces(plan)


async def test_from_the_clients_span_to_the_attempts(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody listens at the collector's port until the task has ended."""
    program = TracerProvider(shutdown_on_exit=False).get_tracer("program")
    monkeypatch.setattr(trace, "get_tracer", lambda _name: program)
    down = Collector()
    port = down.port
    down.close()
    moderators = traces_of(home, "hcna-moderator")
    moderators.start()
    c1s = traces_of(home, "hcna-c1")

    async with a_composite(home / "c1", traces=c1s, traced=True) as c1:
        shop = Workshop(home, c1.moderator.desk)
        shop.traced = True
        async with shop.open():
            shop.start_agent("a")
            wire = httpx.ASGITransport(c1.app)
            with program.start_as_current_span("main") as main:
                async with AsyncClient(URL, ADMIN_KEY, transport=wire) as client:
                    task = await client.submit("echo", {})
            await shop.ended(task.id, timeout_s=60.0)
            moderators.tell(shop.desk.notes)
            moderators.close()
            c1s.close()
            await shop.until(lambda: len(spooled(home / "traces")) == 3, timeout_s=60.0)

    tracing = TracingSettings(endpoint=f"http://127.0.0.1:{port}")
    shipper = Shipper(Spool(home / "traces", 1 << 20), HttpSender(tracing))
    assert shipper.step() == 1.0  # Down: they wait.
    up = Collector(port)
    shipper.step()
    up.close()

    accepted, waited, ran = (
        next(one for one in up.spans if one.name == name)
        for name in ("POST /tasks", "wait default", "run echo")
    )
    trace_id = f"{main.get_span_context().trace_id:032x}"
    assert {one.trace_id for one in up.spans} == {trace_id}
    # The client's own request lies between the program's span and C1's.
    assert accepted.parent_id not in ("", f"{main.get_span_context().span_id:016x}")
    assert waited.parent_id == ran.parent_id == accepted.span_id
    assert ran.span_id == attempt_span_id(task.id, Token(1, 1))
    assert [one.service for one in (accepted, waited, ran)] == [
        "hcna-c1",
        "hcna-moderator",
        "hcna-worker",
    ]
    assert list((home / "traces").iterdir()) == []
