"""What every stable code means and what to do about it: the tables behind "why".

``TASK`` has the codes of `Why.code`: where a task stands. ``REFUSAL`` has the codes of problems:
why a request was refused. ``INTERNAL`` has those that only our own processes and commands meet. A
code without an entry fails the tests, and so does an entry without a code.

A next step is something to type or to do. ``ID``, ``NAME`` and ``KEY`` stand for the caller's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Advice(NamedTuple):
    """One code: a sentence about what it means, and the next step."""

    means: str
    fix: str


#: A task that waits. Most of these are worded anew for the task at hand.
WAITING: Mapping[str, Advice] = {
    "scheduled": Advice("Its `run_at` has not come.", "wait, or submit it without run_at"),
    "due": Advice("Its time has come; M1 queues it in a moment.", "wait"),
    "waiting_dependencies": Advice(
        "Tasks it depends on have not ended.", "look at the tasks in depends_on: hcna why ID"
    ),
    "backoff": Advice(
        "An attempt failed; the pause before the next one is not over.",
        "wait, or look at the error of the last attempt: hcna task ID",
    ),
    "granted": Advice("A worker has it and has not started it.", "wait"),
    "ordering_key": Advice(
        "An earlier task of the same ordering key has not ended.", "wait for it, or cancel it"
    ),
    "concurrency_key": Advice(
        "As many tasks of the same concurrency key run as are allowed.",
        "wait, or raise moderator.scheduling.concurrency_limits for this key",
    ),
    "queue_paused": Advice("Its queue is paused.", "hcna queues resume NAME"),
    "moderator_unavailable": Advice(
        "M1 does not answer, so nothing is placed now.",
        "wait: M1 is started again by itself (hcna status shows it)",
    ),
    "waiting_worker_return": Advice(
        "It waits for the worker that fell silent (`on_disconnect: wait`).",
        "bring the worker back, or cancel the task and submit it again",
    ),
    "waiting_worker": Advice(
        "It names a worker that has never joined, or was forgotten.",
        "join that worker, or drop requires.worker",
    ),
    "no_workers": Advice("No worker has joined yet.", "start one: hcna up"),
    "no_healthy_workers": Advice(
        "No worker that has what it needs takes tasks now.",
        "hcna workers says how each is; wake, mend or uncordon one",
    ),
    "unplaceable": Advice(
        "No worker, online or not, has what it needs.",
        "join a worker that has it, install the package of a missing task type, or drop the need",
    ),
    "no_room": Advice(
        "A worker could run it, but has too little free now.",
        "wait for running tasks to end, or ask for less",
    ),
    "max_concurrent_tasks": Advice(
        "As many attempts run as `max_concurrent_tasks` allows.",
        "wait, or raise moderator.scheduling.max_concurrent_tasks",
    ),
    "waiting_turn": Advice("Others come first.", "wait, or raise its priority"),
}

#: A task that runs.
RUNNING: Mapping[str, Advice] = {
    "running": Advice("It runs, as far as can be seen well.", "wait, or hcna task cancel ID"),
    "cancelling": Advice(
        "It was cancelled, and its worker is ending the process.",
        "wait: a handler that does not stop is killed",
    ),
    "near_timeout": Advice(
        "It has used up nine tenths of its `timeout_s`; then it is stopped.",
        "if it needs longer, submit it again with a larger timeout_s",
    ),
    "no_progress": Advice(
        "It reported progress once, and has not for more than a minute.",
        "see what it waits for; if it hangs, hcna task cancel ID",
    ),
    "worker_silent": Advice(
        "Its worker is not heard of. When its lease ends the task is queued again, waits for that "
        "worker (`on_disconnect: wait`), or fails if that is the last of its `max_losses`.",
        "wait, or wake that machine (hcna up there); hcna workers says how it is",
    ),
    "running_unseen": Advice(
        "M1 does not answer; it ran when last seen. Its outcome is kept by the worker.",
        "wait: M1 is started again by itself (hcna status shows it)",
    ),
}

#: How a task failed: the values of `FailureKind`.
FAILURE: Mapping[str, Advice] = {
    "error": Advice(
        "The handler raised, and no attempt is left or the error is not retried.",
        "hcna task ID shows the traceback; mend the cause, then hcna task retry ID",
    ),
    "timeout": Advice(
        "An attempt ran longer than `timeout_s`, or the task waited longer than `queue_timeout_s`.",
        "submit it again with a larger timeout_s, or hcna task retry ID",
    ),
    "lost": Advice(
        "`max_losses` attempts were lost, the last one with its worker.",
        "hcna workers shows who is there; then hcna task retry ID",
    ),
    "oom": Advice(
        "`max_losses` attempts were lost, the last one for want of memory.",
        "submit it again with requires.mem_gb, or a smaller input",
    ),
    "poison": Advice(
        "`max_losses` attempts were lost, the last one when its process died.",
        "find what kills the process (hcna task ID), then hcna task retry ID",
    ),
    "rejected": Advice(
        "The handler said that no attempt can help, or a task it depends on did not complete.",
        "change what its message names, and submit it again",
    ),
}

#: A task that has ended.
ENDED: Mapping[str, Advice] = {
    "completed": Advice("It has a result.", ""),
    **FAILURE,
    "queue_timeout": Advice(
        "It waited longer than its `queue_timeout_s` without a start.",
        "hcna workers shows who is there; then hcna task retry ID, or a larger queue_timeout_s",
    ),
    "dependency_failed": Advice(
        "A task it depends on did not complete.",
        "run that one again first, then hcna task retry ID",
    ),
    "cancelled": Advice("Somebody cancelled it.", "submit it again if it is wanted after all"),
    "expired": Advice(
        "Its `expires_at` passed before a start, or before the one after a failed or lost attempt.",
        "submit it again with a later expires_at; hcna workers shows who is there",
    ),
}

#: Every `Why.code`.
TASK: Mapping[str, Advice] = {**WAITING, **RUNNING, **ENDED}

_READ_JSON = "send one JSON object; the detail says where it goes wrong"

#: Every ``code`` of a problem that a client can meet.
REFUSAL: Mapping[str, Advice] = {
    "malformed_json": Advice(
        "The body is not JSON, not UTF-8, empty, or holds half a surrogate pair.", _READ_JSON
    ),
    "duplicate_key": Advice("An object of the body names a key twice.", "name each key once"),
    "too_deep": Advice(
        "The body is nested deeper than `limits.json_depth`.",
        "nest less deeply, or upload it as an artifact (PUT /artifacts) and name its sha256",
    ),
    "too_many_keys": Advice(
        "An object of the body has more than 1000 keys.",
        "use a list, or upload it as an artifact (PUT /artifacts) and name its sha256",
    ),
    "not_finite": Advice(
        "The body holds NaN, an infinity, or a number too large for a double.",
        "send null, or the number as text",
    ),
    "number_out_of_range": Advice(
        "An integer of the body does not fit into 64 bits.", "send the number as text"
    ),
    "invalid_header": Advice(
        "Host or Content-Length is missing, given twice, or none; or Transfer-Encoding is not "
        "chunked, or beside a Content-Length.",
        "leave these headers to your HTTP library",
    ),
    "host_refused": Advice(
        "C1 has no such name (`Host`); `composite.hosts` gives it one.",
        "call it by 127.0.0.1 or a name of its machine, or add the name to composite.hosts",
    ),
    "origin_refused": Advice(
        "A browser asks for a page that is not C1's (`Origin`).",
        "add the page's host to composite.hosts if it may use C1",
    ),
    "request_timeout": Advice(
        "The body arrives too slowly.", "send it in smaller parts, or over a faster connection"
    ),
    "unauthorized": Advice(
        "No key, two keys, or one that is not known, has expired or was revoked.",
        'eval "$(hcna env)" on the machine of C1, or set HCNA_API_KEY',
    ),
    "forbidden": Advice(
        "The key's role is lower than the route needs.",
        "hcna keys create NAME --role ROLE, on M1, makes a key that may do this",
    ),
    "out_of_scope": Advice(
        "The key is not for this task type or queue.",
        "ask for a key with that scope: hcna keys create NAME, on M1",
    ),
    "not_found": Advice("There is nothing at this path.", "GET /docs lists the paths"),
    "task_not_found": Advice(
        "There is no such task.", "hcna task list (GET /tasks) shows those that you may see"
    ),
    "batch_not_found": Advice(
        "There is no such batch.", "hcna task list (GET /tasks) shows the batch_id of each task"
    ),
    "artifact_not_found": Advice(
        "There is no such artifact.", "upload it (PUT /artifacts), or check the sha256"
    ),
    "attempt_not_found": Advice(
        "The task has no such attempt, or none yet.",
        "hcna why ID says what it waits for; hcna logs ID -f waits with it",
    ),
    "schedule_not_found": Advice(
        "There is no such schedule, or it is not yours to see.",
        "hcna schedules list (GET /schedules) shows them; ?owner= names somebody else's",
    ),
    "worker_not_found": Advice("There is no such worker.", "hcna workers (GET /workers)"),
    "file_not_found": Advice("The page at `/ui` has no such file.", "open /ui in the browser"),
    "intent_not_found": Advice(
        "The node does not know this intent.", "hcna intent NAME test.ping is one that all know"
    ),
    "method_not_allowed": Advice(
        "The path is there, the method is not; see `Allow`.", "use a method that Allow names"
    ),
    "task_finished": Advice(
        "The task has ended, so it cannot be cancelled.", "nothing: hcna task ID shows how it ended"
    ),
    "not_failed": Advice(
        "The task has not failed, so it cannot be run again.",
        "hcna task list --status failed shows those that have; else submit it anew",
    ),
    "worker_online": Advice(
        "The worker is in contact, so it cannot be forgotten (`force` would).",
        "hcna leave there, or hcna workers forget NAME --force",
    ),
    "invalid_schedule": Advice(
        "The cron line or the time zone means nothing.",
        'five fields, such as "0 3 * * *", or @daily; a time zone such as Europe/Berlin',
    ),
    "schedule_exists": Advice(
        "There is another schedule of that name.",
        "choose another name; PUT /schedules/NAME changes the one that is there",
    ),
    "schedule_busy": Advice(
        "The schedule's last task has not ended, and its `overlap` wants no second one.",
        "wait for that task, or cancel it; the detail names it",
    ),
    "too_many_schedules": Advice(
        "There are as many schedules as there may be, of one owner or in all.",
        "delete one (hcna schedules delete NAME), or raise the setting that the detail names",
    ),
    "idempotency_conflict": Advice(
        "The idempotency key was used before for another request.",
        "use a new key for a new request; the detail names the task of the old one",
    ),
    "offset_mismatch": Advice(
        "The part does not begin where the upload stands; `received` says where.",
        "go on at the byte that received names",
    ),
    "too_large": Advice(
        "More bytes or items than the route takes.",
        "send it in smaller parts; large data as an artifact (PUT /artifacts)",
    ),
    "uri_too_long": Advice("The URL has more than 8 KiB.", "shorten it"),
    "headers_too_large": Advice(
        "More than 80 header fields, or more than 12 KiB of them.", "send fewer headers"
    ),
    "unsupported_encoding": Advice(
        "The body is compressed; send it as it is.", "send it without Content-Encoding"
    ),
    "range_not_satisfiable": Advice(
        "The range begins behind the end of the artifact.",
        "ask for bytes below the size in Content-Range",
    ),
    "unknown_task_type": Advice(
        "No handler has this name; near names are given.",
        "hcna workers show NAME lists the types; install the package that has this one",
    ),
    "invalid_payload": Advice(
        "The payload does not fit the model of its type; fields are named.",
        "change the fields that errors names",
    ),
    "invalid_request": Advice(
        "A field is unknown, missing, or has a wrong value; fields are named.",
        "change the fields that errors names; GET /docs has them all",
    ),
    "dependency_not_found": Advice(
        "`depends_on` names a task or ref that is not there.",
        "submit that one first, or in the same batch with this ref",
    ),
    "dependency_cycle": Advice(
        "`depends_on` goes in a circle, or leads to one.", "take one of those dependencies out"
    ),
    "digest_mismatch": Advice(
        "The bytes do not have the SHA-256 that was announced.",
        "compute the sha256 of what is sent, and send it again from the start",
    ),
    "quota": Advice(
        "As many tasks of the key's owner wait or run as the key allows.",
        "wait for some to end (hcna task list --status queued), or cancel some",
    ),
    "rate_limited": Advice(
        "As many requests were made as the key allows for now.",
        "wait for Retry-After; one batch (POST /tasks/batch) counts as one request",
    ),
    "overloaded": Advice(
        "A budget, buffer or the queue is full. Nothing was stored.",
        "try again after Retry-After; hcna status shows what is full",
    ),
    "moderator_unavailable": Advice(
        "M1 does not answer. Reads go on.",
        "try again after Retry-After: M1 is started again by itself (hcna status)",
    ),
    "outcome_unknown": Advice(
        "M1 was asked and did not answer: it may have been done. Send it again with the same "
        "idempotency key, or look.",
        "send it again with the same Idempotency-Key, or look: hcna task list",
    ),
    "output_unavailable": Advice(
        "The worker that keeps this output does not answer.",
        "hcna workers; the output is there again when that worker is",
    ),
    "worker_unavailable": Advice(
        "The worker that an intent was for is away, or does not answer.",
        "hcna workers shows how it is; try again when it is online",
    ),
    "store_unavailable": Advice(
        "The store cannot be read or written.",
        "hcna status on M1 says what is wrong with it; then it accepts again by itself",
    ),
    "store_damaged": Advice(
        "The store's file is not what was written: keep it, and restore a backup.",
        "hcna down on M1, keep its files, then hcna restore FILE",
    ),
    "store_full": Advice(
        "There is no space left where the store lies.",
        "free space on M1's disk; it accepts again by itself",
    ),
    "disk_full": Advice(
        "Less free space than `limits.disk_free_bytes_min`.",
        "free space on M1's disk; it accepts again by itself",
    ),
    "internal": Advice(
        "Something unexpected; `log_id` finds it in `composite.log`.",
        "look for log_id in logs/composite.log on M1, and report it",
    ),
}

_OURS = "hcna doctor on the machine that says so; if it persists, report it with the log"

#: Codes that only our own processes and commands meet.
INTERNAL: Mapping[str, Advice] = {
    "invalid_report": Advice("A worker's report does not parse.", _OURS),
    "invalid_query": Advice("A question between our processes does not parse.", _OURS),
    "invalid_envelope": Advice("A message between M1 and a worker does not parse.", _OURS),
    "stale_attempt": Advice(
        "An attempt asks for files, and its lease is over.", "nothing: another attempt has the task"
    ),
    "stale_worker": Advice(
        "An earlier life of a worker called.", "nothing: it ends, and its present life goes on"
    ),
    "stale_moderator": Advice(
        "M1 serves an older copy of the store than this worker has worked for.",
        "stop that M1, or remove the mark that the message names",
    ),
    "version_conflict": Advice("A step did not start from the newest stored task.", _OURS),
    "artifact_too_large": Advice(
        "An artifact is larger than allowed.", "raise limits.artifact_bytes, or send less"
    ),
    "worker_name_taken": Advice(
        "Another machine is the worker of that name.",
        "let this one join under another name, or stop that one first",
    ),
    "store_too_old": Advice("The SQLite library has a known fault.", "make sync"),
    "schema_too_new": Advice(
        "A newer hcna-ray wrote the store.", "upgrade hcna-ray, or restore an older backup"
    ),
    "invalid_transition": Advice("A task cannot do this in its state: a fault of ours.", _OURS),
    "invalid_name": Advice(
        "A node's name does not parse.", "name it as in HCNA-W1--prod--home--v1.0"
    ),
}


def next_step(code: str) -> str:
    """Return what to do about a refusal; for a code nobody knows, where to look."""
    advice = REFUSAL.get(code) or INTERNAL.get(code)
    return "hcna status" if advice is None else advice.fix
