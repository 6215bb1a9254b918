"""Write ``llms.txt`` (https://llmstxt.org): the documentation's index for programs that read.

Sections and links are those of the table in ``docs/index.md``; what stands behind a link is the
first sentence of the page. ``--check`` writes nothing and fails if the file is not what the pages
say. Standard library only.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
INDEX = ROOT / "docs" / "index.md"
TARGET = ROOT / "llms.txt"
#: Shorter ones ("In Python:") only lead to what follows.
WORDS_MIN = 4
LINK = re.compile(r"\[([^\]]+)\]\(([^)\s]+)\)")

HEAD = """\
# hcna-ray

> Two laptops, one computer: a durable task queue and HTTP API on Ray 2.60 and SQLite. M1 keeps \
the queue and decides who runs what, W1 runs it, C1 is the one HTTP API that everybody else sees.

What was answered 202 is committed and fsynced. A crash may make an attempt run again; exactly \
one result is recorded. Everything C1 offers is in its OpenAPI (`GET /openapi.json`); every error \
has a stable `code` and a `fix`. `hcna why ID` says where a task stands and what would help. The \
client is `from hcna_ray.client import Client`.
"""


class Missing(Exception):
    """The index leads to a page that is not there, or that says nothing."""


def sections() -> Iterator[tuple[str, list[tuple[str, Path]]]]:
    """Yield the rows of the index: what one wants, and the pages with their titles."""
    for line in INDEX.read_text("utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| ") and len(cells) == 2 and LINK.search(cells[1]):
            found = [
                (title, Path(os.path.normpath(INDEX.parent / target.partition("#")[0])))
                for title, target in LINK.findall(cells[1])
                if "://" not in target
            ]
            yield cells[0], found
        elif line.startswith("## "):
            return


def first_sentence(path: Path) -> str:
    """Return the first sentence of prose on a page or in a notebook, as plain text."""
    if not path.is_file():
        raise Missing(f"{path}: the index leads there")
    text = path.read_text("utf-8")
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n\n".join(
            "".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"
        )
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for block in re.split(r"\n\s*\n", text):
        line = " ".join(block.split())
        if not line or line.startswith(("#", "|", "![", "<", "Generated", "* ", "- ")):
            continue
        plain = LINK.sub(r"\1", line)
        sentence = re.split(r"(?<=[.!?:])\s", plain, maxsplit=1)[0]
        if len(sentence.split()) >= WORDS_MIN:
            return sentence.rstrip(":").removesuffix(".") + "."
    raise Missing(f"{path}: it says nothing")


def text() -> str:
    """Return the whole file."""
    lines = [HEAD.rstrip(), ""]
    for wish, links in sections():
        lines += [f"## {wish[0].upper()}{wish[1:]}", ""]
        lines += [
            f"- [{title.replace('`', '')}]({path.relative_to(ROOT)}): {first_sentence(path)}"
            for title, path in links
        ]
        lines.append("")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Write the file, or check it."""
    current = text()
    if "--check" in arguments:
        if TARGET.is_file() and TARGET.read_text("utf-8") == current:
            return 0
        sys.stderr.write(f"{TARGET.name} is stale: make docs\n")
        return 1
    TARGET.write_text(current, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
