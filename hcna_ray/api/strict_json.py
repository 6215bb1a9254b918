"""JSON as RFC 8259 and RFC 7493 mean it: what two parsers could read differently is refused.

UTF-8 without BOM, no key twice, no NaN or infinity (``1e999`` included), integers that fit into 64
bits, no half surrogate pairs. Nesting and keys are bounded before the recursive parser starts, so
that no document can exhaust the stack.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

from hcna_ray.api.problems import BadRequest

DEPTH_MAX = 32
#: Keys of one object. A record with more is data, and data belongs into an artifact.
KEYS_MAX = 1000
INT_MIN, INT_MAX = -(2**63), 2**64 - 1

_BOM = b"\xef\xbb\xbf"
# Possessive, and an open string runs to the end: linear in the input whatever it holds.
_STRUCTURE = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\Z)|[\[{]|[\]}]', re.DOTALL)
_LONG_DIGITS = re.compile(rb"[0-9]{19}")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse(raw: bytes, *, depth_max: int = DEPTH_MAX, keys_max: int = KEYS_MAX) -> Any:
    """Parse one JSON document.

    Args:
        raw: The document, bytes as received.
        depth_max: Objects and arrays that may be nested in each other.
        keys_max: Keys that one object may have.

    Raises:
        BadRequest: ``malformed_json``, ``duplicate_key``, ``too_deep``, ``not_finite``,
            ``too_many_keys`` or ``number_out_of_range``.
    """
    if raw.startswith(_BOM):
        raise BadRequest("malformed_json", "the body starts with a byte order mark; send none")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRequest("malformed_json", f"the body is not UTF-8 at byte {error.start}") from None
    if not text.strip(" \t\r\n"):
        raise BadRequest("malformed_json", "the body is empty; send a JSON object")
    _check_depth(raw, depth_max)

    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            _refuse_duplicate(pairs)
        if len(found) > keys_max:
            raise BadRequest(
                "too_many_keys",
                f"an object has {len(found)} keys, at most {keys_max} are allowed; "
                "put the data into an artifact",
            )
        return found

    try:
        value = json.loads(
            text,
            object_pairs_hook=build,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_bounded if _LONG_DIGITS.search(raw) else int,
        )
    except json.JSONDecodeError as error:
        raise BadRequest(
            "malformed_json",
            f"the body is not JSON: {error.msg} (line {error.lineno}, column {error.colno})",
        ) from None
    if _SURROGATE.search(raw):
        _check_surrogates(value)
    return value


def _check_depth(raw: bytes, depth_max: int) -> None:
    if raw.count(b"{") + raw.count(b"[") <= depth_max:
        return
    depth = 0
    for match in _STRUCTURE.finditer(raw):
        token = match[0]
        if token in (b"{", b"["):
            depth += 1
            if depth > depth_max:
                raise BadRequest("too_deep", f"the JSON is nested more than {depth_max} deep")
        elif token in (b"}", b"]"):
            depth -= 1


def _refuse_duplicate(pairs: list[tuple[str, Any]]) -> NoReturn:
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            raise BadRequest("duplicate_key", f"the key {key[:100]!r} is given twice")
        seen.add(key)
    raise AssertionError("no key is there twice")


def _refuse_constant(name: str) -> NoReturn:
    raise BadRequest("not_finite", f"{name} is not JSON; only finite numbers are")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise BadRequest("not_finite", f"the number {text[:40]} is too large for a double")
    return value


def _bounded(text: str) -> int:
    if len(text) > 20 or not INT_MIN <= (value := int(text)) <= INT_MAX:
        raise BadRequest(
            "number_out_of_range",
            f"the integer {text[:40]} does not fit into 64 bits; send it as a string",
        )
    return value


def _check_surrogates(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise BadRequest(
            "malformed_json", "a string holds half of a surrogate pair, which is no character"
        ) from None
