"""Every refusal as RFC 9457 problem details, in one place.

A problem names a stable ``code`` (the last part of its ``type``), says in a sentence what is wrong,
and lists fields where there are some. It never tells what lies inside: of an unexpected error the
caller sees only the id under which it was logged.
"""

from __future__ import annotations

import logging
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from hcna_ray.api.request_ids import REQUEST_ID
from hcna_ray.core.advice import next_step
from hcna_ray.core.errors import (
    CannotAccept,
    Conflict,
    DiskFull,
    HcnaError,
    Invalid,
    NoAnswer,
    NotFound,
    QuotaExceeded,
    RateLimited,
    StaleWorker,
    StoreFull,
)
from hcna_ray.observability.log_context import current_fields
from hcna_ray.store.artifacts import ArtifactTooLarge

log = logging.getLogger(__name__)

PROBLEM_JSON = "application/problem+json"
#: Fields listed in one problem; the first of a thousand say enough.
ERRORS_MAX = 50


class RequestRefused(HcnaError):
    """A request that C1 refuses by itself, with its HTTP status."""

    status = 400

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)
        self.code, self.message = code, message

    def __str__(self) -> str:
        return self.message


class BadRequest(RequestRefused):
    """The request cannot even be read (400)."""


class Unauthorized(RequestRefused):
    """No key, or not one of ours (401)."""

    status = 401

    def __init__(self, message: str) -> None:
        super().__init__("unauthorized", message)
        self.args = (message,)


class Forbidden(RequestRefused):
    """The key is known and may not do this (403)."""

    status = 403

    def __init__(self, message: str) -> None:
        super().__init__("forbidden", message)
        self.args = (message,)


class OutOfScope(RequestRefused):
    """The key's role would do, and what it is about lies outside of the key's scopes (403)."""

    status = 403

    def __init__(self, message: str) -> None:
        super().__init__("out_of_scope", message)
        self.args = (message,)


class HostRefused(RequestRefused):
    """The request is for a name that is not C1's (421)."""

    status = 421

    def __init__(self, host: str) -> None:
        super().__init__(
            "host_refused",
            f"C1 is not called {host[:100]!r}; use a name of it, or add yours to composite.hosts",
        )
        self.args = (host,)


class OriginRefused(RequestRefused):
    """A browser sends the request for a page that is not C1's (403)."""

    status = 403

    def __init__(self, origin: str) -> None:
        super().__init__(
            "origin_refused",
            f"pages of {origin[:100]!r} may not use C1; a host in composite.hosts may",
        )
        self.args = (origin,)


class TooSlow(RequestRefused):
    """The body does not arrive in time (408)."""

    status = 408

    def __init__(self) -> None:
        super().__init__("request_timeout", "the body of the request arrives too slowly")
        self.args = ()


class TooLarge(RequestRefused):
    """More bytes or items than are allowed (413)."""

    status = 413

    def __init__(self, message: str) -> None:
        super().__init__("too_large", message)
        self.args = (message,)


class UnsupportedEncoding(RequestRefused):
    """The body is compressed; it must be sent as it is (415)."""

    status = 415

    def __init__(self, encoding: str) -> None:
        super().__init__(
            "unsupported_encoding",
            f"Content-Encoding {encoding[:40]!r} is not supported; send the body as it is",
        )
        self.args = (encoding,)


class UriTooLong(RequestRefused):
    """The request target is too long (414)."""

    status = 414

    def __init__(self, limit: int) -> None:
        super().__init__("uri_too_long", f"the URL is longer than {limit} bytes")
        self.args = (limit,)


class HeadersTooLarge(RequestRefused):
    """Too many header fields, or too many bytes of them (431)."""

    status = 431

    def __init__(self, message: str) -> None:
        super().__init__("headers_too_large", message)
        self.args = (message,)


class RangeNotSatisfiable(RequestRefused):
    """The range asked for lies behind the end (416)."""

    status = 416

    def __init__(self, size: int) -> None:
        super().__init__("range_not_satisfiable", f"the artifact has only {size} bytes")
        self.args = (size,)
        self.size = size


_STATUS_BY_CLASS: tuple[tuple[type[HcnaError], int], ...] = (
    (ArtifactTooLarge, 413),
    (NotFound, 404),
    (Conflict, 409),
    (StaleWorker, 409),
    (Invalid, 422),
    (QuotaExceeded, 429),
    (RateLimited, 429),
    (DiskFull, 507),
    (StoreFull, 507),
    (NoAnswer, 504),
    (CannotAccept, 503),
)

_TITLES = {
    413: "Content Too Large",
    422: "Unprocessable Content",
    507: "Insufficient Storage",
}


def status_of(error: HcnaError) -> int:
    """Return the HTTP status of an expected error; 500 for one no caller should meet."""
    if isinstance(error, RequestRefused):
        return error.status
    for kind, status in _STATUS_BY_CLASS:
        if isinstance(error, kind):
            return status
    return 500


def title_of(status: int) -> str:
    """Return the short text of a status."""
    return _TITLES.get(status) or HTTPStatus(status).phrase


