"""What every route has in common: a declared policy, one way to read requests, one to answer.

A route cannot be added without saying who may use it and which budget it is counted against. What
is declared here is also what ``/openapi.json`` tells.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

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
from hcna_ray.api.problems import Forbidden, invalid, refuse_field, respond, unexpected
from hcna_ray.api.schemas import IDEMPOTENCY_KEY, NoQuery, ProblemOut, Query
from hcna_ray.api.services import Services
from hcna_ray.core.envelopes import trace_id
from hcna_ray.core.errors import HcnaError
from hcna_ray.core.models import AuditEntry
from hcna_ray.security.keys import ApiKey

log = logging.getLogger(__name__)

Access = Literal["open", "key", "admin"]
Method = Literal["GET", "HEAD", "POST", "PUT", "DELETE"]
M = TypeVar("M", bound=BaseModel)
Q = TypeVar("Q", bound=Query)

#: Bodies above this are parsed on a thread, so that others are served in between.
PARSE_INLINE_BYTES_MAX = 256 * 1024


class Call:
    """One request, authenticated and admitted: what a handler works with."""

    __slots__ = ("_query", "caller", "request", "services")

    def __init__(
        self, request: Request, services: Services, caller: ApiKey | None, query: Query
    ) -> None:
        self.request = request
        self.services = services
        self.caller = caller
        self._query = query

    @property
    def principal(self) -> str:
        """Name of the caller's key; empty on an open route."""
        return "" if self.caller is None else self.caller.name

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
        """The W3C trace context; one that is malformed is ignored, as the standard wants it."""
        value = self.request.headers.get("traceparent")
        return value if trace_id(value) is not None else None

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
    access: Access
    sort: Sort | SortOf
    name: str
    pattern: re.Pattern[str]
    endpoint: Endpoint
    models: tuple[type[BaseModel], ...]


#: Problems that the way to a route may bring about, whatever the route.
_HEAD_PROBLEMS = (413, 414, 415, 422, 431, 500, 503)
#: What changes something may end without anybody knowing whether it did.
_UNKNOWN = {"POST": (504,), "DELETE": (504,)}

_WORDS = {
    400: "The body is not strict JSON, or a header is malformed.",
    401: "No key, or one that is not valid.",
    403: "The key may not do this.",
    404: "It does not exist.",
    409: "It does not fit the state of things.",
    413: "The body is too large.",
    414: "The URL is too long.",
    415: "The body is compressed.",
    416: "The range lies behind the end.",
    422: "The request does not fit its model.",
    429: "The caller's quota is used up; see Retry-After.",
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
        access: Access,
        sort: Sort | SortOf,
        answers: Mapping[int, type[BaseModel] | str],
        problems: Sequence[int] = (),
        body: type[BaseModel] | str | None = None,
        body_optional: bool = False,
        query: type[Query] | None = NoQuery,
        in_schema: bool = True,
    ) -> Callable[[Handler], Handler]:
        """Declare a route.

        Args:
            method: HTTP method.
            path: Template such as ``/tasks/{task_id}``.
            access: ``open`` to everyone, with a ``key``, or with an ``admin`` key.
            sort: Budget it is counted against, or how to tell from the request.
            answers: Model of each good status, or a media type for what is not JSON.
            problems: Further statuses that it may refuse with.
            body: Model of the body, or a media type.
            body_optional: Whether it may be left out.
            query: Model of the query; ``None`` ignores whatever is there.
            in_schema: Whether ``/openapi.json`` shows it.
        """

        def declare(handler: Handler) -> Handler:
            guarded = _guard(handler, method, path, access, sort, query)
            pattern, _, _ = compile_path(path)
            models = [m for m in (*answers.values(), body) if isinstance(m, type)]
            self.declared.append(
                Route(
                    method=method,
                    path=path,
                    access=access,
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
                    answers, (*problems, *_UNKNOWN.get(method, ())), access, body is not None
                ),
                openapi_extra=_extra(method, path, access, body, body_optional, query),
                include_in_schema=in_schema,
            )
            return handler

        return declare


def _guard(
    handler: Handler,
    method: str,
    path: str,
    access: Access,
    sort: Sort | SortOf,
    query_model: type[Query] | None,
) -> Endpoint:
    async def endpoint(request: Request) -> Response:
        services: Services = request.app.state.services
        since = services.clock.elapsed()
        try:
            caller = None if access == "open" else authenticate(request.headers, services.keys)
            if access == "admin" and caller is not None and caller.role != "admin":
                await _note_refusal(services, caller, f"{method} {request.url.path}"[:200])
                raise Forbidden(
                    f"the key {caller.name!r} has no admin role, which this route needs"
                )
            budget = sort if isinstance(sort, Sort) else sort(request)
            with services.admission.admit(budget):
                query = NoQuery() if query_model is None else _read_query(request, query_model)
                call = Call(request, services, caller, query)
                if method == "POST":
                    _ = call.idempotency_key  # Refused wherever it is unusable.
                failpoints.hit("c1.request.admitted")
                response = await handler(call)
                failpoints.hit("c1.answer.made")
        except HcnaError as error:
            response = respond(error)
        except ClientDisconnect:
            response = Response(status_code=400)  # Nobody is there to read it.
        except Exception as error:
            response = unexpected(error)
        services.stats.count(path, method, response.status_code, services.clock.elapsed() - since)
        return response

    return endpoint


async def _note_refusal(services: Services, caller: ApiKey, target: str) -> None:
    entry = AuditEntry(
        at=services.clock.now(),
        principal=caller.name,
        action="api.admin_route",
        target=target,
        outcome="refused",
        detail="the key has no admin role",
    )
    try:
        await services.moderator.audit(entry)
    except HcnaError as error:
        log.warning(
            "refusal could not be audited",
            extra={"action": "api.audit_failed", "principal": caller.name, "error": error.code},
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
    access: Access,
    has_body: bool,
) -> dict[int | str, dict[str, Any]]:
    found: dict[int | str, dict[str, Any]] = {}
    for status, model in answers.items():
        entry: dict[str, Any] = {"description": "Good."}
        if isinstance(model, str):
            if model:
                entry["content"] = {model: {"schema": {"type": "string"}}}
        else:
            entry["description"] = (model.__doc__ or "Good.").partition("\n")[0]
            entry["content"] = {"application/json": {"schema": _reference(model)}}
        found[status] = entry
    statuses = {*problems, *_HEAD_PROBLEMS}
    if has_body:
        statuses.add(400)
    if access != "open":
        statuses.add(401)
    if access == "admin":
        statuses.add(403)
    for status in sorted(statuses):
        found[status] = {
            "description": _WORDS[status],
            "content": {"application/problem+json": {"schema": _reference(ProblemOut)}},
        }
    return found


_TRACEPARENT = {
    "name": "traceparent",
    "in": "header",
    "required": False,
    "description": "W3C trace context, handed on to the task.",
    "schema": {"type": "string", "maxLength": 55},
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
    access: Access,
    body: type[BaseModel] | str | None,
    body_optional: bool,
    query: type[Query] | None,
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
    if method == "POST":
        parameters += [_IDEMPOTENCY_KEY, _TRACEPARENT]
    extra: dict[str, Any] = {
        "parameters": parameters,
        "security": [] if access == "open" else [{"bearer": []}, {"apiKey": []}],
        "x-hcna-access": access,
    }
    if body is not None:
        content: dict[str, Any] = (
            {body: {"schema": {"type": "string", "format": "binary"}}}
            if isinstance(body, str)
            else {"application/json": {"schema": _reference(body)}}
        )
        extra["requestBody"] = {"required": not body_optional, "content": content}
    return extra
