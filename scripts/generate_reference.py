"""Write the generated pages of ``docs/reference/`` from the code they describe.

``--check`` writes nothing and fails if a page is not what the code says. A code, failure kind or
pending reason that has no sentence here, or a sentence whose code is gone, fails as well.
"""

from __future__ import annotations

import argparse
import ast
import functools
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from fastapi.routing import APIRoute
from pydantic import BaseModel, WithJsonSchema
from pydantic.fields import FieldInfo

from hcna_ray.api import schemas
from hcna_ray.api.admission import BATCHES_MAX, PROBES_MAX, UPLOADS_MAX, Sort
from hcna_ray.api.app import GROUPS
from hcna_ray.api.policy import MEANING, Check
from hcna_ray.api.problems import status_of
from hcna_ray.cli.main import app
from hcna_ray.config import PortSettings, Settings
from hcna_ray.core import advice
from hcna_ray.core.errors import CannotAccept, Conflict, HcnaError, Invalid
from hcna_ray.core.models import FailureKind
from hcna_ray.observability.exposition import families, full_sample
from hcna_ray.runtime.worker_page import GAUGES
from hcna_ray.security.keys import OF_OTHERS, ROLES, View
from hcna_ray.supervisor.firewall import reach_of

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hcna_ray"
PAGES = ROOT / "docs" / "reference"

HELP_COLUMNS = 88


class Stale(Exception):
    """The sentences of this program and the code disagree."""


# -- small helpers ---------------------------------------------------------------------------------


def header(title: str, source: str) -> list[str]:
    """Return the first lines of a page."""
    return [
        f"# {title}",
        "",
        f"Generated from {source} by `make docs`; edit that, not this page.",
        "",
    ]


def prose(text: str) -> list[str]:
    """Return a dedented text as lines, with the empty line after it."""
    return [*textwrap.dedent(text).strip().splitlines(), ""]


def cell(text: object) -> str:
    """Return text that stays within its cell."""
    return " ".join(str(text).split()).replace("``", "`").replace("|", "\\|")


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Return a Markdown table and the empty line after it."""
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    lines += [f"| {' | '.join(cell(value) for value in row)} |" for row in rows]
    return [*lines, ""]


def agree(what: str, described: Iterable[str], found: Iterable[str]) -> None:
    """Raise `Stale` unless both name the same things."""
    missing, gone = set(found) - set(described), set(described) - set(found)
    if missing:
        raise Stale(f"{what} without a sentence in {Path(__file__).name}: {sorted(missing)}")
    if gone:
        raise Stale(
            f"{what} described in {Path(__file__).name}, but not in the code: {sorted(gone)}"
        )


# -- models ----------------------------------------------------------------------------------------


def kind_of(annotation: Any) -> str:
    """Return a type in words a reader of YAML or JSON knows."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        schemas_of = [one.json_schema or {} for one in inner if isinstance(one, WithJsonSchema)]
        if any(schema.get("format") == "date-time" for schema in schemas_of):
            return "instant"
        return kind_of(inner[0])
    if origin in (Union, UnionType):
        kinds = [kind_of(one) for one in inner if one is not NoneType]
        return " or ".join(dict.fromkeys(kinds))
    if origin is Literal:
        return " or ".join(f"`{one}`" for one in inner)
    if origin in (list, tuple):
        return f"list of {kind_of(inner[0])}"
    if origin is dict:
        return "object" if inner[1] is Any else f"mapping of name to {kind_of(inner[1])}"
    if annotation is NoneType:
        return "null"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"[`{annotation.__name__}`](#{annotation.__name__.lower()})"
    words = {str: "text", int: "integer", float: "number", bool: "true or false", Path: "path"}
    return words.get(annotation, getattr(annotation, "__name__", str(annotation)))


def constraints(annotation: Any, metadata: Sequence[Any] = ()) -> Iterator[Any]:
    """Yield the constraints of a field, those of optional annotated types included."""
    for one in metadata:
        yield from (one.metadata if isinstance(one, FieldInfo) else [one])
    if get_origin(annotation) is Annotated:
        yield from constraints(get_args(annotation)[0], get_args(annotation)[1:])
    elif get_origin(annotation) in (Union, UnionType):
        for inner in get_args(annotation):
            yield from constraints(inner)


