"""Stories in which every promise is kept. The checker must accept each."""

from __future__ import annotations

import hashlib

from tests.checker.histories.world import CANARY, Story, World

GOOD: dict[str, Story] = {}


def good(story: Story) -> Story:
    """Register a story."""
    GOOD[story.__name__] = story
    return story


@good
def nothing_happens(w: World) -> None:
    w.drain()


@good
def one_task_runs(w: World) -> None:
    w.submit("a")
    w.run("a")
    w.get("a")
    w.get("a")


@good
def a_task_is_watched_all_along(w: World) -> None:
    w.submit("a")
    w.get("a")
    w.grant("a")
    w.get("a")
    w.start("a")
    w.get("a", cancel_requested=False)
    w.complete("a")
    w.get("a")


@good
def two_tasks_in_order(w: World) -> None:
    w.submit("a")
    w.submit("b")
    w.run("a")
    w.run("b", "W2")


@good
def a_higher_priority_goes_first(w: World) -> None:
    w.submit("a", priority=1)
    w.submit("b", priority=9)
    w.run("b")
    w.run("a")


@good
def waiting_long_enough_beats_priority(w: World) -> None:
    w.submit("a", priority=1)
    w.wait(500)
    w.submit("b", priority=9)
    w.run("a")
    w.run("b")


@good
def a_key_sent_twice(w: World) -> None:
    w.submit("a", key="k")
    again = w.call("submit", **w.mark("a", "k"))
    w.answer(again, 202, id="a")
    w.run("a")
    late = w.call("submit", **w.mark("a", "k"))
    w.answer(late, 202, id="a")


@good
def a_key_sent_twice_at_once(w: World) -> None:
    one = w.call("submit", **w.mark("a", "k"))
    two = w.call("submit", **w.mark("a", "k"))
    w.accept("a", key="k")
    w.answer(two, 202, id="a")
    w.answer(one, 202, id="a")
    w.run("a")


@good
def a_key_with_another_body_is_refused(w: World) -> None:
    w.submit("a", key="k")
    other = w.call("submit", key="k", nonce="nonce-b", body_hash="body-b")
    w.answer(other, 409)
    w.run("a")


@good
def the_same_key_of_two_principals(w: World) -> None:
    w.submit("a", key="k")
    other = w.call("submit", **w.mark("b", "k"), principal="guest")
    w.accept("b", principal="guest")
    w.specs["b"]["key"] = "k"
    w.keys["guest", "k"] = "b"
    w.answer(other, 202, id="b")
    w.run("a")
    w.run("b")


@good
def the_answer_is_lost(w: World) -> None:
    w.call("submit", **w.mark("a"))
    w.accept("a")
    w.run("a")


@good
def the_request_is_lost(w: World) -> None:
    w.call("submit", **w.mark("a", "k"))
    w.submit("b")
    w.run("b")


@good
def the_answer_is_lost_and_the_key_finds_it(w: World) -> None:
    w.call("submit", **w.mark("a", "k"))
    w.accept("a", key="k")
    w.submit("b")
    again = w.call("submit", **w.mark("a", "k"))
    w.answer(again, 202, id="a")
    w.run("a")
    w.run("b")


@good
def an_anonymous_request_without_answer(w: World) -> None:
    w.call("submit")
    w.accept("a")
    w.specs["a"]["nonce"] = None
    w.grant("a")
    w.start("a")
    w.effects[-1].pop("nonce")
    w.complete("a")


@good
def a_server_error_leaves_it_open(w: World) -> None:
    number = w.call("submit", **w.mark("a"))
    w.accept("a")
    w.answer(number, 500)
    w.run("a")


@good
def a_full_queue_refuses(w: World) -> None:
    w.submit("a")
    w.refuse("b", 503, retry_after=5)
    w.refuse("c", 429, retry_after=60)
    w.refuse("d", 507, retry_after=3600)
    w.refuse("e", 422)
    w.run("a")


@good
def refused_then_accepted_under_the_same_key(w: World) -> None:
    w.refuse("a", 503, key="k")
    w.submit("a", key="k")
    w.run("a")


