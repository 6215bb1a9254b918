"""C1 in this process: the real application around a fake moderator, spoken to over ASGI."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI

from hcna_ray.api.app import build_app
from hcna_ray.api.ports import IdSource
from hcna_ray.api.services import Services
from hcna_ray.config import (
    CompositeSecuritySettings,
    CompositeSettings,
    LimitSettings,
    Settings,
)
from hcna_ray.core.errors import OutputUnavailable
from hcna_ray.core.models import Token
from hcna_ray.handlers import Registry
from hcna_ray.observability.spans import Traces
from hcna_ray.security.keys import ApiKey, Role, digest_of, verify
from hcna_ray.store.artifacts import ArtifactStore
from tests.support.builders import T0
from tests.support.fake_moderator import FakeModerator

ADMIN_KEY = "hcna_admin-key-of-the-tests"
USER_KEY = "hcna_user-key-of-the-tests"
URL = "http://127.0.0.1"
#: By what a C1 of these believes the edge before it.
EDGE_MARK = "0123456789abcdef" * 4


class PaperKeys:
    """Keys without a file: at first one of an admin, one of a submitter."""

    def __init__(self) -> None:
        self._keys: list[ApiKey] = []
        self.add(ADMIN_KEY, name="owner", role="admin")
        self.add(USER_KEY, name="guest", role="submitter")

    def add(self, clear: str, *, name: str, role: Role, **more: Any) -> ApiKey:
        """Add a key; ``clear`` is what opens with it."""
        key = ApiKey(name=name, role=role, sha256=digest_of(clear), created_at=T0, **more)
        self._keys.append(key)
        return key

    def verify(self, presented: str) -> ApiKey | None:
        return verify(self._keys, presented)

    def all(self) -> Sequence[ApiKey]:
        return self._keys


class PaperOutputs:
    """Outputs of attempts, by task and number of the attempt."""

    def __init__(self) -> None:
        self.texts: dict[tuple[str, int], bytes] = {}
        #: Workers that do not answer.
        self.away: set[str] = set()
        self.asked: list[tuple[str, int]] = []
        #: Set, and replaced, by every question.
        self.looked = asyncio.Event()

    async def read(
        self, worker: str, task_id: str, token: Token, offset: int, size: int
    ) -> bytes | None:
        self.asked.append((worker, offset))
        self.looked.set()
        self.looked = asyncio.Event()
        if worker in self.away:
            raise OutputUnavailable(f"worker {worker}, which keeps the output, does not answer", 5)
        text = self.texts.get((task_id, token.attempt))
        return None if text is None else text[offset : offset + size]


class CountedIds:
    """task-1, task-2, ..."""

    def __init__(self) -> None:
        self.tasks = self.batches = 0

    def task_ids(self, count: int) -> list[str]:
        first = self.tasks + 1
        self.tasks += count
        return [f"task-{number}" for number in range(first, first + count)]

    def batch_id(self) -> str:
        self.batches += 1
        return f"batch-{self.batches}"


@functools.cache
def builtin_types() -> Registry:
    """The installed task types; loaded once, because meshes take a while to import."""
    registry = Registry()
    registry.load_entry_points()
    return registry


@dataclass
class Composite:
    """One C1 and everything around it."""

    app: FastAPI
    http: httpx.AsyncClient
    moderator: FakeModerator
    disk: dict[str, int]
    keys: PaperKeys
    outputs: PaperOutputs

    @property
    def services(self) -> Services:
        services: Services = self.app.state.services
        return services

    def client(self, key: str | None) -> httpx.AsyncClient:
        """Return a client with another key, or with none.

        Its requests have all one name, so that answers can be compared word for word.
        """
        http = _client(self.app, key)
        http.headers["X-Request-ID"] = "of-the-tests"
        return http

    async def submit(self, **task: Any) -> str:
        """Submit an echo task, or what ``task`` says; return its id."""
        reply = await self.http.post("/tasks", json={"task_type": "echo", **task})
        assert reply.status_code == 202, reply.text
        return str(reply.json()["task_id"])

    async def task(self, task_id: str, **params: Any) -> dict[str, Any]:
        """Return a task as C1 shows it."""
        reply = await self.http.get(f"/tasks/{task_id}", params=params)
        assert reply.status_code == 200, reply.text
        view: dict[str, Any] = reply.json()
        return view


@asynccontextmanager
async def a_composite(
    home: Path,
    *,
    limits: dict[str, Any] | None = None,
    public: bool = False,
    traces: Traces | None = None,
    ids: IdSource | None = None,
    hosts: tuple[str, ...] = (),
    edge: bool = False,
    **policy: Any,
) -> AsyncIterator[Composite]:
    """Run a C1 with a home of its own; ``edge``: it is behind one."""
    settings = Settings(
        home=home,
        limits=LimitSettings(**(limits or {})),
        composite=CompositeSettings(
            hosts=hosts, security=CompositeSecuritySettings(enable_tls=edge)
        ),
    )
    moderator = FakeModerator(**policy)
    disk = {"free": 1 << 40}
    keys = PaperKeys()
    outputs = PaperOutputs()
    bounds = settings.limits
    app = build_app(
        moderator=moderator,
        reader=moderator.desk.memory.reader(),
        registry=builtin_types(),
        keys=keys,
        artifacts=ArtifactStore(
            settings.artifacts_dir,
            artifact_bytes_max=bounds.artifact_bytes,
            part_bytes_max=bounds.artifact_part_bytes,
            uploads_max=bounds.artifact_uploads_max,
            upload_idle_s=bounds.upload_idle_s,
            disk_free_bytes_min=bounds.disk_free_bytes_min,
            now=moderator.desk.clock.now,
            disk_free=lambda _: disk["free"],
        ),
        outputs=outputs,
        settings=settings,
        clock=moderator.desk.clock,
        ids=ids or CountedIds(),
        threaded_reads=False,
        public=public,
        traces=traces,
        edge_mark=EDGE_MARK if edge else None,
    )
    async with app.router.lifespan_context(app), _client(app, ADMIN_KEY) as http:
        yield Composite(app, http, moderator, disk, keys, outputs)


def _client(app: FastAPI, key: str | None) -> httpx.AsyncClient:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    # Every answer goes through the application's own handlers, the one for bugs included.
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url=URL, headers=headers)
