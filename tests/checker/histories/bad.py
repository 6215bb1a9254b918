"""Stories in which one promise is broken, each rejected by exactly the check that is named."""

from __future__ import annotations

import base64
from collections.abc import Callable

from tests.checker.histories.world import CANARY, Line, Story, World

#: Name to the check that must reject it, and the story.
BAD: dict[str, tuple[str, Story]] = {}


def breaks(check: str) -> Callable[[Story], Story]:
    """Register a story under the check it breaks."""

    def register(story: Story) -> Story:
        BAD[story.__name__] = (check, story)
        return story

    return register


def _of(records: list[Line], record: str, **fields: object) -> Line:
    """Return the one record with these fields."""
    (found,) = [
        one
        for one in records
        if one["record"] == record and all(one.get(name) == v for name, v in fields.items())
    ]
    return found


# -- C0 --------------------------------------------------------------------------------------------


@breaks("C0")
def a_line_in_the_middle_is_no_json(w: World) -> None:
    w.raw["effects.jsonl"] = "{oops}\n"
    w.submit("a")
    w.run("a")


@breaks("C0")
def an_answer_without_a_request(w: World) -> None:
    w.submit("a")
    w.run("a")
    w.answer(99, 200, id="a", body={"status": "completed"})


@breaks("C0")
def an_answer_before_its_request(w: World) -> None:
    w.submit("a")
    w.run("a")
    w.get("a")
    w.history[-1]["t1"] = w.history[-2]["t0"] - 5


# -- C1 --------------------------------------------------------------------------------------------


@breaks("C1")
def an_acknowledged_task_was_never_stored(w: World) -> None:
    number = w.call("submit", **w.mark("a"))
    w.answer(number, 202, id="a")
    w.submit("b")
    w.run("b")


@breaks("C1")
def an_acknowledged_task_was_dropped_with_its_log(w: World) -> None:
    w.submit("a")
    w.submit("b")
    w.run("b")
    w.facts = [one for one in w.facts if one["task"] != "a"]
    for number, one in enumerate(w.facts, 1):
        one["number"] = number
    w._number = len(w.facts)
    del w.specs["a"]


@breaks("C1")
def what_is_stored_is_not_what_was_sent(w: World) -> None:
    w.submit("a")
    w.specs["a"]["nonce"] = "nonce-of-something-else"
    w.cancel("a")


@breaks("C1")
def a_restore_lost_what_the_backup_held(w: World) -> None:
    number = w.call("submit", **w.mark("gone"))
    w.answer(number, 202, id="gone")
    w.wait(10)
    backup_at = w.now
    w.fault("restore", "store", backup_at=backup_at)


# -- C2 --------------------------------------------------------------------------------------------


@breaks("C2")
def a_task_that_nobody_submitted(w: World) -> None:
    w.accept("ghost")
    w.run("ghost")


@breaks("C2")
def two_tasks_of_one_request_without_answer(w: World) -> None:
    w.call("submit")
    for task in ("a", "b"):
        w.accept(task)
        w.specs[task]["nonce"] = None
        w.cancel(task)


@breaks("C2")
def a_task_from_before_its_request(w: World) -> None:
    w.accept("a")
    w.specs["a"]["nonce"] = None
    w.call("submit")
    w.cancel("a")


@breaks("C2")
def something_ran_that_is_stored_nowhere(w: World) -> None:
    w.submit("a")
    w.run("a")
    w.effect("ghost", "start", (1, 1))


@breaks("C2")
def what_ran_is_not_what_is_stored(w: World) -> None:
    w.submit("a")
    w.grant("a")
    w.start("a")
    w.effects[-1]["nonce"] = "nonce-of-something-else"
    w.complete("a")


# -- C3 --------------------------------------------------------------------------------------------


@breaks("C3")
def one_key_made_two_tasks(w: World) -> None:
    w.submit("a", key="k")
    number = w.call("submit", **w.mark("a", "k"))
    w.accept("b", key="k")
    w.specs["b"]["nonce"] = "nonce-a"
    w.answer(number, 202, id="b")
    w.cancel("a")
    w.cancel("b")


@breaks("C3")
def one_key_was_accepted_for_two_bodies(w: World) -> None:
    w.submit("a", key="k")
    number = w.call("submit", key="k", nonce="nonce-a", body_hash="another body")
    w.answer(number, 202, id="a")
    w.run("a")


@breaks("C3")
def two_requests_got_one_task(w: World) -> None:
    w.submit("a", key="k1")
    number = w.call("submit", **w.mark("a", "k2"))
    w.answer(number, 202, id="a")
    w.run("a")