@good
def a_queued_task_is_cancelled(w: World) -> None:
    w.submit("a")
    w.cancel("a")
    w.get("a", cancel_requested=True)
    again = w.call("cancel", id="a")
    w.answer(again, 409)


@good
def a_running_task_is_cancelled(w: World) -> None:
    w.submit("a")
    w.grant("a")
    w.start("a")
    w.cancel("a")
    again = w.call("cancel", id="a")
    w.answer(again, 202, id="a")
    w.get("a", cancel_requested=True)
    w.confirm_cancel("a")


@good
def a_granted_task_is_cancelled_and_comes_back(w: World) -> None:
    w.submit("a")
    w.grant("a")
    w.cancel("a")
    w.fact("a", "cancelled", "cancelled", token=True)


@good
def a_result_wins_over_a_cancel(w: World) -> None:
    w.submit("a")
    w.grant("a")
    w.start("a")
    w.cancel("a")
    w.complete("a")
    w.get("a", cancel_requested=True)


@good
def a_cancel_without_answer_took_effect(w: World) -> None:
    w.submit("a")
    w.call("cancel", id="a")
    w.fact("a", "cancelled", "cancelled")


@good
def a_cancel_answered_503_takes_effect_later(w: World) -> None:
    w.submit("a")
    number = w.call("cancel", id="a")
    w.answer(number, 503, retry_after=2)
    w.wait(5)
    w.fact("a", "cancelled", "cancelled")


@good
def a_server_error_comes_before_the_commit(w: World) -> None:
    number = w.call("submit", **w.mark("a"))
    w.answer(number, 504)
    w.wait(5)
    w.accept("a")
    w.run("a")


@good
def a_cancel_without_answer_did_not(w: World) -> None:
    w.submit("a")
    w.call("cancel", id="a")
    w.run("a")


@good
def a_get_races_with_the_end(w: World) -> None:
    w.submit("a")
    w.grant("a")
    w.start("a")
    early = w.call("get", id="a")
    late = w.call("get", id="a")
    w.complete("a")
    w.answer(late, 200, id="a", body={"status": "running"})
    w.answer(early, 200, id="a", body={"status": "completed", "result_hash": "result-a"})


@good
def a_get_races_with_the_submission(w: World) -> None:
    number = w.call("submit", **w.mark("a"))
    early = w.call("get", id="a")
    w.answer(early, 404, id="a")
    w.accept("a")
    w.answer(number, 202, id="a")
    w.run("a")


@good
def an_old_answer_of_a_follower(w: World) -> None:
    w.submit("a")
    w.run("a")
    number = w.call("get", id="a")
    w.answer(number, 200, id="a", body={"status": "running"}, stale=True)


@good
def a_failure_is_tried_again(w: World) -> None:
    w.submit("a")
    w.grant("a")
    w.start("a")
    w.fail("a", again=True)
    w.queue("a")
    w.run("a")
    w.get("a")


@good
def a_task_fails_for_good_and_is_replayed(w: World) -> None:
    w.submit("a")
    w.grant("a")
    w.start("a")
    w.fail("a")
    w.get("a")
    refused = w.call("cancel", id="a")
    w.answer(refused, 409)
    w.replay("a")
    w.run("a")
    w.get("a")


@good
def a_lost_attempt_runs_elsewhere(w: World) -> None:
    w.submit("a")
    w.grant("a", "W1")
    w.start("a")
    w.fault("kill", "W1")
    w.wait(30)
    w.lose("a")
    w.run("a", "W2")


@good
def a_grant_comes_back_unused(w: World) -> None:
    w.submit("a")
    w.grant("a")
    w.give_back("a")
    w.run("a", "W2")


@good
def a_paused_worker_overlaps_and_is_refused(w: World) -> None:
    w.submit("a")
    w.grant("a", "W1")
    w.start("a")
    w.lose("a")
    w.grant("a", "W2")
    w.start("a")
    w.nodes["a"] = "W1"
    w.effect("a", "end", (1, 1), result_hash="another")
    w.extra.append(
        {"record": "late", "task": "a", "gen": 1, "attempt": 1, "verdict": "stale", "at": w.now}
    )
    w.nodes["a"] = "W2"
    w.complete("a")