def bounds_of(info: FieldInfo) -> str:
    """Return the numeric bounds of a field."""
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    found = list(constraints(info.annotation, info.metadata))
    return ", ".join(
        f"{sign} {number(getattr(one, name))}"
        for name, sign in signs.items()
        for one in found
        if getattr(one, name, None) is not None
    )


def number(value: float) -> str:
    """Return a number as it would be typed."""
    return str(int(value)) if value == int(value) else str(value)


def default_of(info: FieldInfo) -> str:
    """Return the default of a field; empty if there is none to tell."""
    if info.is_required():
        return "required"
    if _makes_model(info):
        return ""
    value = (
        info.default
        if info.default_factory is None
        else info.get_default(call_default_factory=True, validated_data={})
    )
    if isinstance(value, Enum):
        value = value.value
    if value in (None, ""):
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, float | int):
        return f"`{number(value)}`"
    if isinstance(value, tuple | list):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{value}`" if value != {} else "`{}`"


def _makes_model(info: FieldInfo) -> bool:
    return isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel)


# -- configuration ---------------------------------------------------------------------------------


def configuration() -> list[str]:
    """Every setting with its bounds, default and meaning."""
    lines = header("Configuration", "the settings models in `hcna_ray/config.py`")
    lines += prose("""
        One file, `$HCNA_HOME/hcna.yaml` (or the one that `HCNA_CONFIG` names), with the sections
        below, all of them optional. An unknown key, a key given twice or a value out of bounds
        stops the start and is named. The environment wins over the file: `HCNA_` + section + `__` +
        field, in capitals, such as `HCNA_LEASE__TTL_S=45` or
        `HCNA_MODERATOR__SCHEDULING__MAX_CONCURRENT_TASKS=8`; collections are given as JSON. See
        [how to configure](../how-to/configure.md) for examples.
        """)
    for name, info in Settings.model_fields.items():
        if name not in ("home", "source"):
            lines += _section(name, info)
    return lines


#: Settings that are read, but do less than their description says.
NOT_YET = {
    f"{node}.listen_address": "**Only loopback is bound yet.**" for node in ("moderator", "worker")
}


@functools.cache
def _attributes_read() -> frozenset[str]:
    """Return the name of every attribute that the package reads anywhere."""
    return frozenset(
        node.attr
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Attribute)
    )


def _meaning(section: str, name: str, info: FieldInfo) -> str:
    """Return what a setting does, and whether it does it already."""
    text = info.description or ""
    note = NOT_YET.get(f"{section}.{name}")
    if note is not None:
        return f"{text} {note}"
    # Ports are read by name (`Settings.port`); of all others somebody must use the field.
    if section != "ports" and name not in _attributes_read():
        return f"{text} **No effect yet.**"
    return text


def _section(path: str, info: FieldInfo) -> list[str]:
    model = info.annotation
    assert isinstance(model, type)
    assert issubclass(model, BaseModel)
    lines = [f"## `{path}`", "", cell(model.__doc__ or ""), ""]
    nested = {n: i for n, i in model.model_fields.items() if _makes_model(i)}
    plain = {n: i for n, i in model.model_fields.items() if n not in nested}
    rows = [
        (f"`{n}`", kind_of(i.annotation), default_of(i), bounds_of(i), _meaning(path, n, i))
        for n, i in plain.items()
    ]
    lines += table(("field", "kind", "default", "bounds", "meaning"), rows)
    for name, inner in nested.items():
        lines += _section(f"{path}.{name}", inner)
    return [
        line.replace("[`NodeAddress`](#nodeaddress)", "node (`node_id`, `address`, `port`)")
        for line in lines
    ]


# -- ports -----------------------------------------------------------------------------------------

#: Where each port was seen to listen with Ray 2.60 (``ss -ltn`` beside a running cluster).
#: ``every``: on all addresses of the machine, whatever is configured.
EVERYWHERE = "every address"
HERE = "loopback"
OWN = "the node's address, loopback"
LISTENS = {
    "gcs": EVERYWHERE,
    "dashboard": HERE,
    "head_node_manager": EVERYWHERE,
    "head_object_manager": EVERYWHERE,
    "head_agent_http": OWN,
    "head_agent_grpc": EVERYWHERE,
    "head_runtime_env_agent": "",
    "head_metrics_export": EVERYWHERE,
    "autoscaler_metrics": EVERYWHERE,
    "dashboard_metrics": EVERYWHERE,
    "worker_node_manager": EVERYWHERE,
    "worker_object_manager": EVERYWHERE,
    "worker_agent_http": OWN,
    "worker_agent_grpc": EVERYWHERE,
    "worker_runtime_env_agent": "",
    "worker_metrics_export": EVERYWHERE,
    "serve_fallback_proxy": HERE,
    "serve_grpc": "",
    "haproxy_stats": HERE,
    "haproxy_metrics": HERE,
    "serve_http": HERE,
    "gate": EVERYWHERE,
    "replica_http": HERE,
    "replica_grpc": EVERYWHERE,
    "head_processes": EVERYWHERE,
    "worker_processes": EVERYWHERE,
}


def ports() -> list[str]:
    """Every port, who listens on it, and where."""
    lines = header("Ports", "`PortSettings` in `hcna_ray/config.py`")
    lines += prose("""
        `ports.offset` is added to every port of an instance, so a second one beside the first needs
        another offset and another `HCNA_HOME`. *Listens on* is what `ss -ltn` showed beside a
        running cluster with Ray 2.60: Ray opens most of its ports on every address of the machine,
        and no setting of Ray changes that. *Open to* is whom the firewall's rules of hcna let in
        from other machines ([Ports in SECURITY](../SECURITY.md#ports)): `members` are the addresses
        of the cluster's machines; loopback reaches everything. Ray's gRPC ports speak TLS and
        demand a certificate of the cluster's authority and its token; object transfer too, which is
        gRPC as well. Ray's Prometheus pages, and what is marked "no key", demand nothing and are
        not encrypted. C1's own port speaks TLS if `composite.security.enable_tls` says so. **Where
        hcna may not set rules** (`hcna up` and `hcna doctor` say so, with commands) **all that
        listens on every address is open to whoever reaches it.** `hcna observe up` starts
        Prometheus (9090), Alertmanager (9093) and Grafana (3000) on loopback.
        """)
    settings = Settings()
    public = [
        (
            settings.composite.api_port,
            "`composite.api_port`",
            f"{HERE}; with `enable_tls` `composite.listen_address`",
            "nobody; with a public address everybody",
            "C1: the HTTP API. Needs a key. With `enable_tls` the edge: TLS 1.2 or 1.3 alone.",
        ),
        (
            settings.moderator.control_port,
            "`moderator.control_port`",
            HERE,
            "nobody",
            "Control edge: `/admin/*` (admin key), `/metrics`, its targets, `/health` (no key).",
        ),
        (
            settings.worker.worker_port,
            "`worker.worker_port`",
            HERE,
            "nobody",
            "The worker's `/metrics` and `/health` (no key).",
        ),
    ]
    rows: list[tuple[object, ...]] = list(public)
    described = []
    for name, info in PortSettings.model_fields.items():
        if name == "offset" or name.endswith("_max"):
            continue
        first, short = getattr(settings.ports, name), name.removesuffix("_min")
        number_of = first
        text = info.description or ""
        if name.endswith("_min"):
            number_of = f"{first}-{getattr(settings.ports, f'{short}_max')}"
            text = text.replace("First port", "Ports").replace("First gRPC port", "gRPC ports")
        if short.startswith("haproxy"):
            text += " No key."
        described.append(short)
        where = LISTENS.get(short) or "nothing listens"
        rows.append((number_of, f"`ports.{name}`", where, reach_of(short), text))
    agree("ports", LISTENS, described)
    return lines + table(("port", "setting", "listens on", "open to", "what for"), rows)


# -- command line ----------------------------------------------------------------------------------


def cli() -> list[str]:
    """The help of every command."""
    lines = header("The `hcna` command", "the commands in `hcna_ray/cli/`")
    lines += prose("""
        Data goes to stdout, talk to stderr; `--json` works everywhere. Where C1 is and the key are
        found in this order: `HCNA_URL` and `HCNA_API_KEY`, then what `hcna up` left in `$HCNA_HOME`
        (default `~/.hcna`).
        """)
    codes = [
        (0, "it worked"),
        (1, "it failed, or a task that was waited for did not complete"),
        (2, "the command line is wrong"),
        (3, "C1 cannot be reached"),
        (4, "C1 refused"),
        (5, "a check of this machine failed"),
        (130, "interrupted"),
    ]
    lines += table(("exit code", "means"), codes)
    lines += prose("""
        Every error is one line on stderr and ends with the command to type next; `HCNA_DEBUG=1`
        shows the traceback. `HCNA_RETRY_FOR_S` (5) is how long a C1 that is away is tried again.
        """)
    for path, text in _help(typer.main.get_command(app), "hcna", None):
        lines += [f"## `{path}`", "", "```text", text, "```", ""]
    return lines


def _help(command: Any, path: str, parent: Any) -> Iterator[tuple[str, str]]:
    context = command.make_context(
        path.rpartition(" ")[2],
        [],
        parent=parent,
        resilient_parsing=True,
        terminal_width=HELP_COLUMNS,
    )
    text = "\n".join(line.rstrip() for line in command.get_help(context).strip().splitlines())
    yield path, text
    for name, inner in getattr(command, "commands", {}).items():
        yield from _help(inner, f"{path} {name}", context)


# -- errors ----------------------------------------------------------------------------------------

#: Codes that only our own processes and commands meet.
NOT_OVER_HTTP = {
    "invalid_report",
    "invalid_query",
    "invalid_envelope",
}

#: Calls whose first argument that is a word is a code, and the status that goes with it.
RAISED_WITH_CODE = {"Invalid": 422, "BadRequest": 400}


def _codes_in_source() -> dict[str, int]:
    """Return status by code of everything that is raised or rendered with a literal code."""
    found: dict[str, int] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        below = path.relative_to(PACKAGE).parts[0]
        if below in ("cli", "client"):
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call):
                found |= _code_of_call(node)
    return found


def _code_of_call(node: ast.Call) -> dict[str, int]:
    name = getattr(node.func, "id", getattr(node.func, "attr", ""))
    words = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
    texts = [word for word in words if isinstance(word, str)]
    if name in RAISED_WITH_CODE and isinstance(node.args[:1][0], ast.Constant) and texts:
        return {texts[0]: RAISED_WITH_CODE[name]}
    if name == "NotFound" and texts:
        return {f"{texts[0]}_not_found": 404}
    if name == "refuse_field" and len(node.args) == 3 and isinstance(node.args[2], ast.Constant):
        return {texts[-1]: 422}
    if name == "problem" and len(words) >= 2 and isinstance(words[0], int):
        return {texts[0]: words[0]}
    return {}


def _codes_of_classes() -> dict[str, int]:
    """Return status by code of every error class that C1 turns into a problem."""
    found: dict[str, int] = {}
    pending: list[type[HcnaError]] = [HcnaError]
    while pending:
        kind = pending.pop()
        pending += kind.__subclasses__()
        blank = kind.__new__(kind)
        status = status_of(blank)
        if status == 500 or kind in (Conflict, CannotAccept, Invalid):
            continue  # Met by our own processes alone, or a base that nobody raises by itself.
        found[kind.code] = status
    return found


#: Codes whose class sets them when it is made: the class attribute says nothing.
MADE_WITH_CODE = {
    "unauthorized": 401,
    "forbidden": 403,
    "origin_refused": 403,
    "request_timeout": 408,
    "host_refused": 421,
    "out_of_scope": 403,
    "too_large": 413,
    "uri_too_long": 414,
    "unsupported_encoding": 415,
    "range_not_satisfiable": 416,
    "unknown_task_type": 422,
    "invalid_payload": 422,
    "headers_too_large": 431,
}
#: Only between a worker and M1, or between M1 and its store.
INTERNAL_CLASSES = {
    "stale_attempt",
    "stale_worker",
    "version_conflict",
    "artifact_too_large",
    "worker_name_taken",
}


def error_codes() -> list[str]:
    """Problems, failure kinds and pending reasons."""
    import hcna_ray.store.artifacts  # noqa: F401 - so that its error classes are known

    source, classes = _codes_in_source(), _codes_of_classes()
    found = {**classes, **source, **MADE_WITH_CODE}
    for code in INTERNAL_CLASSES | NOT_OVER_HTTP:
        found.pop(code, None)
    agree("error codes", advice.REFUSAL, found)
    agree("internal codes", advice.INTERNAL, _codes_of_ours())
    agree("failure kinds", advice.FAILURE, FailureKind)
    agree("pending reasons", advice.WAITING, _reasons_in_source())
    agree("codes of why", advice.TASK, _whys_in_source())
    lines = header("Error codes", "the errors in `hcna_ray/`")
    lines += prose("""
        Every error of C1 is `application/problem+json`
        ([RFC 9457](https://www.rfc-editor.org/rfc/rfc9457)):

        ```json
        {"type": "urn:hcna:task_not_found", "title": "Not Found", "status": 404,
         "detail": "there is no task 'task-x'", "code": "task_not_found",
         "fix": "hcna task list (GET /tasks) shows those that you may see"}
        ```

        `code` is stable and may be matched on; `detail` and `fix` are for people. `errors` lists
        `{field, message}` where fields are wrong. 429, 503, 504 and 507 carry `Retry-After`, also
        as `retry_after_s`: nothing was stored, trying again later is safe.
        """)
    order = list(advice.REFUSAL)
    ranked = sorted(order, key=lambda code: (found[code], order.index(code)))
    rows = [(found[code], f"`{code}`", *advice.REFUSAL[code]) for code in ranked]
    lines += table(("status", "code", "means", "next step (`fix`)"), rows)
    lines += prose("""
        ## Where a task stands

        `why` of `GET /tasks/{id}`, and what `hcna why ID` prints: one of the codes below, a
        sentence about this very task, and the next step.
        """)
    for title, text, codes in (
        ("It waits", "Also `pending_reason.code`.", advice.WAITING),
        ("It runs", "", advice.RUNNING),
        ("It has ended", "For a failed task also `error.kind`, where there is one.", advice.ENDED),
    ):
        lines += [f"### {title}", "", *([text, ""] if text else [])]
        lines += table(
            ("code", "means", "next step"), [(f"`{c}`", *one) for c, one in codes.items()]
        )
    return lines


def _codes_of_ours() -> set[str]:
    """Return the codes of errors that never become a problem of their own."""
    found = INTERNAL_CLASSES | NOT_OVER_HTTP
    pending: list[type[HcnaError]] = [HcnaError]
    while pending:
        kind = pending.pop()
        pending += kind.__subclasses__()
        if kind.__module__.startswith("hcna_ray.core") and status_of(kind.__new__(kind)) == 500:
            found.add(kind.code)
    return found - advice.REFUSAL.keys()


def _whys_in_source() -> set[str]:
    """Return the codes that `hcna_ray.core.why` can answer with."""
    found = _reasons_in_source() | {kind.value for kind in FailureKind}
    for node in ast.walk(ast.parse((PACKAGE / "core" / "why.py").read_text("utf-8"))):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "_say":
            if isinstance(node.args[0], ast.Constant):
                found.add(str(node.args[0].value))
        elif isinstance(node, ast.FunctionDef) and node.name == "_failure":
            returns = [one.value for one in ast.walk(node) if isinstance(one, ast.Return)]
            found |= {str(one.value) for one in returns if isinstance(one, ast.Constant)}
    return found


def _reasons_in_source() -> set[str]:
    found = set()
    for path in (PACKAGE / "core" / "placement.py", PACKAGE / "api" / "views.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "PendingReason":
                first = node.args[0]
                assert isinstance(first, ast.Constant)
                found.add(str(first.value))
    return found


# -- metrics ---------------------------------------------------------------------------------------


def metrics() -> list[str]:
    """Every metric of C1 and of a worker."""
    lines = header("Metrics", "`hcna_ray/observability/` and `hcna_ray/runtime/worker_page.py`")
    lines += prose("""
        C1 serves them at `/metrics` on its own port and on the control port, each worker its own at
        `/metrics` on `worker.worker_port`. Prometheus' text format, no key where C1 is on loopback.
        Counters of tasks, and how long they wait and run, live in the store, so a restart never
        makes them go backwards; while the store cannot be read they are left out. What M1 counts of
        itself (writer, commits, renewals) and what C1 counts of its requests begin at zero with
        each process; while M1 does not answer its figures are left out. Ids of tasks are never
        labels. `/metrics/targets` lists what to scrape; [how to monitor](../how-to/monitor.md).

        At most 200 queues have figures by name. `hcna_tasks_accepted_total` counts by name the
        first 200 that ever had a task, and all others together under `queue="(other)"`. Of the
        gauges of queues `(other)` is all but the 200 that are paused or have the most open tasks:
        the sum of their depths, the age of the oldest. `GET /status` has each queue's own depth.

        ## C1
        """)
    rows = []
    for family in families(full_sample()):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = ", ".join(getattr(family, "_labelnames", ()))
        rows.append((f"`{name}`", family.type, labels, family.documentation))
    lines += table(("name", "kind", "labels", "meaning"), rows)
    lines += ["## A worker", ""]
    return lines + table(
        ("name", "kind", "labels", "meaning"),
        [(f"`{name}`", "gauge", "worker", text) for name, text in GAUGES.items()],
    )


# -- HTTP ------------------------------------------------------------------------------------------

REQUESTS: tuple[type[BaseModel], ...] = (
    schemas.TaskIn,
    schemas.RetryIn,
    schemas.RequiresIn,
    schemas.BatchTaskIn,
    schemas.WaitIn,
    schemas.CancelIn,
    schemas.ReplayIn,
    schemas.ReplayFilterIn,
    schemas.DrainIn,
    schemas.IntentIn,
)
ANSWERS: tuple[type[BaseModel], ...] = (
    schemas.SubmitOut,
    schemas.BatchOut,
    schemas.BatchItemOut,
    schemas.TaskOut,
    schemas.PendingReasonOut,
    schemas.ProgressOut,
    schemas.FailureOut,
    schemas.AttemptOut,
    schemas.AttemptErrorOut,
    schemas.WaitOut,
    schemas.TasksOut,
    schemas.EventOut,
    schemas.CancelOut,
    schemas.ReplayOut,
    schemas.UploadOut,
    schemas.WorkerOut,
    schemas.WorkersOut,
    schemas.IntentOut,
    schemas.QueueOut,
    schemas.WhoOut,
    schemas.HealthOut,
    schemas.ReadyOut,
)


def http_api() -> list[str]:
    """Routes and shapes."""
    lines = header("HTTP API", "the routes and models in `hcna_ray/api/`")
    lines += prose("""
        A running C1 shows the same, complete, at `/docs` and, for machines, at `/openapi.json`.

        * Every route but the open ones needs `Authorization: Bearer <key>` or `X-API-Key: <key>`;
          `hcna env` prints yours.
        * Bodies are JSON whatever their Content-Type, and strict: no key twice, no NaN, at most 32
          levels, 1 MiB. An unknown field is refused. Instants are ISO 8601 with a time zone;
          answers use UTC and milliseconds.
        * `Idempotency-Key` on any submit: the same key and request give the task that was stored
          before; another request under it is a 409. In a batch it covers item *i* as `key/i`.
        * `traceparent` (W3C trace context) is kept with the task.
        * Errors: [error codes](error-codes.md).

        ## Routes
        """)
    access: dict[tuple[str, str], tuple[str, Any]] = {
        (r.method, r.path): (r.policy.role or "open", r.sort)
        for group in GROUPS
        for r in group.declared
    }
    rows = []
    for route in (route for group in GROUPS for route in group.router.routes):
        assert isinstance(route, APIRoute)
        method = next(iter(route.methods or {"GET"}))
        who, sort = access[method, route.path]
        good = "/".join(str(status) for status in route.responses if int(status) < 400)
        budget = sort.value if isinstance(sort, Sort) else "read or wait"
        rows.append((f"`{method} {route.path}`", who, budget, good, route.summary))
    lines += table(("route", "role", "budget", "answers", "does"), rows)
    lines += prose(f"""
        *Role*: the least that a key must have, or `open` to everyone; what else is held against a
        key: [who may do what](access.md). *Budget*: what the request is counted against while it
        is in progress. Budgets are apart, so that waiting clients take nothing from those who
        submit; a full one answers 503 with `Retry-After` at once. For each replica:
        `limits.writes_max`, `limits.reads_max`, `limits.waits_max`, `limits.streams_max`,
        {BATCHES_MAX} batches, {UPLOADS_MAX} uploads, {PROBES_MAX} probes.

        ## Waiting

        `GET /tasks/{{id}}?wait=30` answers as soon as the task has ended, or after 30 s as it
        stands then; 60 s at most (`limits.wait_s_max`). `POST /tasks/wait` does it for many: send
        the `cursor` of the answer before until `pending` is 0.

        ## Events

        `GET /events` and `GET /tasks/{{id}}/events` are streams of server-sent events
        (`text/event-stream`): one message for each line of history, in the order of commits, with
        an `id` and an *event* as JSON in `data`. A client that sends the last `id` as
        `Last-Event-ID`, as browsers do by themselves, is told everything behind it, once, however
        long it was away; of a task that was pruned (`limits.retention_s`) nothing is told any more.
        Without it, `/events` begins now, and the events of a task at its beginning; `?after=` is
        the same for the first connection, and `?after=0` begins with the oldest there is.

        The stream of a task ends with the task; to whoever was told its end, the answer is 204. A
        message with `event: reset` says that the store was restored from a backup since: what was
        told may not have happened. At least every 15 s there is a comment with the current `id`. A
        stream is ended after `limits.stream_s_max`, when its key is good no more, and when nothing
        of it was read for `limits.stream_send_s_max`; connect again, and it goes on.

        Kinds: `accepted` `queued` `granted` `returned` `started` `retry_scheduled` `lost`
        `unpinned` `cancel_requested` `replayed`, and as a task ends `completed` `failed`
        `cancelled` `expired`. More may come.

        ## What handlers print

        Standard output and error of an attempt are kept on the worker that ran it, up to
        `limits.output_bytes`, for 7 days (`limits.outputs_bytes` in all). `GET /tasks/{{id}}/logs`
        fetches them from there: 503 `output_unavailable` while that worker does not answer. With
        `?follow=true` the answer goes on until the attempt has ended; one that breaks off is taken
        up with `?offset=`, the bytes that came. Nothing is sent while nothing is printed: give up a
        connection that is silent for a minute, and ask again. What looks like an API key of this
        house is overwritten with stars, whatever the offset; what may be half of one at the end is
        held back while the attempt runs. Empty: nothing was printed, or it is no longer kept.

        ## Schedules

        `POST /schedules` has M1 submit a task at every instant that a cron line names. A name is
        one among its owner's; `?owner=` names somebody else's. Creating the same again is harmless,
        409 `schedule_exists` is another one of that name. 409 `schedule_busy`: it is run by hand,
        and its last task has to end first. 422 `invalid_schedule`: cron line or time zone mean
        nothing.
        [Run a task by the clock](../how-to/schedules.md).

        ## Webhooks

        A task's `webhook` is a URL that is told how it has ended: one `POST` as Standard Webhooks
        has it, signed with the caller's secret (`GET /webhooks/secret`), tried again until a 2xx
        answers or `webhooks.backoff_s` has run out. 422: the URL leads where section `webhooks`
        of the settings does not let reports go.

        ## Uploads

        `PUT /artifacts` without `Content-Range` takes a whole artifact of at most
        `limits.artifact_part_bytes` (8 MiB). Larger ones go in parts, with
        `?sha256=<hex of the whole>` and `Content-Range: bytes a-b/total`; `bytes */total` and no
        body asks how much is there. 201: complete. 202: more is wanted from byte `received`. 409
        `offset_mismatch` names that byte too, so an upload is resumed by asking.

        ## What requests hold
        """)
    for model in REQUESTS:
        lines += _shape(model, with_default=True)
    lines += ["## What answers hold", ""]
    for model in ANSWERS:
        lines += _shape(model, with_default=False)
    return lines


# -- who may do what -------------------------------------------------------------------------------

#: What each role is for, and how much it sees of the tasks of others.
ROLE_TEXTS: dict[str, str] = {
    "viewer": "Watches. Changes nothing.",
    "submitter": "Works with its own tasks: submits, looks, waits, cancels, runs again.",
    "operator": "Does that with every task, and runs the house: queues and workers.",
    "admin": "Everything. The owner's key, made at the first `hcna up`, is the first admin.",
}
VIEW_TEXTS = {
    View.NONE: "they do not exist",
    View.OUTLINE: "an outline: type, state, times, where it runs",
    View.FULL: "everything",
}


def access() -> list[str]:
    """Roles, and the policy of every route."""
    agree("roles", ROLE_TEXTS, ROLES)
    lines = header("Who may do what", "the policies beside the routes in `hcna_ray/api/routes/`")
    lines += prose("""
        Every request but those to open routes carries a key, and every key has a role. A role may
        do what those above it in this table may. Whose a task is, its key's *owner* says: by
        default the key's own name, so that each key is by itself; `hcna keys create B --owner A`
        makes another key to the tasks of A. One's own tasks every role sees in full.
        """)
    rows = [(f"`{role}`", ROLE_TEXTS[role], VIEW_TEXTS[OF_OTHERS[role]]) for role in ROLES]
    lines += table(("role", "may", "sees of the tasks of others"), rows)
    lines += prose("""
        *Outline*: payload, result, metadata, trace context and what it depends on are left out, and
        so are the words of errors and progress; `outline: true` says so.

        *Scopes* limit a key to task types (`--task-type`) and queues (`--queue`), by name or by the
        beginning of names (`drgfc.*`). It may submit nothing else, and what lies outside does not
        exist for it, whatever its role. An admin has no scopes.

        What a key may not see is answered like a name that nobody has: 404, in the same words. So
        nobody finds out ids by asking.

        *Artifacts* are their owner's: of the key's owner that has sent all of its bytes, and of the
        owner of a task that has made it (`ctx.artifact()`, or a result too large to be kept
        inline). A key that sees the tasks of others, but not all of them, sees what those that it
        sees in full have made; once it has asked for an artifact that is its owner's too. Operators
        and admins without scopes see all. A task reads what its owner may see: one that was
        submitted with a key that does not see everything is told `there is no artifact` of all
        else, on whatever worker it runs. Names in payloads and results are only words.

        Not separate: names of queues and task types, how many tasks they hold, ordering and
        concurrency keys (they are the house's: the same key of two owners is one key), and whether
        somebody has stored exactly the bytes that one has oneself.

        ## Routes

        *Role*: the least one. *Checked*: what else is held against the key, below.
        """)
    found = []
    for group in GROUPS:
        for route in group.declared:
            role = f"`{route.policy.role}`" if route.policy.role else "open"
            if route.policy.in_public:
                role += f"; `{route.policy.in_public}` where C1 is not on loopback"
            check = "" if route.policy.check is Check.NONE else f"`{route.policy.check}`"
            found.append((f"`{route.method} {route.path}`", role, check))
    lines += table(("route", "role", "checked"), found)
    lines += ["## Checks", ""]
    return lines + table(
        ("check", "means"),
        [(f"`{check}`", text) for check, text in MEANING.items() if check is not Check.NONE],
    )


def _shape(model: type[BaseModel], *, with_default: bool) -> list[str]:
    lines = [f"### `{model.__name__}`", "", cell(model.__doc__ or ""), ""]
    shown = {known.__name__ for known in REQUESTS + ANSWERS}
    own = [
        (name, info)
        for name, info in model.model_fields.items()
        if model is not schemas.BatchTaskIn or name not in schemas.TaskIn.model_fields
    ]
    if model is schemas.BatchTaskIn:
        lines += ["All fields of `TaskIn`, and:", ""]

    def link(kind: str) -> str:
        for name in _linked(kind):
            if name not in shown:
                kind = kind.replace(f"[`{name}`](#{name.lower()})", "object")
        return kind

    if with_default:
        rows = [
            (
                f"`{n}`",
                link(kind_of(i.annotation)),
                default_of(i),
                bounds_of(i),
                i.description or "",
            )
            for n, i in own
        ]
        return lines + table(("field", "kind", "default", "bounds", "meaning"), rows)
    return lines + table(
        ("field", "kind"), [(f"`{name}`", link(_with_null(info))) for name, info in own]
    )


def _linked(kind: str) -> Iterator[str]:
    for piece in kind.split("[`")[1:]:
        yield piece.partition("`]")[0]