@breaks("C3")
def a_key_is_bound_to_another_task(w: World) -> None:
    w.submit("a", key="k")
    w.submit("b")
    w.keys["owner", "k"] = "b"
    w.cancel("a")
    w.cancel("b")


# -- C4 --------------------------------------------------------------------------------------------


@breaks("C4")
def a_queued_task_is_forgotten(w: World) -> None:
    w.submit("a")
    w.drain()


@breaks("C4")
def a_timer_was_lost(w: World) -> None:
    w.submit("a", run_at=w.now + 20)
    w.wait(100)
    w.drain()


@breaks("C4")
def a_task_runs_for_ever(w: World) -> None:
    w.submit("a")
    w.grant("a")
    w.start("a")
    w.wait(1000)
    w.drain()


@breaks("C4")
def a_child_waits_for_a_parent_that_has_ended(w: World) -> None:
    w.submit("a")
    w.submit("b", depends_on=["a"], unmet=1)
    w.run("a")
    w.wait(100)
    w.drain()


@breaks("C4")
def a_reason_that_is_not_true(w: World) -> None:
    w.submit("a", needs={"worker": "W9"})
    w.drain()
    w.get("a", pending_reason={"code": "queue_paused"})


# -- C5 --------------------------------------------------------------------------------------------


@breaks("C5")
def a_task_ends_twice(w: World) -> None:
    w.submit("a")
    w.run("a")
    w.fact("a", "completed", "completed", token=True)


@breaks("C5")
def a_completed_task_is_queued_again(w: World) -> None:
    w.submit("a")
    w.run("a")
    w.fact("a", "queued", "queued")
    w.override("a", state="completed", result_hash="result-a", end_no=1)


@breaks("C5")
def two_gets_see_two_results(w: World) -> None:
    w.submit("a")
    w.run("a")
    w.get("a")
    w.get("a", result_hash="another")


@breaks("C5")
def the_stored_result_changed_after_the_last_get(w: World) -> None:
    w.submit("a")
    w.run("a")
    w.get("a")
    w.effects[-1].pop("result_hash")
    w.override("a", result_hash="another")


@breaks("C5")
def the_result_is_not_what_the_attempt_returned(w: World) -> None:
    w.submit("a")
    w.run("a")
    w.effects[-1]["result_hash"] = "what it really was"


@breaks("C5")
def a_result_of_an_attempt_that_never_ran(w: World) -> None:
    w.submit("a")
    w.run("a")
    w.effects.clear()


@breaks("C5")
def the_final_row_contradicts_the_log(w: World) -> None:
    w.submit("a")
    w.run("a")
    w.override("a", state="expired", result_hash=None)


# -- C6 --------------------------------------------------------------------------------------------


@breaks("C6")
def a_token_falls_back(w: World) -> None:
    w.submit("a")
    w.tokens["a"] = (1, 4)
    w.grant("a")
    w.give_back("a")
    w.tokens["a"] = (1, 1)
    w.run("a", "W2")


@breaks("C6")
def a_generation_comes_back(w: World) -> None:
    w.submit("a")
    w.submit("b")
    w.generation = 2
    w.run("a")
    w.generation = 1
    w.run("b")


@breaks("C6")
def a_token_is_issued_again_after_a_restore(w: World) -> None:
    w.submit("a")
    granted = w.grant("a", "W1")
    w.back_up()
    w.facts.remove(granted)
    w.tokens.pop("a")
    w._number -= 1
    w.fault("restore", "store", backup_at=w.now)
    w.grant("a", "W2")
    w.start("a")
    w.complete("a")


@breaks("C6")
def one_token_started_twice(w: World) -> None:
    w.submit("a")
    w.grant("a")
    w.effect("a", "start", pid=7)
    w.start("a")
    w.complete("a")


@breaks("C6")
def a_start_under_a_token_never_granted(w: World) -> None:
    w.submit("a")
    w.effect("a", "start", (1, 7))
    w.run("a")


@breaks("C6")
def a_start_before_the_grant(w: World) -> None:
    w.submit("a")
    w.tokens["a"] = (1, 1)
    w.effect("a", "start")
    w.tokens.pop("a")
    w.grant("a")
    w.fact("a", "started", "running", token=True)
    w.outcomes["a", (1, 1)] = None
    w.complete("a")


# -- C7, C7b, C8 -----------------------------------------------------------------------------------


@breaks("C7")
def two_leases_at_once(w: World) -> None:
    w.submit("a")
    w.grant("a", "W1")
    w.grant("a", "W2")
    w.start("a")
    w.complete("a")


