"""Whose tasks and artifacts they are: what a caller sees, and what does not exist for it.

Keys that see everything (`ApiKey.sees_all`) are held against nothing here, and pay nothing. For the
others something that is not theirs does not exist: the answer is the one to a name nobody has.

Artifacts are named by their digest, so a name cannot be guessed, but whoever has the bytes knows
it. A caller that does not see everything sees those that it has sent, and those that are named in
the result of a task it sees in full and were not named in that task's payload.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from string import hexdigits
from typing import TYPE_CHECKING

from hcna_ray.api.problems import refuse_field
from hcna_ray.api.views import (
    Json,
    outline,
    worker_for_strangers,
    worker_in_brief,
    worker_view,
)
from hcna_ray.core.errors import HcnaError, Invalid, NotFound
from hcna_ray.core.models import Task, TaskFilter, TaskSpec, TaskState
from hcna_ray.runtime.messages import WorkerInfo
from hcna_ray.security.keys import OF_OTHERS, ApiKey, View
from hcna_ray.store.base import Belongs, TaskReader

if TYPE_CHECKING:
    from hcna_ray.api.services import Services

#: Pages of a listing that are looked through for tasks inside a key's scopes.
SCANS_MAX = 20
#: Batches, and grants of artifacts, that are remembered.
REMEMBERED_MAX = 10_000
#: Artifacts that one request may name in payloads.
DIGESTS_MAX = 20_000
#: Artifacts that one look at results makes the caller's.
GRANTS_MAX = 1000
#: More than this is looked through on a thread, not on the event loop.
INLINE_BYTES = 64 << 10
DIGEST_CHARS = 64

#: Hexadecimal digits as x, everything else as a blank.
_MASK = bytes(120 if chr(code) in hexdigits else 32 for code in range(256))
_RUN = b"x" * DIGEST_CHARS


def view_of(caller: ApiKey, task: Task) -> View:
    """Return how much a caller sees of a task."""
    spec = task.spec
    return caller.view(spec.principal, spec.task_type, spec.queue)


def whose(caller: ApiKey) -> str | None:
    """Return the principal that a caller's listings are limited to, if they are."""
    return None if OF_OTHERS[caller.role] is not View.NONE else caller.owner


class Seen:
    """Bounded memory of what never changes: pairs that were found to belong together."""

    def __init__(self) -> None:
        self._pairs: OrderedDict[tuple[str, str], None] = OrderedDict()

    def add(self, who: str, what: str) -> None:
        """Remember a pair, and forget the oldest beyond the bound."""
        self._pairs[who, what] = None
        if len(self._pairs) > REMEMBERED_MAX:
            self._pairs.popitem(last=False)

    def has(self, who: str, what: str) -> bool:
        """Return whether the pair is remembered."""
        return (who, what) in self._pairs


async def check_task(services: Services, caller: ApiKey, task_id: str) -> None:
    """Raise `NotFound` unless the caller sees a task."""
    found = await services.reads.run(lambda reader: reader.belongs((task_id,)))
    if task_id not in found or caller.view(*found[task_id]) is View.NONE:
        raise NotFound("task", task_id[:100])


def visible_ids(reader: TaskReader, caller: ApiKey, ids: Sequence[str]) -> tuple[str, ...]:
    """Leave out what exists and is not the caller's to see."""
    known = reader.belongs(ids)
    return tuple(i for i in ids if i not in known or caller.view(*known[i]) is not View.NONE)


def sees_batch(reader: TaskReader, seen: Seen, caller: ApiKey, batch_id: str) -> bool:
    """Return whether a batch exists for a caller: all of its tasks are of one principal."""
    if seen.has(caller.sha256, batch_id):
        return True
    where = TaskFilter(batch_id=batch_id, principal=whose(caller))
    before: int | None = None
    while page := reader.page(where, before_seq=before, limit=1000 if caller.scoped else 1):
        if any(view_of(caller, task) is View.NONE for task in page):
            return False
        before = page[-1].seq
        if not caller.scoped:
            break
    if before is None:
        return False
    seen.add(caller.sha256, batch_id)
    return True


