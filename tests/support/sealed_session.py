"""M1's actor and a worker's agent in one process, without Ray, with somebody on the wire.

    python -m tests.support.sealed_session FOLDER true|false

Both are the real ones: the moderator on SQLite with its writer thread, the agent with its link.
What crosses between them is pickled and captured, and one answer is forged. With ``true`` the
message cipher is on. Prints one JSON object: what came of it, and what of the captured messages M1
took a second time.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import logging
import os
import pickle
import sys
import time
from collections.abc import Awaitable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hcna_ray.config import Settings, load_settings
from hcna_ray.core.clock import SystemClock
from hcna_ray.core.errors import HcnaError
from hcna_ray.runtime import actors, wire
from hcna_ray.runtime.agent import AgentSettings, WorkerAgent
from hcna_ray.runtime.keyring import cipher_of, guard_of
from hcna_ray.runtime.messages import Hello, IntentOrder, Offer
from hcna_ray.runtime.ray_link import AgentModeratorLink
from hcna_ray.security.certs import ensure_ca
from hcna_ray.store.factory import open_reader

CANARY = "canary-of-the-wire"
TOKEN = "ab" * 32


class Wire:
    """What `ActorLink` is over Ray: calls to M1's actor, pickled both ways, and captured."""

    def __init__(self, actor: actors.ModeratorActor) -> None:
        self._actor = actor
        self.captured: list[tuple[str, bytes]] = []
        #: The next grant gets an intent that M1 did not send.
        self.forge = False

    async def acall(self, method: str, *args: Any, timeout_s: float = 15.0, **kwargs: Any) -> Any:
        question = pickle.dumps((args, kwargs))
        self.captured.append((method, question))
        kind, value = await self.answer(method, question)
        self.captured.append(("answer", pickle.dumps(value)))
        if kind == "error":
            raise value
        if method == "exchange" and self.forge:
            self.forge = False
            grant = wire.unpack_grant(value)
            order = IntentOrder({"msg_id": "forged", "intent": "test.ping"})
            return wire.pack_grant(dataclasses.replace(grant, intents=(order,), proof=b"forged"))
        return value

    async def answer(self, method: str, question: bytes) -> tuple[str, Any]:
        args, kwargs = pickle.loads(question)
        return await self._actor.call(method, args, kwargs)


class NoProcesses:
    """Slots that are there and do nothing."""

    def start_slot(self, slot: int, name: str) -> Awaitable[None]:
        return asyncio.get_running_loop().create_future()

    def start_heavy(self, offer: Offer, name: str) -> Awaitable[None]:
        raise AssertionError(offer)

    def withdraw(self, name: str) -> None:
        raise AssertionError(name)


async def session(folder: Path) -> dict[str, Any]:
    """Let the two meet; return what came of it."""
    m1, w1 = _machines(folder)
    actor = actors.ModeratorActor()
    tap = Wire(actor)
    agent = _agent(w1, tap)
    running = asyncio.create_task(agent.run())
    await _until(lambda: agent.connected)
    pong = await actor.do_send_intent(
        "W1", "test.ping", {"word": CANARY}, principal="ann", wait_s=10.0
    )
    await _until(lambda: sum(method == "heartbeat" for method, _ in tap.captured) >= 3)
    (worker,) = await actor.do_workers()
    tap.forge = True
    again = await actor.do_send_intent("W1", "test.ping", {}, principal="ann", wait_s=10.0)
    captured = list(tap.captured)
    taken: list[str] = []
    for method, question in captured:
        if method == "heartbeat" or (method == "exchange" and b"sealed" in question):
            kind, value = await tap.answer(method, question)
            # What asks for a hello has taken nothing.
            if kind == "ok" and (
                value.known if method == "heartbeat" else not wire.unpack_grant(value).hello
            ):
                taken.append(method)
    running.cancel()
    reader = open_reader(m1)
    lines = reader.audit_after(0, 100)
    reader.close()
    return {
        "answer": pong["answer"],
        "after the forgery": again["answer"],
        "telemetry": worker.telemetry["payload"],
        "in clear": sum(CANARY.encode() in raw for _method, raw in captured),
        "heartbeats": sum(method == "heartbeat" for method, _ in captured),
        "taken twice": taken,
        "audit": [[line.entry.principal, line.entry.action] for line in lines],
    }


def _machines(folder: Path) -> tuple[Settings, Settings]:
    """Set up M1, and a machine that has joined it."""
    os.environ["HCNA_HOME"] = str(folder / "m1")
    for section in ("MODERATOR", "WORKER"):
        os.environ[f"HCNA_{section}__SECURITY__ENABLE_BPCS"] = sys.argv[2]
    m1, w1 = load_settings(), load_settings(folder / "w1")
    for settings in (m1, w1):
        settings.cluster_dir.mkdir(parents=True)
    ca_pem = ensure_ca(m1.cluster_dir, now=datetime.now(UTC)).cert.read_text()
    joined = {"schema": 1, "ca_pem": ca_pem, "member_token": TOKEN}
    (w1.cluster_dir / "membership.json").write_text(json.dumps(joined))
    digest = hashlib.sha256(TOKEN.encode()).hexdigest()
    members = {"schema": 1, "members": [{"name": "W1", "token_sha256": digest}]}
    (m1.cluster_dir / "members.json").write_text(json.dumps(members))
    actors.cluster_nodes = list  # There is no Ray to ask.
    return m1, w1


def _agent(settings: Settings, tap: Wire) -> WorkerAgent:
    incarnation = f"{time.time_ns():x}"
    link = AgentModeratorLink(
        1.0, guard_of(settings, cipher_of(settings, settings.worker.security))
    )
    link._link = tap  # type: ignore[assignment]
    return WorkerAgent(
        AgentSettings(
            worker="W1",
            node_id="HCNA-W1",
            incarnation=incarnation,
            outbox=settings.home / "outbox",
            base=1,
            heartbeat_s=0.2,
        ),
        link,
        NoProcesses(),
        SystemClock(),
        describe=lambda reports: Hello(
            worker="W1",
            node_id="HCNA-W1",
            incarnation=incarnation,
            address="10.0.0.2",
            cpu=1.0,
            mem_gb=1.0,
            gpu=0.0,
            resources=(),
            labels=(),
            task_types=(),
            reports=reports,
            machine_id="machine-of-w1",
        ),
        telemetry=lambda: {"word": CANARY},
        new_id=lambda: "m",
    )


async def _until(what: Any) -> None:
    async with asyncio.timeout(30.0):
        while not what():  # noqa: ASYNC110 - a thread sets no events here
            await asyncio.sleep(0.01)


if __name__ == "__main__":
    try:
        told = asyncio.run(asyncio.wait_for(session(Path(sys.argv[1])), 60.0))
    except (HcnaError, TimeoutError):
        logging.getLogger("hcna_ray").exception("the session failed")
        raise
    sys.stdout.write(json.dumps(told) + "\n")
    sys.stdout.flush()
    os._exit(0)  # The moderator's writer thread goes on for ever, as in its actor.
