from __future__ import annotations

import pickle

from hcna_ray.core.errors import QueueFull
from hcna_ray.core.models import Needs, OnDisconnect, RetryPolicy, TaskState
from hcna_ray.runtime.messages import Accepted, Refused, SubmitBatch, in_brief, in_full
from tests.support.builders import T0, a_spec


def test_a_batch_arrives_as_it_was_sent() -> None:
    rich = a_spec(
        "t2",
        queue="night",
        priority=9,
        run_at=T0 + 1.5,
        expires_at=T0 + 9,
        timeout_s=1.25,
        queue_timeout_s=3.0,
        retry=RetryPolicy(max_attempts=4, retry_on=("KeyError",)),
        needs=Needs(worker="W2", cpu=1.0, labels=(("disk", "fast"),)),
        depends_on=("t0", "t1"),
        ordering_key="o",
        concurrency_key="c",
        on_disconnect=OnDisconnect.WAIT,
        principal="owner",
        idempotency_key="k/1",
        fingerprint="ab",
        batch_id="batch-1",
        traceparent="00-1",
        metadata=b"{}",
        confined=True,
    )
    batch = SubmitBatch(specs=(a_spec("t1"), rich), atomic=True)

    assert pickle.loads(pickle.dumps(batch)) == batch


def test_what_goes_without_saying_is_left_out_of_a_reply() -> None:
    batch = SubmitBatch(specs=tuple(map(a_spec, ("t1", "t2", "t3", "t4"))))
    results = [
        Accepted("t1", TaskState.QUEUED),
        Accepted("t2", TaskState.SCHEDULED),
        Refused(QueueFull("full", 5)),
        Accepted("t0", TaskState.QUEUED, duplicate=True),
    ]

    brief = in_brief(batch, results)

    assert brief == [None, *results[1:]]
    assert in_full(batch, brief) == results
