"""The ``hcna`` command as a user types it, against the cluster: output, exit codes, hints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hcna_ray.client import Client
from hcna_ray.supervisor.state import read_state, read_supervisor
from tests.integration.conftest import Cluster
from tests.support.live import eventually

W1 = "HCNA-W1--prod--home--v1.0"
HCNA = Path(sys.executable).parent / "hcna"


@dataclass(frozen=True)
class Ran:
    """What a command left."""

    code: int
    out: str
    err: str
    took_s: float

    @property
    def json(self) -> Any:
        assert self.code == 0, self.err
        return json.loads(self.out)


@dataclass(frozen=True)
class Shell:
    """A user's shell."""

    env: dict[str, str]
    folder: Path

    def __call__(self, *words: str, stdin: str = "", **env: str) -> Ran:
        started = time.monotonic()
        done = subprocess.run(
            [str(HCNA), *words],
            input=stdin,
            env={**self.env, **env},
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return Ran(done.returncode, done.stdout, done.stderr, time.monotonic() - started)


@pytest.fixture
def hcna(cluster: Cluster, tmp_path: Path) -> Shell:
    """A shell on this machine that knows nothing but where the cluster's home is."""
    env = {name: value for name, value in cluster.env.items() if not name.startswith("HCNA_")}
    return Shell({**env, "HCNA_HOME": str(cluster.settings.home), "COLUMNS": "200"}, tmp_path)


def test_status(hcna: Shell, cluster: Cluster) -> None:
    told = hcna("status", "--json").json

    assert told["url"] == cluster.url
    assert told["health"]["status"] == "healthy"
    assert told["trouble"] is None
    assert [worker["name"] for worker in told["workers"]] == ["W1"]
    assert told["machine"]["state"] == "up"
    members = {one["name"]: one for one in told["machine"]["members"]}
    assert set(members) == {"head", "worker", "edge"}
    assert all(one["up"] and one["pid"] for one in members.values())
    for_people = hcna("status")
    assert for_people.code == 0
    assert "healthy" in for_people.out
    assert "W1" in for_people.out


def test_env_is_for_eval(hcna: Shell, cluster: Cluster) -> None:
    line = hcna("env")
    shell = 'eval "$line" && echo "$HCNA_URL $HCNA_API_KEY"'
    env = {"PATH": os.environ["PATH"], "line": line.out}
    echoed = subprocess.run(
        ["bash", "-c", shell], env=env, capture_output=True, text=True, timeout=10, check=True
    )

    assert echoed.stdout.split() == [cluster.url, cluster.api_key]
    assert hcna("env", "--json").json == {
        "HCNA_URL": cluster.url,
        "HCNA_API_KEY": cluster.api_key,
    }


def test_workers(hcna: Shell) -> None:
    (worker,) = hcna("workers", "--json").json
    assert (worker["name"], worker["node_id"], worker["state"]) == ("W1", W1, "online")
    assert hcna("workers", "show", "W1", "--json").json["node_id"] == W1
    assert "online" in hcna("workers").out
    try:
        assert hcna("workers", "cordon", "W1", "--json").json["state"] == "cordoned"
        task_id = hcna("submit", "echo").out.strip()
        why = hcna("why", task_id)
        assert "No healthy workers available" in why.out
        assert "hcna workers uncordon" in why.out
    finally:
        assert hcna("workers", "uncordon", "W1", "--json").json["state"] == "online"
    assert hcna("task", task_id, "--wait", "--json").json["status"] == "completed"


def test_submit_and_look(hcna: Shell) -> None:
    ran = hcna("submit", "echo", "message=hello", "n=3", "--metadata", "who=me")
    task_id = ran.out.strip()
    assert (ran.code, task_id[:5], ran.out.count("\n")) == (0, "task-", 1)
    assert f"hcna task {task_id}" in ran.err

    waited = hcna("task", task_id, "--wait")
    assert json.loads(waited.out)["message"] == "hello"
    task = hcna("task", task_id, "--json").json
    assert (task["status"], task["result"]["n"]) == ("completed", 3)
    assert task["metadata"] == {"who": "me"}
    assert "W1" in hcna("task", task_id).out
    listed = hcna("task", "list", "--status", "completed", "--limit", "5", "--json").json
    assert task_id in [one["task_id"] for one in listed]
    assert task_id in hcna("task", "list", "--limit", "5").out
    assert "completed on W1" in hcna("why", task_id).out
    assert hcna("why", task_id, "--json").json["status"] == "completed"


def test_submit_and_wait(hcna: Shell) -> None:
    assert hcna("submit", "echo", '{"a": [1]}', "--wait").json["a"] == [1]
    from_stdin = hcna("submit", "echo", "-", "--wait", "--json", stdin='{"b": "ü"}').json
    assert (from_stdin["status"], from_stdin["result"]["b"]) == ("completed", "ü")
    heavy = hcna("submit", "sleep", "seconds=0", "--requires", "cpu=1", "--wait", "--json").json
    assert heavy["status"] == "completed"


def test_a_failed_task_is_exit_code_1(hcna: Shell) -> None:
    ran = hcna("submit", "example.flaky", "fail_until_attempt=9", "--attempts", "2", "--wait")

    assert (ran.code, ran.out) == (1, "")
    (line,) = ran.err.strip().splitlines()
    assert "attempt 2 fails, as asked" in line
    assert "after 2 attempts" in line
    assert "Next: hcna why task-" in line
    task_id = line.split()[1].rstrip(":")
    as_json = hcna("task", task_id, "--wait", "--json")
    assert as_json.code == 1
    assert json.loads(as_json.out)["error"]["kind"] == "error"
    why = hcna("why", task_id)
    assert "attempt 2 on W1: errored" in why.out
    assert f"hcna task retry {task_id}" in why.out
    again = hcna("task", "retry", task_id, "--wait", "--json")
    assert again.code == 1
    assert len(json.loads(again.out)["attempts"]) > 2


def test_waiting_may_have_an_end(hcna: Shell) -> None:
    ran = hcna("submit", "sleep", "seconds=60", "--wait", "--wait-timeout", "1")

    assert ran.code == 1
    assert "did not end within 1 s and goes on" in ran.err
    task_id = next(word for word in ran.err.split() if word.startswith("task-"))
    cancelled = hcna("task", "cancel", task_id, "--reason", "enough", "--json")
    assert cancelled.code == 0
    assert hcna("task", task_id, "--wait").code == 1
    second = hcna("task", "cancel", task_id)
    assert second.code == 4
    assert "task_finished (409)" in second.err


def test_map_keeps_the_order_and_says_what_failed(hcna: Shell, tmp_path: Path) -> None:
    file = tmp_path / "payloads.ndjson"
    file.write_text("".join(json.dumps({"n": n}) + "\n" for n in range(40)))

    ran = hcna("map", "echo", str(file), "--chunk", "10")
    lines = [json.loads(line) for line in ran.out.splitlines()]
    assert ran.code == 0
    assert [line["n"] for line in lines] == list(range(40))

    payloads = [{"fail_until_attempt": 1}, {"fail_until_attempt": 50}]
    stdin = "\n".join(json.dumps(one) for one in payloads)
    mixed = hcna("map", "example.flaky", "-", "--json", stdin=stdin)
    good, bad = (json.loads(line) for line in mixed.out.splitlines())
    assert mixed.code == 1
    assert good["succeeded_on_attempt"] == 1
    assert (bad["error"]["kind"], bad["error"]["attempts"]) == ("error", 5)
    assert "1 of the tasks did not complete" in mixed.err


def test_why_of_a_task_that_fits_nowhere(hcna: Shell) -> None:
    task_id = hcna("submit", "echo", "--requires", "cpu=99").out.strip()

    why = hcna("why", task_id, "--json").json

    assert (why["status"], why["code"]) == ("queued", "unplaceable")
    assert "needs cpu>=99: excludes 1 of 1 worker" in why["message"]
    assert why["fix"]
    assert hcna("task", "cancel", task_id).code == 0


def test_intent(hcna: Shell) -> None:
    assert hcna("intent", "W1", "test.ping").json["pong"] is True
    whole = hcna("intent", W1, "test.ping", "--json").json
    assert (whole["dst"], whole["intent"]) == (W1, "test.ping")


def test_the_audit_log_is_whole_and_in_a_file_too(
    hcna: Shell, cluster: Cluster, tmp_path: Path
) -> None:
    assert hcna("intent", "W1", "test.ping").json["pong"] is True
    file = cluster.settings.audit_file
    eventually(
        lambda: file.is_file() and "intent.send" in file.read_text(), 30.0, "the line in the file"
    )
    # What is done beside the moderator gets there too.
    assert hcna("keys", "create", "for-a-moment").code == 0
    assert hcna("keys", "revoke", "for-a-moment").code == 0
    eventually(lambda: '"key.revoked"' in file.read_text(), 30.0, "the key in the file")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    about = [one["action"] for one in lines if one.get("target") == "for-a-moment"]
    assert about == ["key.created", "key.revoked"]
    told = hcna("audit", "verify", "--json").json
    assert set(told) == {cluster.settings.store_name, str(file)}
    assert all(one["whole"] and one["lines"] for one in told.values())
    copy = tmp_path / "copy.jsonl"
    assert hcna("audit", "export", str(copy)).code == 0
    copy.write_text(copy.read_text().replace('"intent.send"', '"intent.sent"', 1))
    assert hcna("audit", "verify", "--file", str(copy), "--alone").code == 5


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("submit",), 2, "Missing argument 'TYPE'"),
        (("submit", "echo", "no-pair"), 2, "'no-pair' is not key=value"),
        (("submit", "echo", "{broken"), 2, "is not JSON"),
        (("submit", "echo", "--requires", "cpu=much"), 2, "needs a number"),
        (("frobnicate",), 2, "No such command"),
        (("map", "echo", "/no/such/file"), 2, "/no/such/file"),
        (("submit", "ecko"), 4, "unknown_task_type (422)"),
        (("submit", "sleep", "seconds=long"), 4, "payload.seconds"),
        (("task", "task-none"), 4, "task_not_found (404)"),
        (("workers", "show", "W9"), 4, "worker_not_found (404)"),
        (("intent", "W9", "test.ping"), 4, "worker_not_found (404)"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_one_line_and_an_exit_code_for_everything_that_goes_wrong(
    hcna: Shell, words: tuple[str, ...], code: int, said: str
) -> None:
    ran = hcna(*words)

    (line,) = ran.err.strip().splitlines()
    assert ran.code == code, line
    assert said in line
    assert line.startswith("error: ")
    assert ". Next: " in line
    assert ran.out == ""


def test_nobody_there_is_exit_code_3(hcna: Shell) -> None:
    nowhere = {"HCNA_URL": "http://127.0.0.1:9", "HCNA_API_KEY": "x", "HCNA_RETRY_FOR_S": "0"}
    for words in (("status",), ("submit", "echo"), ("workers",), ("task", "list")):
        ran = hcna(*words, **nowhere)
        assert ran.code == 3, ran.err
        assert "hcna up" in ran.err


def test_a_wrong_key_is_exit_code_4(hcna: Shell, cluster: Cluster) -> None:
    ran = hcna("workers", HCNA_URL=cluster.url, HCNA_API_KEY="hcna_wrong")

    assert ran.code == 4
    assert "unauthorized (401)" in ran.err
    assert 'eval "$(hcna env)"' in ran.err
    assert cluster.api_key not in ran.err


def test_up_on_a_running_cluster_changes_nothing(
    hcna: Shell, cluster: Cluster, client: Client
) -> None:
    running = client.submit("sleep", {"seconds": 3})
    run_dir = cluster.settings.run_dir
    before, members = read_supervisor(run_dir), read_state(run_dir)["members"]

    ran = hcna("up", "--json")

    assert ran.json["url"] == cluster.url
    assert ran.took_s < 5
    assert read_supervisor(run_dir) == before
    assert before is not None
    assert {name: one["pid"] for name, one in read_state(run_dir)["members"].items()} == {
        name: one["pid"] for name, one in members.items()
    }
    view = running.wait(timeout_s=30)
    assert (view.status, view.losses) == ("completed", 0)
    card = hcna("up").out
    assert cluster.url in card
    assert len(card.splitlines()) <= 12
    assert cluster.api_key not in card
