"""C1 in this process: the real application around a fake moderator, spoken to over ASGI."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI

from hcna_ray.api.app import build_app
from hcna_ray.api.services import Services
from hcna_ray.config import LimitSettings, Settings
from hcna_ray.handlers import Registry
from hcna_ray.security.keys import ApiKey, verify
from hcna_ray.store.artifacts import ArtifactStore
from tests.support.builders import T0
from tests.support.fake_moderator import FakeModerator

ADMIN_KEY = "hcna_admin-key-of-the-tests"
USER_KEY = "hcna_user-key-of-the-tests"
URL = "http://c1.test"


class FixedKeys:
    """Two keys: one of an admin, one of a user."""

    def __init__(self) -> None:
        self._keys = (
            _key("owner", "admin", ADMIN_KEY),
            _key("guest", "user", USER_KEY),
        )

    def verify(self, presented: str) -> ApiKey | None:
        return verify(self._keys, presented)

    def all(self) -> Sequence[ApiKey]:
        return self._keys


def _key(name: str, role: Any, clear: str) -> ApiKey:
    digest = hashlib.sha256(clear.encode()).hexdigest()
    return ApiKey(name=name, role=role, sha256=digest, created_at=T0)


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

    @property
    def services(self) -> Services:
        services: Services = self.app.state.services
        return services

    def client(self, key: str | None) -> httpx.AsyncClient:
        """Return a client with another key, or with none."""
        return _client(self.app, key)

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
    home: Path, *, limits: dict[str, Any] | None = None, **policy: Any
) -> AsyncIterator[Composite]:
    """Run a C1 with a home of its own."""
    settings = Settings(home=home, limits=LimitSettings(**(limits or {})))
    moderator = FakeModerator(**policy)
    disk = {"free": 1 << 40}
    bounds = settings.limits
    app = build_app(
        moderator=moderator,
        reader=moderator.desk.memory.reader(),
        registry=builtin_types(),
        keys=FixedKeys(),
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
        settings=settings,
        clock=moderator.desk.clock,
        ids=CountedIds(),
        threaded_reads=False,
    )
    async with app.router.lifespan_context(app), _client(app, ADMIN_KEY) as http:
        yield Composite(app, http, moderator, disk)


def _client(app: FastAPI, key: str | None) -> httpx.AsyncClient:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    # Every answer goes through the application's own handlers, the one for bugs included.
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url=URL, headers=headers)
