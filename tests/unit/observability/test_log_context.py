"""Lines that say what they are about without being told each time."""

from __future__ import annotations

import io
import json
import logging

import pytest

from hcna_ray.observability import logs
from hcna_ray.observability.log_context import current_fields, lines_about, names_of

TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def test_every_line_inside_names_the_attempt_and_its_trace() -> None:
    stream = io.StringIO()
    logs.configure(stream=stream, fields={"node": "W1"})
    log = logging.getLogger("hcna_ray.test")

    with lines_about(names_of("t1", 2, TRACE)):
        log.info("inside")
        with lines_about({"step": 1}):
            log.info("deeper", extra={"attempt": 7})
    log.info("outside")

    inside, deeper, outside = map(json.loads, stream.getvalue().splitlines())
    names = {"task_id": "t1", "attempt": 2, "trace_id": "4bf92f3577b34da6a3ce929d0e0e4736"}
    assert inside.items() >= {**names, "node": "W1"}.items()
    assert deeper.items() >= {**names, "attempt": 7, "step": 1}.items()
    assert not outside.keys() & {*names, "step"}


def test_an_error_inside_leaves_nothing_behind() -> None:
    with pytest.raises(ValueError, match="no"), lines_about({"task_id": "t1"}):
        raise ValueError("no")

    assert current_fields() == {}


def test_what_is_in_no_trace_says_nothing_of_one() -> None:
    assert names_of("t1", 1, None) == {"task_id": "t1", "attempt": 1}