@breaks("C7")
def the_row_holds_a_lease_that_the_log_ended(w: World) -> None:
    w.submit("a", needs={"worker": "W9"})
    w.nodes["a"] = "W9"
    w.grant("a", "W9")
    w.give_back("a")
    w.override("a", lease=[1, 1])
    w.schedule["drained_at"] = None
    w.schedule["without"] = {"C4": "the story ends in the middle"}


@breaks("C7b")
def an_overlap_that_nobody_refused(w: World) -> None:
    w.submit("a")
    w.grant("a", "W1")
    w.start("a")
    w.lose("a")
    w.grant("a", "W2")
    w.start("a")
    w.nodes["a"] = "W1"
    w.effect("a", "end", (1, 1), result_hash="another")
    w.nodes["a"] = "W2"
    w.complete("a")


@breaks("C7b")
def an_overlap_on_one_machine(w: World) -> None:
    w.submit("a")
    w.grant("a")
    w.start("a")
    w.lose("a")
    w.grant("a")
    w.start("a")
    w.effect("a", "end", (1, 1))
    w.complete("a")


@breaks("C8")
def a_start_long_after_the_cancel(w: World) -> None:
    w.submit("a")
    w.grant("a")
    w.cancel("a")
    w.fact("a", "cancelled", "cancelled", token=True)
    w.wait(40)
    w.effect("a", "start")


@breaks("C8")
def a_start_long_after_the_lease_was_taken_back(w: World) -> None:
    w.submit("a")
    w.grant("a", "W1")
    w.give_back("a")
    w.wait(40)
    w.effect("a", "start")
    w.run("a", "W1")


# -- C9 --------------------------------------------------------------------------------------------


@breaks("C9")
def a_pinned_task_is_granted_to_another(w: World) -> None:
    w.submit("a", needs={"worker": "W2"})
    w.grant("a", "W1")
    w.give_back("a")
    w.run("a", "W2")


@breaks("C9")
def a_pinned_task_ran_on_another(w: World) -> None:
    w.submit("a", needs={"worker": "W2"})
    w.run("a", "W2")
    for one in w.effects:
        one["node"], one["boot_id"] = "W1", "boot-W1"


@breaks("C9")
def two_tasks_of_an_ordering_key_are_out(w: World) -> None:
    w.submit("a", ordering_key="north")
    w.submit("b", ordering_key="north")
    w.grant("a", "W1")
    w.start("a")
    w.grant("b", "W2")
    w.start("b")
    w.complete("a")
    w.complete("b")


@breaks("C9")
def an_ordering_key_moves_on_during_a_backoff(w: World) -> None:
    w.submit("a", ordering_key="north")
    w.submit("b", ordering_key="north")
    w.grant("a")
    w.start("a")
    w.fail("a", again=True)
    w.run("b")
    w.queue("a")
    w.run("a")


@breaks("C9")
def an_ordering_key_is_overtaken(w: World) -> None:
    w.submit("a", ordering_key="north")
    w.submit("b", ordering_key="north")
    w.run("b")
    w.run("a")


@breaks("C9")
def a_concurrency_key_above_its_limit(w: World) -> None:
    w.submit("a", concurrency_key="left")
    w.submit("b", concurrency_key="left")
    w.grant("a", "W1")
    w.grant("b", "W2")
    for task in ("a", "b"):
        w.start(task)
        w.complete(task)


@breaks("C9")
def the_later_of_two_alike_goes_first(w: World) -> None:
    w.submit("a")
    w.submit("b")
    w.run("b")
    w.run("a")


@breaks("C9")
def priority_is_ignored_between_types(w: World) -> None:
    w.submit("a", task_type="other", priority=9)
    w.submit("b", priority=0)
    w.run("b")
    w.run("a")


@breaks("C9")
def a_place_moved_without_a_reason(w: World) -> None:
    w.submit("a")
    w.run("a")
    due = w.facts[0]["at"] + 30
    w.override("a", due_at=due, dispatch_key=due - 300.0)


@breaks("C9")
def a_place_that_the_rule_does_not_give(w: World) -> None:
    w.submit("a")
    w.run("a")
    w.override("a", dispatch_key=w.facts[0]["at"])


# -- C10 -------------------------------------------------------------------------------------------


@breaks("C10")
def a_refusal_without_retry_after(w: World) -> None:
    w.refuse("a", 503, retry_after=None)


@breaks("C10")
def a_refusal_that_says_at_once(w: World) -> None:
    w.refuse("a", 429, retry_after=0)


@breaks("C10")
def refused_for_lack_of_room_and_stored(w: World) -> None:
    w.refuse("a", 503, key="k")
    _store_quietly(w, "a", "k")


