from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.support.paper_grafana import Paper, PaperGrafana, served


class Unaware:
    """A Prometheus of somebody who has never heard of us."""

    url = ""

    def answer(
        self, method: str, path: str, headers: dict[str, str], body: Any
    ) -> tuple[int, dict[str, Any]]:
        return 200, {"status": "success", "data": {"yaml": "scrape_configs: []"}}


@contextmanager
def serving(paper: Paper) -> Iterator[None]:
    server = served(paper)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def grafana() -> Iterator[PaperGrafana]:
    paper = PaperGrafana()
    with serving(paper):
        yield paper


@pytest.fixture
def unaware() -> Iterator[Unaware]:
    paper = Unaware()
    with serving(paper):
        yield paper
