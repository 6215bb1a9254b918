"""Strict JSON for payloads, results and checkpoints: RFC 8259, UTF-8, no NaN, string keys only."""

from __future__ import annotations

import json

import msgspec
from pydantic_core import to_jsonable_python


def decode(raw: bytes) -> object:
    """Parse ``raw``.

    Raises:
        ValueError: It is not JSON, not UTF-8 or nested too deeply.
    """
    try:
        parsed: object = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"is not JSON: {error}") from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    return parsed


def encode(value: object) -> bytes:
    """Return ``value`` as JSON.

    Beyond JSON's own types it takes models, dataclasses, dates, UUIDs, enums, paths and sets.

    Raises:
        ValueError: It holds NaN or an infinity, a key that is no string, a circle, bytes that are
            not UTF-8, or something JSON has no word for. A `TypeError` is turned into this too.
    """
    try:
        _check_keys(value)
        text = json.dumps(
            value, ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_encode_other
        )
        return text.encode()
    except RecursionError:
        raise ValueError("it is nested too deeply for JSON") from None
    except UnicodeEncodeError:
        raise ValueError("it holds half of a surrogate pair, which UTF-8 cannot carry") from None
    except TypeError as error:
        raise ValueError(str(error)) from None


def _encode_other(value: object) -> object:
    # "constants" keeps NaN as NaN, so that json refuses it instead of writing null.
    plain: object = to_jsonable_python(value, inf_nan_mode="constants")
    _check_keys(plain)
    return plain


def _check_keys(value: object) -> None:
    """Refuse keys that are no strings: json would turn 1 and "1" into the same key, twice."""
    stack = [value]
    seen: set[int] = set()
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            if id(item) in seen:
                continue
            seen.add(id(item))
            for key in item:
                if not isinstance(key, str):
                    raise ValueError(f"it has a key that is no string: {key!r}"[:200])
            stack.extend(v for v in item.values() if isinstance(v, (dict, list, tuple)))
        elif isinstance(item, (list, tuple)):
            if id(item) in seen:
                continue
            seen.add(id(item))
            stack.extend(v for v in item if isinstance(v, (dict, list, tuple)))
