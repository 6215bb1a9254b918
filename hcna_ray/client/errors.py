"""What can go wrong between a client and C1, as one tree of types.

HcnaClientError
├── ConnectionFailed          nobody answered; the message names the next command
│   └── ConnectionsBusy       nobody was asked: this client had no connection free
├── StrangerListens           refused here: another user's program has C1's port
├── UnexpectedAnswer          something answered, and it was not C1
├── UnsendablePayload         refused here, before anything was sent
├── WaitTimeout               your own ``timeout_s`` passed; the task goes on
├── DigestMismatch            a download is not the bytes that were asked for
├── ApiError                  C1 said no (RFC 9457 problem details)
│   ├── InvalidRequest        400, 405, 413, 415, 422
│   ├── Unauthorized          401      ├── Forbidden   403
│   ├── NotFound              404      ├── Conflict    409
│   └── Overloaded            429, 503, 504, 507: not now, with ``retry_after_s``
└── TaskError                 the task ended, and not with a result
    ├── TaskFailed  ├── TaskCancelled  └── TaskExpired
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class FieldError:
    """One field C1 did not like: a path such as ``payload.message`` and a sentence."""

    field: str
    message: str


class HcnaClientError(Exception):
    """Anything this client raises on purpose."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by state: constructors here take keywords, which `Exception` would forget."""
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(
    cls: type[HcnaClientError], args: tuple[Any, ...], state: dict[str, Any]
) -> HcnaClientError:
    error = cls.__new__(cls)
    error.args = args
    error.__dict__.update(state)
    return error


class ConnectionFailed(HcnaClientError):
    """Nobody answered at ``url`` for as long as the client was told to try."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(url, reason)
        self.url = url
        self.reason = reason

    def __str__(self) -> str:
        return (
            f"cannot reach C1 at {self.url} ({self.reason}). "
            "Next: `hcna up` starts one here, or set HCNA_URL to where it runs"
        )


class ConnectionsBusy(ConnectionFailed):
    """The request never left this client. It says nothing about whether C1 can be reached."""

    def __str__(self) -> str:
        return (
            f"nothing was sent to C1 at {self.url}: this client waited for a connection, and "
            f"{self.reason}. Next: ask for less at once (`map`, or `submit_many` and one wait for "
            "the batch), or use a second client"
        )


class StrangerListens(HcnaClientError):
    """Another user's program listens where C1 should. Nothing was sent, the key least of all."""

    def __init__(self, url: str, uid: int) -> None:
        super().__init__(url, uid)
        self.url = url
        self.uid = uid

    def __str__(self) -> str:
        return (
            f"a program of user id {self.uid} listens at {self.url}, where C1 would be: this "
            "machine's key is not sent to it. Next: end that program and `hcna up`, or set "
            "HCNA_URL and HCNA_API_KEY if it is the C1 you mean"
        )


class UnexpectedAnswer(HcnaClientError):
    """The answer does not speak C1's contract: another program may own that address."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(url, reason)
        self.url = url
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.url} did not answer like C1: {self.reason}. Next: check HCNA_URL"


class UnsendablePayload(HcnaClientError, ValueError):
    """The value has no JSON form (a set, bytes, NaN, ...). Nothing was sent."""


class WaitTimeout(HcnaClientError, TimeoutError):
    """The caller's own patience ended first. The tasks are durable and go on."""

    def __init__(self, task_ids: tuple[str, ...], timeout_s: float) -> None:
        super().__init__(task_ids, timeout_s)
        self.task_ids = task_ids
        self.timeout_s = timeout_s

    def __str__(self) -> str:
        first = self.task_ids[0] if self.task_ids else "task"
        more = f" and {len(self.task_ids) - 1} more" if len(self.task_ids) > 1 else ""
        return (
            f"{first}{more} did not end within {self.timeout_s:g} s and goes on. "
            f"Next: `hcna why {first}`"
        )


class DigestMismatch(HcnaClientError):
    """Bytes whose SHA-256 is not the one asked for. They were thrown away."""

    def __init__(self, expected: str, actual: str) -> None:
        super().__init__(expected, actual)
        self.expected = expected
        self.actual = actual

    def __str__(self) -> str:
        return f"expected bytes with SHA-256 {self.expected}, got {self.actual}"


