"""From what a client sent to what the moderator stores: pure, and the same for one task or many."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
from pydantic import BaseModel, ValidationError

from hcna_ray.api.problems import OutOfScope, invalid, refuse_field
from hcna_ray.api.schemas import BatchTaskIn, RequiresIn, RetryIn, ScheduledTaskIn, TaskIn
from hcna_ray.config import Settings
from hcna_ray.core.errors import HcnaError, Invalid
from hcna_ray.core.models import Needs, OnDisconnect, RetryPolicy, TaskSpec
from hcna_ray.handlers import Registry, TaskDefaults, TaskType
from hcna_ray.security.keys import ApiKey
from hcna_ray.security.outbound import TargetRefused, policy_of, vet_url

REF = "ref:"
#: Items named of a circle.
PATH_MAX = 12
_ON_DISCONNECT = {choice.value: choice for choice in OnDisconnect}


@dataclass(frozen=True, kw_only=True, slots=True)
class Sender:
    """Who submits, and what the request's headers say about all of its tasks."""

    key: ApiKey
    #: Header ``Idempotency-Key``; item *i* of a batch has ``key/i``.
    idempotency_key: str | None = None
    traceparent: str | None = None


@dataclass(frozen=True, slots=True)
class _Policy:
    """What a task of a type gets where its submitter says nothing."""

    timeout_s: float
    retry: RetryPolicy
    needs: Needs


