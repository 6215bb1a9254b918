from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from hcna_ray.observability import logs


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


def test_what_a_library_adds_to_every_record_for_itself_is_left_out() -> None:
    usual = logging.getLogRecordFactory()

    def with_more(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = usual(*args, **kwargs)
        record.__dict__["_its_own"] = 1
        return record

    stream = io.StringIO()
    logs.configure(stream=stream)
    logging.setLogRecordFactory(with_more)
    try:
        logging.getLogger("hcna_ray.api.test").info("done", extra={"count": 2})
    finally:
        logging.setLogRecordFactory(usual)

    line = json.loads(stream.getvalue())
    assert line["count"] == 2
    assert "_its_own" not in line


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


def lines_of(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_what_is_secret_by_its_name_is_not_written() -> None:
    stream = io.StringIO()
    logs.configure(stream=stream)
    deep: object = "deep down"
    for _ in range(30):
        deep = [deep]
    logging.getLogger("hcna_ray.test").info(
        "hello",
        extra={
            "api_key": "s1",
            "headers": {"Authorization": "s2", "X-API-Key": "s3", "accept": "text/plain"},
            "items": [{"refreshToken": "s4"}, ({"Client-Secret": "s5"},)],
            "deep": deep,
            "task_id": "task-1",
        },
    )
    (line,) = lines_of(stream)
    assert not [word for word in ("s1", "s2", "s3", "s4", "s5", "deep down") if word in str(line)]
    assert line["headers"] == {"Authorization": "***", "X-API-Key": "***", "accept": "text/plain"}
    assert line["task_id"] == "task-1"


def test_an_api_key_is_not_written_wherever_it_stands() -> None:
    stream = io.StringIO()
    logs.configure(stream=stream)
    key = "hcna_" + "aB3_-" * 8 + "xyz"
    log = logging.getLogger("hcna_ray.test")
    try:
        raise ValueError(key)
    except ValueError as error:
        log.warning("refused %s", key, exc_info=True, extra={"why": error, "url": f"/?k={key}"})
    assert key not in stream.getvalue()
    (line,) = lines_of(stream)
    assert line["message"] == "refused ***"
    assert line["url"] == "/?k=***"


def test_levels_are_set_by_module_and_forgotten_again() -> None:
    stream = io.StringIO()
    logs.configure(stream=stream, levels="warning, hcna.api=debug,hcna_ray.store.sqlite=trace")
    for name in ("hcna_ray.api.gather", "hcna_ray.store.sqlite", "hcna_ray.store.memory"):
        log = logging.getLogger(name)
        log.log(logs.TRACE, "trace")
        log.debug("debug")
        log.info("info")
    assert [(line["logger"], line["level"]) for line in lines_of(stream)] == [
        ("hcna_ray.api.gather", "debug"),
        ("hcna_ray.api.gather", "info"),
        ("hcna_ray.store.sqlite", "trace"),
        ("hcna_ray.store.sqlite", "debug"),
        ("hcna_ray.store.sqlite", "info"),
    ]
    logs.configure(stream=stream, levels="")
    assert logging.getLogger("hcna_ray.api").level == logging.NOTSET
    assert logging.getLogger("hcna_ray").level == logging.INFO


def test_the_environment_sets_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HCNA_LOG", "error")
    logs.configure(stream=io.StringIO())
    assert logging.getLogger("hcna_ray").level == logging.ERROR


@pytest.mark.parametrize("levels", ["loud", "ray=debug", "hcna_ray.api=", "hcna_rays=info"])
def test_levels_that_make_no_sense_are_said_and_left_aside(levels: str) -> None:
    stream = io.StringIO()
    logs.configure(stream=stream, levels=levels)
    (line,) = lines_of(stream)
    assert line["action"] == "logs.levels_refused"
    assert logging.getLogger("hcna_ray").level == logging.INFO
