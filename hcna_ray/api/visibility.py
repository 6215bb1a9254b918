"""Whose tasks and artifacts they are: what a caller sees, and what does not exist for it.

Keys that see everything (`ApiKey.sees_all`) are held against nothing here, and pay nothing. For the
others something that is not theirs does not exist: the answer is the one to a name nobody has.

Artifacts are named by their digest, so a name cannot be guessed, but whoever has the bytes knows
it, and names are no secrets. A caller that does not see everything sees those that it has sent, and
those that a task it sees in full has made. What payloads and results say is of no account: which
artifacts a task may read is decided where it reads them (`hcna_ray.runtime.artifacts`).
"""

from __future__ import annotations

import asyncio
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from hcna_ray.api.views import (
    Json,
    outline,
    worker_for_strangers,
    worker_in_brief,
    worker_view,
)
from hcna_ray.core.errors import CannotAccept, HcnaError, Invalid, NotFound
from hcna_ray.core.models import Task, TaskFilter, TaskSpec
from hcna_ray.core.schedules import Schedule
from hcna_ray.runtime.messages import WorkerInfo
from hcna_ray.security.keys import OF_OTHERS, ApiKey, View
from hcna_ray.store.artifacts import ArtifactStore
from hcna_ray.store.base import Belongs, TaskReader

if TYPE_CHECKING:
    from hcna_ray.api.services import Services

#: Pages of a listing that are looked through for tasks inside a key's scopes.
SCANS_MAX = 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:\-]{0,63}\Z")
#: Batches that are remembered.
REMEMBERED_MAX = 10_000


def view_of(caller: ApiKey, task: Task) -> View:
    """Return how much a caller sees of a task."""
    return view_of_spec(caller, task.spec)


def view_of_spec(caller: ApiKey, spec: TaskSpec) -> View:
    """Return how much a caller sees of tasks that were submitted so."""
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


async def check_task(
    services: Services, caller: ApiKey, task_id: str, *, in_full: bool = False
) -> None:
    """Raise `NotFound` unless the caller sees a task, or all of it."""
    found = await services.reads.run(lambda reader: reader.belongs((task_id,)))
    view = caller.view(*found[task_id]) if task_id in found else View.NONE
    if view is View.NONE or (in_full and view is not View.FULL):
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


def schedule_seen(caller: ApiKey, schedule: Schedule) -> View:
    """Return how much a caller sees of a schedule: what it would see of its tasks."""
    return view_of_spec(caller, schedule.spec)


async def find_schedule(services: Services, caller: ApiKey, owner: str, name: str) -> Schedule:
    """Return a schedule. Raises `NotFound` unless there is one that the caller sees."""
    found: Schedule | None = None
    if _NAME.match(name):
        found = await services.reads.run(lambda reader: reader.get_schedule((owner, name)))
    if found is None or schedule_seen(caller, found) is View.NONE:
        raise NotFound("schedule", name[:100])
    return found


def visible_schedules(
    reader: TaskReader,
    caller: ApiKey,
    *,
    owner: str | None,
    after: tuple[str, str],
    limit: int,
) -> tuple[list[Schedule], tuple[str, str] | None]:
    """Return a page of schedules and behind which the next one begins, if there is one.

    Scopes are held against each, so a page may be shorter than ``limit`` although another follows.
    """
    mine = whose(caller)
    if mine is not None and owner not in (None, mine):
        return [], None
    found: list[Schedule] = []
    for _ in range(SCANS_MAX):
        page = reader.schedules(principal=owner or mine, after=after, limit=limit + 1)
        for schedule in page[:limit]:
            if len(found) == limit:
                return found, after
            after = schedule.key
            if schedule_seen(caller, schedule) is not View.NONE:
                found.append(schedule)
        if len(page) <= limit:
            return found, None
        if len(found) == limit:
            break
    return found, after


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


async def foreign_parents(
    services: Services, caller: ApiKey, specs: Sequence[TaskSpec]
) -> Mapping[str, HcnaError]:
    """Return, by the id of the spec, why it depends on what does not exist for its submitter.

    Parents of the same batch are references still, or ids of specs given here; neither is looked
    for. What exists for nobody is left to the moderator, which answers in the same words.
    """
    refused: dict[str, HcnaError] = {}
    own = {spec.id for spec in specs}
    parents = {name for spec in specs for name in spec.depends_on if name not in own}
    if parents:
        known = await services.reads.run(lambda reader: reader.belongs(parents))
        hidden = {i for i, belongs in known.items() if caller.view(*belongs) is View.NONE}
        for spec in specs:
            for parent in spec.depends_on:
                if parent in hidden:
                    refused.setdefault(spec.id, _no_parent(parent))
    return refused


def _no_parent(parent: str) -> Invalid:
    """Return what the moderator says of a parent that nobody has."""
    return Invalid(
        "dependency_not_found",
        f"depends_on names {parent}, which does not exist",
        (("depends_on", f"there is no task {parent!r}"),),
    )


# -- artifacts -------------------------------------------------------------------------------------


async def check_artifact(services: Services, caller: ApiKey, name: str) -> None:
    """Raise `NotFound` unless an artifact is the caller's to see."""
    if caller.sees_all:
        return
    loop = asyncio.get_running_loop()
    if not await loop.run_in_executor(
        services.files, sees_artifact, services.artifacts, caller, name
    ):
        raise NotFound("artifact", name[:64])


def sees_artifact(store: ArtifactStore, caller: ApiKey, name: str) -> bool:
    """Return whether it is the caller's, or was made by a task that it sees in full.

    That makes it the caller's own: whoever was given the bytes could send them.
    """
    if store.owned(name, caller.owner):
        return True
    if all(caller.view(*maker) is not View.FULL for maker in store.makers(name)):
        return False
    with suppress(CannotAccept):  # A full disk: then it is looked at again next time.
        store.own(name, caller.owner)
    return True
