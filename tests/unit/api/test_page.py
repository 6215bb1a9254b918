from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest

from hcna_ray.api import schemas
from hcna_ray.api.page import FOLDER, INDEX, VENDORED, page_files
from tests.support.builders import T0
from tests.support.c1 import USER_KEY, Composite

#: Addresses that are names, and nothing that a browser asks for.
NAMES = {"http://www.w3.org/2000/svg"}


async def test_the_page_comes_without_a_key_and_may_load_nothing_from_elsewhere(
    c1: Composite,
) -> None:
    async with c1.client(None) as stranger:
        reply = await stranger.get("/ui")
    assert (reply.status_code, reply.headers["content-type"]) == (200, "text/html; charset=utf-8")
    policy = dict(
        part.split(" ", 1) for part in reply.headers["content-security-policy"].split("; ")
    )
    assert policy.pop("default-src") == "'none'"
    assert {policy.pop(f"{kind}-src") for kind in ("script", "style", "img", "connect")} == {
        "'self'"
    }
    assert policy == {
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    assert reply.headers["referrer-policy"] == "no-referrer"
    assert reply.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("name", sorted(page_files()))
async def test_every_file_is_served_under_the_same_policy(c1: Composite, name: str) -> None:
    async with c1.client(None) as stranger:
        page = await stranger.get("/ui")
        reply = await stranger.get(f"/ui/{name}")
    assert reply.status_code == 200
    assert reply.content == (FOLDER / name).read_bytes()
    same = ("content-security-policy", "cache-control", "x-content-type-options")
    assert [reply.headers[one] for one in same] == [page.headers[one] for one in same]


async def test_a_file_is_sent_again_only_when_it_has_changed(c1: Composite) -> None:
    first = await c1.http.get("/ui")
    again = await c1.http.get("/ui", headers={"If-None-Match": first.headers["etag"]})
    other = await c1.http.get("/ui", headers={"If-None-Match": '"of another version"'})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == first.headers["etag"]
    assert other.content == first.content


@pytest.mark.parametrize(
    "name", ["nothing.js", "LICENSE.preact", "..%2Fpage.py", "%2e%2e", "page.py"]
)
async def test_nothing_else_is_handed_out(c1: Composite, name: str) -> None:
    reply = await c1.http.get(f"/ui/{name}")
    assert reply.status_code == 404
    assert reply.headers["content-type"] == "application/problem+json"


def test_what_is_not_ours_is_as_its_makers_published_it() -> None:
    for name, about in VENDORED.items():
        content = (FOLDER / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == about.sha256, name
        assert about.source.partition(" ")[0].replace("@", "-") + ".js" == name
        assert (FOLDER / about.licence_file).stat().st_size > 1000


def test_every_file_is_named_by_another_one_and_every_name_is_a_file() -> None:
    """Nothing comes from outside, nothing is missing, nothing lies about."""
    served = page_files()
    named = set(re.findall(r'(?:href|src)="ui/([^"]+)"', served[INDEX].content.decode()))
    for name, file in served.items():
        text = file.content.decode()
        if name.endswith(".js"):
            named |= set(re.findall(r'from ?"\./([^"]+)"', text))
        if name not in VENDORED:
            assert set(re.findall(r"https?://[^\"'\s)]+", text)) <= NAMES, name
    assert named == set(served) - {INDEX}
    licences = {about.licence_file for about in VENDORED.values()}
    assert {path.name for path in Path(FOLDER).iterdir()} == set(served) | licences


def test_no_text_becomes_markup_or_a_program() -> None:
    """What a submitter wrote is shown as text; the key is in the tab's store alone."""
    for name, file in page_files().items():
        if name in VENDORED or not name.endswith(".js"):
            continue
        text = file.content.decode()
        for never in (
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "new Function",
            "dangerouslySetInnerHTML",
            "localStorage",
            "document.cookie",
        ):
            assert never not in text, (name, never)
        assert ("sessionStorage" in text) == (name == "c1.js"), name


async def test_a_key_is_told_what_it_is(c1: Composite) -> None:
    c1.keys.add(
        "hcna_night",
        name="night",
        role="operator",
        owner="guest",
        queues=("n*",),
        expires_at=T0 + 60,
    )
    async with c1.client("hcna_night") as night, c1.client(USER_KEY) as guest:
        scoped = (await night.get("/whoami")).json()
        plain = (await guest.get("/whoami")).json()
    schemas.WhoOut.model_validate(scoped)
    assert scoped == {
        "name": "night",
        "role": "operator",
        "owner": "guest",
        "task_types": [],
        "queues": ["n*"],
        "expires_at": "2026-01-01T00:01:00.000Z",
    }
    assert (plain["role"], plain["owner"], plain["expires_at"]) == ("submitter", "guest", None)
