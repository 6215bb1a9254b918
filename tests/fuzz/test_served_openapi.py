"""C1 keeps what its own OpenAPI says, whoever asks and whatever: schemathesis, one run a caller.

``HCNA_FUZZ_EXAMPLES`` says how many requests are drawn of each operation: 50 in ``make test``, 500
in ``make fuzz``. ``HCNA_FUZZ_SEED`` draws others.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from hcna_ray.api.app import declared_routes
from tests.fuzz.run import SEED
from tests.fuzz.stage import CALLERS
from tests.support.figures import note

REPOSITORY = Path(__file__).parents[2]
EXAMPLES = int(os.environ.get("HCNA_FUZZ_EXAMPLES", "50"))
FUZZ_SEED = int(os.environ.get("HCNA_FUZZ_SEED", SEED))
#: Before a run counts as stuck. It takes half a second for an example asked for, and some to begin.
RUN_S = 120.0 + 5.0 * EXAMPLES
#: Each run keeps one processor busy.
AT_ONCE = 2

#: That a failed task is replayed by its id may not be seen: replays by filter come first. Nothing
#: has printed anything here.
MAY_STAY_UNSEEN = {"POST /tasks/{task_id}/retry", "GET /tasks/{task_id}/logs"}
#: In a run of few examples these succeed by luck alone: each needs the id of a task of the caller.
MAY_STAY_UNSEEN_IN_FEW = {"POST /tasks/wait", "POST /tasks/{task_id}/cancel"}

pytestmark = pytest.mark.timeout(3 * RUN_S)


def one_run(folder: Path, caller: str) -> dict[str, Any]:
    """Ask everything as one caller, in a process of its own."""
    command = [sys.executable, "-m", "tests.fuzz.run", str(folder), caller]
    done = subprocess.run(
        [*command, str(EXAMPLES), str(FUZZ_SEED)],
        cwd=REPOSITORY,
        # Nobody may come across a Ray cluster, or start one.
        env={**os.environ, "RAY_ENABLE_AUTO_CONNECT": "0"},
        capture_output=True,
        text=True,
        timeout=RUN_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


Runs = dict[str, Future[dict[str, Any]]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        begun = {
            caller: pool.submit(one_run, tmp_path_factory.mktemp(caller), caller)
            for caller in CALLERS
        }
        yield begun
        for run in begun.values():
            run.cancel()


def operations(caller: str | None = None) -> set[str]:
    """Return the operations of C1, or those that a caller's role allows."""
    ranks = ("anonymous", "viewer", "submitter", "operator", "admin")
    rank = len(ranks) if caller is None else ranks.index(caller)
    return {
        f"{route.method} {route.path}"
        for route in declared_routes()
        if route.path not in ("/openapi.json", "/docs", "/ui", "/ui/{file}")
        and ranks.index(route.policy.role or "anonymous") <= rank
    }


@pytest.mark.parametrize("caller", CALLERS)
def test_no_answer_is_an_error_of_ours_or_undocumented(caller: str, runs: Runs) -> None:
    found = runs[caller].result()
    sent, drawn = (sum(found[name].values()) for name in ("sent", "drawn"))
    note(
        f"measured: OpenAPI as {caller}, seed {found['seed']}: {sent} requests, {drawn} of them "
        f"drawn, in {found['took_s']:.0f} s: {len(found['failures'])} not as documented"
    )
    assert not found["errors"], "\n\n".join(found["errors"])
    assert not found["failures"], "\n\n".join(found["failures"])
    assert not any(status.startswith("5") for status in found["statuses"]), found["statuses"]


@pytest.mark.parametrize("caller", CALLERS)
def test_every_operation_was_asked_often_enough_and_as_far_as_allowed(
    caller: str, runs: Runs
) -> None:
    found = runs[caller].result()
    assert set(found["drawn"]) == operations()
    too_few = {name: count for name, count in found["drawn"].items() if count < EXAMPLES}
    assert not too_few
    # A run that is only ever refused would show little.
    unseen = MAY_STAY_UNSEEN if EXAMPLES >= 500 else MAY_STAY_UNSEEN | MAY_STAY_UNSEEN_IN_FEW
    assert operations(caller) - set(found["good"]) <= unseen
    assert set(found["good"]) <= operations(caller)
