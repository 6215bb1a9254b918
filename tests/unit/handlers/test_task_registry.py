"""Registering, finding and loading task types."""

from __future__ import annotations

import pickle
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field, field_validator

from hcna_ray.core.models import RetryPolicy
from hcna_ray.handlers import (
    DuplicateTaskType,
    InvalidPayload,
    OptionalWorkerPath,
    Payload,
    Registry,
    TaskContext,
    TaskDefaults,
    TaskType,
    UnknownTaskType,
)
from hcna_ray.handlers.registry import AnyPayload

BUILTIN = [
    "drgfc.compress",
    "drgfc.decompress",
    "echo",
    "qegg.generate",
    "sleep",
    "test.ping",
]


class Words(Payload):
    text: str = Field(min_length=1)
    parts: list[int] = Field(default_factory=list)


def handler(payload: Words) -> None:
    """Do nothing."""


def from_module(name: str, module: str, *, stand_in: bool = False) -> TaskType:
    def elsewhere(payload: Words) -> None: ...

    elsewhere.__module__ = module
    return TaskType(name=name, handler=elsewhere, payload=Words, stand_in=stand_in)


@pytest.fixture
def on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory of modules that can be imported, and are forgotten afterwards."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def write_module(directory: Path, name: str, source: str) -> EntryPoint:
    (directory / f"{name}.py").write_text(textwrap.dedent(source))
    return EntryPoint(name=name, value=name, group="hcna_ray.tasks")


def test_the_built_in_types_are_found_by_entry_point(registry: Registry) -> None:
    assert set(BUILTIN) <= set(registry.names())
    assert registry.problems == []


def test_an_unknown_type_names_those_that_are_close(registry: Registry) -> None:
    with pytest.raises(UnknownTaskType) as caught:
        registry.get("drgfc.compres")

    assert caught.value.code == "unknown_task_type"
    assert "did you mean drgfc.compress" in str(caught.value)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.close, again.code) == (
        str(caught.value),
        caught.value.close,
        "unknown_task_type",
    )


@pytest.mark.parametrize("name", ["", "Echo", "a..b", "a b", ".a", "a.", "ä", "x" * 101, "a/b"])
def test_a_name_out_of_shape_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="not a task type name"):
        TaskType(name=name, handler=handler, payload=Words)


@pytest.mark.parametrize(
    "odd", [lambda: None, lambda payload, ctx, more: None, lambda *, payload: None, 5]
)
def test_a_function_that_cannot_take_a_payload_is_refused(odd: object) -> None:
    with pytest.raises(TypeError, match=r"acme\.odd"):
        TaskType(name="acme.odd", handler=odd)  # type: ignore[arg-type]


def test_the_context_is_passed_however_it_is_asked_for(context: Any) -> None:
    def none(payload: AnyPayload) -> object:
        return None

    def second(payload: AnyPayload, context: TaskContext) -> object:
        return context

    def named(payload: AnyPayload, *, ctx: TaskContext) -> object:
        return ctx

    def optional(payload: AnyPayload, ctx: TaskContext | None = None) -> object:
        return ctx

    def other_default(payload: AnyPayload, retries: int = 3) -> object:
        return retries

    ctx = context()
    got = [
        TaskType(name="a", handler=f).call(AnyPayload({}), ctx)
        for f in (none, second, named, optional, other_default)
    ]
    assert got == [None, ctx, ctx, ctx, 3]


def test_a_payload_may_come_as_bytes_or_parsed() -> None:
    words = TaskType(name="acme.words", handler=handler, payload=Words)

    assert words.validate_payload(b'{"text": "hi"}') == Words(text="hi")
    assert words.validate_payload({"text": "hi", "parts": [1]}) == Words(text="hi", parts=[1])


@pytest.mark.parametrize(
    ("raw", "fields"),
    [
        (b'{"text": ""}', ["payload.text"]),
        (b'{"text": 5}', ["payload.text"]),
        (b'{"text": "a", "parts": [1, "2"], "more": 1}', ["payload.parts.1", "payload.more"]),
        (b"[1]", ["payload"]),
        (b"null", ["payload"]),
        (b"{", ["payload"]),
        (b"\xff", ["payload"]),
        (b'{"text": NaN}', ["payload"]),
        (b"[" * 100_000, ["payload"]),
    ],
)
def test_a_payload_that_does_not_fit_names_its_fields(raw: bytes, fields: list[str]) -> None:
    words = TaskType(name="acme.words", handler=handler, payload=Words)

    with pytest.raises(InvalidPayload) as caught:
        words.validate_payload(raw)

    assert [field for field, _ in caught.value.problems] == fields
    assert caught.value.code == "invalid_payload"
    assert pickle.loads(pickle.dumps(caught.value)).problems == caught.value.problems


def test_the_number_and_length_of_problems_is_bounded() -> None:
    words = TaskType(name="acme.words", handler=handler, payload=Words)

    with pytest.raises(InvalidPayload) as caught:
        words.validate_payload({"text": "a", **{f"{'k' * 5000}{i}": 1 for i in range(100)}})

    assert len(caught.value.problems) == 20
    assert len(str(caught.value)) < 2000


def test_a_broken_validator_refuses_the_payload() -> None:
    class Broken(Payload):
        text: str

        @field_validator("text")
        @classmethod
        def _break(cls, value: str) -> str:
            raise KeyError(value)

    broken = TaskType(name="acme.broken", handler=handler, payload=Broken)
    with pytest.raises(InvalidPayload, match="KeyError"):
        broken.validate_payload({"text": "a"})