@good
def a_paused_worker_overlaps_with_the_same_result(w: World) -> None:
    w.submit("a")
    w.grant("a", "W1")
    w.start("a")
    w.lose("a")
    w.grant("a", "W2")
    w.start("a")
    w.nodes["a"] = "W1"
    w.effect("a", "end", (1, 1), result_hash="result-a")
    w.nodes["a"] = "W2"
    w.complete("a")


@good
def a_frozen_process_starts_late(w: World) -> None:
    w.submit("a")
    w.grant("a", "W1")
    pause = w.fault("pause", "W1")
    w.wait(35)
    w.fact("a", "returned", "queued", token=True)
    w.grant("a", "W2")
    w.wait(60)
    pause["until"] = w.now
    w.effects.append({**w.effect("a", "start", (1, 1)), "node": "W1", "boot_id": "boot-W1"})
    w.effects.pop(0)
    w.start("a")
    w.complete("a")


@good
def a_worker_reports_and_repeats_itself(w: World) -> None:
    w.submit("a")
    w.grant("a")
    w.start("a")
    number = w.call("complete", id="a", gen=1, attempt=1, outcome="completed")
    w.complete("a")
    w.answer(number, 200, id="a")
    again = w.call("complete", id="a", gen=1, attempt=1, outcome="completed")
    w.answer(again, 200, id="a")


@good
def a_stale_completion_is_refused(w: World) -> None:
    w.submit("a")
    w.grant("a", "W1")
    w.lose("a")
    w.outcomes["a", (1, 1)] = "lost"
    w.grant("a", "W2")
    w.start("a")
    number = w.call("complete", id="a", gen=1, attempt=1, outcome="completed")
    w.answer(number, 409, id="a")
    w.complete("a")


@good
def pinned_tasks_run_where_they_must(w: World) -> None:
    w.submit("a", needs={"worker": "W2"})
    w.submit("b", needs={"worker": "node-W1"})
    w.run("b", "W1")
    w.run("a", "W2")


@good
def an_ordering_key_goes_one_by_one(w: World) -> None:
    w.submit("a", ordering_key="north")
    w.submit("b", ordering_key="north")
    w.submit("c")
    w.run("a")
    w.run("b")
    w.run("c")


@good
def a_concurrency_key_holds_back(w: World) -> None:
    w.submit("a", concurrency_key="left")
    w.submit("b", concurrency_key="left")
    w.submit("c", concurrency_key="left")
    w.schedule["settings"]["concurrency_limits"] = {"left": 2}
    w.grant("a")
    w.grant("b", "W2")
    w.start("a")
    w.complete("a")
    w.grant("c")
    w.start("b")
    w.complete("b")
    w.start("c")
    w.complete("c")


@good
def tasks_wait_for_good_reasons(w: World) -> None:
    w.submit("a", needs={"worker": "W9"})
    w.submit("b", run_at=w.now + 1e6)
    w.submit("c", depends_on=["a"], unmet=1)
    w.submit("d", queue="calm")
    w.extra.append({"record": "paused", "queue": "calm"})
    w.audit("queue.pause", "calm")
    w.submit("e", needs={"worker": "W9"}, ordering_key="north")
    w.submit("f", ordering_key="north")
    w.drain()
    w.get("a", pending_reason={"code": "waiting_worker"})
    w.get("b", pending_reason={"code": "scheduled"})
    w.get("c", pending_reason={"code": "waiting_dependencies"})
    w.get("d", pending_reason={"code": "queue_paused"})
    w.get("f", pending_reason={"code": "ordering_key"})


@good
def a_paused_queue_is_passed_by(w: World) -> None:
    w.submit("a", queue="calm")
    w.audit("queue.pause", "calm")
    w.wait(1)
    w.submit("b")
    w.run("b")
    w.audit("queue.resume", "calm")
    w.wait(1)
    w.run("a")


@good
def a_scheduled_task_waits_for_its_time(w: World) -> None:
    w.submit("a", run_at=w.now + 60)
    w.wait(60)
    w.queue("a")
    w.run("a")