class Submissions:
    """Checks tasks and makes specs of them. Knows the task types and the settings, no more."""

    def __init__(self, registry: Registry, settings: Settings) -> None:
        limits, scheduling = settings.limits, settings.moderator.scheduling
        self._registry = registry
        self._retry = RetryPolicy(
            max_attempts=settings.retry.max_attempts,
            backoff_s=settings.retry.backoff_s,
            factor=settings.retry.factor,
            max_backoff_s=settings.retry.max_backoff_s,
            jitter=settings.retry.jitter,
            retry_on=tuple(settings.retry.retry_on),
        )
        self._disk_path = str(settings.data_dir)
        self._payload_max = limits.body_bytes
        self._metadata_max = limits.metadata_bytes
        self._schedule_max = limits.schedule_bytes
        self._depends_on_max = limits.depends_on_max
        self._timeout_s = scheduling.task_timeout_seconds
        self._max_losses = scheduling.max_losses
        self._wait_max_s = scheduling.wait_max_s
        self._outbound = policy_of(settings.webhooks)
        self._policies: dict[str, _Policy] = {}

    def task(self, body: object, sender: Sender, *, task_id: str, now: float) -> TaskSpec:
        """Check one task.

        Args:
            body: What the client sent, parsed.
            sender: Who, and the headers.
            task_id: Id minted for it.
            now: Instant of acceptance.

        Raises:
            Invalid: it does not fit; fields are named.
        """
        model = _validate(TaskIn, body)
        for name in model.depends_on:
            if name.startswith(REF):
                raise refuse_field("depends_on", f"{name!r} has a meaning in a batch only")
        return self._spec(model, sender, sender.idempotency_key, task_id, None, now)

    def scheduled(self, body: object, sender: Sender, *, now: float) -> tuple[TaskSpec, bytes]:
        """Check the task of a schedule; return its spec, and what was sent as canonical JSON.

        Raises:
            Invalid: it does not fit; fields are named.
        """
        _validate(ScheduledTaskIn, body)
        spec = self._spec(_validate(TaskIn, body), sender, None, "", None, now)
        size = len(spec.payload) + len(spec.metadata or b"")
        if size > self._schedule_max:
            raise refuse_field(
                "task",
                f"payload and metadata have {size} bytes, at most {self._schedule_max} are allowed "
                "in a schedule; upload the data with PUT /artifacts and send its sha256",
            )
        return spec, msgspec.json.encode(body, order="deterministic")

    def batch_item(
        self, body: object, sender: Sender, *, index: int, task_id: str, batch_id: str, now: float
    ) -> tuple[str | None, TaskSpec]:
        """Check one item of a batch; return its ref and its spec, references not yet resolved.

        Raises:
            Invalid: it does not fit; fields are named.
        """
        model = _validate(BatchTaskIn, body)
        key = None if sender.idempotency_key is None else f"{sender.idempotency_key}/{index}"
        return model.ref, self._spec(model, sender, key, task_id, batch_id, now)

    def _spec(
        self,
        model: TaskIn,
        sender: Sender,
        key: str | None,
        task_id: str,
        batch_id: str | None,
        now: float,
    ) -> TaskSpec:
        caller = sender.key
        if caller.scoped and not caller.covers(model.task_type, model.queue):
            raise _out_of_scope(caller, model)
        task_type = self._registry.get(model.task_type)
        payload = task_type.validate_payload(model.payload)
        task_type.check_worker_paths(payload, self._disk_path)
        raw_payload = msgspec.json.encode(model.payload)
        if len(raw_payload) > self._payload_max:
            raise refuse_field(
                "payload",
                f"has {len(raw_payload)} bytes, at most {self._payload_max} are allowed; "
                "upload the data with PUT /artifacts and send its sha256",
            )
        metadata = None if model.metadata is None else msgspec.json.encode(model.metadata)
        if metadata is not None and len(metadata) > self._metadata_max:
            raise refuse_field(
                "metadata", f"has {len(metadata)} bytes, at most {self._metadata_max} are allowed"
            )
        if len(model.depends_on) > self._depends_on_max:
            raise refuse_field(
                "depends_on",
                f"names {len(model.depends_on)} tasks, at most {self._depends_on_max} are allowed",
            )
        if model.webhook is not None:
            try:
                vet_url(model.webhook, self._outbound)
            except TargetRefused as error:
                raise refuse_field("webhook", str(error)) from error
        if model.expires_at is not None and model.expires_at <= now:
            raise refuse_field("expires_at", "lies in the past")
        key = model.idempotency_key or key
        policy = self._policies.get(task_type.name) or self._policy_of(task_type)
        return TaskSpec(
            id=task_id,
            task_type=task_type.name,
            payload=raw_payload,
            queue=model.queue,
            priority=model.priority,
            accepted_at=now,
            run_at=model.run_at,
            expires_at=model.expires_at,
            timeout_s=float(model.timeout_s or policy.timeout_s),
            queue_timeout_s=model.queue_timeout_s,
            retry=policy.retry if model.retry is None else _retry(model.retry, policy.retry),
            max_losses=self._max_losses,
            needs=policy.needs if model.requires is None else _needs(model.requires, task_type),
            depends_on=tuple(dict.fromkeys(model.depends_on)),
            ordering_key=model.ordering_key,
            concurrency_key=model.concurrency_key,
            on_disconnect=_ON_DISCONNECT[model.on_disconnect],
            wait_max_s=self._wait_max_s,
            principal=caller.owner,
            idempotency_key=key,
            fingerprint="" if key is None else fingerprint(model, payload),
            batch_id=batch_id,
            traceparent=sender.traceparent,
            webhook=model.webhook,
            metadata=metadata,
            confined=not caller.sees_all,
        )

    def _policy_of(self, task_type: TaskType) -> _Policy:
        defaults = task_type.defaults
        policy = self._policies[task_type.name] = _Policy(
            timeout_s=defaults.timeout_s or self._timeout_s,
            retry=defaults.retry(self._retry),
            needs=_needs(None, task_type),
        )
        return policy


def fingerprint(model: TaskIn, payload: BaseModel) -> str:
    """Return the SHA-256 (hex) of a task's meaning: the checked models, not the bytes sent.

    Spelling out a default, another order of keys or another spacing make no difference.
    """
    meaning = model.model_dump(mode="json", exclude={"payload", "idempotency_key", "ref"})
    try:
        meaning["payload"] = payload.model_dump(mode="json")
        canonical = msgspec.json.encode(meaning, order="deterministic")
    except Exception:
        # A plug-in's model that cannot be written as JSON: then what was sent is what was meant.
        meaning["payload"] = model.payload
        canonical = msgspec.json.encode(meaning, order="deterministic")
    return hashlib.sha256(canonical).hexdigest()


