from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from hcna_ray.cli.cluster import card
from hcna_ray.cli.main import describe
from hcna_ray.client.errors import api_error_of
from tests.support.fake_c1 import FakeC1, problem
from tests.unit.cli.conftest import Hcna

# -- submit and task -------------------------------------------------------------------------------


def test_submit_prints_the_id_and_says_what_next(hcna: Hcna, c1: FakeC1) -> None:
    ran = hcna("submit", "echo", "message=hi", "n=3", "on=true")
    (task_id,) = c1.tasks
    assert (ran.code, ran.out) == (0, task_id + "\n")
    assert f"hcna task {task_id} --wait" in ran.err
    assert c1.tasks[task_id]["payload"] == {"message": "hi", "n": 3, "on": True}


def test_submit_and_wait_prints_the_result(hcna: Hcna) -> None:
    ran = hcna("submit", "echo", '{"message": "hi"}', "--wait")
    assert ran.code == 0
    assert ran.json["message"] == "hi"


def test_submit_reads_stdin(hcna: Hcna, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO('{"n": 5}'))
    assert hcna("submit", "echo", "-", "-w").json["n"] == 5


def test_every_option_of_submit_arrives(hcna: Hcna, c1: FakeC1) -> None:
    ran = hcna(
        *("submit", "echo", "--priority", "9", "--queue", "q", "--timeout", "3"),
        *("--requires", "worker=W1", "--requires", "cpu=1", "--requires", "label.room=attic"),
        *("--requires", "resource.disk=2", "--queue-timeout", "4", "--attempts", "2"),
        *("--depends-on", "task-a", "--ordering-key", "o", "--concurrency-key", "c"),
        *("--on-disconnect", "wait", "--idempotency-key", "k", "--metadata", "who=me"),
        *("--run-at", "2026-01-01T00:00:00Z", "--expires-at", "2027-01-01T00:00:00Z", "--json"),
    )
    assert ran.code == 0
    assert ran.json["status"] == "queued"
    seen = c1.requests[0]
    assert seen.headers["idempotency-key"] == "k"
    assert seen.json == {
        "task_type": "echo",
        "payload": {},
        "priority": 9,
        "queue": "q",
        "timeout_s": 3,
        "queue_timeout_s": 4,
        "requires": {
            "worker": "W1",
            "cpu": 1,
            "labels": {"room": "attic"},
            "resources": {"disk": 2},
        },
        "retry": {"max_attempts": 2},
        "depends_on": ["task-a"],
        "ordering_key": "o",
        "concurrency_key": "c",
        "on_disconnect": "wait",
        "metadata": {"who": "me"},
        "run_at": "2026-01-01T00:00:00Z",
        "expires_at": "2027-01-01T00:00:00Z",
    }


def test_a_failed_task_gives_exit_code_1_and_one_line(hcna: Hcna, c1: FakeC1) -> None:
    c1.artifacts["bad"] = b"not compressed"
    ran = hcna("submit", "drgfc.decompress", "artifact=bad", "--wait")
    (task_id,) = c1.tasks
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.count("\n") == 1
    assert f"hcna why {task_id}" in ran.err


def test_task_shows_lists_cancels_and_retries(hcna: Hcna, c1: FakeC1) -> None:
    held = hcna("submit", "hold").out.strip()
    done = hcna("submit", "echo", "n=1").out.strip()

    assert hcna("task", held, "--json").json["status"] == "queued"
    assert "queued" in hcna("task", held).out
    assert hcna("task", "show", done, "--wait").json["n"] == 1
    listed = hcna("task", "list", "--json").json
    assert [task["task_id"] for task in listed] == [held, done]
    assert done in hcna("task", "list", "--status", "completed").out
    assert hcna("task", "cancel", held, "--reason", "enough").code == 0
    assert c1.tasks[held]["status"] == "cancelled"
    assert hcna("task", "cancel", held).code == 4
    c1.tasks[done].update(status="failed", finished_at="x")
    assert hcna("task", "retry", done, "--json").code == 0
    c1.tasks[done].update(status="failed", finished_at="x")
    assert hcna("task", "retry", done, "--wait").json["n"] == 1


