"""What ``/openapi.json`` says where no fuzzer comes by: schemathesis asks the rest (tests/fuzz)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.c1 import Composite


@pytest.fixture
async def document(c1: Composite) -> dict[str, Any]:
    reply = await c1.http.get("/openapi.json")
    found: dict[str, Any] = reply.json()
    return found


def values_of(part: Any, name: str) -> Iterator[Any]:
    if isinstance(part, dict):
        if name in part:
            yield part[name]
        part = list(part.values())
    if isinstance(part, list):
        for one in part:
            yield from values_of(one, name)


async def test_patterns_are_in_the_dialect_of_openapi(document: dict[str, Any]) -> None:
    patterns = [one for one in values_of(document, "pattern") if isinstance(one, str)]
    assert len(patterns) > 20
    assert not [one for one in patterns if re.search(r"\\[zAZ]", one)]
    assert all(one.startswith("^") and one.endswith("$") for one in patterns)


async def test_every_refusal_has_the_shape_of_a_problem(document: dict[str, Any]) -> None:
    seen = 0
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            for status, answer in operation["responses"].items():
                if int(status) < 400:
                    continue
                shape = answer["content"]["application/problem+json"]["schema"]
                assert shape == {"$ref": "#/components/schemas/ProblemOut"}, (path, method, status)
                seen += 1
    assert seen > 200


async def test_a_probe_that_says_503_itself_is_documented_so(
    c1: Composite, document: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    c1.moderator.down = True
    c1.services.cache.forget()
    reply = await c1.http.get("/ready")
    assert (reply.status_code, reply.headers["content-type"]) == (503, "application/json")
    answer = document["paths"]["/ready"]["get"]["responses"]["503"]
    assert set(answer["content"]) == {"application/json", "application/problem+json"}
    assert not answer["headers"]["Retry-After"]["required"]


@pytest.mark.parametrize("path", ["/tasks/batch", "/tasks/wait", "/tasks/retry"])
@pytest.mark.parametrize("method", ["GET", "DELETE", "PUT", "OPTIONS"])
async def test_a_path_that_is_written_out_is_no_task(path: str, method: str, c1: Composite) -> None:
    reply = await c1.http.request(method, path)
    assert (reply.status_code, reply.headers["allow"]) == (405, "POST")
    assert reply.json()["code"] == "method_not_allowed"


async def test_the_patterns_refuse_what_the_models_refuse(
    c1: Composite, document: dict[str, Any]
) -> None:
    """``$`` in OpenAPI is the very end: a name with a line break behind it fits neither."""
    text = json.dumps({"task_type": "echo", "queue": "a\n"})
    reply = await c1.http.post("/tasks", content=text)
    assert reply.status_code == 422
    queue = document["components"]["schemas"]["TaskIn"]["properties"]["queue"]
    assert not re.fullmatch(queue["pattern"].removesuffix("$"), "a\n")