class ApiError(HcnaClientError):
    """C1 refused. ``code`` is stable and is what programs should test.

    Args:
        status: HTTP status.
        code: Stable word such as ``task_not_found``; the last part of the problem's ``type``.
        detail: A sentence for people.
        errors: Field by field, when the request did not fit.
        retry_after_s: Seconds after which trying again is worth it, if C1 said so.
        problem: The whole problem object, for members this class does not name.
    """

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        errors: tuple[FieldError, ...] = (),
        retry_after_s: float | None = None,
        problem: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(status, code, detail)
        self.status = status
        self.code = code
        self.detail = detail
        self.errors = errors
        self.retry_after_s = retry_after_s
        self.problem: dict[str, Any] = dict(problem or {})

    @property
    def fix(self) -> str:
        """The next step, as C1 says it; an older C1 says nothing."""
        return str(self.problem.get("fix") or "")

    def __str__(self) -> str:
        fields = "; ".join(f"{error.field}: {error.message}" for error in self.errors)
        later = f" (try again in {self.retry_after_s:g} s)" if self.retry_after_s else ""
        told = f"{self.detail} [{fields}]" if fields else self.detail
        return f"{self.code} ({self.status}): {told}{later}"


class InvalidRequest(ApiError):
    """The request itself is wrong; sending it again changes nothing."""


class Unauthorized(ApiError):
    """No key, or one C1 does not know (`hcna env` prints the right one on C1's machine)."""


class Forbidden(ApiError):
    """The key is known and may not do this."""


class NotFound(ApiError):
    """No such task, artifact, worker or route."""


class Conflict(ApiError):
    """The thing is not in a state that allows this, e.g. cancelling a finished task."""


class Overloaded(ApiError):
    """C1 cannot accept now: quota, full buffers, Moderator away or disk full.

    With status 504 (``outcome_unknown``) the Moderator was asked and did not answer: what was asked
    may have been done. Otherwise nothing was.
    """


_BY_STATUS: Mapping[int, type[ApiError]] = {
    400: InvalidRequest,
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    405: InvalidRequest,
    409: Conflict,
    413: InvalidRequest,
    415: InvalidRequest,
    422: InvalidRequest,
    429: Overloaded,
    503: Overloaded,
    504: Overloaded,
    507: Overloaded,
}


def api_error_of(
    status: int, problem: Mapping[str, Any], retry_after_s: float | None = None
) -> ApiError:
    """Turn a problem object into the matching `ApiError`. Unknown statuses stay `ApiError`."""
    raw_errors = problem.get("errors")
    errors = tuple(
        FieldError(str(item.get("field", "")), str(item.get("message", "")))
        for item in (raw_errors if isinstance(raw_errors, list) else [])
        if isinstance(item, dict)
    )
    if retry_after_s is None:
        told = problem.get("retry_after_s")
        retry_after_s = float(told) if isinstance(told, int | float) else None
    code = str(problem.get("code") or str(problem.get("type", "")).rpartition(":")[2] or "unknown")
    detail = str(problem.get("detail") or problem.get("title") or f"HTTP {status}")
    cls = _BY_STATUS.get(status, ApiError)
    return cls(status, code, detail, errors, retry_after_s, problem)


class TaskError(HcnaClientError):
    """A task ended without a result.

    Args:
        task_id: Which one.
        kind: ``error timeout lost oom poison rejected`` for a failure, else the final status.
        message: What the handler or the moderator said.
        attempts: How many times it was started.
    """

    def __init__(self, task_id: str, kind: str, message: str, attempts: int) -> None:
        super().__init__(task_id, kind, message, attempts)
        self.task_id = task_id
        self.kind = kind
        self.message = message
        self.attempts = attempts

    def __str__(self) -> str:
        tries = f"after {self.attempts} attempt{'s' if self.attempts > 1 else ''}"
        when = tries if self.attempts else "before its first attempt"
        return f"{self.task_id} {self.kind} {when}: {self.message}"


class TaskFailed(TaskError):
    """Failed for good; `Client.retry` plays it again."""


class TaskCancelled(TaskError):
    """Somebody cancelled it."""


class TaskExpired(TaskError):
    """Its ``expires_at`` passed before a worker could start it."""