def test_why_prints_reason_and_fix(hcna: Hcna) -> None:
    task_id = hcna("submit", "echo", "--requires", "gpu=1").out.strip()
    ran = hcna("why", task_id)
    assert "needs gpu 1" in ran.out
    assert "drop the need" in ran.out
    assert hcna("why", task_id, "--json").json["code"] == "no_worker_fits"


# -- map -------------------------------------------------------------------------------------------


def test_map_gives_a_result_for_each_line(hcna: Hcna, tmp_path: Path) -> None:
    file = tmp_path / "in.ndjson"
    file.write_text("".join(f'{{"n": {n}}}\n' for n in range(30)) + "\n")
    ran = hcna("map", "echo", str(file), "--chunk", "7")
    assert ran.code == 0
    assert [json.loads(line)["n"] for line in ran.out.splitlines()] == list(range(30))


def test_map_reads_stdin_and_counts_failures(
    hcna: Hcna, c1: FakeC1, monkeypatch: pytest.MonkeyPatch
) -> None:
    c1.artifacts["bad"] = b"not compressed"
    monkeypatch.setattr("sys.stdin", io.StringIO('{"artifact": "bad"}\n'))
    ran = hcna("map", "drgfc.decompress", "-", "--unordered")
    assert ran.code == 1
    assert ran.json["error"]["kind"] == "rejected"
    monkeypatch.setattr("sys.stdin", io.StringIO("{}\n"))
    assert hcna("map", "nonsense", "-").json["error"]["code"] == "unknown_task_type"


def test_map_names_the_line_that_is_wrong(hcna: Hcna, tmp_path: Path) -> None:
    file = tmp_path / "in.ndjson"
    file.write_text('{"n": 1}\n{"n": \n')
    ran = hcna("map", "echo", str(file))
    assert ran.code == 2
    assert "line 2" in ran.err
    assert hcna("map", "echo", str(tmp_path / "absent")).code == 2


# -- workers and intents ---------------------------------------------------------------------------


def test_workers_can_be_listed_shown_and_steered(hcna: Hcna, c1: FakeC1) -> None:
    assert "online" in hcna("workers").out
    assert hcna("workers", "--json").json[0]["name"] == "W1"
    assert "HCNA-W1--prod--home--v1.0" in hcna("workers", "show", "W1").out
    for verb, state in (("drain", "draining"), ("cordon", "cordoned"), ("uncordon", "online")):
        assert hcna("workers", verb, "W1", "--json").json["state"] == state
    ran = hcna("workers", "show", "W9")
    assert (ran.code, "hcna workers" in ran.err) == (4, True)


def test_a_worker_can_be_forgotten(hcna: Hcna, c1: FakeC1, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "online" in hcna("workers", "forget", "W1").err
    said = hcna("workers", "forget", "W1", "--force").err
    assert "W1 is forgotten" in said
    assert "wait" not in said
    view = c1.worker() | {"waiting": 2}
    with monkeypatch.context() as patched:
        patched.setattr(c1, "worker", lambda: view)
        assert "2 tasks wait for it" in hcna("workers", "forget", "W1", "--force").err
    c1.worker_state = "asleep"
    assert "asleep" in hcna("workers").out
    assert hcna("workers", "forget", "W1", "--json").json["state"] == "asleep"


def test_a_worker_in_trouble_is_shown_as_such(
    hcna: Hcna, c1: FakeC1, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = c1.worker()
    sick = {"trouble": "cannot write to its disk (full)", "address": "10.0.0.7"}
    monkeypatch.setattr(c1, "worker", lambda: view | sick)

    assert "trouble" in hcna("workers").out
    shown = hcna("workers", "show", "W1").out
    assert "it cannot write to its disk (full)" in shown
    assert "10.0.0.7" in shown


def test_an_intent_takes_the_short_name(hcna: Hcna, c1: FakeC1) -> None:
    ran = hcna("intent", "W1", "test.ping")
    assert ran.json == {"pong": True, "node": "HCNA-W1--prod--home--v1.0"}
    assert c1.requests[-1].json["dst"] == "HCNA-W1--prod--home--v1.0"


# -- manners ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("task", "task-none"), 4, "hcna task list"),
        (("submit", "nonsense"), 4, "hcna workers"),
        (("submit", "echo", "no-equals"), 2, "hcna submit --help"),
        (("submit", "echo", "{bad"), 2, "not JSON"),
        (("submit", "echo", "[1]"), 2, "not an object"),
        (("submit", "echo", "--requires", "moon=1"), 2, "--requires"),
        (("submit", "echo", "--requires", "gpu=many"), 2, "number"),
        (("submit", "echo", "--priority", "10"), 2, "hcna submit --help"),
        (("submit",), 2, "hcna submit --help"),
        (("nonsense",), 2, "hcna --help"),
    ],
)
def test_every_error_is_one_line_with_the_next_command(
    hcna: Hcna, words: tuple[str, ...], code: int, says: str
) -> None:
    ran = hcna(*words)
    assert (ran.code, ran.out) == (code, "")
    assert ran.err.count("\n") == 1
    assert ran.err.startswith("error: ")
    assert says in ran.err
    assert "Traceback" not in ran.err


