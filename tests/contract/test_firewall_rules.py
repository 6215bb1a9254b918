"""The rules as the kernel takes them: two machines with a cable between, and who gets through."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hcna_ray.config import load_settings
from hcna_ray.supervisor.firewall import (
    addresses_of,
    port_plan,
    removal,
    rules,
    table_of,
)

REPOSITORY = Path(__file__).parents[2]
#: Where root's programs are, for those who are not root.
PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin:/sbin"))
SOURCES = {
    "member": "10.99.0.2",
    "member by IPv6": "fd99::2",
    "other": "10.99.0.3",
    "stranger": "10.99.0.9",
    "stranger by IPv6": "fd99::9",
}
#: Nobody's of ours, M1's gate, then Ray's: GCS, raylet, one of its processes.
FOREIGN, GATE, NODES = 22022, 10040, (6379, 10010, 10250)
#: The dashboard and Jobs API, an agent's HTTP, pages of figures, the replicas' ports.
CLOSED = (8265, 10012, 10015, 10016, 10017, 10025, 10032, 10033, 10100)
LISTEN = sorted((FOREIGN, GATE, *NODES, *CLOSED))
ELSEWHERE = """\
table inet somebodys {
    chain input {
        type filter hook input priority 10; policy accept;
        tcp dport 4242 drop
    }
}
"""


def namespace() -> list[str]:
    """Return the words that give a command a network of its own; skip where there can be none."""
    words = ["unshare", "--net"]
    if os.geteuid() != 0:
        words = ["unshare", "--user", "--map-root-user", "--net"]
    why = ""
    for program in ("nft", "ip", "nsenter", "unshare"):
        if shutil.which(program, path=PATH) is None:
            why = f"{program} is missing"
    if not why:
        command = [*words, "nft", "list", "ruleset"]
        tried = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "PATH": PATH}, check=False
        )
        why = tried.stderr.strip()
    if why:
        if os.environ.get("HCNA_REQUIRE_ALL") == "1":
            pytest.fail(why, pytrace=False)
        pytest.skip(why)
    return words


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What came of three sets of rules and of none, one after the other."""
    settings = load_settings(home=tmp_path_factory.mktemp("home"), env={})
    plan, table = port_plan(settings, "head"), table_of(settings)
    two = rules(table, plan, addresses_of([SOURCES["member"], SOURCES["member by IPv6"]]))
    members = [FOREIGN, GATE, *NODES]
    everybody = [FOREIGN, GATE]
    strangers = dict.fromkeys(SOURCES, everybody)
    steps = [
        {
            "script": two,
            "reach": {**strangers, "member": members, "member by IPv6": members},
            "kept": ["member"],
        },
        # One has moved: other rules in place of these.
        {
            "script": rules(table, plan, addresses_of([SOURCES["other"]])),
            "reach": {**strangers, "other": members},
            "kept": [],
        },
        {"script": rules(table, plan, ()), "reach": strangers, "kept": []},
        {"script": removal(table), "reach": dict.fromkeys(SOURCES, LISTEN), "kept": ["member"]},
        {"script": removal(table), "reach": dict.fromkeys(SOURCES, LISTEN), "kept": ["member"]},
        {"script": two, "reach": steps_reach(members, everybody), "kept": ["member"]},
    ]
    asked = {
        "listen": LISTEN,
        "elsewhere": ELSEWHERE,
        "sources": SOURCES,
        "keep": {"member": 6379},
        "steps": steps,
        "own_port": 10900,
    }
    done = subprocess.run(
        [*namespace(), sys.executable, "-m", "tests.support.two_networks"],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "PATH": PATH, "PYTHONPATH": str(REPOSITORY)},
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {"asked": asked, "table": table, **json.loads(done.stdout)}


def steps_reach(members: list[int], everybody: list[int]) -> dict[str, list[int]]:
    """Who reaches what while two addresses are let in."""
    reach = dict.fromkeys(SOURCES, everybody)
    return {**reach, "member": members, "member by IPv6": members}


def test_each_reaches_what_is_meant_for_it_and_nothing_else(seen: dict[str, Any]) -> None:
    count = 0
    for step, result in zip(seen["asked"]["steps"], seen["steps"], strict=True):
        for name in SOURCES:
            assert result["reached"][name] == sorted(step["reach"][name]), (name, result)
            count += len(result["reached"][name])
    assert count > 100  # Something was reached at all.


def test_the_machine_itself_reaches_everything(seen: dict[str, Any]) -> None:
    assert [each["own"] for each in seen["steps"]] == [LISTEN] * len(seen["steps"])


def test_a_connection_ends_with_the_membership_and_not_before(seen: dict[str, Any]) -> None:
    """What was not let through is sent again, so it arrives once the rules are gone."""
    assert [each["kept"]["member"] for each in seen["steps"]] == [
        True,
        False,
        False,
        True,
        True,
        True,
    ]