def _with_null(info: FieldInfo) -> str:
    kind = kind_of(Annotated[info.annotation, *info.metadata] if info.metadata else info.annotation)
    return f"{kind} or null" if NoneType in get_args(info.annotation) else kind


# -- the program -----------------------------------------------------------------------------------

BUILDERS: dict[str, Callable[[], list[str]]] = {
    "access.md": access,
    "cli.md": cli,
    "configuration.md": configuration,
    "error-codes.md": error_codes,
    "http-api.md": http_api,
    "metrics.md": metrics,
    "ports.md": ports,
}


def pages() -> dict[Path, str]:
    """Return every generated page with its text.

    Raises:
        Stale: Something in the code has no sentence here, or the other way round.
    """
    return {PAGES / name: "\n".join(build()).rstrip() + "\n" for name, build in BUILDERS.items()}


def main(arguments: Sequence[str]) -> int:
    """Write the pages, or check them; return 0 if all is well."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail if stale")
    check = parser.parse_args(arguments).check
    try:
        found = pages()
    except Stale as stale:
        sys.stderr.write(f"{stale}\n")
        return 1
    stale_pages = [
        path for path, text in found.items() if not path.exists() or path.read_text("utf-8") != text
    ]
    for path in stale_pages:
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(found[path], "utf-8")
        sys.stderr.write(f"{'stale' if check else 'wrote'} {path.relative_to(ROOT)}\n")
    if check and stale_pages:
        sys.stderr.write("write them anew: make docs\n")
    return 1 if check and stale_pages else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