def resolve(
    items: Sequence[tuple[str | None, TaskSpec] | HcnaError],
) -> list[TaskSpec | HcnaError]:
    """Put the ids of a batch in the place of its references, and refuse what cannot be resolved.

    An item is refused if its ref is taken, if it depends (also through others) on itself, on a ref
    that is not there, or on an item that was refused. All others stay.

    Args:
        items: Each item's ref and spec, or why it was refused already.

    Returns:
        For each item its spec or the reason, in order.
    """
    results: list[TaskSpec | HcnaError] = []
    by_ref: dict[str, int] = {}
    linked = False
    for index, item in enumerate(items):
        if isinstance(item, HcnaError):
            results.append(item)
            continue
        ref, spec = item
        results.append(spec)
        linked = linked or bool(spec.depends_on)
        if ref is not None and by_ref.setdefault(ref, index) != index:
            results[index] = refuse_field("ref", f"{ref!r} is the ref of item {by_ref[ref]} too")
    parents = _parents(items, by_ref, results) if linked else []
    if not any(parents):
        return results
    for index, circle in _circles(parents).items():
        if not isinstance(results[index], HcnaError):
            path = " -> ".join(_label(items, step) for step in circle)
            results[index] = Invalid(
                "dependency_cycle",
                f"depends_on goes in a circle: {path}",
                (("depends_on", f"goes in a circle: {path}"),),
            )
    _refuse_dependents(items, parents, results)
    for index, found in enumerate(results):
        if isinstance(found, TaskSpec) and parents[index]:
            ids = [_id_of(name, by_ref, items) for name in found.depends_on]
            results[index] = replace(found, depends_on=tuple(dict.fromkeys(ids)))
    return results


def _parents(
    items: Sequence[tuple[str | None, TaskSpec] | HcnaError],
    by_ref: Mapping[str, int],
    results: list[TaskSpec | HcnaError],
) -> list[list[int]]:
    """Return for each item the indexes it refers to; refuse items whose reference leads nowhere."""
    parents: list[list[int]] = [[] for _ in items]
    for index, item in enumerate(items):
        if isinstance(item, HcnaError):
            continue
        for name in item[1].depends_on:
            if not name.startswith(REF):
                continue
            parent = by_ref.get(name.removeprefix(REF))
            if parent is not None:
                parents[index].append(parent)
            elif not isinstance(results[index], HcnaError):
                results[index] = refuse_field(
                    "depends_on", f"no item of this batch has {name!r}", "dependency_not_found"
                )
    return parents


def _cyclic(parents: Sequence[Sequence[int]]) -> list[int]:
    """Return the items on a circle, or between two: those that no topological order reaches.

    What merely depends on a circle is peeled off from the other end.
    """
    children: list[list[int]] = [[] for _ in parents]
    missing = [len(above) for above in parents]
    for index, above in enumerate(parents):
        for parent in above:
            children[parent].append(index)
    free = [index for index, count in enumerate(missing) if not count]
    for index in free:
        for child in children[index]:
            missing[child] -= 1
            if not missing[child]:
                free.append(child)
    left = {index for index, count in enumerate(missing) if count}
    # Peel from the other end: what no item left depends on is behind a circle, not on one.
    waiting = {index: sum(child in left for child in children[index]) for index in left}
    ends = [index for index, count in waiting.items() if not count]
    for index in ends:
        left.discard(index)
        for parent in parents[index]:
            if parent in left:
                waiting[parent] -= 1
                if not waiting[parent]:
                    ends.append(parent)
    return sorted(left)


def _circles(parents: Sequence[Sequence[int]]) -> dict[int, list[int]]:
    """Return, for each item on a circle, the circle: its first item is repeated at the end."""
    on_circles = set(_cyclic(parents))
    found: dict[int, list[int]] = {}
    for start in sorted(on_circles):
        path: list[int] = []
        seen: dict[int, int] = {}
        at = start
        while at not in found and at not in seen:
            seen[at] = len(path)
            path.append(at)
            # An item that is left always has a parent that is left, so this never runs out.
            at = next(parent for parent in parents[at] if parent in on_circles)
        circle = found[at] if at in found else [*path[seen[at] :], at]
        if len(circle) > PATH_MAX:
            circle = [*circle[: PATH_MAX - 1], circle[-1]]
        found.update(dict.fromkeys(path, circle))
    return found


