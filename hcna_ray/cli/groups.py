"""A command group with a default command, so that ``hcna task ID`` and ``hcna workers`` work."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup


class DefaultGroup(TyperGroup):
    """Runs ``default`` when the first word names no command of the group.

    ``when_empty`` also runs it when there is no word at all; else the help shows then.
    ``--help`` stays the group's own.
    """

    default = ""
    when_empty = False

    @classmethod
    def of(cls, default: str, *, when_empty: bool = False) -> type[DefaultGroup]:
        """A group class with that default."""
        members = {"default": default, "when_empty": when_empty}
        return type("DefaultGroup", (cls,), members)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the default's name in front where none of the group's is."""
        if not args:
            args = [self.default if self.when_empty else "--help"]
        elif args[0] not in self.commands and args[0] not in ("--help", "-h"):
            args = [self.default, *args]
        return super().parse_args(ctx, args)