def test_answers_to_the_machines_own_connections_pass(seen: dict[str, Any]) -> None:
    """Whatever port it opened them from: Linux may hand out one of ours."""
    assert seen["answered"] is True


def test_no_other_table_is_touched_and_nothing_is_left(seen: dict[str, Any]) -> None:
    for step in seen["steps"]:
        assert "tcp dport 4242 drop" in step["ruleset"]
    tables = [step["ruleset"].count("table inet ") for step in seen["steps"]]
    assert tables == [2, 2, 2, 1, 1, 2]
    assert all(f"table inet {seen['table']} " in seen["steps"][n]["ruleset"] for n in (0, 1, 2, 5))


#: What a supervisor does with its table, inside a network of its own; prints the tables each time.
SHELL = """
import json, logging, subprocess, sys
from itertools import islice
from pathlib import Path
from hcna_ray.config import load_settings
from hcna_ray.supervisor import firewall
from hcna_ray.supervisor.checks import head_checks

def tables():
    command = [firewall.nft_program(), "list", "tables"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.split("table inet ")[1:]

settings = load_settings(home=Path(sys.argv[1]), env={})
one = firewall.Firewall(settings, "head", logging.getLogger("test"))
seen = []
def look():
    seen.append([[each.strip() for each in tables()], one.describe()["trouble"]])
one.open_for(["10.0.0.2"]); look()
one.let_in(["10.0.0.2", "fd00::3"]); look()
one.look_after(); look()
subprocess.run([firewall.nft_program(), "flush", "ruleset"], check=False); look()
one.look_after(); look()
# Its table stays without what is in it.
whole = firewall.show_table(one.table)
subprocess.run([firewall.nft_program(), "flush", "table", "inet", one.table], check=False)
one.look_after()
same = firewall.show_table(one.table) == whole
one.remove(); look()
one.open_for([]); look()
# The supervisor is killed.
seen.append([each.found for each in islice(head_checks(settings), 3) if each.id == "firewall"])
seen.append(firewall.clear(settings)); look()
one.look_after(); look()
off = load_settings(home=Path(sys.argv[1]), env={"HCNA_RAY__FIREWALL": "off"})
for _ in range(2):
    firewall.Firewall(off, "head", logging.getLogger("test")).open_for(["10.0.0.2"]); look()
print(json.dumps([same, *seen]))
"""


def shell(home: Path, *before: str) -> Any:
    """Run what a supervisor does, and return what it printed."""
    done = subprocess.run(
        [*before, sys.executable, "-c", SHELL, str(home)],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "PATH": PATH, "PYTHONPATH": str(REPOSITORY)},
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_supervisors_table_comes_and_goes(tmp_path: Path) -> None:
    table = table_of(load_settings(home=tmp_path, env={}))
    there, gone = [[table], ""], [[], ""]

    seen = shell(tmp_path, *namespace())

    assert seen.pop(0) is True
    left = seen.pop(7)
    assert seen == [there, there, there, gone, there, gone, there, "", gone, there, gone, gone]
    assert left == [f"table inet {table} is there, and no supervisor looks after it"]


def test_without_the_right_nothing_is_set_and_it_is_said(tmp_path: Path) -> None:
    before = namespace()
    if os.geteuid() == 0:
        before += ["setpriv", "--bounding-set=-net_admin", "--inh-caps=-all"]
    else:
        before = []

    seen = shell(tmp_path, *before)

    assert seen.pop(0) is True  # There is none, before and after.
    assert seen.pop(8) == ""
    assert seen.pop(7) == []  # Nothing is left, or this process cannot know.
    assert all(trouble == "" or "CAP_NET_ADMIN" in trouble for _, trouble in seen)
    assert "CAP_NET_ADMIN" in seen[0][1]
    assert all(tables == [] for tables, _ in seen)


@pytest.mark.parametrize("role", ["head", "worker"])
@pytest.mark.parametrize("offset", ["0", "21000"])
def test_nft_takes_the_rules_of_every_machine(role: Any, offset: str, tmp_path: Path) -> None:
    settings = load_settings(home=tmp_path, env={"HCNA_PORTS__OFFSET": offset})
    many = addresses_of([f"10.1.{n // 250}.{n % 250 + 1}" for n in range(1000)])
    for members in ((), addresses_of(["10.0.0.1"]), addresses_of(["fd00::1"]), many):
        done = subprocess.run(
            [*namespace(), "nft", "-c", "-f", "-"],
            input=rules(table_of(settings), port_plan(settings, role), members),
            capture_output=True,
            text=True,
            env={**os.environ, "PATH": PATH},
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
