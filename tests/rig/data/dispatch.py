"""Submit COUNT echoes at RATE a second; print how long each waited from accepted to started."""

from __future__ import annotations

import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

from hcna_ray.client import Client


def at(stamp: str) -> float:
    return datetime.fromisoformat(stamp).timestamp()


def main(count: int, rate: float) -> None:
    local = threading.local()

    def client() -> Client:
        if not hasattr(local, "client"):
            local.client = Client()
        return local.client

    def submit(number: int) -> str:
        return client().submit("echo", {"number": number}).id

    with ThreadPoolExecutor(max_workers=8) as pool:
        begun = time.monotonic()
        jobs = []
        for number in range(count):
            pause = begun + number / rate - time.monotonic()
            if pause > 0:
                time.sleep(pause)
            jobs.append(pool.submit(submit, number))
        ids = [job.result() for job in jobs]
        took = time.monotonic() - begun
        tasks = list(pool.map(lambda one: client().attach(one).wait(timeout_s=60).raw, ids))
    waits = sorted(
        (at(task["attempts"][0]["started_at"]) - at(task["accepted_at"])) * 1000 for task in tasks
    )
    print(
        json.dumps(
            {
                "completed": sum(task["status"] == "completed" for task in tasks),
                "workers": sorted({task["attempts"][0]["worker"] for task in tasks}),
                "rate": count / took,
                "p50_ms": waits[len(waits) // 2],
                "p95_ms": waits[int(len(waits) * 0.95)],
                "p99_ms": waits[int(len(waits) * 0.99)],
            }
        )
    )


main(int(sys.argv[1]), float(sys.argv[2]))
