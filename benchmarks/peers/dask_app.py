"""FastAPI + Dask distributed, as its documentation recommends.

* A scheduler and a worker process for each core (distributed.dask.org, "Worker": one thread each
  for pure Python work), and the asynchronous client of asynchronous programs ("Asynchronous
  Operation").
* ``pure=False``: an echo is asked for anew each time ("Client", ``submit``). The futures are held,
  as else Dask forgets the results.
"""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from common import BatchIn, TaskIn, echoed
from distributed import Client, Future
from fastapi import FastAPI

held: dict[str, Future] = {}
client: Client


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """Hold the client."""
    global client
    async with Client(os.environ["DASK_SCHEDULER"], asynchronous=True) as client:
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/tasks", status_code=202)
async def submit(task: TaskIn) -> dict[str, str]:
    """Submit a task."""
    task_id = uuid.uuid4().hex
    held[task_id] = client.submit(echoed, task.payload, key=task_id, pure=False)
    return {"task_id": task_id, "status": "queued"}


@app.post("/tasks/batch", status_code=202)
async def submit_batch(batch: BatchIn) -> dict[str, Any]:
    """Submit many in one message."""
    ids = [uuid.uuid4().hex for _ in batch.tasks]
    futures = client.map(echoed, [task.payload for task in batch.tasks], key=ids, pure=False)
    held.update(zip(ids, futures, strict=True))
    return {"accepted": len(ids), "task_ids": ids}


@app.get("/tasks/{task_id}")
async def show(task_id: str, wait: float = 0) -> dict[str, Any]:
    """Show a task, after waiting for its result."""
    future = held[task_id]
    result = await asyncio.wait_for(future.result(), wait or 1.0)
    return {"status": "completed" if future.done() else "queued", "result": result}


@app.get("/completed")
async def completed() -> dict[str, int]:
    """Count futures that are done."""
    return {"completed": sum(future.status == "finished" for future in held.values())}
