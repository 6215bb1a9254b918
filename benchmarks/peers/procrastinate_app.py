"""FastAPI + Procrastinate + PostgreSQL, as their documentation recommends.

* The asynchronous connector with its pool, opened in the lifespan of the application, and
  ``defer_async``, which is what it recommends (procrastinate.readthedocs.io, quickstart and how-to
  guides).
* An ``async def`` task and ``--concurrency``, so that one worker runs many at once; the worker is
  woken by LISTEN/NOTIFY, which is the default.
* Procrastinate keeps no results: that a job has succeeded is all that can be asked for, and
  nothing tells it but looking.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from common import BatchIn, TaskIn, echoed
from fastapi import FastAPI
from procrastinate import App, PsycopgConnector
from procrastinate.jobs import Status

#: How often somebody who waits for a job looks. No notification exists for that.
LOOK_S = 0.001

procrastinate = App(connector=PsycopgConnector(conninfo=os.environ["POSTGRES_URL"]))


@procrastinate.task(name="echo")
async def echo(payload: dict[str, Any]) -> dict[str, Any]:
    """The work."""
    return echoed(payload)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """Hold the pool of connections."""
    async with procrastinate.open_async():
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/tasks", status_code=202)
async def submit(task: TaskIn) -> dict[str, str]:
    """Submit a task."""
    job_id = await echo.defer_async(payload=task.payload)
    return {"task_id": str(job_id), "status": "queued"}


@app.post("/tasks/batch", status_code=202)
async def submit_batch(batch: BatchIn) -> dict[str, Any]:
    """Submit many with one statement."""
    ids = await echo.batch_defer_async(*({"payload": task.payload} for task in batch.tasks))
    return {"accepted": len(ids), "task_ids": [str(one) for one in ids]}


@app.get("/tasks/{task_id}")
async def show(task_id: int, wait: float = 0) -> dict[str, Any]:
    """Show a task, after waiting for its end."""
    end = time.monotonic() + wait
    while True:
        status = await procrastinate.job_manager.get_job_status_async(task_id)
        if status not in (Status.TODO, Status.DOING) or time.monotonic() > end:
            break
        await asyncio.sleep(LOOK_S)
    done = status is Status.SUCCEEDED
    return {"status": "completed" if done else status.value, "result": await _begun(task_id)}


async def _begun(task_id: int) -> dict[str, float]:
    """Return when a worker took a job, which is what is known instead of a result."""
    rows = await procrastinate.connector.execute_query_all_async(
        "SELECT extract(epoch FROM at)::float8 AS at FROM procrastinate_events "
        "WHERE job_id = %(job)s AND type = 'started'",
        job=task_id,
    )
    return {"started_at": rows[0]["at"]} if rows else {}


@app.get("/completed")
async def completed() -> dict[str, int]:
    """Count jobs that have succeeded."""
    row = await procrastinate.connector.execute_query_one_async(
        "SELECT count(*) AS n FROM procrastinate_jobs WHERE status = 'succeeded'"
    )
    return {"completed": row["n"]}
