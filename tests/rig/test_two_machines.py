"""M1 and W1, then W2, on hosts of their own: joining, failing, coming back.

The tests of this file build on each other, in their order, on one cluster: a bring-up for each
would take half an hour. What they print as ``measured: rig: ...`` are the figures of the run.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from hcna_ray.supervisor.processes import Marker, scan
from tests.page.browser import MISSING, Browser, a_browser, found
from tests.rig.computer import HCNA, HOME, LEAVES_S, PYTHON, Computer, eventually, measured
from tests.rig.reach import asked_for_pages, found_by_a_stranger
from tests.support.rig import Rig
from tests.support.rig.door import Door
from tests.support.rig.testing import rig_for_tests

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def computer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Computer]:
    base = tmp_path_factory.mktemp("rigs").resolve()
    with rig_for_tests(base=base, data_size={"client": "1500m"}) as rig:
        yield Computer(rig)


@pytest.fixture
def rig(computer: Computer) -> Iterator[Rig]:
    yield computer.rig
    computer.rig.heal()
    for host in computer.rig:
        host.resume()


@pytest.fixture
def page(computer: Computer, tmp_path: Path) -> Iterator[Browser]:
    """A Chromium of this machine with the page open and signed in, for as long as a test takes."""
    if not found():
        pytest.skip(MISSING)
    with Door(computer.m1, 8080) as door, a_browser(tmp_path / "profile") as browser:
        browser.url = door.url
        browser.sign_in(computer.key)
        browser.driver.execute_script("window.opened = 'once'")
        yield browser
        assert browser.driver.execute_script("return window.opened") == "once"
        assert browser.complaints() == []


def test_up_join_and_first_result_take_three_commands(computer: Computer) -> None:
    begun = time.monotonic()
    printed = computer.hcna("m1", "up").out
    up_s = time.monotonic() - begun
    joined = computer.join("w1", code=computer.code_in(printed))
    first = computer.hcna("m1", "submit echo message=hello --wait").out
    took = time.monotonic() - begun

    measured(f"(b) hcna up {up_s:.1f} s, join and first result of W1 {took:.1f} s, 3 commands")
    assert "this machine is W1" in joined.out
    assert json.loads(first)["processed_by"] == "HCNA-W1--prod--home--v1.0"
    workers = computer.workers()
    assert list(workers) == ["W1"]
    assert workers["W1"]["state"] == "online"
    assert workers["W1"]["last_seen_age_s"] < 10
    # An instance under the same paths on this machine would not take those for its own.
    told = json.loads(computer.m1.sh(f"cat {HOME}/run/cluster.json").out)
    marker = Marker(home=Path(HOME), cluster_id=told["cluster_id"], temp_dir=Path(told["temp_dir"]))
    assert scan(marker) == []
    # M1's machine has stopped working itself.
    assert not [one for one in computer.m1.processes() if "slot:" in one.command]


def test_the_services_run_what_the_units_say(computer: Computer) -> None:
    for host in ("m1", "w1"):
        computer.install_services(host)
    # By hand first, by the service manager from now on.
    computer.hcna("w1", "down")
    computer.hcna("m1", "down --here")
    begun = time.monotonic()
    computer.systemctl("m1", "enable --now hcna-m1 hcna-c1")
    computer.systemctl("w1", "enable --now hcna-w1")

    eventually(lambda: computer.state_of("W1") == "online", 90, "W1 online")
    computer.works("W1", 30)
    measured(f"both services started, first result {time.monotonic() - begun:.1f} s")
    journal = computer.rig["w1"].sh("tail -n 50 /var/log/journal/hcna-w1.log").out
    assert "Connected to M1 HCNA-M1--prod--home--v1.0 at 10.77.0.11:8443" in journal
    journal = computer.m1.sh("tail -n 200 /var/log/journal/hcna-m1.log").out
    assert "W1 node HCNA-W1--prod--home--v1.0 registered successfully" in journal


def test_seed_tests_1_to_4(computer: Computer) -> None:
    computer.m1.write("/root/phase7.sh", (DATA / "phase7.sh").read_text(), mode=0o755)
    computer.m1.write(
        "/root/.curlrc",
        f'header = "Authorization: Bearer {computer.key}"\n'
        'connect-to = "hcna-c1.local:8080:127.0.0.1:8080"\n'
        'connect-to = "hcna-m1.local:8443:127.0.0.1:8443"\n',
        mode=0o600,
    )
    done = computer.m1.sh("bash /root/phase7.sh", timeout_s=180)
    words = dict(line.split("=", 1) for line in done.lines if "=" in line)

    assert "pong" in words["test1"]
    assert json.loads(words["test2"])["processed_by"] == "HCNA-W1--prod--home--v1.0"
    assert int(words["test3_completed"]) == 100
    assert float(words["test3_total_after"]) - float(words["test3_total_before"]) >= 100
    measured(f"seed test 3: 100 parallel curls, all complete after {words['test3_s']} s")
    measured(f"seed test 4: one task by curl, submit to completed {words['test4_s']} s")
    assert (
        "Received intent test.ping from M1"
        in computer.rig["w1"].sh("tail -n 400 /var/log/journal/hcna-w1.log").out
    )


def test_nobody_else_finds_more_than_the_gate(computer: Computer) -> None:
    """Who shows what at the ports that members reach is in test_ports.py."""
    measured(found_by_a_stranger(computer, ("m1", "w1")))
    measured(asked_for_pages(computer, [("client", "m1"), ("w1", "m1")]))


def test_prometheus_on_m1_is_sent_to_pages_that_answer(computer: Computer) -> None:
    groups = computer.api("GET", "/metrics/targets")[1]

    def status(target: str) -> str:
        words = ("-qs", "-m", "5", "-o", "/dev/null", "-w", "%{http_code}")
        return computer.m1.run("curl", *words, f"http://{target}/metrics", check=False).out

    answers = {
        (one["labels"]["node"], one["labels"]["exporter"]): status(*one["targets"])
        for one in groups
    }
    # The rules for ports let nobody elsewhere read Ray's own page of a worker.
    assert answers.pop(("W1", "node")) == "000"
    assert {("M1", exporter) for exporter in ("c1", "node", "edge", "autoscaler")} <= set(answers)
    assert set(answers.values()) == {"200"}, answers


def test_dispatch_latency_across_hosts(computer: Computer) -> None:
    computer.m1.write("/root/dispatch.py", (DATA / "dispatch.py").read_text())
    done = computer.m1.sh(f"{PYTHON} /root/dispatch.py 1000 50", timeout_s=120)
    found = json.loads(done.out)

    assert found["completed"] == 1000
    assert found["workers"] == ["W1"]
    measured(
        f"dispatch m1 to W1, 1000 echoes at {found['rate']:.0f}/s: p50 {found['p50_ms']:.1f} ms, "
        f"p95 {found['p95_ms']:.1f} ms, p99 {found['p99_ms']:.1f} ms"
    )


def test_seed_test_5_a_stopped_worker(computer: Computer) -> None:
    begun = time.time()
    computer.rig.ssh("m1", "w1", "sudo systemctl stop hcna-w1", user="hcna-admin", timeout_s=60)
    computer.until_state("W1", "gone", 10)
    task_id = computer.submit("echo", {})
    eventually(
        lambda: computer.logged("m1", "moderator.log", "No healthy workers available", begun),
        20,
        "the log line",
    )
    task = computer.task(task_id)
    assert task["status"] == "queued"
    assert task["pending_reason"]["message"].startswith("No healthy workers available")
    computer.rig.ssh("m1", "w1", "sudo systemctl start hcna-w1", user="hcna-admin", timeout_s=60)
    back = eventually(lambda: computer.state_of("W1") == "online", 60, "W1 online")[1]
    ended = time.monotonic()
    computer.completed(task_id, 10)
    measured(
        f"(c) W1 stopped and started: online after {back:.1f} s, the waiting task ended "
        f"{time.monotonic() - ended:.1f} s later"
    )


def test_a_second_worker_shares_the_load(computer: Computer) -> None:
    joined = computer.join("w2")
    assert "this machine is W2" in joined.out
    computer.install_services("w2")
    computer.hcna("w2", "down")
    computer.systemctl("w2", "enable --now hcna-w2")
    eventually(lambda: computer.state_of("W2") == "online", 60, "W2 online")
    eventually(lambda: computer.state_of("W1") == "online", 60, "W1 online")
    for worker in ("W1", "W2"):
        computer.works(worker, 60)
    ids = [computer.submit("sleep", {"seconds": 0.5}) for _ in range(16)]
    who = [computer.completed(one)["result"]["processed_by"] for one in ids]

    shares = {name: who.count(name) for name in sorted(set(who))}
    measured(f"16 tasks of 0.5 s over two workers: {shares}")
    assert min(shares.values()) >= 4
    assert len(shares) == 2


@pytest.mark.parametrize(
    "seeds_own",
    [
        pytest.param(False, id="receiver"),
        pytest.param(True, id="output", marks=pytest.mark.drill),
    ],
)
def test_seed_test_6_a_partition(computer: Computer, rig: Rig, seeds_own: bool) -> None:
    moves = computer.submit("sleep", {"seconds": 25}, requires={"worker": "W1"})
    eventually(lambda: computer.task(moves)["status"] == "running", 20, "it runs on W1")
    ids = [computer.submit("sleep", {"seconds": 30}) for _ in range(4)]
    eventually(lambda: all(computer.task(one)["status"] == "running" for one in ids), 20, "all run")
    on_w1 = [one for one in ids if computer.task(one)["attempts"][-1]["worker"] == "W1"]
    assert on_w1, "two idle workers should share four tasks"
    begun, at = time.monotonic(), time.time()
    rig.partition("m1", "w1", output=seeds_own) if seeds_own else rig.partition("m1", "w1")

    eventually(
        lambda: computer.logged("m1", "moderator.log", "health check failed", at), 30, "noticed"
    )
    noticed = time.monotonic() - begun
    eventually(
        lambda: all(
            (one := computer.task(task))["status"] == "completed"
            or one["attempts"][0]["outcome"] == "lost"
            for task in on_w1
        ),
        60,
        "the attempts of W1 are taken back",
    )
    requeued = time.monotonic() - begun
    # Pinned to W1: it waits there and says why.
    assert "W1" in str(computer.task(moves)["pending_reason"])
    for task in on_w1:
        assert computer.completed(task, 90)["result"]["processed_by"].startswith("HCNA-W2")
    rig.heal()
    healed = time.monotonic()
    computer.works("W1", 60)
    usable = time.monotonic() - healed
    computer.completed(moves, 90)
    kind = "the seed's OUTPUT drop" if seeds_own else "silent, both ways"
    measured(
        f"(d) partition, {kind}: health check failed after {noticed:.1f} s, queued again after "
        f"{requeued:.1f} s, W1 usable {usable:.1f} s after healing"
    )
    ends = computer.ends()
    assert {ends[one] for one in (*ids, moves)} == {1}


def test_rejoin_after_the_raylet_is_killed(computer: Computer) -> None:
    w1 = computer.rig["w1"]
    w1.sh("kill -9 $(pgrep -x raylet)")
    begun = time.monotonic()
    eventually(lambda: computer.state_of("W1") != "online", 30, "the loss is seen")
    computer.works("W1", 90)
    measured(f"(e) raylet killed: W1 works again after {time.monotonic() - begun:.1f} s")


def test_rejoin_after_the_plug_and_after_a_reboot(computer: Computer) -> None:
    w1, w2 = computer.rig["w1"], computer.rig["w2"]
    w1.unplug()
    w2.reboot()
    begun = time.monotonic()
    eventually(lambda: computer.state_of("W1") in ("suspect", "asleep"), 40, "W1 missed")
    computer.works("W2", 120)
    measured(f"(e) reboot: W2 works again {time.monotonic() - begun:.1f} s after boot")
    eventually(lambda: computer.state_of("W1") == "asleep", 60, "W1 asleep")
    w1.boot()
    begun = time.monotonic()
    computer.works("W1", 120)
    measured(f"(e) plug pulled: W1 works again {time.monotonic() - begun:.1f} s after boot")


@pytest.mark.drill
def test_the_page_sees_w1_lose_its_power_and_come_back(computer: Computer, page: Browser) -> None:
    w1 = computer.rig["w1"]
    page.see("online", "[data-machine=W1]")
    w1.unplug()
    page.see("unreachable", "[data-machine=W1]")
    first_s = last_known_s(page)
    eventually(lambda: computer.state_of("W1") == "asleep", 90, "W1 asleep")
    page.see("asleep", "[data-machine=W1]")
    page.see("online", "[data-machine=W2]")
    assert 0 < first_s < last_known_s(page) < 180
    page.picture("w1-without-power")
    w1.boot()
    computer.works("W1", 120)
    page.see("online", "[data-machine=W1]")
    page.see_no("unreachable", "[data-machine=W1]")


def last_known_s(page: Browser) -> int:
    """Return how long ago, as the page has it, W1 was heard of."""
    words = page.text("[data-machine=W1]")
    age = re.search(r"last known (?:(\d+) min )?(\d+)(?:\.\d)? s ago", words)
    assert age is not None, words
    return 60 * int(age[1] or 0) + int(age[2])


@pytest.mark.drill
def test_rejoin_after_a_long_partition_and_after_sleep(computer: Computer, rig: Rig) -> None:
    task = computer.submit("sleep", {"seconds": 1}, requires={"worker": "W1"})
    computer.completed(task)
    slept = time.monotonic()
    rig["w2"].pause()
    rig.partition("m1", "w1")
    eventually(
        lambda: {computer.state_of("W1"), computer.state_of("W2")} == {"asleep"},
        60,
        "both asleep",
    )
    time.sleep(max(0.0, 90 - (time.monotonic() - slept)))
    rig.heal()
    begun = time.monotonic()
    computer.works("W1", 90)
    measured(f"(e) 90 s partition: W1 works again {time.monotonic() - begun:.1f} s after healing")
    time.sleep(max(0.0, 120 - (time.monotonic() - slept)))
    rig["w2"].resume()
    begun = time.monotonic()
    computer.works("W2", 120)
    measured(f"(e) 120 s sleep: W2 works again {time.monotonic() - begun:.1f} s after waking")


@pytest.mark.drill
def test_rejoin_after_m1s_process_changed(computer: Computer) -> None:
    begun = time.monotonic()
    computer.m1.sh("kill -9 $(pgrep -x gcs_server)")
    eventually(lambda: not computer.workers(), 30, "C1 is away", pause_s=0.05)
    for worker in ("W1", "W2"):
        eventually(lambda: computer.workers(), 90, "C1 answers")
        eventually(lambda w=worker: computer.state_of(w) == "online", 120, f"{worker} online")
        computer.works(worker, 60)
    measured(f"(e) M1's head killed: all workers work again after {time.monotonic() - begun:.1f} s")


def test_reboot_of_m1(computer: Computer) -> None:
    ids = [computer.submit("sleep", {"seconds": 3}) for _ in range(30)]
    computer.m1.reboot()
    begun = time.monotonic()
    eventually(lambda: computer.api("GET", "/ready")[0] == 200, 90, "C1 ready", pause_s=0.5)
    late = computer.submit("echo", {"after": "reboot"})
    accepting = time.monotonic() - begun
    for worker in ("W1", "W2"):
        eventually(lambda w=worker: computer.state_of(w) == "online", 150, f"{worker} online")
    back = time.monotonic() - begun
    for one in (*ids, late):
        computer.completed(one, 120)
    measured(
        f"(f) M1 reboot: accepting {accepting:.1f} s after boot, all workers back after "
        f"{back:.1f} s, 31 of 31 tasks completed"
    )
    ends = computer.ends()
    assert {ends[one] for one in (*ids, late)} == {1}


def test_serve_deploy_and_neighbours(computer: Computer) -> None:
    m1 = computer.m1
    m1.write("/root/neighbour/neighbour.py", (DATA / "neighbour.py").read_text(), mode=0o755)
    ids = [computer.submit("sleep", {"seconds": 0.2}) for _ in range(20)]
    m1.sh(
        f'eval "$({HCNA} env)"; cd ~/hcna-ray && .venv/bin/serve deploy serve_config.yaml',
        timeout_s=60,
    )
    eventually(lambda: computer.api("GET", "/ready")[0] == 200, 60, "C1 ready")
    for one in ids:
        computer.completed(one)
    # A neighbour comes; deploying C1 anew by hcna leaves it, a plain serve deploy does not.
    both = yaml.safe_load((Path(__file__).parents[2] / "serve_config.yaml").read_text())
    both["applications"].append(yaml.safe_load((DATA / "neighbour.yaml").read_text()))
    m1.write("/root/both.yaml", yaml.safe_dump(both))

    def deploy(config: str) -> None:
        m1.sh(f'eval "$({HCNA} env)"; ~/hcna-ray/.venv/bin/serve deploy {config}', timeout_s=60)

    def answers() -> bool:
        return (
            m1.sh("curl -qs -m 5 http://127.0.0.1:8080/neighbour", check=False).out == "next door"
        )

    deploy("/root/both.yaml")
    eventually(answers, 60, "the neighbour answers")
    m1.sh(
        f'eval "$({HCNA} env)"; cd /tmp && HCNA_HOME={HOME} HCNA_CONFIG={HOME}/run/settings.yaml '
        f"{PYTHON} -m hcna_ray.runtime.bootstrap --ray-address 127.0.0.1:6379",
        timeout_s=120,
    )
    assert answers()
    deploy("/root/hcna-ray/serve_config.yaml")
    eventually(lambda: not answers(), 60, "the neighbour goes")
    eventually(lambda: computer.api("GET", "/ready")[0] == 200, 60, "C1 ready")


def test_memory_of_both_machines(computer: Computer) -> None:
    for host in ("m1", "w1"):
        found = json.loads(computer.hcna(host, "memory --json").out)
        total = sum(part["pss_bytes"] for part in found["nodes"])
        measured(f"memory (PSS) of {host}: {total / 1e6:.0f} MB")


OK, USAGE, UNREACHABLE, REFUSED, CHECK_FAILED = 0, 2, 3, 4, 5


def test_bad_joins_are_refused_with_a_sentence_and_a_code(computer: Computer, rig: Rig) -> None:
    """Each leaves the machine as it was, so that the good one at the end still joins."""
    client = rig["client"]
    told: list[str] = []

    def refused(case: str, command: str, code: int, *words: str, user: str = "root") -> None:
        done = client.sh(command, user=user, timeout_s=90, check=False)
        text = f"{done.out}\n{done.err}"
        assert done.code == code, (case, done.code, text)
        for word in words:
            assert word in text, (case, word, text)
        assert not client.file(f"{HOME}/cluster/membership.json").exists(), case
        lines = [line for line in done.err.splitlines() if line.startswith(("✗", "error:"))]
        told.append(f"  {case}: exit {done.code}: {lines[0]}")

    good = computer.invite()
    join = f"{HCNA} join"
    slip = good[:-1] + ("2" if good[-1] != "2" else "3")
    refused("wrong code", f"{join} {slip}", USAGE, "join code")
    expired = computer.invite("--lifetime 1s")
    time.sleep(1.5)
    refused("expired code", f"{join} {expired}", REFUSED, "expired", "hcna invite")
    revoked = computer.invite()
    computer.hcna("m1", f"invite revoke {_newest_invite(computer)}")
    refused("revoked code", f"{join} {revoked}", REFUSED, "revoked", "hcna invite")
    good = computer.invite()
    refused("name taken", f"{join} {good} --name W1", CHECK_FAILED, "W1 is taken by hcna-w1")
    rig.partition("client", "m1", one_way=True, port=6379)
    refused("port blocked on M1", f"{join} {good}", CHECK_FAILED, "6379")
    rig.heal()
    rig.partition("m1", "client", one_way=True, port=10020)
    refused("port blocked here", f"{join} {good}", CHECK_FAILED, "10020")
    rig.heal()
    refused("clock 10 min off", f"faketime -f +10m {join} {good}", CHECK_FAILED, "clock")
    # The interpreter of the command itself: the checkout is to be seen under two paths.
    metadata = client.sh(
        f"""$(head -n 1 {HCNA} | cut -c 3-) -c 'from importlib.metadata import files; """
        """print(next(one.locate() for one in files("ray") if one.name == "METADATA"))'"""
    ).out.strip()
    client.sh(
        f"sed 's/^Version: .*/Version: 2.59.0/' {metadata} >/tmp/METADATA && "
        f"mount --bind /tmp/METADATA {metadata}"
    )
    refused("other Ray version", f"{join} {good}", CHECK_FAILED, "2.59.0", "2.60.0")
    client.sh(f"umount {metadata}")
    client.fill("/root", leave=200 << 20)
    refused("disk full", f"{join} {good}", CHECK_FAILED, "disk")
    client.free()
    rig.partition("client", "m1")
    refused("M1 unreachable", f"{join} {good}", UNREACHABLE, "10.77.0.11")
    rig.heal()
    wrong = client.add_card()
    refused(
        "wrong card", f"{join} {good} --address {wrong}", UNREACHABLE, wrong, "without --address"
    )
    client.sh("install -d -o root -m 755 /home/hcna-admin/.hcna")
    home = "/home/hcna-admin/hcna-ray/.venv/bin/hcna"
    refused(
        "no permission",
        f"{home} join {good}",
        CHECK_FAILED,
        "/home/hcna-admin/.hcna",
        user="hcna-admin",
    )
    measured("bad joins")
    for line in told:
        measured(line)

    assert "this machine is W3" in computer.join("client", "--name W3").out
    refused_here = computer.hcna("client", f"join {computer.invite()} --name W9", check=False)
    assert refused_here.code in (OK, REFUSED)
    computer.works("W3", 30)
    computer.hcna("client", "leave")


def _newest_invite(computer: Computer) -> str:
    listed = json.loads(computer.hcna("m1", "invite list --json").out)
    return str(max(listed, key=lambda one: one["created_at"])["id"])


def test_doctor_on_every_machine(computer: Computer) -> None:
    for host in ("m1", "w1", "w2"):
        done = computer.hcna(host, "doctor", check=False)
        assert done.code == 0, done.err + done.out


def test_leave_and_come_again(computer: Computer) -> None:
    task = computer.submit("sleep", {"seconds": 3}, requires={"worker": "W2"})
    eventually(lambda: computer.task(task)["status"] == "running", 20, "it runs")
    computer.hcna("w2", "leave")
    assert computer.completed(task)["losses"] == 0
    assert "W2" not in computer.workers()
    assert computer.leftovers(computer.rig["w2"]) == []
    assert "this machine is W2" in computer.join("w2").out
    computer.works("W2", 30)


def test_down_leaves_nothing_on_any_host(computer: Computer) -> None:
    begun = time.monotonic()
    computer.hcna("m1", "down")
    computer.until_clean(LEAVES_S)
    measured(f"hcna down on M1: all hosts clean after {time.monotonic() - begun:.1f} s")
