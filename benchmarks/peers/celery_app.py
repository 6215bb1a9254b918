"""FastAPI + Celery + Redis, as their documentation recommends.

* Submitting blocks, so its routes are plain ``def``, which FastAPI runs in threads
  (fastapi.tiangolo.com/async), with a web process a core
  (fastapi.tiangolo.com/deployment/server-workers).
* Many short tasks: a large prefetch multiplier (docs.celeryq.dev, userguide/optimizing, "Prefetch
  Limits"). Everything else has Celery's defaults: prefork, one process a core, JSON, results kept.
* Broker and results on Redis (docs.celeryq.dev, getting-started/backends-and-brokers/redis) with
  hiredis; AOF each second, Redis' suggestion and default (redis.io, persistence).
"""

from __future__ import annotations

import os
from typing import Any

import redis
from celery import Celery, group
from celery.result import AsyncResult
from common import BatchIn, TaskIn, echoed
from fastapi import FastAPI

PORT = int(os.environ["REDIS_PORT"])
#: Results alone live in database 1, so that counting them costs nothing.
RESULTS = f"redis://127.0.0.1:{PORT}/1"

celery = Celery("benchmark", broker=f"redis://127.0.0.1:{PORT}/0", backend=RESULTS)
celery.conf.update(worker_prefetch_multiplier=64, broker_connection_retry_on_startup=True)
app = FastAPI()
results = redis.Redis.from_url(RESULTS)


@celery.task
def echo(payload: dict[str, Any]) -> dict[str, Any]:
    """The work."""
    return echoed(payload)


@app.post("/tasks", status_code=202)
def submit(task: TaskIn) -> dict[str, str]:
    """Submit a task."""
    return {"task_id": echo.delay(task.payload).id, "status": "queued"}


@app.post("/tasks/batch", status_code=202)
def submit_batch(batch: BatchIn) -> dict[str, Any]:
    """Submit many: a group, sent over one connection (userguide/canvas, "Groups")."""
    sent = group(echo.s(task.payload) for task in batch.tasks).apply_async()
    return {"accepted": len(sent), "task_ids": [one.id for one in sent]}


@app.get("/tasks/{task_id}")
def show(task_id: str, wait: float = 0) -> dict[str, Any]:
    """Show a task, after waiting for its result."""
    found = AsyncResult(task_id, app=celery)
    if wait:
        found.get(timeout=wait, propagate=False)
    done = found.successful()
    return {"status": "completed" if done else "queued", "result": found.result if done else None}


@app.get("/completed")
def completed() -> dict[str, int]:
    """Count results."""
    return {"completed": results.dbsize()}
