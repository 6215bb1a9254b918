from __future__ import annotations

import pickle
from typing import Any

import pytest
from ray import cloudpickle

from hcna_ray.api import deployment
from hcna_ray.api.ray_moderator import RayModerator
from hcna_ray.core.errors import ModeratorUnavailable, NoAnswer
from hcna_ray.core.models import AuditEntry, TaskFilter, TaskState
from hcna_ray.runtime.messages import Accepted, ReplayQuery, SubmitBatch, in_brief
from tests.support.builders import T0, a_spec
from tests.support.fake_moderator import FakeModerator


def test_the_application_is_small_and_survives_pickling() -> None:
    application = deployment.build({"home": "/somewhere"})
    pickled = cloudpickle.dumps(application)

    # Serve wraps the class by value; none of our modules with state may be in there.
    assert len(pickled) < 500_000
    assert b"apsw" not in pickled
    assert b"hcna_ray.store" not in pickled
    pickle.loads(pickled)


def test_an_unknown_argument_is_refused() -> None:
    with pytest.raises(ValueError, match="hoem"):
        deployment.build({"hoem": "/x"})


class FakeLink:
    """Calls a fake moderator by method name, as the actor does, and notes how long it may take."""

    def __init__(self, moderator: FakeModerator) -> None:
        self.moderator = moderator
        self.timeouts: dict[str, float] = {}

    async def acall(self, method: str, *args: Any, timeout_s: float = 15.0, **kwargs: Any) -> Any:
        self.timeouts[method] = timeout_s
        reply = await getattr(self.moderator, method)(*args, **kwargs)
        return in_brief(args[0], reply) if method == "submit" else reply


async def test_every_call_reaches_the_actor_under_its_name() -> None:
    fake = FakeModerator()
    fake.join()
    link = FakeLink(fake)
    moderator = RayModerator(link)

    answers = await moderator.submit(SubmitBatch(specs=(a_spec("t1"), a_spec("t2"))))
    assert answers == [Accepted("t1", TaskState.QUEUED), Accepted("t2", TaskState.QUEUED)]
    assert await moderator.cancel("t1", reason="", principal="p") is TaskState.CANCELLED
    assert (await moderator.changes(0, 0.0)).last > 0
    assert [worker.name for worker in await moderator.workers()] == ["W1"]
    views, running, running_max = await moderator.worker_views()
    assert (len(views), running) == (1, 0)
    assert running_max > 0
    await moderator.pause_queue("q", True, principal="p")
    assert (await moderator.status()).paused == ("q",)
    worker = await moderator.set_worker("W1", "cordon", deadline_s=None, principal="p")
    assert worker.state.value == "cordoned"
    assert (await moderator.forget_worker("W1", force=True, principal="p")).name == "W1"
    query = ReplayQuery(where=TaskFilter(states=(TaskState.FAILED,)))
    assert (await moderator.retry_many(query, principal="p")).retried == ()
    reply = await moderator.send_intent("W1", "test.ping", {}, principal="p", wait_s=20.0)
    assert reply["answer"] == {"pong": True}
    await moderator.audit(AuditEntry(at=T0, principal="p", action="a", target="t", outcome="ok"))
    with pytest.raises(Exception, match="only a failed task"):
        await moderator.retry("t1", principal="p")

    assert link.timeouts["send_intent"] > 20.0
    fake.kill()
    with pytest.raises(ModeratorUnavailable):
        await moderator.status()


async def test_only_what_changes_something_may_have_happened_without_an_answer() -> None:
    class SilentLink:
        async def acall(
            self, method: str, *args: Any, timeout_s: float = 15.0, **kwargs: Any
        ) -> Any:
            raise NoAnswer("moderator did not answer", 2)

    moderator = RayModerator(SilentLink())

    with pytest.raises(NoAnswer):
        await moderator.cancel("t1", reason="", principal="p")
    for look in (moderator.status, moderator.workers, moderator.worker_views):
        with pytest.raises(ModeratorUnavailable) as refused:
            await look()
        assert not isinstance(refused.value, NoAnswer)