def problem(
    status: int,
    code: str,
    detail: str,
    *,
    errors: Sequence[tuple[str, str]] = (),
    retry_after_s: int | None = None,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Build a problem object.

    Args:
        status: HTTP status.
        code: Stable word.
        detail: One sentence for people.
        errors: (field path, sentence) pairs.
        retry_after_s: Seconds after which trying again is worth it.
        extra: Further members.
    """
    body: dict[str, Any] = {
        "type": f"urn:hcna:{code}",
        "title": title_of(status),
        "status": status,
        "detail": detail,
        "code": code,
        "fix": next_step(code),
    }
    if errors:
        body["errors"] = [
            {"field": field, "message": message} for field, message in errors[:ERRORS_MAX]
        ]
    if retry_after_s is not None:
        body["retry_after_s"] = retry_after_s
    return body | dict(extra or {})


def problem_of(error: HcnaError) -> dict[str, Any]:
    """Build the problem object of an expected error."""
    status = status_of(error)
    if status == 500:
        return _unexpected(error)
    errors = error.problems if isinstance(error, Invalid) else ()
    retry_after_s = None
    if isinstance(error, CannotAccept):
        retry_after_s = min(3600, max(1, math.ceil(error.retry_after_s)))
    received = getattr(error, "received", None)
    extra = {"received": received} if isinstance(received, int) else None
    return problem(
        status, error.code, str(error), errors=errors, retry_after_s=retry_after_s, extra=extra
    )


def render(body: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> Response:
    """Turn a problem object into the response to this request, with the headers that go with it."""
    status = int(body["status"])
    if (request_id := current_fields().get(REQUEST_ID)) is not None:
        body = {**body, REQUEST_ID: request_id}
    sent = dict(headers or {})
    if (retry_after_s := body.get("retry_after_s")) is not None:
        sent["Retry-After"] = str(retry_after_s)
    if status == 401:
        sent["WWW-Authenticate"] = 'Bearer realm="hcna"'
    return Response(msgspec.json.encode(body), status, sent, PROBLEM_JSON)


def respond(error: HcnaError) -> Response:
    """Return the response to an expected error."""
    headers: dict[str, str] = {}
    if isinstance(error, RangeNotSatisfiable):
        headers["Content-Range"] = f"bytes */{error.size}"
    return render(problem_of(error), headers)


def invalid(error: ValidationError, prefix: str = "") -> Invalid:
    """Turn a model's complaint into `Invalid`, one (field, sentence) pair for each.

    Args:
        error: What Pydantic found.
        prefix: Path of the checked value inside the request, e.g. ``tasks.3``.
    """
    found = error.errors(include_url=False, include_context=False, include_input=False)
    problems = tuple(_field(item, prefix) for item in found[:ERRORS_MAX])
    first = "; ".join(f"{field}: {message}" for field, message in problems[:3])
    more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
    return Invalid("invalid_request", f"the request does not fit: {first}{more}", problems)


def _field(item: Mapping[str, Any], prefix: str) -> tuple[str, str]:
    path = ".".join([prefix] * bool(prefix) + [str(part) for part in item["loc"]])
    message = str(item["msg"]).removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        message = "this field is unknown"
    return (path or "body")[:200], message[:300]


def refuse_field(field: str, message: str, code: str = "invalid_request") -> Invalid:
    """Return the refusal of one field."""
    return Invalid(code, f"{field}: {message}", ((field, message),))


#: Which methods a path offers, for 405; and how to count what never reached a route.
Allowed = Callable[[str], Sequence[str]]
Counted = Callable[[str, int], None]


def install(app: FastAPI, *, allowed: Allowed, counted: Counted) -> None:
    """Register the handlers that make every error of ``app`` a problem.

    Args:
        app: The application.
        allowed: Returns the methods of a path.
        counted: Told method and status of each request that reached no route.
    """

    async def on_expected(_: Request, error: Exception) -> Response:
        assert isinstance(error, HcnaError)
        return respond(error)

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        counted(request.method, error.status_code)
        if error.status_code == 405 and (methods := allowed(request.url.path)):
            return not_offered(request.method, methods)
        return render(_of_http(error), error.headers)

    async def on_unexpected(_: Request, error: Exception) -> Response:
        return render(_unexpected(error))

    app.add_exception_handler(HcnaError, on_expected)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(Exception, on_unexpected)


def not_offered(method: str, allowed: Sequence[str]) -> Response:
    """Return the response to a method that a path does not offer.

    Args:
        method: What was sent.
        allowed: What the path offers.
    """
    methods = ", ".join(allowed)
    detail = f"{method[:20]} is not offered here; use {methods}"
    return render(problem(405, "method_not_allowed", detail), {"Allow": methods})


def unexpected(error: BaseException) -> Response:
    """Log an error nobody expected and return a response that tells only its log id."""
    return render(_unexpected(error))


def _of_http(error: HTTPException) -> dict[str, Any]:
    if error.status_code == 404:
        return problem(404, "not_found", "there is nothing at this path; see /docs")
    code = title_of(error.status_code).lower().replace(" ", "_")
    return problem(error.status_code, code, str(error.detail))


def _unexpected(error: BaseException) -> dict[str, Any]:
    log_id = secrets.token_hex(6)
    log.error(
        "request failed unexpectedly",
        extra={"action": "api.internal_error", "log_id": log_id},
        exc_info=(type(error), error, error.__traceback__),
    )
    return problem(
        500,
        "internal",
        f"something went wrong inside; the log has it as {log_id}",
        extra={"log_id": log_id},
    )
