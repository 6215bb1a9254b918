"""``/openapi.json``, and ``/docs`` made from it: one plain page, no script, all of it from here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

DESCRIPTION = """\
Everything behind one API: submit tasks, wait for them, move files, look after workers.

Errors are RFC 9457 problem details with a stable `code`. Send a key as `Authorization: Bearer
<key>` or `X-API-Key: <key>`; `hcna env` prints yours.

Every answer has an `X-Request-ID`: the one you sent (1 to 128 letters, digits and `._:/+=@-`), or
one made for it. C1's log lines about your request carry it as `request_id`, as do problems."""

SECURITY = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "apiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}


def build(app: FastAPI, models: Iterable[type[BaseModel]], version: str) -> dict[str, Any]:
    """Return the OpenAPI document of ``app`` with the schemas of ``models``."""
    document: dict[str, Any] = get_openapi(
        title="hcna C1", version=version, description=DESCRIPTION, routes=app.routes
    )
    unique = sorted(set(models), key=lambda model: model.__name__)
    _, schemas = models_json_schema(
        [(model, "validation") for model in unique], ref_template="#/components/schemas/{model}"
    )
    components = document.setdefault("components", {})
    components["schemas"] = schemas["$defs"]
    components["securitySchemes"] = SECURITY
    _speak_ecma(document)
    return document


def _speak_ecma(part: Any) -> None:
    r"""Write patterns in OpenAPI's dialect: there the end of a text is ``$``, and ``\z`` is a z."""
    if isinstance(part, dict):
        pattern = part.get("pattern")
        if isinstance(pattern, str) and pattern.endswith(r"\z"):
            part["pattern"] = pattern.removesuffix(r"\z") + "$"
        part = list(part.values())
    if isinstance(part, list):
        for one in part:
            _speak_ecma(one)


_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;
color:#1a1a1a}
code,pre{font:14px/1.4 ui-monospace,monospace;background:#f3f3f3}
code{padding:0 .2em}pre{padding:.6em;overflow:auto}
h2{margin-top:2.5rem;border-bottom:1px solid #ccc}h3{margin-top:2rem}
table{border-collapse:collapse;width:100%}td,th{text-align:left;vertical-align:top;
border-bottom:1px solid #ddd;padding:.2rem .6rem .2rem 0}
.m{display:inline-block;min-width:4.5rem;font-weight:700}
@media (prefers-color-scheme:dark){body{background:#161616;color:#e8e8e8}
code,pre{background:#262626}a{color:#8ab4f8}}
"""


def render_page(document: Mapping[str, Any]) -> str:
    """Return the reference as one HTML page."""
    info = document["info"]
    groups: dict[str, list[tuple[str, str, Mapping[str, Any]]]] = {}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            tag = (operation.get("tags") or ["other"])[0]
            groups.setdefault(tag, []).append((method.upper(), path, operation))
    parts = [
        "<!doctype html><html lang=en><head><meta charset=utf-8>",
        "<meta name=viewport content='width=device-width,initial-scale=1'>",
        f"<title>{escape(info['title'])} reference</title><style>{_STYLE}</style></head><body>",
        f"<h1>{escape(info['title'])} {escape(info['version'])}</h1>",
        f"<p>{_text(info.get('description', ''))}</p>",
        "<p>The same for machines: <a href=openapi.json>openapi.json</a></p><nav><ul>",
    ]
    for operations in groups.values():
        for method, path, operation in operations:
            anchor = escape(operation["operationId"])
            parts.append(
                f"<li><a href='#{anchor}'><code>{method} {escape(path)}</code></a> "
                f"{escape(operation.get('summary', ''))}</li>"
            )
    parts.append("</ul></nav>")
    for tag, operations in groups.items():
        parts.append(f"<h2>{escape(tag)}</h2>")
        for method, path, operation in operations:
            parts += _operation(method, path, operation)
    parts.append("<h2>shapes</h2>")
    for name, schema in document["components"]["schemas"].items():
        parts += _shape(name, schema)
    parts.append("</body></html>")
    return "\n".join(parts)


def _operation(method: str, path: str, operation: Mapping[str, Any]) -> Sequence[str]:
    role = operation.get("x-hcna-role", "open")
    access = "open to everyone" if role == "open" else f"needs a key of role {role}, or higher"
    parts = [
        f"<h3 id='{escape(operation['operationId'])}'><span class=m>{method}</span> "
        f"<code>{escape(path)}</code></h3>",
        f"<p>{_text(operation.get('summary', ''))} <i>({access})</i></p>",
        f"<p>{_text(operation.get('description', ''))}</p>",
    ]
    if parameters := operation.get("parameters"):
        parts.append("<table><tr><th>parameter<th>in<th>meaning")
        parts += [
            f"<tr><td><code>{escape(parameter['name'])}</code><td>{parameter['in']}"
            f"<td>{_text(parameter.get('description', ''))} {_kind(parameter['schema'])}"
            for parameter in parameters
        ]
        parts.append("</table>")
    if body := operation.get("requestBody"):
        kinds = ", ".join(
            f"<code>{escape(media)}</code> {_kind(content['schema'])}"
            for media, content in body["content"].items()
        )
        parts.append(f"<p>Body: {kinds}</p>")
    parts.append("<table><tr><th>status<th>answer")
    for status, response in operation["responses"].items():
        kinds = ", ".join(
            _kind(content.get("schema", {})) for content in response.get("content", {}).values()
        )
        parts.append(f"<tr><td>{escape(str(status))}<td>{_text(response['description'])} {kinds}")
    parts.append("</table>")
    return parts


def _shape(name: str, schema: Mapping[str, Any]) -> Sequence[str]:
    parts = [
        f"<h3 id='shape-{escape(name)}'><code>{escape(name)}</code></h3>",
        f"<p>{_text(schema.get('description', ''))}</p>",
    ]
    if properties := schema.get("properties"):
        required = schema.get("required", ())
        parts.append("<table><tr><th>field<th>kind<th>meaning")
        for field, about in properties.items():
            mark = "" if field in required else "?"
            parts.append(
                f"<tr><td><code>{escape(field)}{mark}</code><td>{_kind(about)}"
                f"<td>{_text(about.get('description', ''))}"
            )
        parts.append("</table>")
    return parts


def _kind(schema: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        name = escape(schema["$ref"].rsplit("/", 1)[-1])
        return f"<a href='#shape-{name}'>{name}</a>"
    if "anyOf" in schema:
        return " or ".join(_kind(one) for one in schema["anyOf"])
    if "enum" in schema:
        return " | ".join(f"<code>{escape(str(value))}</code>" for value in schema["enum"])
    if "const" in schema:
        return f"<code>{escape(str(schema['const']))}</code>"
    kind = escape(str(schema.get("format") or schema.get("type") or "any"))
    if "items" in schema:
        return f"{kind} of {_kind(schema['items'])}"
    bounds = [
        f"{sign} {schema[name]}"
        for name, sign in (
            ("minimum", ">="),
            ("exclusiveMinimum", ">"),
            ("maximum", "<="),
            ("maxLength", "length <="),
            ("maxItems", "items <="),
        )
        if name in schema
    ]
    return f"{kind} ({escape(', '.join(bounds))})" if bounds else kind


def _text(text: str) -> str:
    """Escape prose and set what stands between backticks as code."""
    pieces = escape(text).replace("``", "`").split("`")
    return "".join(
        f"<code>{piece}</code>" if index % 2 else piece for index, piece in enumerate(pieces)
    )
