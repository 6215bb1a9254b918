"""What every route has in common: a declared policy, one way to read requests, one to answer.

A route cannot be added without saying who may use it (`hcna_ray.api.policy`) and which budget it is
counted against. What is declared here is also what ``/openapi.json`` tells.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import msgspec
from fastapi import APIRouter, Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import compile_path

from hcna_ray import failpoints
from hcna_ray.api import strict_json
from hcna_ray.api.admission import Sort
from hcna_ray.api.auth import authenticate
from hcna_ray.api.clients import ADDRESS
from hcna_ray.api.events import MEDIA_TYPE as EVENT_STREAM
from hcna_ray.api.policy import Check, Policy, rank_of
from hcna_ray.api.problems import (
    PROBLEM_JSON,
    Forbidden,
    OutOfScope,
    Unauthorized,
    invalid,
    refuse_field,
    respond,
    unexpected,
)
from hcna_ray.api.schemas import IDEMPOTENCY_KEY, NoQuery, ProblemOut, Query
from hcna_ray.api.services import Services
from hcna_ray.api.streaming import StreamResponse
from hcna_ray.api.visibility import check_artifact, check_task
from hcna_ray.core.envelopes import trace_id
from hcna_ray.core.errors import HcnaError, RateLimited
from hcna_ray.observability.log_context import lines_about
from hcna_ray.security.keys import ApiKey

if TYPE_CHECKING:
    from hcna_ray.observability.spans import RequestSpan

Method = Literal["GET", "HEAD", "POST", "PUT", "DELETE"]
M = TypeVar("M", bound=BaseModel)
Q = TypeVar("Q", bound=Query)

#: One line for each answer, at level debug: at full load they would be thousands a second.
access_log = logging.getLogger("hcna_ray.api.access")

#: Of an id that somebody wrote into a path, as much is logged.
_ID_CHARS_MAX = 100
#: Bodies above this are parsed on a thread, so that others are served in between.
PARSE_INLINE_BYTES_MAX = 256 * 1024


class Call:
    """One request, authenticated and admitted: what a handler works with."""

    __slots__ = ("_query", "about", "caller", "request", "services", "span")

    def __init__(
        self, request: Request, services: Services, caller: ApiKey | None, query: Query
    ) -> None:
        self.request = request
        self.services = services
        self.caller = caller
        self._query = query
        #: The span of this request, where one is made.
        self.span: RequestSpan | None = None
        #: What the lines are about that are logged for this request, beside its own name.
        self.about: dict[str, object] = {}

    @property
    def key(self) -> ApiKey:
        """The caller's key, on a route that is not open."""
        assert self.caller is not None
        return self.caller

    @property
    def principal(self) -> str:
        """Name of the caller's key, for the audit; empty on an open route.

        Whose a task is says the key's *owner*, which several keys may share.
        """
        return "" if self.caller is None else self.caller.name

    def still_good(self) -> bool:
        """Whether the caller's key still opens this, for what goes on for long."""
        try:
            found = _caller(self.request, self.services)
        except (Unauthorized, RateLimited):
            return False
        return found == self.caller

    def path(self, name: str) -> str:
        """Return a path parameter."""
        return str(self.request.path_params[name])

    def query(self, kind: type[Q]) -> Q:
        """Return the checked query of the declared kind."""
        assert isinstance(self._query, kind)
        return self._query

    @property
    def idempotency_key(self) -> str | None:
        """The ``Idempotency-Key`` header. Raises `Invalid` when it is not usable."""
        found = self.request.headers.getlist("idempotency-key")
        if not found:
            return None
        if len(found) > 1 or not IDEMPOTENCY_KEY.match(found[0]):
            raise refuse_field("Idempotency-Key", "must be 1 to 200 visible ASCII characters, once")
        return found[0]

    @property
    def traceparent(self) -> str | None:
        """The W3C trace context to keep with what is submitted: this request's span, if it has one.

        Else the client's; one that is malformed is ignored, as the standard wants it.
        """
        if self.span is not None and self.span.traceparent is not None:
            return self.span.traceparent
        value = self.request.headers.get("traceparent")
        return value if trace_id(value) is not None else None

    def look_at_names(self) -> None:
        """Note which trace and which task this request belongs to, as far as its head says."""
        if (found := trace_id(self.traceparent)) is not None:
            self.about["trace_id"] = found
        if (task_id := self.request.path_params.get("task_id")) is not None:
            self.about["task_id"] = str(task_id)[:_ID_CHARS_MAX]

    def say_of_span(self, attributes: Mapping[str, str | int]) -> None:
        """Add to this request's span what became known, if it has one."""
        if self.span is not None:
            self.span.set(attributes)

    async def json(self, *, extra_depth: int = 0) -> Any:
        """Return the body parsed as strict JSON, whatever its Content-Type.

        Args:
            extra_depth: Levels that our own wrapping adds to what the client may nest.

        Raises:
            BadRequest: it is not strict JSON.
            TooLarge: it is too long.
        """
        raw = await self.request.body()
        depth = self.services.settings.limits.json_depth + extra_depth
        if len(raw) <= PARSE_INLINE_BYTES_MAX:
            return strict_json.parse(raw, depth_max=depth)
        return await asyncio.to_thread(strict_json.parse, raw, depth_max=depth)

    async def model(self, kind: type[M], *, optional: bool = False) -> M:
        """Return the body as a model.

        Args:
            kind: The model.
            optional: No body at all means an empty object.
        """
        if optional and not await self.request.body():
            return kind()
        body = await self.json()
        if not isinstance(body, dict):
            raise refuse_field("body", "must be a JSON object")
        try:
            return kind.model_validate(body)
        except ValidationError as error:
            raise invalid(error) from None

    async def wait_for(self, event: asyncio.Event, timeout_s: float) -> bool:
        """Wait for ``event``; return False when the time is up or the client has gone."""
        if timeout_s <= 0:
            return event.is_set()
        waiting = asyncio.ensure_future(event.wait())
        gone = asyncio.ensure_future(self._gone())
        try:
            await asyncio.wait(
                {waiting, gone}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
            return event.is_set()
        finally:
            waiting.cancel()
            gone.cancel()
            await asyncio.gather(waiting, gone, return_exceptions=True)

    async def _gone(self) -> None:
        while (await self.request.receive())["type"] != "http.disconnect":
            pass


Handler = Callable[[Call], Awaitable[Response]]
#: A handler behind its policy.
Endpoint = Callable[[Request], Awaitable[Response]]
SortOf = Callable[[Request], Sort]


@dataclass(frozen=True, kw_only=True)
class Route:
    """A declared route: its policy and what it documents."""

    method: Method
    path: str
    policy: Policy
    sort: Sort | SortOf
    name: str
    pattern: re.Pattern[str]
    endpoint: Endpoint
    models: tuple[type[BaseModel], ...]


#: Problems that the way to a route may bring about, whatever the route.
_HEAD_PROBLEMS = (400, 403, 413, 414, 415, 421, 422, 431, 500, 503)
#: What changes something may end without anybody knowing whether it did.
_UNKNOWN = {"POST": (504,), "DELETE": (504,)}

#: Nothing is said beside the rest.
_NONE: Mapping[str, str] = {}

_WORDS = {
    400: "The body is not strict JSON, or a header is malformed.",
    401: "No key, or one that is not valid.",
    403: "The key's role or its scopes do not allow this, or a page of elsewhere asks.",
    404: "It does not exist.",
    405: "The path is that of another route, such as /tasks/wait; see Allow.",
    408: "The body arrives too slowly.",
    409: "It does not fit the state of things.",
    413: "The body is too large.",
    414: "The URL is too long.",
    415: "The body is compressed.",
    416: "The range lies behind the end.",
    421: "C1 is not called by this name (Host).",
    422: "The request does not fit its model.",
    429: "The key's rate or quota is used up, or wrong keys came from there; see Retry-After.",
    431: "The header fields are too large.",
    500: "Something went wrong inside; the log id tells what.",
    503: "Not now; see Retry-After.",
    504: "The moderator did not answer: it may have been done. See Retry-After.",
    507: "Too little disk space; see Retry-After.",
}


class Routes:
    """A group of routes. Invariant: each has a policy."""

    def __init__(self, tag: str) -> None:
        self.router = APIRouter(tags=[tag], redirect_slashes=False)
        self.declared: list[Route] = []

    def add(
        self,
        method: Method,
        path: str,
        *,
        policy: Policy,
        sort: Sort | SortOf,
        answers: Mapping[int, type[BaseModel] | str],
        problems: Sequence[int] = (),
        body: type[BaseModel] | str | None = None,
        body_also: Mapping[str, str] = _NONE,
        body_optional: bool = False,
        query: type[Query] | None = NoQuery,
        headers: Mapping[str, str] = _NONE,
        in_schema: bool = True,
    ) -> Callable[[Handler], Handler]:
        """Declare a route.

        Args:
            method: HTTP method.
            path: Template such as ``/tasks/{task_id}``.
            policy: Who may use it, and what of the request is held against the key.
            sort: Budget it is counted against, or how to tell from the request.
            answers: Model of each good status, or a media type for what is not JSON.
            problems: Further statuses that it may refuse with.
            body: Model of the body, or a media type.
            body_also: Media types that it may have as well, and what each is.
            body_optional: Whether it may be left out.
            query: Model of the query; ``None`` ignores whatever is there.
            headers: Header fields that it looks at, and what each says.
            in_schema: Whether ``/openapi.json`` shows it.
        """

        def declare(handler: Handler) -> Handler:
            guarded = _guard(handler, method, path, policy, sort, query)
            pattern, _, _ = compile_path(path)
            models = [m for m in (*answers.values(), body) if isinstance(m, type)]
            self.declared.append(
                Route(
                    method=method,
                    path=path,
                    policy=policy,
                    sort=sort,
                    name=handler.__name__,
                    pattern=pattern,
                    endpoint=guarded,
                    models=tuple(models),
                )
            )
            self.router.add_api_route(
                path,
                guarded,
                methods=[method],
                name=handler.__name__,
                operation_id=handler.__name__,
                summary=(handler.__doc__ or handler.__name__).strip().partition("\n")[0],
                description=(handler.__doc__ or "").partition("\n")[2].strip(),
                status_code=next(iter(answers)),
                response_class=Response,
                response_model=None,
                responses=_responses(
                    answers,
                    # A name with a slash in it leads to no route.
                    (*problems, *_UNKNOWN.get(method, ()), *((404,) if "{" in path else ())),
                    policy,
                    body is not None,
                ),
                openapi_extra=_extra(method, path, policy, query, headers)
                | _request_body(body, body_also, body_optional),
                include_in_schema=in_schema,
            )
            return handler

        return declare


def _guard(
    handler: Handler,
    method: str,
    path: str,
    policy: Policy,
    sort: Sort | SortOf,
    query_model: type[Query] | None,
) -> Endpoint:
    check = policy.check
    least = {public: policy.least(public=public) for public in (False, True)}
    ranks = {public: rank_of(role) for public, role in least.items()}

    async def endpoint(request: Request) -> Response:
        services: Services = request.app.state.services
        since = services.clock.elapsed()
        caller: ApiKey | None = None
        span: RequestSpan | None = None
        fields: Mapping[str, object] = _NONE
        try:
            rank = ranks[services.public]
            if rank < 0:
                if check is not Check.NONE:
                    caller = _perhaps(request, services)
            else:
                caller = _caller(request, services)
                if caller.rate is not None:
                    services.rates.take(caller)
                if caller.rank < rank:
                    raise Forbidden(
                        f"the key {caller.name!r} has role {caller.role}; this needs role "
                        f"{least[services.public]}, or a higher one"
                    )
            budget = sort if isinstance(sort, Sort) else sort(request)
            services.admission.take(budget)
            goes_on = False
            try:
                if caller is not None and not caller.sees_all and check in _OF_THE_PATH:
                    await _check_path(services, caller, check, request)
                query = NoQuery() if query_model is None else _read_query(request, query_model)
                call = Call(request, services, caller, query)
                if method == "POST":
                    _ = call.idempotency_key  # Refused wherever it is unusable.
                if services.traces is not None and check is Check.SUBMISSION:
                    span = call.span = services.traces.request(method, path, call.traceparent)
                failpoints.hit("c1.request.admitted")
                call.look_at_names()
                fields = call.about
                with lines_about(fields):
                    response = await handler(call)
                failpoints.hit("c1.answer.made")
                if isinstance(response, StreamResponse):
                    response.when_over(partial(services.admission.give, budget))
                    goes_on = True
            finally:
                if not goes_on:
                    services.admission.give(budget)
        except HcnaError as error:
            response = respond(error)
        except ClientDisconnect:
            response = Response(status_code=400)  # Nobody is there to read it.
        except Exception as error:
            with lines_about(fields):
                response = unexpected(error)
        if span is not None:
            span.end(response.status_code)
        services.audit.count(request, caller, method, path, response.status_code)
        took_s = services.clock.elapsed() - since
        services.stats.count(path, method, response.status_code, took_s)
        if access_log.isEnabledFor(logging.DEBUG):
            with lines_about(fields):
                _log_answer(method, path, response.status_code, caller, took_s)
        return response

    return endpoint


def _log_answer(method: str, path: str, status: int, caller: ApiKey | None, took_s: float) -> None:
    access_log.debug(
        "request answered",
        extra={
            "action": "api.answered",
            "method": method,
            "route": path,
            "status": status,
            "duration_ms": round(took_s * 1000, 3),
            "principal": "" if caller is None else caller.name,
        },
    )


#: What the path names is held against the key here, before a handler sees the request. The other
#: checks concern bodies, filters and answers: handlers make them, with `hcna_ray.api.visibility`.
_OF_THE_PATH = frozenset({Check.TASK, Check.OUTPUT, Check.QUEUE, Check.ARTIFACT, Check.MACHINES})


async def _check_path(services: Services, caller: ApiKey, check: Check, request: Request) -> None:
    """Raise unless what the path names is there for the caller."""
    params = request.path_params
    if check is Check.TASK:
        await check_task(services, caller, params["task_id"])
    elif check is Check.OUTPUT:
        await check_task(services, caller, params["task_id"], in_full=True)
    elif check is Check.QUEUE:
        if caller.task_types:
            raise OutOfScope(
                f"the key {caller.name!r} is limited to some task types; a queue holds those of "
                "others"
            )
        if not caller.covers(queue=params["name"]):
            raise OutOfScope(f"the key {caller.name!r} is not for the queue {params['name']!r:.80}")
    elif check is Check.MACHINES:
        if caller.scoped:
            raise OutOfScope(
                f"the key {caller.name!r} is limited to some tasks; a machine runs those of others"
            )
    elif "sha256" in params:  # An upload names none in its path.
        await check_artifact(services, caller, params["sha256"])


def _perhaps(request: Request, services: Services) -> ApiKey | None:
    """Return the caller of an open route: nobody, unless the key it shows is good."""
    try:
        return _caller(request, services)
    except (Unauthorized, RateLimited):
        return None


def _caller(request: Request, services: Services) -> ApiKey:
    return authenticate(
        request.headers,
        services.keys,
        services.clock,
        guesses=services.guesses,
        address=request.scope.get(ADDRESS),
    )


def _read_query(request: Request, kind: type[Query]) -> Query:
    pairs = request.query_params.multi_items() if request.scope.get("query_string") else []
    values = dict(pairs)
    if len(values) != len(pairs):
        raise refuse_field("query", "a parameter is given twice")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise invalid(error) from None


def answer(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return a JSON answer; `msgspec.Raw` values are passed through as they are."""
    return Response(
        msgspec.json.encode(body),
        status,
        None if headers is None else dict(headers),
        "application/json",
    )


# -- what /openapi.json says -----------------------------------------------------------------------


def _reference(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{model.__name__}"}


def _responses(
    answers: Mapping[int, type[BaseModel] | str],
    problems: Sequence[int],
    policy: Policy,
    has_body: bool,
) -> dict[int | str, dict[str, Any]]:
    found: dict[int | str, dict[str, Any]] = {}
    for status, model in answers.items():
        entry: dict[str, Any] = {"description": "Good."}
        if isinstance(model, str):
            if model:
                # OpenAPI 3.1 has no words for the messages of a stream of events.
                schema = {} if model == EVENT_STREAM else {"type": "string"}
                entry["content"] = {model: {"schema": schema}}
        else:
            entry["description"] = (model.__doc__ or "Good.").partition("\n")[0]
            entry["content"] = {"application/json": {"schema": _reference(model)}}
        found[status] = entry
    statuses = {*problems, *_HEAD_PROBLEMS}
    if has_body:
        statuses.add(408)
    if policy.role is not None or policy.in_public is not None:
        statuses |= {401, 429}
    for status in sorted(statuses):
        # A probe answers 503 itself; that it is refused with 503 is another answer.
        entry = found.setdefault(status, {"description": _WORDS[status]})
        entry.setdefault("content", {})[PROBLEM_JSON] = {"schema": _reference(ProblemOut)}
    for status in statuses & _SENT.keys():
        entry = found[status]
        name, schema, text = _SENT[status]
        # Not beside an answer of another kind, which comes without.
        required = len(entry["content"]) == 1
        entry["headers"] = {name: {"description": text, "required": required, "schema": schema}}
    return found


_AGAIN: tuple[str, dict[str, Any], str] = (
    "Retry-After",
    {"type": "integer", "minimum": 1, "maximum": 3600},
    "Seconds after which trying again is worth it.",
)
#: The header field that goes with a status.
_SENT: Mapping[int, tuple[str, dict[str, Any], str]] = {
    401: ("WWW-Authenticate", {"type": "string"}, "How to show a key."),
    405: ("Allow", {"type": "string"}, "What the path offers."),
    416: ("Content-Range", {"type": "string"}, "How many bytes there are."),
    429: _AGAIN,
    503: _AGAIN,
    504: _AGAIN,
    507: _AGAIN,
}


_TRACEPARENT = {
    "name": "traceparent",
    "in": "header",
    "required": False,
    "description": "W3C trace context, handed on to the task. One that is malformed is ignored.",
    "schema": {"type": "string"},
}
_IDEMPOTENCY_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": "Sending the same request with the same key again returns what was stored.",
    "schema": {"type": "string", "minLength": 1, "maxLength": 200, "pattern": "^[!-~]+$"},
}


def _extra(
    method: str,
    path: str,
    policy: Policy,
    query: type[Query] | None,
    headers: Mapping[str, str],
) -> dict[str, Any]:
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"{(\w+)}", path)
    ]
    if query is not None:
        schema = query.model_json_schema()
        for name, field in schema.get("properties", {}).items():
            text = field.pop("description", "")
            field.pop("title", None)
            parameters.append(
                {
                    "name": name,
                    "in": "query",
                    "required": name in schema.get("required", ()),
                    "description": text,
                    "schema": field,
                }
            )
    parameters += [
        {
            "name": name,
            "in": "header",
            "required": False,
            "description": text,
            "schema": {"type": "string"},
        }
        for name, text in headers.items()
    ]
    if method == "POST":
        parameters += [_IDEMPOTENCY_KEY, _TRACEPARENT]
    return {
        "parameters": parameters,
        "security": [] if policy.role is None else [{"bearer": []}, {"apiKey": []}],
        "x-hcna-role": policy.role or "open",
        "x-hcna-check": policy.check.value,
    }


def _request_body(
    body: type[BaseModel] | str | None, also: Mapping[str, str], optional: bool
) -> dict[str, Any]:
    if body is None:
        return {}
    content: dict[str, Any] = (
        {body: {"schema": {"type": "string", "format": "binary"}}}
        if isinstance(body, str)
        else {"application/json": {"schema": _reference(body)}}
    )
    for media, text in also.items():
        content[media] = {"schema": {"type": "string", "description": text}}
    return {"requestBody": {"required": not optional, "content": content}}
