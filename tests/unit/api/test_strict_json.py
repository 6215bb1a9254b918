from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hcna_ray.api import strict_json
from hcna_ray.api.problems import BadRequest

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(strict_json.INT_MIN, strict_json.INT_MAX)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=30,
)


@given(values)
def test_what_is_good_json_is_read_as_it_is(value: Any) -> None:
    for ascii_only in (True, False):
        try:
            raw = json.dumps(value, ensure_ascii=ascii_only).encode()
        except UnicodeEncodeError:
            return
        assert strict_json.parse(raw) == value


@given(st.binary(max_size=200) | st.text('{}[]",:\\u01dDeE+-. ', max_size=200).map(str.encode))
def test_anything_is_read_or_refused_and_never_breaks(raw: bytes) -> None:
    try:
        value = strict_json.parse(raw)
    except BadRequest:
        return
    assert json.loads(raw) == value


@pytest.mark.parametrize("depth", [31, 32, 33])
@pytest.mark.parametrize(("left", "right"), [(b"[", b"]"), (b'{"a":', b"}")])
def test_the_limit_of_depth_is_exact(depth: int, left: bytes, right: bytes) -> None:
    raw = left * depth + b"1" + right * depth
    if depth <= 32:
        strict_json.parse(raw)
        return
    with pytest.raises(BadRequest) as caught:
        strict_json.parse(raw)
    assert caught.value.code == "too_deep"


def test_brackets_inside_of_strings_do_not_count() -> None:
    text = "[{" * 100 + '\\"' * 3
    assert strict_json.parse(json.dumps([text, [[text]]]).encode()) == [text, [[text]]]


@pytest.mark.parametrize(
    "raw",
    [
        b'["' + b'\\"' * 500_000,
        b"[" * 33 + b'"' + b'\\"' * 500_000,
        b'"' * 1_000_000,
        b"\\" * 1_000_000,
        b"{" * 1_000_000,
        b"-" * 1_000_000,
        b"1" * 1_000_000,
        b"1e" + b"9" * 1_000_000,
        b"[" + b"[]," * 300_000 + b"[]]",
    ],
    ids=lambda raw: raw[:12].decode(),
)
def test_no_megabyte_takes_long(raw: bytes) -> None:
    """Quadratic would be minutes, and run into the suite's limit of one test."""
    try:
        strict_json.parse(raw)
    except BadRequest:
        pass


def test_the_stack_is_never_the_limit() -> None:
    frames = sys.getrecursionlimit()
    with pytest.raises(BadRequest):
        strict_json.parse(b"[" * (frames * 10))
