"""Commands that a sentence names: found in it, and held against those that there are."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import typer.main

from hcna_ray.cli.main import app

ROOT: Any = typer.main.get_command(app)
#: What stands for something of the reader's: ``ID``, ``NAME``, and the label of an alert.
_LABEL = re.compile(r"\{\{.*?\}\}")
#: A word of prose: it ends the command that stands before it.
_PROSE = re.compile(r"[a-z]+")


def commands_in(text: str) -> Iterator[str]:
    """Yield each command of a sentence: its words up to the next word of prose or the next stop."""
    for said in re.split(r"\bhcna(?= )", _LABEL.sub("LABEL", text))[1:]:
        yield " ".join(["hcna", *_words(said.split())])


def _words(said: list[str]) -> Iterator[str]:
    command, value_next = ROOT, False
    for word in said:
        bare = word.rstrip(',;:.)"')
        inner = getattr(command, "commands", {}).get(bare)
        if inner is not None:
            command = inner
        elif _PROSE.fullmatch(bare) and not value_next:
            # As the first word it is the name of a command, be there one or not.
            if command is ROOT:
                yield bare
            return
        elif word.startswith("("):
            return
        yield bare
        value_next = bare.startswith("--")
        if bare != word:
            return


def trouble_with(said: str) -> str:
    """Return what ``hcna`` itself would say against a command; empty if there is nothing."""
    command, context, words = ROOT, None, said.split()[1:]
    try:
        while True:
            context = command.make_context(command.name or "hcna", list(words), parent=context)
            words = [*context._protected_args, *context.args]
            if not words:
                return ""
            name, command, words = command.resolve_command(context, words)
            if command is None:
                return f"there is no {name}"
    except typer.TyperException as error:
        return error.format_message()
    except typer.Exit:  # A group that only shows its help: nobody is helped by that.
        return "it names no command"
