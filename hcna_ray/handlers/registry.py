"""Task types by name: the ``@task`` decorator, the registry, and the packages that fill it.

A package declares its types by decorating functions and names the module in the entry point group
``hcna_ray.tasks``. Loading never fails as a whole: a package that cannot be loaded, or wants a name
that is taken, is logged and listed in `Registry.problems`; all others work.
"""

from __future__ import annotations

import difflib
import functools
import importlib.metadata
import inspect
import logging
import math
import re
import threading
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, RootModel, ValidationError

from hcna_ray.core.errors import HcnaError
from hcna_ray.core.models import RetryPolicy
from hcna_ray.handlers import encoding
from hcna_ray.handlers.context import TaskContext
from hcna_ray.handlers.errors import (
    DuplicateTaskType,
    InvalidPayload,
    PathOutsideDisk,
    UnknownTaskType,
)
from hcna_ray.handlers.paths import WorkerPathMark, check_worker_path
from hcna_ray.handlers.text import safe_text, type_name

ENTRY_POINT_GROUP = "hcna_ray.tasks"
#: Keys of ``requires``, as in a submitted task.
REQUIREMENTS = frozenset({"worker", "cpu", "mem_gb", "gpu", "resources", "labels"})
PROBLEMS_MAX = 20

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*(\.[a-z0-9][a-z0-9_-]*)*")
_NAME_MAX = 100

log = logging.getLogger(__name__)

Handler = Callable[..., Any]
F = TypeVar("F", bound=Handler)


class Payload(BaseModel):
    """Base of payload models: frozen, refuses unknown fields and silent conversions."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class AnyPayload(RootModel[dict[str, object]]):
    """Any JSON object; what a type takes that declares no model of its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskDefaults:
    """A type's own policy, where the submitter says nothing. ``None`` keeps the house's default."""

    #: Longest one attempt may run, in seconds.
    timeout_s: float | None = None
    max_attempts: int | None = None
    backoff_s: float | None = None
    factor: float | None = None
    max_backoff_s: float | None = None
    jitter: float | None = None
    retry_on: tuple[str, ...] | None = None
    #: As in a submitted task: worker, cpu, mem_gb, gpu, resources, labels.
    requires: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        bounds = {
            "timeout_s": (0.0, math.inf),
            "max_attempts": (1, 1000),
            "backoff_s": (0.0, math.inf),
            "factor": (1.0, math.inf),
            "max_backoff_s": (0.0, math.inf),
            "jitter": (0.0, 1.0),
        }
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if value is not None and not (low <= value <= high and math.isfinite(value)):
                raise ValueError(f"{name} must be between {low} and {high}, not {value}")
        if self.timeout_s == 0:
            raise ValueError("timeout_s must be greater than zero")
        if unknown := set(self.requires) - REQUIREMENTS:
            raise ValueError(f"requires has unknown keys: {', '.join(sorted(unknown))}")
        object.__setattr__(self, "requires", types.MappingProxyType(dict(self.requires)))

    def retry(self, base: RetryPolicy) -> RetryPolicy:
        """Return ``base`` with what this type says differently."""
        names = ("max_attempts", "backoff_s", "factor", "max_backoff_s", "jitter", "retry_on")
        return replace(base, **{n: v for n in names if (v := getattr(self, n)) is not None})


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskType:
    """A registered task type: its handler, its models and its policy."""

    name: str
    handler: Handler
    #: Model the payload must fit; the handler is given an instance.
    payload: type[BaseModel] = AnyPayload
    #: Model the result must fit (of a generator: each item), or ``None`` for any JSON.
    result: type[BaseModel] | None = None
    defaults: TaskDefaults = field(default_factory=TaskDefaults)
    #: Whether each attempt gets a process of its own.
    isolated: bool = False
    #: Whether another package may replace it.
    stand_in: bool = False
    #: How the handler takes its context: not at all, second in line, or by the name ``ctx``.
    context_style: str = field(init=False, default="none")

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name) or len(self.name) > _NAME_MAX:
            raise ValueError(
                f"{self.name!r} is not a task type name: lower-case words of letters, digits, "
                f"'_' and '-', joined by dots, at most {_NAME_MAX} characters"
            )
        object.__setattr__(self, "context_style", _context_style(self.name, self.handler))

    @property
    def module(self) -> str:
        """Module the handler was defined in."""
        return str(getattr(self.handler, "__module__", None) or type(self.handler).__module__)

    @property
    def package(self) -> str:
        """Top-level package the handler comes from."""
        return self.module.partition(".")[0]

    @property
    def description(self) -> str:
        """First line of the handler's docstring."""
        return (inspect.getdoc(self.handler) or "").partition("\n")[0]

    def call(self, payload: BaseModel, ctx: TaskContext) -> Any:
        """Call the handler; its answer may be a value, an awaitable or a generator."""
        if self.context_style == "second":
            return self.handler(payload, ctx)
        if self.context_style == "named":
            return self.handler(payload, ctx=ctx)
        return self.handler(payload)

    def validate_payload(self, raw: bytes | Mapping[str, object]) -> BaseModel:
        """Return the payload as its model.

        Args:
            raw: JSON, or the object parsed from it.

        Raises:
            InvalidPayload: With a (field path, sentence) pair for each problem, at most 20.
        """
        try:
            parsed = encoding.decode(raw) if isinstance(raw, bytes) else raw
        except ValueError as error:
            raise InvalidPayload(self.name, [("payload", str(error))]) from None
        if not isinstance(
            parsed, (dict, Mapping)
        ):  # To be a dict is quickly seen, to be another not.
            raise InvalidPayload(self.name, [("payload", "must be a JSON object")])
        try:
            return self.payload.model_validate(parsed)
        except ValidationError as error:
            raise InvalidPayload(self.name, _problems(error)) from None
        except Exception as error:
            # A validator of a plug-in may itself be broken; its task is refused, not the process.
            log.warning(
                "payload model failed",
                extra={"action": "payload.model_failed", "task_type": self.name},
                exc_info=not isinstance(error, RecursionError),
            )
            text = f"could not be checked: its model raised {type_name(error)}"
            raise InvalidPayload(self.name, [("payload", text)]) from None

    def check_worker_paths(self, payload: BaseModel, disk_path: str) -> None:
        """Refuse paths outside ``disk_path`` before a worker sees them. Reads no disk.

        Raises:
            InvalidPayload: A field marked as `WorkerPath` leads out of ``disk_path``.
        """
        problems: list[tuple[str, str]] = []
        for name, path in _worker_paths(type(payload)):
            value = getattr(payload, name)
            if isinstance(value, str):
                try:
                    check_worker_path(value, disk_path, field=path)
                except PathOutsideDisk as error:
                    problems.append((path, str(error).removeprefix(f"{path}: ")))
        if problems:
            raise InvalidPayload(self.name, problems)

    def schema(self) -> dict[str, Any]:
        """Return the JSON schema of the payload."""
        return self.payload.model_json_schema()

    def result_schema(self) -> dict[str, Any] | None:
        """Return the JSON schema of the result, if it has a model."""
        return None if self.result is None else self.result.model_json_schema()