@good
def a_task_expires(w: World) -> None:
    w.submit("a", expires_at=w.now + 10)
    w.wait(10)
    w.expire("a")
    w.get("a")


@good
def a_dependency_fails(w: World) -> None:
    w.submit("a")
    w.submit("b", depends_on=["a"], unmet=1)
    w.grant("a")
    w.start("a")
    w.fail("a")
    w.fact("b", "failed", "failed")
    w.get("b")


@good
def a_moderator_is_killed_and_comes_back(w: World) -> None:
    w.submit("a")
    w.fault("kill", "moderator")
    w.call("submit", **w.mark("b"))
    w.submit("c")
    w.run("a")
    w.run("c")


@good
def all_hosts_lose_power_at_once(w: World) -> None:
    """No lease can end while there is no moderator, and its workers lost power the same moment."""
    w.submit("a")
    w.grant("a")
    w.start("a")
    at = w.fault("reboot", "all")["at"]
    w.fault("reboot", "W1")["at"] = at
    w.wait(80)
    w.submit("b")
    w.lose("a")
    w.run("a", "W2")
    w.run("b")


@good
def a_restore_forgets_what_came_after_the_backup(w: World) -> None:
    w.submit("a")
    backup_at = w.now
    number = w.call("submit", **w.mark("gone"))
    w.answer(number, 202, id="gone")
    w.fault("restore", "store", backup_at=backup_at)
    w.generation = 2
    w.run("a")
    w.get("a")


@good
def what_ended_while_a_backup_was_made_is_in_it(w: World) -> None:
    w.submit("a")
    backup_at = w.now
    w.grant("a")
    w.start("a")
    w.fail("a")
    w.fault("restore", "store", backup_at=backup_at, last_fact=w._number)
    w.generation = 2
    w.submit("b")
    w.run("b")


@good
def tokens_of_a_restored_store_are_new(w: World) -> None:
    w.submit("a")
    backup_at = w.now
    granted = w.grant("a")
    w.back_up()
    w.facts.remove(granted)
    w.tokens.pop("a")
    w._number -= 1
    w.fault("restore", "store", backup_at=backup_at)
    w.generation = 2
    w.run("a", "W2")


@good
def a_chained_audit_log(w: World) -> None:
    previous = ""
    for index in range(3):
        body = f'{{"line":{index}}}'
        digest = hashlib.sha256((previous + body).encode()).hexdigest()
        w.audit("queue.pause", f"q{index}", prev=previous, body=body, hash=digest)
        previous = digest


@good
def memory_and_files_stay_flat(w: World) -> None:
    w.schedule["limits"] = {
        "rss_bytes": {"max": 1e9, "per_hour_max": 1e6},
        "wal_bytes": {"max": 64 * 2**20},
    }
    for minute in range(20):
        w.samples.append(
            {
                "t": w.now + 60 * minute,
                "name": "moderator",
                "rss_bytes": 5e8 + 1e3 * (minute % 3),
                "wal_bytes": 2**20 * (minute % 8),
            }
        )


@good
def the_last_lines_are_torn(w: World) -> None:
    w.submit("a")
    w.run("a")
    w.raw["history.jsonl"] = '{"event":"call","client":"x","n":1,"op":"ge'
    w.raw["effects.jsonl"] = '{"what":"sta'


@good
def a_log_that_hides_the_key(w: World) -> None:
    w.raw["moderator.log"] = f"key {CANARY[:9]}... was used\n"


@good
def a_queue_stays_within_its_limit(w: World) -> None:
    w.schedule["settings"]["queue_tasks_max"] = 2
    w.submit("a")
    w.submit("b")
    w.refuse("c", 503)
    w.run("a")
    w.submit("c2")
    w.run("b")
    w.run("c2")


@good
def one_round_grants_to_both_workers(w: World) -> None:
    w.submit("a", task_type="other")
    w.submit("b")
    w.submit("c")
    first = w.grant("a", "W1")
    for task, worker in (("b", "W2"), ("c", "W1")):
        w.grant(task, worker)["at"] = first["at"]
    for task in ("a", "b", "c"):
        w.start(task)
        w.complete(task)
