"""Text about exceptions we did not write: their names, messages and traces, whatever they do."""

from __future__ import annotations

import traceback

MESSAGE_CHARS_MAX = 2000
TRACEBACK_BYTES_MAX = 8 << 10
_FRAMES_MAX = 20
_CAUSES_MAX = 4


def type_name(value: object) -> str:
    """Return the class name of ``value``, even if its metaclass lies about it."""
    return str(type.__dict__["__name__"].__get__(type(value)))


def safe_text(error: BaseException) -> str:
    """Return ``str(error)``, or a stand-in if that fails; never raises, always valid UTF-8."""
    try:
        text = str(error)
        # Through str itself: the text may be an instance of a subclass with methods of its own.
        plain = str.encode(text, "utf-8", "replace").decode()
    except BaseException as problem:  # A hostile __str__ may raise anything, SystemExit included.
        return f"<{type_name(error)} whose text raised {type_name(problem)}>"
    if len(plain) > MESSAGE_CHARS_MAX:
        return plain[: MESSAGE_CHARS_MAX - 1] + "…"
    return plain


def short_trace(error: BaseException) -> str:
    """Return the frames that led to ``error`` and to its causes, at most 8 KiB, the newest kept."""
    parts: list[str] = []
    link: BaseException | None = error
    for _ in range(_CAUSES_MAX):
        if link is None:
            break
        frames = traceback.extract_tb(link.__traceback__, limit=-_FRAMES_MAX)
        frames = traceback.StackSummary.from_list([f for f in frames if not _ours(f.filename)])
        parts.append("".join(frames.format()) + f"{type_name(link)}: {safe_text(link)}\n")
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    text = "\nwhich led to:\n\n".join(reversed(parts))
    raw = text.encode("utf-8", "replace")
    if len(raw) > TRACEBACK_BYTES_MAX:
        raw = "…\n".encode() + raw[-(TRACEBACK_BYTES_MAX - 4) :]
    return raw.decode("utf-8", "ignore")


def _ours(filename: str) -> bool:
    return filename.endswith(("hcna_ray/handlers/run.py", "hcna_ray/handlers/registry.py"))
