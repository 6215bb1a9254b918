"""Submit COUNT short tasks at RATE a second, whatever happens meanwhile; print their ids."""

from __future__ import annotations

import json
import sys
import time

from hcna_ray.client import Client

count, rate = int(sys.argv[1]), float(sys.argv[2])
with Client(retry_for_s=120) as client:
    begun, ids = time.monotonic(), []
    for number in range(count):
        time.sleep(max(0.0, begun + number / rate - time.monotonic()))
        ids.append(
            client.submit("sleep", {"seconds": 0.2}, idempotency_key=f"load-{begun}-{number}").id
        )
    print(json.dumps(ids))
