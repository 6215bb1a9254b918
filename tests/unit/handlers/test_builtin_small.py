"""``echo``, ``test.ping`` and ``sleep``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hcna_ray.core.models import Outcome
from hcna_ray.handlers import InvalidPayload, Registry, load_registry, run_handler

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@pytest.mark.parametrize(
    ("name", "payload"),
    [
        ("echo", {}),
        ("echo", {"msg": "test"}),
        ("echo", {"message": "Hello, HCNA-3!"}),
        ("echo", {"id": 100}),
        ("test.ping", {}),
        ("qegg.generate", {"grid_level": 4, "output_formats": ["glb", "obj"]}),
        (
            "drgfc.compress",
            {"input_file": "/data/my_file.txt", "output_file": "/data/my_file.drgfc"},
        ),
    ],
)
def test_the_payloads_of_the_guide_are_accepted(
    registry: Registry, name: str, payload: dict[str, object]
) -> None:
    model = registry.get(name).validate_payload(json.dumps(payload).encode())
    registry.get(name).check_worker_paths(model, "/data")


@given(st.dictionaries(st.text(), JSON))
def test_echo_returns_every_field(fields: dict[str, Any]) -> None:
    echo = load_registry().get("echo")
    payload = echo.validate_payload(json.dumps(fields).encode())
    assert echo.handler(payload) == fields


def test_echo_runs(context: Any, registry: Registry) -> None:
    raw = b'{"msg":"h\xc3\xa4","model_config":{"a":[1,null]},"items":[]}'
    assert run_handler(registry.get("echo"), raw, context("echo")).result == raw


def test_ping_names_its_node_and_time(context: Any, registry: Registry) -> None:
    outcome = run_handler(registry.get("test.ping"), b"{}", context("test.ping"))

    answer = json.loads(outcome.result or b"")
    assert (answer["pong"], answer["node"]) == (True, "HCNA-W1--prod--home--v1.0")
    assert answer["time"].endswith("Z")
    assert datetime.now(UTC) - datetime.fromisoformat(answer["time"]) < timedelta(minutes=1)


def sleep(context: Any, payload: Mapping[str, object], **changes: Any) -> Any:
    raw = json.dumps(payload).encode()
    return run_handler(load_registry().get("sleep"), raw, context("sleep", **changes))


def test_sleep_reports_its_steps(context: Any, effects: Any, clock: Any) -> None:
    outcome = sleep(context, {"seconds": 8, "steps": 4})

    assert json.loads(outcome.result) == {"slept_s": 8, "resumed_s": 0}
    assert clock() == pytest.approx(1008)
    assert effects.progress[0] == (25, "slept 2 of 8 s")
    assert [percent for percent, _ in effects.progress] == [25, 50, 75, 100]
    assert effects.checkpoints == []


def test_sleep_ends_when_cancelled(context: Any, effects: Any, clock: Any) -> None:
    effects.cancel_after = 20
    assert sleep(context, {"seconds": 86400}).outcome is Outcome.CANCELLED
    assert clock() < 1003


def test_a_resumed_sleep_sleeps_only_the_rest(context: Any, effects: Any, clock: Any) -> None:
    asked = {"seconds": 10, "resume": True}
    effects.cancel_after = 65  # In the middle of the sixth second, at ten looks a second.
    sleep(context, asked)
    effects.cancel_after = None
    clock.now = 2000.0

    outcome = sleep(context, asked, last_checkpoint=effects.checkpoints[-1], attempt=2)

    answer = json.loads(outcome.result)
    assert answer["resumed_s"] > 0
    assert answer["slept_s"] + answer["resumed_s"] == 10
    assert clock() == pytest.approx(2000 + answer["slept_s"])


@pytest.mark.parametrize("checkpoint", [b"5", b'{"steps_done":"x"}', b'{"steps_done":99}', b"{}"])
def test_a_foreign_checkpoint_does_no_harm(context: Any, checkpoint: bytes) -> None:
    outcome = sleep(context, {"seconds": 1, "resume": True}, last_checkpoint=checkpoint)
    assert outcome.outcome is Outcome.COMPLETED


@pytest.mark.parametrize(
    "payload",
    [
        {},
        {"seconds": -1},
        {"seconds": 86401},
        {"seconds": "5"},
        {"seconds": True},
        {"seconds": 1, "steps": 0},
        {"seconds": 1, "minutes": 1},
    ],
)
def test_sleep_refuses_what_is_out_of_bounds(
    registry: Registry, payload: dict[str, object]
) -> None:
    with pytest.raises(InvalidPayload):
        registry.get("sleep").validate_payload(payload)
