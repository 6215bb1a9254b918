"""Values to bytes and back, for stores that keep bytes.

Every blob starts with one byte, the version of its form, so that what was written yesterday stays
readable: a new form gets a new number and a new decoder, and the old decoder stays. A spec is
written as a positional tuple of *all* its fields: a default that changes later must not change
what was accepted under the old one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import msgspec

from hcna_ray.core.errors import SchemaTooNew, StoreDamaged
from hcna_ray.core.models import (
    Needs,
    OnDisconnect,
    Progress,
    RetryPolicy,
    TaskError,
    TaskSpec,
    WorkerRecord,
)
from hcna_ray.core.schedules import Overlap, Schedule

_T = TypeVar("_T")

#: First byte of everything written now, but for specs that are confined or scheduled.
FORM = b"\x01"
#: First byte of the spec of a task that is confined; all the rest of it is as in form 1. A version
#: that knows nothing of that must not run it.
CONFINED = b"\x02"
#: First byte of the spec of a task from a schedule: beside form 1 whether it is confined, and which
#: schedule and instant it comes from.
SCHEDULED = b"\x03"

#: What ``nil`` stands for in form 1, spelled out so that new defaults cannot reach old blobs.
_RETRY_1 = RetryPolicy(
    max_attempts=1,
    backoff_s=1.0,
    factor=2.0,
    max_backoff_s=300.0,
    jitter=0.1,
    retry_on=("error", "timeout"),
)
_NEEDS_1 = Needs(worker=None, cpu=0.0, mem_gb=0.0, gpu=0.0, resources=(), labels=(), isolated=False)

_Spec1 = tuple[
    str,  # id
    str,  # task_type
    bytes,  # payload
    str,  # queue
    int,  # priority
    float,  # accepted_at
    float | None,  # run_at
    float | None,  # expires_at
    float,  # timeout_s
    float | None,  # queue_timeout_s
    RetryPolicy | None,
    int,  # max_losses
    Needs | None,
    tuple[str, ...],  # depends_on
    str | None,  # ordering_key
    str | None,  # concurrency_key
    str,  # on_disconnect
    float,  # wait_max_s
    str,  # principal
    str | None,  # idempotency_key
    str,  # fingerprint
    str | None,  # batch_id
    str | None,  # traceparent
    str | None,  # webhook
    bytes | None,  # metadata
]

_Spec3 = tuple[
    _Spec1,
    bool,  # confined
    str,  # schedule
    float,  # schedule_at
]
_Schedule1 = tuple[
    str,  # cron
    str,  # timezone
    bytes,  # spec, as `pack_spec` writes it
    bytes,  # task
    str,  # overlap
    float,  # catch_up_s
    bool,  # paused
    str,  # key_sha256
    float,  # created_at
    float,  # changed_at
]

_encode = msgspec.msgpack.Encoder().encode
_decode_spec = msgspec.msgpack.Decoder(_Spec1).decode
_decode_scheduled = msgspec.msgpack.Decoder(_Spec3).decode
_decode_schedule = msgspec.msgpack.Decoder(_Schedule1).decode
_decode_error = msgspec.msgpack.Decoder(TaskError).decode
_decode_progress = msgspec.msgpack.Decoder(Progress).decode
_decode_worker = msgspec.msgpack.Decoder(WorkerRecord).decode
_encode_json = msgspec.json.Encoder().encode
_decode_needs = msgspec.json.Decoder(Needs).decode


def pack_spec(spec: TaskSpec) -> bytes:
    """Return a spec as bytes, payload included."""
    fields = (
        spec.id,
        spec.task_type,
        spec.payload,
        spec.queue,
        spec.priority,
        spec.accepted_at,
        spec.run_at,
        spec.expires_at,
        spec.timeout_s,
        spec.queue_timeout_s,
        None if spec.retry == _RETRY_1 else spec.retry,
        spec.max_losses,
        None if spec.needs == _NEEDS_1 else spec.needs,
        spec.depends_on,
        spec.ordering_key,
        spec.concurrency_key,
        spec.on_disconnect,
        spec.wait_max_s,
        spec.principal,
        spec.idempotency_key,
        spec.fingerprint,
        spec.batch_id,
        spec.traceparent,
        spec.webhook,
        spec.metadata,
    )
    if spec.schedule is not None:
        return SCHEDULED + _encode((fields, spec.confined, spec.schedule, spec.schedule_at))
    return (CONFINED if spec.confined else FORM) + _encode(fields)


def unpack_spec(blob: bytes) -> TaskSpec:
    """Return the spec that `pack_spec` wrote.

    Raises:
        SchemaTooNew: a newer hcna-ray wrote it.
        StoreDamaged: nobody wrote it so.
    """
    body = _body(blob, FORM, CONFINED, SCHEDULED)
    confined, schedule, schedule_at = blob[:1] == CONFINED, None, None
    if blob[:1] == SCHEDULED:
        fields, confined, schedule, schedule_at = _decoded(_decode_scheduled, body)
    else:
        fields = _decoded(_decode_spec, body)
    (
        id_,
        task_type,
        payload,
        queue,
        priority,
        accepted_at,
        run_at,
        expires_at,
        timeout_s,
        queue_timeout_s,
        retry,
        max_losses,
        needs,
        depends_on,
        ordering_key,
        concurrency_key,
        on_disconnect,
        wait_max_s,
        principal,
        idempotency_key,
        fingerprint,
        batch_id,
        traceparent,
        webhook,
        metadata,
    ) = fields
    return TaskSpec(
        id=id_,
        task_type=task_type,
        payload=payload,
        queue=queue,
        priority=priority,
        accepted_at=accepted_at,
        run_at=run_at,
        expires_at=expires_at,
        timeout_s=timeout_s,
        queue_timeout_s=queue_timeout_s,
        retry=_RETRY_1 if retry is None else retry,
        max_losses=max_losses,
        needs=_NEEDS_1 if needs is None else needs,
        depends_on=depends_on,
        ordering_key=ordering_key,
        concurrency_key=concurrency_key,
        on_disconnect=OnDisconnect(on_disconnect),
        wait_max_s=wait_max_s,
        principal=principal,
        idempotency_key=idempotency_key,
        fingerprint=fingerprint,
        batch_id=batch_id,
        traceparent=traceparent,
        webhook=webhook,
        metadata=metadata,
        confined=confined,
        schedule=schedule,
        schedule_at=schedule_at,
    )


def pack_schedule(schedule: Schedule) -> bytes:
    """Return what somebody has asked for with a schedule; how far it has come is in columns."""
    return FORM + _encode(
        (
            schedule.cron,
            schedule.timezone,
            pack_spec(schedule.spec),
            schedule.task,
            schedule.overlap,
            schedule.catch_up_s,
            schedule.paused,
            schedule.key_sha256,
            schedule.created_at,
            schedule.changed_at,
        )
    )


def unpack_schedule(principal: str, name: str, blob: bytes) -> Schedule:
    """Return the schedule that `pack_schedule` wrote, as if it had not come anywhere."""
    (
        cron,
        timezone,
        spec,
        task,
        overlap,
        catch_up_s,
        paused,
        key_sha256,
        created_at,
        changed_at,
    ) = _decoded(_decode_schedule, _body(blob))
    return Schedule(
        principal=principal,
        name=name,
        cron=cron,
        timezone=timezone,
        spec=unpack_spec(spec),
        task=task,
        overlap=Overlap(overlap),
        catch_up_s=catch_up_s,
        paused=paused,
        key_sha256=key_sha256,
        created_at=created_at,
        changed_at=changed_at,
    )


def pack_error(error: TaskError | None) -> bytes | None:
    """Return an error as bytes; ``None`` stays ``None``."""
    return None if error is None else FORM + _encode(error)


def unpack_error(blob: bytes | None) -> TaskError | None:
    """Return the error that `pack_error` wrote."""
    return None if blob is None else _decoded(_decode_error, _body(blob))


def pack_progress(progress: Progress | None) -> bytes | None:
    """Return progress as bytes; ``None`` stays ``None``."""
    return None if progress is None else FORM + _encode(progress)


def unpack_progress(blob: bytes | None) -> Progress | None:
    """Return the progress that `pack_progress` wrote."""
    return None if blob is None else _decoded(_decode_progress, _body(blob))


def pack_worker(record: WorkerRecord) -> bytes:
    """Return a worker's record as bytes."""
    return FORM + _encode(record)


def unpack_worker(blob: bytes) -> WorkerRecord:
    """Return the record that `pack_worker` wrote."""
    return _decoded(_decode_worker, _body(blob))


def needs_to_json(needs: Needs) -> str:
    """Return needs as JSON text. Fields keep their order, so the text is canonical."""
    return _encode_json(needs).decode()


def needs_from_json(text: str) -> Needs:
    """Return the needs that `needs_to_json` wrote."""
    return _decoded(_decode_needs, text)


def to_json(items: Iterable[str] | Iterable[int]) -> str:
    """Return a JSON array, which SQLite's ``json_each`` takes as one parameter."""
    return _encode_json(list(items)).decode()


def _body(blob: bytes, *forms: bytes) -> Any:
    known = forms or (FORM,)
    if blob[:1] not in known:
        raise SchemaTooNew(blob[0], known[-1][0])
    return memoryview(blob)[1:]


def _decoded(decode: Callable[[Any], _T], raw: Any) -> _T:
    try:
        return decode(raw)
    except msgspec.DecodeError as error:
        raise StoreDamaged(f"a value in it cannot be read ({error})") from error