@breaks("C10")
def refused_as_invalid_and_stored(w: World) -> None:
    w.refuse("a", 422)
    _store_quietly(w, "a", None)


def _store_quietly(w: World, task: str, key: str | None) -> None:
    """Store a task, and let it look as if it were another principal's own business."""
    w.accept(task, key=key)
    w.schedule["foreign_principals"] = ["owner"]
    w.cancel(task)


# -- C11 -------------------------------------------------------------------------------------------


@breaks("C11")
def a_counter_forgot_an_attempt(w: World) -> None:
    w.submit("a")
    w.run("a")
    w.edits.append(lambda records: _of(records, "counter", name="attempts").update(value=0))


@breaks("C11")
def failures_were_reset(w: World) -> None:
    w.submit("a")
    w.grant("a")
    w.start("a")
    w.fail("a", again=True)
    w.queue("a")
    w.run("a")
    w.override("a", failures=0)


@breaks("C11")
def more_losses_than_allowed(w: World) -> None:
    w.submit("a", max_losses=1)
    for worker in ("W1", "W2"):
        w.grant("a", worker)
        w.start("a")
        w.lose("a")
    w.run("a")


@breaks("C11")
def a_lost_attempt_is_called_completed(w: World) -> None:
    w.submit("a")
    w.grant("a")
    w.start("a")
    w.lose("a")
    w.run("a", "W2")
    w.outcomes["a", (1, 1)] = "completed"
    w.override("a", losses=0)


@breaks("C11")
def an_attempt_of_nobody(w: World) -> None:
    w.submit("a")
    w.run("a")
    w.outcomes["a", (1, 9)] = None


@breaks("C11")
def the_depth_of_the_queue_is_wrong(w: World) -> None:
    w.submit("a")
    w.run("a")
    w.edits.append(lambda records: _of(records, "depth").update(tasks=2))


@breaks("C11")
def one_more_than_the_queue_may_hold(w: World) -> None:
    w.schedule["settings"]["queue_tasks_max"] = 1
    w.submit("a")
    w.submit("b")
    w.run("a")
    w.run("b")


# -- C12 -------------------------------------------------------------------------------------------


@breaks("C12")
def an_acknowledged_task_is_not_found(w: World) -> None:
    w.submit("a")
    number = w.call("get", id="a")
    w.answer(number, 404, id="a")
    w.run("a")


@breaks("C12")
def a_get_goes_back_in_time(w: World) -> None:
    w.submit("a")
    w.grant("a")
    w.start("a")
    w.complete("a")
    w.get("a")
    w.get("a", "running")


@breaks("C12")
def a_get_sees_the_end_before_it(w: World) -> None:
    w.submit("a")
    w.grant("a")
    w.start("a")
    w.get("a", "completed", result_hash="result-a")
    w.complete("a")


@breaks("C12")
def a_cancel_was_promised_and_forgotten(w: World) -> None:
    w.submit("a")
    number = w.call("cancel", id="a")
    w.answer(number, 200, id="a")
    w.run("a")


@breaks("C12")
def a_cancel_that_nobody_asked_for(w: World) -> None:
    w.submit("a")
    w.fact("a", "cancelled", "cancelled")


@breaks("C12")
def a_cancel_is_refused_while_it_waits(w: World) -> None:
    w.submit("a")
    number = w.call("cancel", id="a")
    w.answer(number, 409, id="a")
    w.run("a")


@breaks("C12")
def a_stale_completion_is_taken(w: World) -> None:
    w.submit("a")
    w.grant("a", "W1")
    w.give_back("a")
    w.grant("a", "W2")
    w.start("a")
    number = w.call("complete", id="a", gen=1, attempt=9, outcome="completed")
    w.answer(number, 200, id="a")
    w.complete("a")


@breaks("C12")
def acknowledged_before_it_was_committed(w: World) -> None:
    number = w.call("submit", **w.mark("a"))
    w.answer(number, 202, id="a")
    w.wait(5)
    w.accept("a")
    w.run("a")


@breaks("C12")
def a_line_of_the_log_contradicts_itself(w: World) -> None:
    w.submit("a")
    w.grant("a")["state"] = "running"
    w.start("a")
    w.complete("a")


@breaks("C12")
def a_task_starts_that_was_not_due(w: World) -> None:
    w.submit("a", run_at=w.now + 1000)
    w.run("a")


# -- C13 -------------------------------------------------------------------------------------------


@breaks("C13")
def a_recovery_took_too_long(w: World) -> None:
    w.schedule["measured"].append({"name": "heal", "from": w.now, "to": w.now + 31, "max_s": 30})


