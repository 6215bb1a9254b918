"""The town on paper: its end comes when nothing can happen any more, not sooner."""

from __future__ import annotations

from pathlib import Path

from hcna_ray.core.models import Needs
from tests.faults.town import Town


def test_a_drain_waits_for_slots_whose_calls_were_lost(tmp_path: Path) -> None:
    town = Town(tmp_path, 7, {"load": 0.0})
    town.live(2.0)
    worker = town.workers[0]
    # New slots ask into the void: they will wait for an answer for half a minute.
    worker.up_cut, worker.cut_until = True, town.clock.true + 3.0
    for slot in list(worker.slots):
        worker.slots.remove(slot)
        worker._add_slot()
    town.live(3.5)
    body = town._spec(town.draw)
    for name in ("ordering_key", "run_at", "expires_at", "queue_timeout_s", "depends_on"):
        body.pop(name, None)
    town._submit({**body, "queue": "default", "needs": Needs(worker="W1")}, "north", None)

    town.drain()

    assert town.store is not None
    assert town.store.size().tasks == 0
    town.close()
    assert town.judge() == []