def test_paths_are_checked_before_a_worker_sees_them() -> None:
    class Paths(Payload):
        source: OptionalWorkerPath = None
        other: str = "/etc/passwd"

    paths = TaskType(name="acme.paths", handler=handler, payload=Paths)
    paths.check_worker_paths(Paths(source="/data/a"), "/data")
    paths.check_worker_paths(Paths(), "/data")

    with pytest.raises(InvalidPayload) as caught:
        paths.check_worker_paths(Paths(source="/etc/passwd"), "/data")
    assert [field for field, _ in caught.value.problems] == ["payload.source"]
    assert "below '/data'" in caught.value.problems[0][1]


def test_a_type_knows_its_schema(registry: Registry) -> None:
    schema = registry.get("qegg.generate").schema()

    assert schema["properties"]["grid_level"]["maximum"] == 7
    assert registry.get("echo").schema()["type"] == "object"
    assert registry.get("echo").result_schema() is None
    assert all(registry.get(name).description for name in registry.names())


def test_defaults_change_only_what_they_say() -> None:
    base = RetryPolicy(max_attempts=2, jitter=0.5)

    assert TaskDefaults().retry(base) == base
    assert TaskDefaults(max_attempts=4, retry_on=("OSError",)).retry(base) == RetryPolicy(
        max_attempts=4, jitter=0.5, retry_on=("OSError",)
    )


@pytest.mark.parametrize(
    "policy",
    [
        {"timeout_s": 0},
        {"timeout_s": float("nan")},
        {"max_attempts": 0},
        {"factor": 0.5},
        {"jitter": 2},
        {"requires": {"cpus": 2}},
    ],
)
def test_a_policy_out_of_bounds_is_refused(policy: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(policy))):
        TaskDefaults(**policy)  # type: ignore[arg-type]


def test_a_module_may_declare_its_type_again() -> None:
    registry = Registry()
    first, second = (from_module("acme.a", "notebook") for _ in range(2))

    registry.register(first)
    registry.register(second)

    assert registry.get("acme.a") is second


def test_a_name_of_another_package_is_refused() -> None:
    registry = Registry()
    held = from_module("acme.a", "acme.tasks")
    registry.register(held)

    with pytest.raises(DuplicateTaskType, match=r"other\.tasks.*acme\.tasks"):
        registry.register(from_module("acme.a", "other.tasks"))
    assert registry.get("acme.a") is held


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_stand_in_gives_way_in_either_order(order: tuple[int, int]) -> None:
    types = [
        from_module("qegg.generate", "hcna_ray.x", stand_in=True),
        from_module("qegg.generate", "licensed"),
    ]
    registry = Registry()
    for index in order:
        registry.register(types[index])

    assert registry.get("qegg.generate") is types[1]


def test_two_stand_ins_do_not_replace_each_other() -> None:
    registry = Registry()
    registry.register(from_module("a.b", "one", stand_in=True))
    with pytest.raises(DuplicateTaskType):
        registry.register(from_module("a.b", "two", stand_in=True))


def test_one_broken_package_does_not_stop_the_others(on_path: Path) -> None:
    good = """
        from hcna_ray import task

        @task("good.one")
        def one(payload):
            return payload

        @task("echo")
        def echo(payload):
            return payload
    """
    entry_points = [
        write_module(on_path, "zz_good_tasks", good),
        write_module(on_path, "a_broken_import", "import no_such_module_anywhere"),
        write_module(on_path, "b_broken_exit", "import sys; sys.exit(3)"),
        write_module(on_path, "c_broken_name", good.replace("good.one", "Good One")),
        write_module(on_path, "d_number", "answer = 42"),
        EntryPoint(name="e", value="d_number:answer", group="hcna_ray.tasks"),
        EntryPoint(name="f", value="no_such_module_at_all", group="hcna_ray.tasks"),
        EntryPoint(name="builtin", value="hcna_ray.handlers.builtin", group="hcna_ray.tasks"),
    ]
    registry = Registry()

    registry.load_entry_points(entry_points)

    assert set(registry.names()) == {*BUILTIN, "good.one"}
    assert registry.get("echo").package == "hcna_ray"
    said = {p.entry_point.partition(" ")[0]: p.message for p in registry.problems}
    assert set(said) == {
        "a_broken_import",
        "b_broken_exit",
        "c_broken_name",
        "e",
        "f",
        "zz_good_tasks",
    }
    assert "no_such_module_anywhere" in said["a_broken_import"]
    assert "SystemExit" in said["b_broken_exit"]
    assert "'echo' of zz_good_tasks is refused" in said["zz_good_tasks"]
    assert "must name a module or a callable" in said["e"]


def test_an_entry_point_may_be_a_callable_and_is_undone_when_it_fails(on_path: Path) -> None:
    write_module(
        on_path,
        "callable_tasks",
        """
        def fill(registry):
            registry.task("made.one")(lambda payload: 1)

        def fill_and_fail(registry):
            registry.task("made.two")(lambda payload: 1)
            raise OSError("half way")
        """,
    )
    registry = Registry()

    registry.load_entry_points(
        EntryPoint(name=name, value=f"callable_tasks:{name}", group="hcna_ray.tasks")
        for name in ("fill", "fill_and_fail")
    )

    assert registry.names() == ["made.one"]
    assert [p.message for p in registry.problems] == ["OSError: half way"]


def test_importing_the_house_is_cheap() -> None:
    code = """
        import sys
        import hcna_ray
        assert not [m for m in sys.modules if m.startswith("hcna_ray.")]
        from hcna_ray import task
        from hcna_ray.handlers import load_registry
        assert callable(task) and "echo" in load_registry().names()
        heavy = {"ray", "fastapi", "httpx", "numpy", "trimesh"} & set(sys.modules)
        assert not heavy, heavy
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=60)