@functools.cache
def _worker_paths(model: type[BaseModel]) -> tuple[tuple[str, str], ...]:
    """Return the fields of a payload model that are paths on a worker, each with its name."""
    return tuple(
        (name, f"payload.{info.alias or name}")
        for name, info in model.model_fields.items()
        if any(isinstance(mark, WorkerPathMark) for mark in info.metadata)
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """A package of task types that could not be used, wholly or in part."""

    #: Name of the entry point.
    entry_point: str
    #: Distribution it comes from.
    distribution: str
    message: str


class Registry:
    """Task types by name. Invariant: a name belongs to one package, stand-ins excepted."""

    def __init__(self) -> None:
        self._types: dict[str, TaskType] = {}
        self._lock = threading.RLock()
        #: What could not be loaded, and why.
        self.problems: list[Problem] = []

    def register(self, task_type: TaskType) -> None:
        """Add a type. The module that declared it may declare it again, as a notebook does.

        A stand-in gives way to any other type of its name, whichever comes first.

        Raises:
            DuplicateTaskType: Another package, or another module of it, holds the name.
        """
        with self._lock:
            held = self._types.get(task_type.name)
            if held is None or held.module == task_type.module:
                self._types[task_type.name] = task_type
            elif held.stand_in and not task_type.stand_in:
                log.info(
                    "stand-in replaced",
                    extra={
                        "action": "task_type.replaced",
                        "task_type": held.name,
                        "package": task_type.package,
                    },
                )
                self._types[task_type.name] = task_type
            elif not (task_type.stand_in and not held.stand_in):
                raise DuplicateTaskType(task_type.name, task_type.module, held.module)

    def task(
        self,
        name: str,
        *,
        payload: type[BaseModel] | None = None,
        result: type[BaseModel] | None = None,
        timeout_s: float | None = None,
        max_attempts: int | None = None,
        backoff_s: float | None = None,
        factor: float | None = None,
        max_backoff_s: float | None = None,
        jitter: float | None = None,
        retry_on: Iterable[str] | None = None,
        requires: Mapping[str, Any] | None = None,
        isolated: bool = False,
        stand_in: bool = False,
    ) -> Callable[[F], F]:
        """Register the decorated function here; see `task` for the arguments."""

        def decorate(handler: F) -> F:
            self.register(
                TaskType(
                    name=name,
                    handler=handler,
                    payload=payload or AnyPayload,
                    result=result,
                    defaults=TaskDefaults(
                        timeout_s=timeout_s,
                        max_attempts=max_attempts,
                        backoff_s=backoff_s,
                        factor=factor,
                        max_backoff_s=max_backoff_s,
                        jitter=jitter,
                        retry_on=None if retry_on is None else tuple(retry_on),
                        requires=requires or {},
                    ),
                    isolated=isolated,
                    stand_in=stand_in,
                )
            )
            return handler

        return decorate

    def get(self, name: str) -> TaskType:
        """Return the type called ``name``.

        Raises:
            UnknownTaskType: There is none; the error names those that are close.
        """
        found = self._types.get(name)
        if found is None:
            close = difflib.get_close_matches(name[:_NAME_MAX], self.names(), n=3, cutoff=0.6)
            raise UnknownTaskType(name, close)
        return found

    def __contains__(self, name: object) -> bool:
        return name in self._types

    def names(self) -> list[str]:
        """Return all names, sorted."""
        return sorted(self._types)

    def load_entry_points(
        self, entry_points: Iterable[importlib.metadata.EntryPoint] | None = None
    ) -> None:
        """Load every installed package of task types; never raises because of one of them.

        An entry point is a module, whose ``@task`` functions are taken, or a callable, which is
        called with this registry. Our own come first, the others by the name of their distribution.

        Args:
            entry_points: Those to load; by default the group ``hcna_ray.tasks``.
        """
        if entry_points is None:
            entry_points = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
        for entry_point in sorted(entry_points, key=_load_order):
            self._load(entry_point)

    def _load(self, entry_point: importlib.metadata.EntryPoint) -> None:
        before = dict(self._types)
        try:
            with _declarations.loading():
                loaded = entry_point.load()
            if isinstance(loaded, types.ModuleType):
                self._adopt(entry_point, _declarations.of(loaded.__name__))
            elif callable(loaded):
                loaded(self)
            else:
                text = f"names a {type_name(loaded)}; it must name a module or a callable"
                self._report(entry_point, text)
        except DuplicateTaskType as error:
            self._types = before
            self._report(entry_point, str(error))
        except (Exception, SystemExit) as error:
            self._types = before
            self._report(entry_point, f"{type_name(error)}: {safe_text(error)}")

    def _adopt(
        self, entry_point: importlib.metadata.EntryPoint, declared: Iterable[TaskType]
    ) -> None:
        for task_type in declared:
            try:
                self.register(task_type)
            except HcnaError as error:
                self._report(entry_point, str(error))

    def _report(self, entry_point: importlib.metadata.EntryPoint, message: str) -> None:
        problem = Problem(
            entry_point=f"{entry_point.name} = {entry_point.value}"[:200],
            distribution=_distribution(entry_point),
            message=message[:1000],
        )
        self.problems.append(problem)
        log.error(
            "package of task types could not be loaded",
            extra={
                "action": "task_type.package_broken",
                "entry_point": problem.entry_point,
                "distribution": problem.distribution,
                "reason": problem.message,
            },
        )


class _Declarations(Registry):
    """Everything ``@task`` saw, by module, so that any registry can adopt a module's types later.

    Outside of loading a declaration also goes straight to the default registry, for notebooks and
    scripts. While an entry point loads it waits, because a name that is taken must not break the
    import of the module that wants it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._declared: dict[tuple[str, str], TaskType] = {}
        self._depth = threading.local()

    def register(self, task_type: TaskType) -> None:
        """Remember a declaration."""
        self._declared[task_type.module, task_type.name] = task_type
        if not getattr(self._depth, "value", 0):
            default_registry().register(task_type)

    def loading(self) -> _Loading:
        """Hold declarations of this thread back while the block runs."""
        return _Loading(self._depth)

    def of(self, module: str) -> list[TaskType]:
        """Return what the top-level package of ``module`` declared, in order."""
        package = module.partition(".")[0]
        return [t for t in self._declared.values() if t.package == package]


class _Loading:
    def __init__(self, depth: threading.local) -> None:
        self._depth = depth

    def __enter__(self) -> None:
        self._depth.value = getattr(self._depth, "value", 0) + 1

    def __exit__(self, *_: object) -> None:
        self._depth.value -= 1


_declarations = _Declarations()


@functools.cache
def default_registry() -> Registry:
    """Return the process-wide registry that ``@task`` fills. Loads nothing."""
    return Registry()


_load_lock = threading.Lock()
_loaded = False


def load_registry() -> Registry:
    """Return the process-wide registry with every installed package loaded, once."""
    global _loaded
    with _load_lock:
        if not _loaded:
            default_registry().load_entry_points()
            _loaded = True
    return default_registry()


def task(
    name: str,
    *,
    payload: type[BaseModel] | None = None,
    result: type[BaseModel] | None = None,
    timeout_s: float | None = None,
    max_attempts: int | None = None,
    backoff_s: float | None = None,
    factor: float | None = None,
    max_backoff_s: float | None = None,
    jitter: float | None = None,
    retry_on: Iterable[str] | None = None,
    requires: Mapping[str, Any] | None = None,
    isolated: bool = False,
    stand_in: bool = False,
) -> Callable[[F], F]:
    """Register the decorated function as the handler of a task type.

    The function takes the payload and, if it wants one, a `TaskContext` as second argument or by
    the name ``ctx``. It may be a plain function, a coroutine function, or a generator of either
    sort, whose items become ``{"items": [...]}`` and are shown as progress while it runs.

    Args:
        name: Lower-case words joined by dots, such as ``acme.count``.
        payload: Pydantic model the payload must fit, checked before a task is accepted; any JSON
            object by default.
        result: Pydantic model the result must fit; of a generator, each item.
        timeout_s: Longest one attempt may run.
        max_attempts: Attempts that may fail before the task does; 1 means no retry.
        backoff_s: Pause before the second attempt.
        factor: Each further pause is this many times the one before.
        max_backoff_s: Longest pause.
        jitter: Share, 0 to 1, by which a pause is varied.
        retry_on: Failure kinds (``error``, ``timeout``) and exception class names worth a retry.
        requires: Needs, as in a submitted task: worker, cpu, mem_gb, gpu, resources, labels.
        isolated: Give each attempt a process of its own.
        stand_in: Give way to another package's type of the same name.

    Raises:
        ValueError: The name or the policy is out of bounds.
        TypeError: The function cannot be called with a payload.
        DuplicateTaskType: Another module holds the name.
    """
    return _declarations.task(
        name,
        payload=payload,
        result=result,
        timeout_s=timeout_s,
        max_attempts=max_attempts,
        backoff_s=backoff_s,
        factor=factor,
        max_backoff_s=max_backoff_s,
        jitter=jitter,
        retry_on=retry_on,
        requires=requires,
        isolated=isolated,
        stand_in=stand_in,
    )


def _context_style(name: str, handler: Handler) -> str:
    try:
        parameters = list(inspect.signature(handler).parameters.values())
    except (TypeError, ValueError):
        raise TypeError(f"the handler of {name!r} is not a callable with a signature") from None
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    keywords = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    required = [p for p in positional[2:] if p.default is p.empty]
    required += [p for p in keywords if p.default is p.empty and p.name != "ctx"]
    if not positional or required:
        raise TypeError(f"the handler of {name!r} must take (payload), or (payload, ctx)")
    second = positional[1] if len(positional) > 1 else None
    if second is not None and (second.default is second.empty or second.name == "ctx"):
        return "second"
    return "named" if any(p.name == "ctx" for p in keywords) else "none"


def _problems(error: ValidationError) -> list[tuple[str, str]]:
    found = error.errors(include_url=False, include_context=False, include_input=False)
    problems = []
    for item in found[:PROBLEMS_MAX]:
        path = ".".join(["payload", *(str(part) for part in item["loc"])])
        text = item["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
        problems.append((path[:200], text[:300]))
    return problems


def _load_order(entry_point: importlib.metadata.EntryPoint) -> tuple[bool, str, str]:
    distribution = _distribution(entry_point)
    return (distribution != "hcna-ray", distribution, entry_point.name)


def _distribution(entry_point: importlib.metadata.EntryPoint) -> str:
    return entry_point.dist.name if entry_point.dist is not None else "?"