def test_an_unreachable_c1_is_exit_code_3(hcna: Hcna, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HCNA_URL", "http://127.0.0.1:9")
    ran = hcna("task", "task-x")
    assert ran.code == 3
    assert ran.err.count("\n") == 1
    assert "hcna up" in ran.err


def test_a_wrong_key_is_exit_code_4(hcna: Hcna, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HCNA_API_KEY", "wrong")
    ran = hcna("workers")
    assert (ran.code, "hcna env" in ran.err) == (4, True)


@pytest.mark.parametrize(
    ("status", "code", "then"),
    [
        (403, "forbidden", "hcna keys create NAME --role ROLE, on M1"),
        (403, "out_of_scope", "ask for a key with that scope: hcna keys create NAME, on M1"),
        (429, "quota", "wait for some to end (hcna task list --status queued)"),
        (429, "rate_limited", "wait for Retry-After"),
        (418, "of_a_newer_c1", "hcna status"),
    ],
)
def test_a_key_that_may_not_is_told_what_helps(status: int, code: str, then: str) -> None:
    exit_code, line = describe(api_error_of(status, {"code": code, "detail": "no"}))
    assert (exit_code, f"Next: {then}" in line) == (4, True)


def test_what_c1_says_to_do_is_what_is_printed() -> None:
    told = {"code": "of_a_newer_c1", "detail": "no", "fix": "turn it round"}
    assert describe(api_error_of(409, told))[1].endswith("no. Next: turn it round")


def test_a_wait_that_ends_first_is_exit_code_1(hcna: Hcna) -> None:
    ran = hcna("submit", "hold", "--wait", "--wait-timeout", "0")
    assert (ran.code, "hcna why" in ran.err) == (1, True)


def test_debug_shows_the_traceback(hcna: Hcna, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HCNA_DEBUG", "1")
    with pytest.raises(Exception, match="task_not_found"):
        hcna("task", "task-none")


def test_a_broken_setting_is_named(hcna: Hcna, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HCNA_RETRY_FOR_S", "soon")
    assert "HCNA_RETRY_FOR_S" in hcna("workers").err


def test_help_is_there_for_people(hcna: Hcna) -> None:
    asked = ((), ("task",), ("--help",), ("task", "--help"), ("workers", "--help"))
    for words in (*asked, ("submit", "--help")):
        ran = hcna(*words)
        assert ran.code == 0
        assert "--help" in ran.out


def test_ordinary_commands_do_not_load_ray() -> None:
    code = (
        "import sys\n"
        "from hcna_ray.cli.main import main\n"
        "main(['task', '--help'])\n"
        "found = {'ray', 'fastapi', 'trimesh', 'hcna_ray.supervisor'} & set(sys.modules)\n"
        "sys.exit(str(found) if found else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr


# -- the cluster on this machine -------------------------------------------------------------------


def test_env_prints_what_a_shell_can_eval(hcna: Hcna, url: str) -> None:
    assert hcna("env").out == f"export HCNA_URL={url} HCNA_API_KEY=test-key\n"
    assert hcna("env", "--json").json["HCNA_URL"] == url


def test_env_without_a_key_says_where_it_comes_from(
    hcna: Hcna, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HCNA_API_KEY")
    ran = hcna("env")
    assert (ran.code, "hcna up" in ran.err) == (1, True)


def test_status_of_a_c1_elsewhere(hcna: Hcna, c1: FakeC1, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = hcna("status")
    assert ran.code == 0
    assert "healthy" in ran.out
    assert "W1" in ran.out
    assert hcna("status", "--json").json["health"]["worker_nodes"] == 1
    c1.script.extend([lambda seen: None, problem(401, "unauthorized")])
    assert hcna("status").code == 4
    monkeypatch.setenv("HCNA_URL", "http://127.0.0.1:9")
    ran = hcna("status", "--json")
    assert (ran.code, ran.json["health"]) == (3, None)


def test_the_card_is_short_and_has_everything() -> None:
    lines = card("http://127.0.0.1:8080", "http://127.0.0.1:8265", Path("/home/me/.hcna"), "CODE")
    text = "\n".join(lines)
    assert len(lines) <= 12
    for part in (
        "8080/ui",
        "8080/docs",
        "8265",
        "client.key",
        "curl",
        "hcna demo",
        "hcna join CODE",
    ):
        assert part in text


def test_the_card_names_the_entrance_for_others() -> None:
    words = ("http://127.0.0.1:10034", "http://127.0.0.1:8265", Path("/home/me/.hcna"), "CODE")
    lines = card(*words, "https://c1.example.org:8080")

    assert len(lines) <= 12
    assert "https://c1.example.org:8080 for others" in lines[1]
    assert "HCNA_CA_FILE" in lines[1]


@dataclass(frozen=True)
class _Info:
    url: str = "http://127.0.0.1:8080"
    control_url: str = "http://127.0.0.1:8443"
    public_url: str | None = None
    dashboard_url: str = "http://127.0.0.1:8265"
    ray_address: str = "127.0.0.1:6379"
    home: str = "/home/me/.hcna"
    started_at: float = 0.0


@dataclass(frozen=True)
class _Stopped:
    was_running: bool = True
    took_s: float = 1.5


def test_up_refuses_a_public_address_in_clear(hcna: Hcna, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HCNA_COMPOSITE__LISTEN_ADDRESS", "0.0.0.0")

    ran = hcna("up")

    assert ran.code == 1
    assert "composite.listen_address is 0.0.0.0 without composite.security.enable_tls" in ran.err
    assert ran.err.endswith("Next: set that right, and the same command again\n")


def test_up_and_down_call_the_supervisor(hcna: Hcna, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class FakeSupervisor(ModuleType):
        @staticmethod
        def up(settings: object, *, wait_s: float, on_step: Any) -> _Info:
            calls.append(wait_s)
            on_step("starting M1")
            return _Info()

        @staticmethod
        def invite(settings: object, *, now: float) -> str:
            return "HCNA-CODE"

        @staticmethod
        def down(settings: object, *, on_step: Any, everywhere: bool) -> _Stopped:
            calls.append(everywhere)
            on_step("stopping C1")
            return _Stopped()

    fake = FakeSupervisor("hcna_ray.supervisor")
    monkeypatch.setitem(sys.modules, "hcna_ray.supervisor", fake)
    monkeypatch.setattr("hcna_ray.supervisor", fake, raising=False)
    monkeypatch.setenv("HCNA_MODERATOR__LISTEN_ADDRESS", "0.0.0.0")

    ran = hcna("up", "--wait", "7")
    assert (ran.code, calls) == (0, [7.0])
    assert "moderator.listen_address is 0.0.0.0" in ran.err
    assert "starting M1" in ran.err
    assert "http://127.0.0.1:8080/docs" in ran.out
    assert "hcna join HCNA-CODE" in ran.out
    assert hcna("up", "--json").json["ray_address"] == "127.0.0.1:6379"
    ran = hcna("down")
    assert (ran.code, "stopped in 1.5 s" in ran.err) == (0, True)
    assert hcna("down", "--json").json["was_running"] is True


def test_the_versions_are_told_in_one_line(hcna: Hcna) -> None:
    ran = hcna("--version")
    assert ran.code == 0
    assert re.fullmatch(r"hcna-ray \d\S*, Ray \d\S*, Python 3\.\d\S*\n", ran.out)