def visible_page(
    reader: TaskReader, caller: ApiKey, where: TaskFilter, *, before_seq: int | None, limit: int
) -> tuple[list[Task], int | None]:
    """Return a page of a listing and where the next one begins, if there is one.

    ``where.principal`` is set already (`whose`). Scopes are held against each task, so a page may
    be shorter than ``limit`` although another follows.
    """
    found: list[Task] = []
    if not caller.covers(where.task_type, where.queue):
        return [], None
    for _ in range(SCANS_MAX):
        page = reader.page(where, before_seq=before_seq, limit=limit + 1)
        for task in page[:limit]:
            if len(found) == limit:
                return found, before_seq
            before_seq = task.seq
            if not caller.scoped or view_of(caller, task) is not View.NONE:
                found.append(task)
        if len(page) <= limit:
            return found, None
        if len(found) == limit or not caller.scoped:
            break
    return found, before_seq


def seen_as(caller: ApiKey, task: Task, view: Json) -> Json:
    """Return a task's view as far as its caller may see it; it may see something of it."""
    if caller.sees_all or view_of(caller, task) is View.FULL:
        return view
    return outline(view)


async def worker_views(
    services: Services, caller: ApiKey | None, workers: Sequence[WorkerInfo]
) -> list[Json]:
    """Return workers as far as a caller may see them; ``None`` is nobody in particular."""
    views = [worker_view(worker) for worker in workers]
    if caller is None:
        return [worker_for_strangers(view) for view in views]
    if caller.sees_all:
        return views
    running = [str(item.get("task_id", "")) for worker in workers for item in worker.running]
    known: Mapping[str, Belongs] = {}
    if running:
        known = await services.reads.run(lambda reader: reader.belongs(running))
    shown = {i for i, belongs in known.items() if caller.view(*belongs) is not View.NONE}
    brief = OF_OTHERS[caller.role] is not View.FULL
    found = []
    for worker, view in zip(workers, views, strict=True):
        seen = [item for item in worker.running if item.get("task_id") in shown]
        found.append(worker_in_brief(view, seen, brief=brief))
    return found


# -- what a submission names ----------------------------------------------------------------------


def names_anything(specs: Sequence[TaskSpec]) -> bool:
    """Return whether any of the specs may name a task or an artifact; cheap."""
    return any(spec.depends_on or len(spec.payload) > DIGEST_CHARS for spec in specs)


async def foreign_names(
    services: Services, caller: ApiKey, specs: Sequence[TaskSpec]
) -> Mapping[str, HcnaError]:
    """Return, by the id of the spec, why it names what does not exist for its submitter.

    Parents of the same batch are references still, or ids of specs given here; neither is looked
    for. What exists for nobody is left to the moderator, which answers in the same words.

    Raises:
        Invalid: the payloads name more artifacts than can be looked for.
    """
    refused: dict[str, HcnaError] = {}
    if not names_anything(specs):
        return refused
    own = {spec.id for spec in specs}
    parents = {name for spec in specs for name in spec.depends_on if name not in own}
    if parents:
        known = await services.reads.run(lambda reader: reader.belongs(parents))
        hidden = {i for i, belongs in known.items() if caller.view(*belongs) is View.NONE}
        for spec in specs:
            for parent in spec.depends_on:
                if parent in hidden:
                    refused.setdefault(spec.id, _no_parent(parent))
    named = await _in_all(services, [(spec.id, spec.payload) for spec in specs])
    digests = {digest for found in named.values() for digest in found}
    if len(digests) > DIGESTS_MAX:
        raise refuse_field(
            "payload", f"names {len(digests)} artifacts, at most {DIGESTS_MAX} are allowed at once"
        )
    if digests:
        loop = asyncio.get_running_loop()
        others = await loop.run_in_executor(services.files, _foreign, services, caller, digests)
        for task_id, found in named.items():
            for digest in found:
                if digest in others:
                    refused.setdefault(task_id, _no_artifact(digest))
    return refused


