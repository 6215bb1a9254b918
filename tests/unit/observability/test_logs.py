from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from hcna_ray.observability import logs


@pytest.fixture(autouse=True)
def leave_logging_as_it_was() -> Iterator[None]:
    log = logging.getLogger("hcna_ray")
    before = (log.level, log.propagate)
    yield
    for handler in log.handlers[:]:
        log.removeHandler(handler)
        handler.close()
    log.level, log.propagate = before


def test_a_line_is_one_object_with_its_fields(tmp_path: Path) -> None:
    stream = io.StringIO()
    file = tmp_path / "logs" / "composite.log"
    logs.configure(file, stream=stream, fields={"node_id": "HCNA-C1"})
    log = logging.getLogger("hcna_ray.api.test")

    log.info("two\nlines ä", extra={"action": "test.done", "count": 2, "where": Path("/x")})
    log.debug("too quiet")

    (text,) = file.read_text(encoding="utf-8").splitlines()
    assert text + "\n" == stream.getvalue()
    line = json.loads(text)
    assert line.pop("at").endswith("Z")
    assert line == {
        "level": "info",
        "logger": "hcna_ray.api.test",
        "message": "two\nlines ä",
        "node_id": "HCNA-C1",
        "action": "test.done",
        "count": 2,
        "where": "/x",
    }


def test_an_exception_goes_into_its_line() -> None:
    stream = io.StringIO()
    logs.configure(stream=stream)
    try:
        raise ValueError("no")
    except ValueError:
        logging.getLogger("hcna_ray").exception("failed", extra={"action": "test.failed"})

    line = json.loads(stream.getvalue())
    assert line["exception"].endswith("ValueError: no")


def test_configuring_twice_writes_each_line_once() -> None:
    stream = io.StringIO()
    logs.configure(stream=io.StringIO())
    logs.configure(stream=stream)
    logging.getLogger("hcna_ray").warning("once")
    assert len(stream.getvalue().splitlines()) == 1