@breaks("C13")
def a_recovery_never_came(w: World) -> None:
    w.schedule["measured"].append({"name": "heal", "from": w.now, "to": None, "max_s": 30})


@breaks("C13")
def nobody_is_accepted_after_the_kill(w: World) -> None:
    w.fault("kill", "moderator")
    w.wait(20)
    w.refuse("a", 503)
    w.submit("b")
    w.run("b")


@breaks("C13")
def a_lease_outlives_its_worker(w: World) -> None:
    w.submit("a")
    w.grant("a", "W1")
    w.start("a")
    w.fault("kill", "W1")
    w.wait(60)
    w.lose("a")
    w.run("a", "W2")


@breaks("C13")
def the_write_ahead_log_grows(w: World) -> None:
    w.schedule["limits"] = {"wal_bytes": {"max": 64 * 2**20}}
    w.samples.append({"t": w.now, "name": "store", "wal_bytes": 65 * 2**20})


@breaks("C13")
def memory_leaks(w: World) -> None:
    w.schedule["limits"] = {"rss_bytes": {"per_hour_max": 1e6}}
    for minute in range(30):
        w.samples.append({"t": w.now + 60 * minute, "name": "m", "rss_bytes": 5e8 + 1e5 * minute})


# -- C14 -------------------------------------------------------------------------------------------


@breaks("C14")
def a_line_of_the_log_is_gone(w: World) -> None:
    w.submit("a", needs={"worker": "W9"})
    w.fact("a", "unpinned", "queued")
    w.drain()
    w.fact("a", "unpinned", "queued")
    del w.facts[-2]


@breaks("C14")
def the_end_of_the_log_is_cut(w: World) -> None:
    w.submit("a", needs={"worker": "W9"})
    w.fact("a", "unpinned", "queued")
    w.drain()
    del w.facts[-1]


@breaks("C14")
def the_log_goes_back_in_time(w: World) -> None:
    w.submit("a", needs={"worker": "W9"})
    w.fact("a", "unpinned", "queued")["at"] += 100
    w.fact("a", "unpinned", "queued")


@breaks("C14")
def a_task_without_a_log(w: World) -> None:
    w.submit("a")
    w.facts.clear()
    w._number = 0
    w.override("a", state="cancelled", due_at=None)


def _three_audit_lines(w: World) -> list[Line]:
    for queue in ("a", "b", "c"):
        w.audit("queue.pause", queue)
    return w.extra[-3:]


@breaks("C14")
def an_audit_line_is_gone(w: World) -> None:
    w.extra.remove(_three_audit_lines(w)[1])


@breaks("C14")
def the_audit_log_is_cut(w: World) -> None:
    w.extra.remove(_three_audit_lines(w)[2])


@breaks("C14")
def the_audit_log_is_gone(w: World) -> None:
    for line in _three_audit_lines(w):
        w.extra.remove(line)


@breaks("C14")
def the_audit_log_has_lost_its_beginning(w: World) -> None:
    w.extra.remove(_three_audit_lines(w)[0])


@breaks("C14")
def an_audit_line_was_rewritten(w: World) -> None:
    _three_audit_lines(w)[1]["principal"] = "eve"


@breaks("C14")
def an_audit_line_has_another_time(w: World) -> None:
    _three_audit_lines(w)[1]["at"] += 0.001


@breaks("C14")
def an_audit_line_has_no_hash(w: World) -> None:
    del _three_audit_lines(w)[2]["hash"]


@breaks("C14")
def two_audit_lines_have_changed_places(w: World) -> None:
    _one, two, three = _three_audit_lines(w)
    two["number"], three["number"] = three["number"], two["number"]


@breaks("C14")
def an_audit_line_was_put_in(w: World) -> None:
    _one, two, three = _three_audit_lines(w)
    w.extra.append({**two, "number": 3, "target": "z"})
    three["number"] = 4
    w.edits.append(lambda records: _of(records, "number", name="last_audit").update(value=4))


@breaks("C14")
def the_audit_log_stands_on_another_anchor(w: World) -> None:
    _three_audit_lines(w)
    w.prune_audit(1)
    _of(w.extra, "audit_anchor")["hash"] = "f" * 64


# -- C15 -------------------------------------------------------------------------------------------


@breaks("C15")
def a_key_is_in_a_log(w: World) -> None:
    w.raw["moderator.log"] = f"authorized with {CANARY}\n"


@breaks("C15")
def a_key_is_in_a_dump_in_other_clothes(w: World) -> None:
    coded = base64.b64encode(f"user:{CANARY}".encode()).decode()
    w.raw["ps.txt"] = f"curl -H 'Authorization: Basic {coded}'\n"