def _refuse_dependents(
    items: Sequence[tuple[str | None, TaskSpec] | HcnaError],
    parents: Sequence[Sequence[int]],
    results: list[TaskSpec | HcnaError],
) -> None:
    """Refuse every item that refers to a refused one, also through others."""
    children: list[list[int]] = [[] for _ in parents]
    for index, above in enumerate(parents):
        for parent in above:
            children[parent].append(index)
    refused = [index for index, found in enumerate(results) if isinstance(found, HcnaError)]
    for index in refused:
        for child in children[index]:
            if not isinstance(results[child], HcnaError):
                results[child] = refuse_field(
                    "depends_on",
                    f"{_label(items, index)} was refused",
                    "dependency_not_found",
                )
                refused.append(child)


def _label(items: Sequence[tuple[str | None, TaskSpec] | HcnaError], index: int) -> str:
    item = items[index]
    ref = None if isinstance(item, HcnaError) else item[0]
    return f"item {index}" if ref is None else f"{REF}{ref}"


def _id_of(
    name: str,
    by_ref: Mapping[str, int],
    items: Sequence[tuple[str | None, TaskSpec] | HcnaError],
) -> str:
    if not name.startswith(REF):
        return name
    item = items[by_ref[name.removeprefix(REF)]]
    assert not isinstance(item, HcnaError)
    return item[1].id


def _out_of_scope(caller: ApiKey, model: TaskIn) -> OutOfScope:
    if caller.covers(model.task_type):
        return OutOfScope(f"the key {caller.name!r} is not for the queue {model.queue!r}")
    return OutOfScope(f"the key {caller.name!r} is not for tasks of type {model.task_type!r}")


def _validate(kind: type[Any], body: object) -> Any:
    if not isinstance(body, dict):
        raise refuse_field("body", "must be a JSON object")
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise invalid(error) from None


def _retry(wanted: RetryIn, base: RetryPolicy) -> RetryPolicy:
    retry_on = None if wanted.retry_on is None else tuple(wanted.retry_on)
    policy = TaskDefaults(
        max_attempts=wanted.max_attempts,
        backoff_s=wanted.backoff_s,
        factor=wanted.factor,
        max_backoff_s=wanted.max_backoff_s,
        jitter=wanted.jitter,
        retry_on=retry_on,
    ).retry(base)
    if wanted.backoff_s is not None and wanted.max_backoff_s is None:
        return replace(policy, max_backoff_s=max(policy.max_backoff_s, policy.backoff_s))
    if policy.backoff_s > policy.max_backoff_s:
        raise refuse_field(
            "retry.max_backoff_s", f"must be at least backoff_s ({policy.backoff_s:g})"
        )
    return policy


def _needs(wanted: RequiresIn | None, task_type: TaskType) -> Needs:
    """Lay what the submitter asks for over what the type asks for, key by key."""
    asked: dict[str, Any] = dict(task_type.defaults.requires)
    if wanted is not None:
        asked |= {name: value for name, value in wanted if value is not None}
    resources: Mapping[str, float] = asked.get("resources") or {}
    labels: Mapping[str, str] = asked.get("labels") or {}
    return Needs(
        worker=asked.get("worker"),
        cpu=float(asked.get("cpu") or 0.0),
        mem_gb=float(asked.get("mem_gb") or 0.0),
        gpu=float(asked.get("gpu") or 0.0),
        resources=tuple(sorted((name, float(amount)) for name, amount in resources.items())),
        labels=tuple(sorted(labels.items())),
        isolated=task_type.isolated,
    )


def parents_first(specs: Sequence[TaskSpec]) -> list[int]:
    """Return the indexes of ``specs`` in an order in which no task comes before one it depends on.

    Otherwise the order stays as it is. The specs hold no circle (see `resolve`).
    """
    if not any(spec.depends_on for spec in specs):
        return list(range(len(specs)))
    index_of = {spec.id: index for index, spec in enumerate(specs)}
    parents = [[index_of[name] for name in spec.depends_on if name in index_of] for spec in specs]
    order: list[int] = []
    placed = [False] * len(specs)
    for start in range(len(specs)):
        stack = [start]
        while stack:
            at = stack[-1]
            missing = [] if placed[at] else [p for p in parents[at] if not placed[p]]
            if missing:
                stack += reversed(missing)
                continue
            stack.pop()
            if not placed[at]:
                placed[at] = True
                order.append(at)
    return order