async def _in_all(
    services: Services, texts: Sequence[tuple[str, bytes | None]]
) -> dict[str, list[str]]:
    """Return the digests in each of the texts that have any; much text is read on a thread."""
    if sum(len(raw or b"") for _, raw in texts) <= INLINE_BYTES:
        return _digests_in(texts)
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(services.files, _digests_in, texts)


def _digests_in(texts: Sequence[tuple[str, bytes | None]]) -> dict[str, list[str]]:
    return {name: found for name, raw in texts if (found := digests_of(raw))}


def _foreign(services: Services, caller: ApiKey, digests: Iterable[str]) -> set[str]:
    store = services.artifacts
    found = set()
    for digest in digests:
        try:
            store.find(digest)
        except NotFound:
            continue
        if not store.owned(digest, caller.owner):
            found.add(digest)
    return found


def digests_of(raw: bytes | None) -> list[str]:
    """Return what may be names of artifacts: 64 hexadecimal digits, no more in a row.

    In time that grows with the length alone, whatever is written there.
    """
    if raw is None or len(raw) < DIGEST_CHARS:
        return []
    mask = raw.translate(_MASK)
    names: dict[str, None] = {}
    at = mask.find(_RUN)
    while at >= 0:
        end = mask.find(b" ", at + DIGEST_CHARS)
        end = len(mask) if end < 0 else end
        if end - at == DIGEST_CHARS:
            names[raw[at:end].decode().lower()] = None
        at = mask.find(_RUN, end)
    return list(names)


def _no_parent(parent: str) -> Invalid:
    """Return what the moderator says of a parent that nobody has."""
    return Invalid(
        "dependency_not_found",
        f"depends_on names {parent}, which does not exist",
        (("depends_on", f"there is no task {parent!r}"),),
    )


def _no_artifact(digest: str) -> Invalid:
    return Invalid(
        "unknown_artifact",
        f"payload: there is no artifact {digest!r}; upload it with PUT /artifacts",
        (("payload", f"there is no artifact {digest!r}"),),
    )


# -- artifacts -------------------------------------------------------------------------------------


async def check_artifact(services: Services, caller: ApiKey, name: str) -> None:
    """Raise `NotFound` unless an artifact is the caller's."""
    if caller.sees_all:
        return
    store = services.artifacts
    loop = asyncio.get_running_loop()
    if not await loop.run_in_executor(services.files, store.owned, name, caller.owner):
        raise NotFound("artifact", name[:64])


async def grant_results(services: Services, caller: ApiKey, tasks: Iterable[Task]) -> None:
    """Mark what the results of these tasks name as the caller's, if it sees them in full.

    What the payload names is no product of the task: else a handler that returns what it was sent
    would hand out anything.
    """
    if caller.sees_all:
        return
    fresh = [
        task
        for task in tasks
        if task.state is TaskState.COMPLETED
        and view_of(caller, task) is View.FULL
        and not services.granted.has(caller.owner, task.id)
    ]
    results = await _in_all(services, [(task.id, task.result) for task in fresh])
    sent = await _in_all(services, [(t.id, t.spec.payload) for t in fresh if t.id in results])
    new = {name for i, names in results.items() for name in names if name not in sent.get(i, ())}
    new = {name for name in new if not services.granted.has(caller.owner, name)}
    if new:
        loop = asyncio.get_running_loop()
        some = sorted(new)[:GRANTS_MAX]  # Each is made durable; the next look brings the rest.
        for name in await loop.run_in_executor(services.files, _own, services, caller, some):
            services.granted.add(caller.owner, name)
    if len(new) <= GRANTS_MAX:
        for task in fresh:  # A result does not change: it is read once.
            services.granted.add(caller.owner, task.id)


def _own(services: Services, caller: ApiKey, names: Iterable[str]) -> list[str]:
    return [name for name in names if services.artifacts.own(name, caller.owner)]
