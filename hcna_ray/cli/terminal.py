"""What every command shares: streams, exit codes, the client, words from the command line."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from enum import IntEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from hcna_ray.client import Client, Requires

Json = dict[str, Any]

#: ``--json``, the same in every command.
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]


class ExitCode(IntEnum):
    """What a script can rely on."""

    OK = 0
    FAILED = 1
    USAGE = 2
    UNREACHABLE = 3
    REFUSED = 4
    CHECK_FAILED = 5


class CommandFailed(Exception):
    """A command cannot go on: one sentence, what to type next, and the exit code."""

    def __init__(self, message: str, then: str, code: ExitCode = ExitCode.FAILED) -> None:
        super().__init__(message, then, code)
        self.message, self.then, self.code = message, then, code

    def __str__(self) -> str:
        return f"{self.message}. Next: {self.then}"


class UsageProblem(CommandFailed):
    """The command line itself does not make sense."""

    def __init__(self, message: str, then: str) -> None:
        super().__init__(message, then, ExitCode.USAGE)


def talk() -> Console:
    """For people: stderr. Made on each call, because tests swap the stream."""
    return Console(stderr=True, highlight=False)


def paper() -> Console:
    """For data: stdout, never wrapped at a terminal that is not there."""
    width = None if sys.stdout.isatty() else 200
    return Console(highlight=False, width=width)


def print_json(value: object) -> None:
    """One JSON document and a newline on stdout."""
    typer.echo(json.dumps(value, ensure_ascii=False, indent=2, default=str))


def print_line(value: object) -> None:
    """One line of NDJSON on stdout."""
    typer.echo(json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str))


@contextmanager
def open_client(*, retry_for_s: float | None = None) -> Iterator[Client]:
    """The client every command uses.

    At a prompt 30 s of silence would be rude: a C1 that is away is tried again for
    ``HCNA_RETRY_FOR_S`` seconds, 5 by default.
    """
    if retry_for_s is None:
        told = os.environ.get("HCNA_RETRY_FOR_S", "5")
        try:
            retry_for_s = float(told)
        except ValueError:
            raise UsageProblem(
                f"HCNA_RETRY_FOR_S is {told!r}, not a number of seconds", "unset HCNA_RETRY_FOR_S"
            ) from None
    with Client(retry_for_s=retry_for_s) as client:
        yield client


# -- words from the command line -------------------------------------------------------------------


def parse_payload(words: list[str], command: str) -> Json:
    """A payload from the command line: one JSON object, ``-`` for stdin, or ``key=value`` words.

    A value that is JSON counts as that (``n=3``, ``on=true``, ``tags=["a"]``), else as text.
    """
    if not words:
        return {}
    if words == ["-"]:
        return _json_object(sys.stdin.read(), "stdin", command)
    if len(words) == 1 and words[0].lstrip().startswith(("{", "[")):
        return _json_object(words[0], "the payload", command)
    return dict(_pair(word, command) for word in words)


def parse_pairs(words: Iterable[str], command: str) -> Json:
    """``key=value`` options as one object."""
    return dict(_pair(word, command) for word in words)


def parse_requires(words: Iterable[str], command: str) -> Requires | None:
    """``worker=W1 cpu=1 mem_gb=2 gpu=1 resource.NAME=AMOUNT label.NAME=VALUE``."""
    needs: Requires = {}
    resources: dict[str, float] = {}
    labels: dict[str, str] = {}
    for word in words:
        name, _, value = word.partition("=")
        if name == "worker" and value:
            needs["worker"] = value
        elif name == "cpu":
            needs["cpu"] = _amount(word, value, command)
        elif name == "mem_gb":
            needs["mem_gb"] = _amount(word, value, command)
        elif name == "gpu":
            needs["gpu"] = _amount(word, value, command)
        elif name.startswith("resource."):
            resources[name.removeprefix("resource.")] = _amount(word, value, command)
        elif name.startswith("label.") and value:
            labels[name.removeprefix("label.")] = value
        else:
            raise UsageProblem(
                f"--requires {word!r}: use worker=, cpu=, mem_gb=, gpu=, resource.NAME=, "
                "label.NAME=",
                f"{command} --help",
            )
    if resources:
        needs["resources"] = resources
    if labels:
        needs["labels"] = labels
    return needs or None


def parse_lines(path: Path, command: str) -> Iterator[Json]:
    """JSON objects of an NDJSON file (``-`` is stdin), one at a time; blank lines are skipped."""
    if str(path) != "-":
        try:
            file = path.open(encoding="utf-8")
        except OSError as error:
            raise UsageProblem(f"{path}: {error.strerror}", f"{command} --help") from None
        with file:
            yield from _objects(file, str(path), command)
    else:
        yield from _objects(sys.stdin, "stdin", command)


def _objects(lines: Iterable[str], name: str, command: str) -> Iterator[Json]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield _json_object(line, f"{name}, line {number}", command)


def _json_object(text: str, where: str, command: str) -> Json:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UsageProblem(f"{where} is not JSON ({error})", f"{command} --help") from None
    if not isinstance(value, dict):
        raise UsageProblem(f"{where} is JSON, but not an object", f"{command} --help")
    return value


def _pair(word: str, command: str) -> tuple[str, Any]:
    name, equals, value = word.partition("=")
    if not equals or not name:
        raise UsageProblem(f"{word!r} is not key=value", f"{command} --help")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _amount(word: str, value: str, command: str) -> float:
    try:
        amount = float(value)
    except ValueError:
        amount = math.nan
    if not 0 <= amount < math.inf:
        raise UsageProblem(f"--requires {word!r} needs a number", f"{command} --help")
    return amount


def tame(text: str) -> str:
    """What others wrote, without what would speak to the terminal; lines stay lines."""
    return "".join(one if one.isprintable() or one == "\n" else "?" for one in text)


def clock(at: datetime | None) -> str:
    """A time of day for people, in local time; empty if there is none."""
    return at.astimezone().strftime("%H:%M:%S") if at else ""
