"""Give the cluster some work and say who did it: ``ray submit cluster.yaml first_tasks.py``.

Runs wherever C1 can be reached; on M1 it finds address and key by itself. Imports no Ray.
"""

from __future__ import annotations

from collections import Counter

from hcna_ray.client import Client


def main() -> None:
    """Wait until somebody works, run twenty echoes, print who ran how many."""
    with Client() as client:
        results = list(client.map("echo", ({"number": number} for number in range(20))))
    for worker, count in sorted(Counter(one["processed_by"] for one in results).items()):
        print(f"{worker} ran {count}")


if __name__ == "__main__":
    main()
