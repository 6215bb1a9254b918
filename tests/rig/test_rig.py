"""The hosts are separate, the faults are real, and nothing stays behind."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.rig.computer import measured
from tests.support.rig import CommandFailed, Host, Rig, RigError
from tests.support.rig.door import Door, network_of
from tests.support.rig.processes import KEEPER_MODULE, arguments, find_inits, namespace, numbers
from tests.support.rig.rig import REPOSITORY
from tests.support.rig.state import PREFIX

PYTHON = "hcna-ray/.venv/bin/python"
#: Exit codes of a try to connect.
OPEN, REFUSED, SILENT = 0, 1, 124
KINDS = ("mnt", "net", "pid", "uts", "ipc")

#: Writes every datagram that arrives to a file.
LISTENER = """
import socket
ear = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
ear.bind(("0.0.0.0", 9999))
print("ready", flush=True)
with open("/tmp/heard", "w", buffering=1) as heard:
    while True:
        heard.write(ear.recv(100).decode() + "\\n")
"""


def eventually(look: Callable[[], object], timeout_s: float = 10.0) -> None:
    end = time.monotonic() + timeout_s
    while not look():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)


def connect(sender: Host, address: str, port: int = 22) -> int:
    """Return how a TCP connection from a host ends, within two seconds."""
    script = f"timeout 2 bash -c '</dev/tcp/{address}/{port}' 2>/dev/null"
    return sender.sh(script, check=False).code


def say(sender: Host, receiver: Host, word: str) -> None:
    sender.sh(f"echo -n {word} >/dev/udp/{receiver.address}/9999")


def footprint(rig: Rig) -> set[tuple[str, str]]:
    """Return all namespaces that a rig consists of."""
    firsts = [host.init for host in rig]
    found = {
        (kind, name)
        for pid in (rig.keeper, *firsts)
        for kind in KINDS
        if pid and (name := namespace(pid, kind))
    }
    assert not {(kind, namespace(os.getpid(), kind)) for kind in KINDS if kind != "ipc"} & found
    own = ("ipc", namespace(os.getpid(), "ipc") or "")
    return found - {own}


def processes_of(base: Path) -> list[int]:
    return [pid for pid in numbers() if str(base) in " ".join(arguments(pid))]


def assert_nothing_left(base: Path, namespaces: set[tuple[str, str]]) -> None:
    assert processes_of(base) == []
    for pid in numbers():
        assert not {(kind, namespace(pid, kind)) for kind in KINDS} & namespaces, arguments(pid)
    assert str(base) not in Path("/proc/self/mountinfo").read_text()
    links = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout
    assert not [line for line in links.splitlines() if "p-" in line.split(":")[1]]
    assert not list(base.glob(f"{PREFIX}*"))


# -- hosts are separate ----------------------------------------------------------------------------


def test_people_log_in_from_host_to_host(rig: Rig) -> None:
    for sender, receiver in (("client", "m1"), ("m1", "w1"), ("client", "w1")):
        done = rig.ssh(sender, receiver, "hostname; whoami")
        assert done.lines == [f"hcna-{receiver}", "root"]
        assert done.err == ""
        done = rig.ssh(sender, receiver, "whoami; echo $HOME", user="hcna-admin")
        assert done.lines == ["hcna-admin", "/home/hcna-admin"]


def test_a_launcher_s_login_shell_says_nothing_of_its_own(rig: Rig) -> None:
    command = "bash --login -c -i 'source ~/.bashrc; echo here'"
    for user in ("root", "hcna-admin"):
        done = rig.ssh("client", "m1", command, tty=True, user=user)
        assert done.lines == ["here"]
        assert done.err == ""


def test_files_travel_by_rsync_and_scp(rig: Rig) -> None:
    client, m1 = rig["client"], rig["m1"]
    client.write("/root/parcel/a", "from the client")
    client.run("rsync", "-a", "parcel", "m1:/data/")
    client.run("scp", "-q", "parcel/a", "m1:/data/b")
    assert m1.read("/data/parcel/a") == m1.read("/data/b") == "from the client"


def test_hosts_have_files_processes_and_names_of_their_own(rig: Rig) -> None:
    m1, w1 = rig["m1"], rig["w1"]
    paths = ("/tmp/own", "/dev/shm/own", "/run/own", "/data/own", "/var/log/own", "/var/tmp/own")
    m1.sh(f"mkdir -p ~/.hcna; touch ~/.hcna/own /etc/own {' '.join(paths)}")
    with m1.running("sleep", "4711"):
        eventually(lambda: "sleep 4711" in m1.run("ps", "ax").out)
        assert [one for one in m1.processes() if one.command == "sleep 4711"]
        assert "4711" not in w1.run("ps", "ax").out
    listed = f"ls ~/.hcna/own /etc/own {' '.join(paths)} 2>/dev/null"
    assert len(m1.sh(listed).lines) == len(paths) + 2
    assert w1.sh(listed, check=False).lines == []
    assert not any(Path(path).exists() for path in (*paths, "/etc/own"))

    facts = {
        host.name: tuple(
            host.sh("hostname; cat /etc/machine-id /proc/sys/kernel/random/boot_id; ip -br -4 addr")
            .out.replace(host.address, "")
            .split()
        )
        for host in rig
    }
    for name, (hostname, machine_id, boot_id, *_) in facts.items():
        assert hostname == f"hcna-{name}"
        for other, (_, other_machine, other_boot, *_) in facts.items():
            assert name == other or (machine_id != other_machine and boot_id != other_boot)
    m1.sh("echo 10.77.0.99 elsewhere >>/etc/hosts")
    assert m1.run("getent", "hosts", "elsewhere").ok
    assert w1.run("getent", "hosts", "elsewhere", check=False).code == 2
    for host in rig:
        assert (
            rig["client"]
            .run("getent", "hosts", f"hcna-{host.name}.local")
            .lines[0]
            .startswith(host.address)
        )


def test_code_is_the_same_everywhere_and_nobody_can_change_it(rig: Rig) -> None:
    ask = "import hcna_ray.core.models as models, sys; print(models.__file__, sys.prefix)"
    for user in ("root", "hcna-admin"):
        said = rig["w1"].run(PYTHON, "-c", ask, user=user).out.split()
        assert said[0] == str(REPOSITORY / "hcna_ray/core/models.py")
    for path in (str(REPOSITORY), "hcna-ray", "/usr"):
        done = rig["w1"].run("touch", f"{path}/x", check=False)
        assert "Read-only file system" in done.err


def test_the_environment_is_clean(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HCNA_HOME", "RAY_ADDRESS", "VIRTUAL_ENV", "SSL_CERT_FILE", "PYTHONPATH"):
        monkeypatch.setenv(name, "/of/the/caller")
    rig["w2"].reboot()
    for said in (rig["w2"].run("env"), rig.ssh("m1", "w2", "env")):
        assert "/of/the/caller" not in said.out
    assert "LEFT=1" in rig["w2"].run("env", env={"LEFT": "1"}).lines


def test_a_program_that_bash_has_too_is_run_on_the_host(rig: Rig) -> None:
    # Bash's own would send the signal to a process outside that has the same number.
    w1 = rig["w1"]
    asleep = w1.popen("sleep", "4716")
    try:
        eventually(lambda: "sleep 4716" in [one.command for one in w1.processes()])
        (inner,) = [one.inner_pid for one in w1.processes() if one.command == "sleep 4716"]
        w1.run("kill", "-9", str(inner))
        assert asleep.wait(timeout=10) == 128 + signal.SIGKILL
    finally:
        w1.end(asleep)


def test_a_user_may_become_root_by_sudo_and_root_only_by_that(rig: Rig) -> None:
    w1 = rig["w1"]
    assert w1.run("sudo", "id", "-u", user="hcna-admin").out == "0\n"
    with pytest.raises(CommandFailed, match="exit code 1"):
        w1.run("cat", "/etc/shadow", user="hcna-admin")


def test_ports_are_listed_with_their_processes(rig: Rig) -> None:
    with rig["w1"].running(PYTHON, "-S", "-m", "http.server", "8123", "--bind", "127.0.0.1"):
        eventually(lambda: 8123 in {one.number for one in rig["w1"].ports()})
        found = {one.number: one for one in rig["w1"].ports()}
        others = {one.number for one in rig["m1"].ports()}
    assert found[8123].process.startswith("python")
    assert found[8123].on_loopback
    assert found[22].process == "sshd"
    assert not found[22].on_loopback
    assert 8123 not in others


def test_there_is_no_way_out(rig: Rig) -> None:
    done = rig["m1"].sh("timeout 5 bash -c '</dev/tcp/192.0.2.1/80'; echo $?", check=False)
    assert done.out == "1\n", "it is told at once"
    assert rig["m1"].run("getent", "hosts", "example.com", check=False, timeout_s=5).code == 2


def test_a_command_that_takes_too_long_is_ended_with_its_children(rig: Rig) -> None:
    done = rig["m1"].sh("echo begun; sleep 4712 & sleep 4712", timeout_s=3, check=False)
    assert (done.code, done.out) == (124, "begun\n")
    assert done.took_s < 30
    assert not [one for one in rig["m1"].processes() if "4712" in one.command]


def test_what_a_command_leaves_running_does_not_hold_it_up(rig: Rig) -> None:
    done = rig["m1"].sh("setsid sleep 4713 & echo left")
    assert done.took_s < 5
    eventually(lambda: "sleep 4713" in [one.command for one in rig["m1"].processes()])
    rig["m1"].run("pkill", "-f", "sleep 4713")
    eventually(lambda: "4713" not in rig["m1"].run("ps", "ax").out)


def test_a_program_can_have_a_wrong_clock(rig: Rig) -> None:
    if not shutil.which("faketime"):
        pytest.skip("faketime is not installed (scripts/system_packages.sh)")
    ask = f"{PYTHON} -S -c 'import time; print(time.time())'"
    wrong = rig["m1"].sh(f"FAKETIME_DONT_FAKE_MONOTONIC=1 faketime -f +600s {ask}")
    assert 590 < float(wrong.out) - time.time() < 610


# -- partitions ------------------------------------------------------------------------------------


def test_a_partition_is_silent_both_ways_and_others_do_not_feel_it(rig: Rig) -> None:
    m1, w1, w2 = rig["m1"], rig["w1"], rig["w2"]
    rig.partition("m1", "w1")
    assert connect(m1, "hcna-w1") == SILENT
    assert connect(w1, "hcna-m1") == SILENT
    assert connect(m1, "hcna-w2") == connect(w1, "hcna-w2") == connect(w2, "hcna-m1") == OPEN

    rig.heal("w1", "m1")
    assert connect(m1, "hcna-w1") == connect(w1, "hcna-m1") == OPEN


def test_one_way_loses_what_the_first_says_and_not_what_it_is_told(rig: Rig) -> None:
    m1, w1 = rig["m1"], rig["w1"]
    listen = (PYTHON, "-S", "-u", "-c", LISTENER)
    with m1.running(*listen) as one, w1.running(*listen) as other:
        for ear in (one, other):
            assert ear.stdout is not None
            assert ear.stdout.readline() == "ready\n"
        with rig.partitioned("m1", "w1", one_way=True):
            say(m1, w1, "lost")
            say(w1, m1, "told")
            eventually(lambda: m1.read("/tmp/heard") == "told\n")
        say(m1, w1, "healed")
        eventually(lambda: w1.read("/tmp/heard") == "healed\n")


def test_a_port_alone_can_be_cut_and_refused(rig: Rig) -> None:
    m1, w1 = rig["m1"], rig["w1"]
    w1.sh("setsid hcna-ray/.venv/bin/python -S -m http.server 8124 >/dev/null 2>&1 &")
    eventually(lambda: connect(m1, "hcna-w1", 8124) == OPEN)
    rig.partition("m1", "w1", port=8124, one_way=True)
    assert connect(m1, "hcna-w1", 8124) == SILENT
    assert connect(m1, "hcna-w1") == OPEN
    rig.heal()
    rig.partition("m1", "w1", port=22)
    assert connect(m1, "hcna-w1", 8124) == OPEN
    assert connect(m1, "hcna-w1") == connect(w1, "hcna-m1") == SILENT
    rig.heal()
    rig.partition("m1", "w1", port=8124, reject=True)
    assert connect(m1, "hcna-w1", 8124) == REFUSED
    assert connect(m1, "hcna-w1") == OPEN
    rig.heal()
    rig.partition("m1", "w1", reject=True)
    assert connect(m1, "hcna-w1") == REFUSED


def test_the_partition_of_the_deployment_guide_is_made_by_the_sender(rig: Rig) -> None:
    m1, w1 = rig["m1"], rig["w1"]
    rig.partition("m1", "w1", output=True)
    assert f"-A OUTPUT -d {w1.address}/32 -j DROP" in m1.run("iptables", "-S").lines
    assert connect(m1, "hcna-w1") == connect(w1, "hcna-m1") == SILENT
    rig.heal("m1", "w1")
    assert "DROP" not in m1.run("iptables", "-S").out
    assert connect(m1, "hcna-w1") == OPEN

    m1.run("sudo", "iptables", "-A", "OUTPUT", "-d", w1.address, "-j", "DROP", user="hcna-admin")
    assert connect(m1, "hcna-w1") == SILENT
    m1.run("sudo", "iptables", "-F", user="hcna-admin")
    assert connect(m1, "hcna-w1") == OPEN


def test_a_cut_outlives_a_reboot_and_holds_for_a_second_card(rig: Rig) -> None:
    m1, w1 = rig["m1"], rig["w1"]
    assert w1.add_card() == w1.second_address
    m1.add_card()
    assert connect(m1, w1.second_address) == OPEN
    rig.partition("m1", "w1")
    w1.reboot()
    assert connect(m1, "hcna-w1") == connect(m1, w1.second_address) == SILENT
    rig.heal()
    assert connect(m1, "hcna-w1") == connect(m1, w1.second_address) == OPEN
    assert connect(rig["w2"], w1.second_address) != OPEN, "it has no card there"


# -- power -----------------------------------------------------------------------------------------


def test_pulling_the_plug_ends_everything_and_tells_nobody(rig: Rig) -> None:
    client, w1 = rig["client"], rig["w1"]
    w1.sh("setsid hcna-ray/.venv/bin/python -S -m http.server 8125 >/dev/null 2>&1 &")
    w1.sh("setsid sleep 4714 & setsid unshare -p -f sleep 4714 &")
    eventually(lambda: connect(client, "hcna-w1", 8125) == OPEN)
    talk = (
        "import socket, sys\n"
        "line = socket.create_connection(('hcna-w1', 8125))\n"
        "print('connected', flush=True)\n"
        "line.settimeout(0.7)\n"
        "try: print('closed' if line.recv(1) == b'' else 'data', flush=True)\n"
        "except TimeoutError: print('silence', flush=True)\n"
        "sys.stdin.readline()\n"
        "line.settimeout(10)\n"
        "try:\n"
        "    line.send(b'x')\n"
        "    print('closed' if line.recv(1) == b'' else 'data')\n"
        "except ConnectionResetError: print('reset')\n"
    )
    watch = w1.running("sleep", "4714")
    call = client.running(PYTHON, "-S", "-u", "-c", talk, stdin=subprocess.PIPE)
    with watch as watched, call as caller:
        assert caller.stdin is not None
        assert caller.stdout is not None
        assert caller.stdout.readline() == "connected\n"
        before = [one.pid for one in w1.processes()]
        assert len([pid for pid in before if "4714" in arguments(pid)]) >= 4

        w1.unplug()

        assert w1.processes() == []
        assert not w1.is_up
        assert not [pid for pid in before if "4714" in arguments(pid)]
        assert watched.wait(5) != 0
        assert caller.stdout.readline() == "silence\n"
        with pytest.raises(RigError, match="w1 is off"):
            w1.run("true")
        assert connect(client, "hcna-w1") == SILENT

        w1.boot()
        caller.stdin.write("\n")
        caller.stdin.flush()
        assert caller.stdout.readline() == "reset\n", "a host that booted knows no old connection"


def test_a_reboot_keeps_the_disk_and_wipes_the_rest(rig: Rig) -> None:
    w1 = rig["w1"]
    w1.at_boot("mark", "echo booted at $(cut -d. -f1 /proc/uptime) >>/data/boots; sleep 4715")
    kept = ("/root/.hcna/x", "/home/hcna-admin/x", "/data/x", "/etc/x", "/var/log/x", "/var/tmp/x")
    gone = ("/tmp/x", "/dev/shm/x", "/run/x")
    w1.sh(f"mkdir -p .hcna; touch {' '.join((*kept, *gone))}")
    ask = "cat /proc/sys/kernel/random/boot_id /etc/machine-id; cut -d. -f1 /proc/uptime"
    old_boot, old_machine, _ = w1.sh(ask).lines

    w1.reboot()

    boot, machine, uptime = w1.sh(ask).lines
    assert boot != old_boot
    assert machine == old_machine
    assert int(uptime) < 5
    for path, there in [(path, True) for path in kept] + [(path, False) for path in gone]:
        assert w1.run("test", "-e", path, check=False).ok is there, path
    eventually(lambda: w1.file("/data/boots").exists())
    assert w1.read("/data/boots") in ("booted at 0\n", "booted at 1\n", "booted at 2\n")
    eventually(lambda: "sleep 4715" in [one.command for one in w1.processes()])
    w1.run("rm", "/etc/boot.d/mark.sh")


def test_a_disk_can_be_written_while_the_host_is_off(rig: Rig) -> None:
    w2 = rig["w2"]
    w2.unplug()
    w2.write("/root/.hcna/hcna.yaml", "written: off\n")
    w2.boot()
    assert w2.run("cat", ".hcna/hcna.yaml").out == "written: off\n"


def test_nothing_runs_on_a_paused_host_and_all_goes_on_afterwards(rig: Rig) -> None:
    w1 = rig["w1"]
    count = "while :; do echo >>/tmp/ticks; sleep 0.01; done"
    # A process that was stopped already stays so, and one that starts others is caught.
    w1.sh("setsid sleep 4716 & setsid bash -c 'while :; do /bin/true; done' &")
    eventually(lambda: [one for one in w1.processes() if one.command == "sleep 4716"])
    (asleep,) = (one for one in w1.processes() if one.command == "sleep 4716")
    os.kill(asleep.pid, signal.SIGSTOP)

    def ticks() -> int:
        return w1.file("/tmp/ticks").stat().st_size

    with w1.running("bash", "-c", count) as counter:
        eventually(lambda: w1.file("/tmp/ticks").exists())
        w1.pause()
        assert w1.is_paused
        found = w1.processes()
        assert {one.state for one in found} <= {"T", "Z"}
        assert found[0].inner_pid == 1
        at = ticks()
        time.sleep(0.4)
        assert ticks() == at
        assert {one.pid for one in w1.processes()} == {one.pid for one in found}
        assert connect(rig["m1"], "hcna-w1") == OPEN, "its kernel still shakes hands"
        with pytest.raises(CommandFailed, match="timed out"):
            rig.ssh("m1", "w1", "true", timeout_s=0.5)
        with pytest.raises(RigError, match="paused"):
            w1.run("true")

        w1.resume()
        eventually(lambda: ticks() > at)
        assert rig.ssh("m1", "w1", "echo awake").out == "awake\n"
        states = {one.pid: one.state for one in w1.processes()}
        assert states.pop(asleep.pid) == "T"
        assert "T" not in states.values()
        assert counter.poll() is None
    with w1.running("sleep", "4718") as left:
        w1.pause()
    assert left.poll() is not None, "one can stop waiting for a sleeping host"
    w1.resume()
    with w1.running("sleep", "4718") as left:
        w1.pause()
        w1.unplug()  # A sleeping host has a plug, too.
        assert left.wait(5) != 0
    w1.boot()
    assert not w1.is_paused


# -- disks -----------------------------------------------------------------------------------------


def test_a_small_disk_can_be_filled_and_freed(rig: Rig) -> None:
    w2 = rig["w2"]
    assert w2.fill("/root/.hcna") > 20 << 20
    done = w2.sh("head -c 100000 /dev/zero >~/.hcna/more", check=False)
    assert "No space left on device" in done.err
    w2.free()
    w2.sh("head -c 100000 /dev/zero >~/.hcna/more")
    with pytest.raises(RigError, match="this machine's own disk"):
        rig["w1"].fill("/data")


# -- making and removing ---------------------------------------------------------------------------


def test_another_host_can_be_added(base: Path) -> None:
    with Rig.up(["m1"], base=base) as rig:
        rig.add("w3")
        assert rig.ssh("m1", "w3", "hostname").out == "hcna-w3\n"
        assert rig.ssh("w3", "m1", "hostname").out == "hcna-m1\n"
        with pytest.raises(RigError, match="already"):
            rig.add("w3")


def test_down_of_four_hosts_leaves_nothing(base: Path) -> None:
    own = base / "timed"
    started = time.monotonic()
    rig = Rig.up(base=own)
    took_s = time.monotonic() - started
    namespaces = footprint(rig)
    rig["m1"].add_card()
    rig.partition("m1", "w1")
    rig["w1"].pause()
    assert len(namespaces) == 5 * len(KINDS) - 1, "the keeper has no IPC of its own"
    assert [one.name for one in Rig.all(base=own)] == [rig.name]

    with rig["w2"].running("sleep", "4717"):
        rig.down()
        assert_nothing_left(own, namespaces)
    rig.down()
    measured(f"four hosts are up after {took_s:.1f} s")


def owner(base: Path, then: str = "pass") -> tuple[subprocess.Popen[str], Rig]:
    """Start a process that makes a rig and waits."""
    code = (
        "import sys, threading, time, pathlib\n"
        "from tests.support.rig import Rig\n"
        "rig = Rig.up(['m1', 'w1'], base=pathlib.Path(sys.argv[1]))\n"
        f"{then}\n"
        "print(rig.name, flush=True)\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(base)], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
    )
    assert process.stdout is not None
    name = process.stdout.readline().strip()
    return process, Rig.find(name, base=base)


def test_a_rig_with_a_sleeping_host_that_somebody_waits_for_can_be_removed(base: Path) -> None:
    own = base / "asleep"
    rig = Rig.up(["m1"], base=own)
    with rig["m1"].running("sleep", "4719") as waiting:
        eventually(lambda: "sleep 4719" in [one.command for one in rig["m1"].processes()])
        namespaces = footprint(rig)
        rig["m1"].pause()
        rig.down()
        assert waiting.wait(5) != 0
    assert_nothing_left(own, namespaces)


def test_it_goes_with_its_maker_also_when_that_waits_for_a_sleeping_host(base: Path) -> None:
    own = base / "maker"
    process, rig = owner(
        own, "threading.Thread(target=rig['m1'].run, args=('sleep', '50')).start()"
    )
    eventually(lambda: "sleep 50" in [one.command for one in rig["m1"].processes()])
    namespaces = footprint(rig)
    rig["m1"].pause()
    process.kill()
    with process:
        process.wait(10)
    eventually(lambda: not rig.directory.exists())
    eventually(lambda: not processes_of(own), 2)
    assert_nothing_left(own, namespaces)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_rig_goes_with_the_process_that_made_it(base: Path, number: signal.Signals) -> None:
    own = base / number.name
    process, rig = owner(own)
    namespaces = footprint(rig)
    process.send_signal(number)
    with process:
        process.wait(10)
    eventually(lambda: not rig.directory.exists())
    # The directory is the last thing but one: then the keeper ends, and who waits for it.
    eventually(lambda: not processes_of(own), 2)
    assert_nothing_left(own, namespaces)


def test_what_a_crash_of_everything_leaves_is_swept_up_and_no_more(base: Path) -> None:
    own = base / "crashed"
    running = Rig.up(["m1"], base=own)
    process, crashed = owner(own)
    namespaces = footprint(crashed)
    keeper = crashed.keeper
    assert keeper is not None
    os.kill(keeper, signal.SIGKILL)
    os.kill(process.pid, signal.SIGKILL)
    with process:
        process.wait(10)
    eventually(lambda: processes_of(crashed.directory) == [])
    assert crashed.directory.exists()

    assert Rig.sweep(base=own) == [crashed.name]
    assert not crashed.directory.exists()
    assert running["m1"].is_up, "it belongs to somebody"
    namespaces |= footprint(running)
    # Somebody may even have deleted the directory of a running one.
    shutil.rmtree(running.directory)
    assert Rig.sweep(base=own, running=True) == [running.name]
    running.down()
    assert_nothing_left(own, namespaces)


def test_a_checkout_below_tmp_is_seen_as_well(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    for part in ("tests/__init__.py", "tests/support/__init__.py"):
        (clone / part).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / part, clone / part)
    shutil.copytree(REPOSITORY / "tests/support/rig", clone / "tests/support/rig")
    (clone / ".venv").symlink_to(sys.prefix)
    code = (
        "import pathlib\n"
        "from tests.support.rig import Rig\n"
        f"with Rig.up(['m1'], base=pathlib.Path({str(tmp_path)!r})) as rig:\n"
        f"    print(rig['m1'].sh('ls hcna-ray; ls {clone}; ls -A /tmp; "
        'hcna-ray/.venv/bin/python -c "import httpx; print(42)"\').out)\n'
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=clone,
        env={**os.environ, "PYTHONPATH": str(clone)},
        timeout=60,
    )
    assert done.stderr == ""
    # Of /tmp only what leads to the checkout and to its packages is there.
    below = {one for one in (clone, Path(sys.prefix).resolve()) if one.is_relative_to("/tmp")}
    tops = sorted({one.relative_to("/tmp").parts[0] for one in below})
    assert done.stdout.split() == ["tests", "tests", *tops, "42"]


def test_people_have_the_same_verbs_as_commands(base: Path, tmp_path: Path) -> None:
    def rig(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "tests.support.rig", *words],
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
            env={**os.environ, "TMPDIR": str(tmp_path)},
            timeout=60,
        )

    done = rig("up", "--hosts", "a", "b", "--with-hosts", "c", "--data-size", "32m")
    assert done.returncode == 0, done.stderr
    try:
        namespaces = footprint(Rig.find(base=tmp_path))
        assert rig("up").returncode == 1, "there is one of that name"
        done = rig("run", "a", "--", "sh", "-c", "hostname; echo no >&2; exit 7")
        assert (done.returncode, done.stdout, done.stderr) == (7, "hcna-a\n", "no\n")
        assert rig("run", "a", "--user", "hcna-admin", "--", "whoami").stdout == "hcna-admin\n"
        assert rig("run", "a", "--timeout", "0.3", "--", "sleep", "9").returncode == 124
        assert rig("ssh", "a", "b", "hostname; id -un").stdout == "hcna-b\nroot\n"
        assert rig("partition", "a", "b", "--port", "22", "--reject").returncode == 0
        assert rig("ssh", "a", "b", "true").returncode == 255
        assert "cut a <-> b port 22 refused" in rig("status").stdout
        assert rig("heal").returncode == 0
        assert rig("pause", "b").returncode == 0
        assert " paused " in rig("status").stdout
        assert rig("resume", "b").returncode == 0
        assert rig("nic", "c").stdout == "10.78.0.13\n"
        assert rig("fill", "b", "/data").returncode == 0
        assert rig("run", "b", "--", "sh", "-c", "echo x >/data/x").returncode != 0
        assert rig("free", "b").returncode == 0
        assert rig("at-boot", "b", "mark", "touch /data/booted").returncode == 0
        assert rig("unplug", "b", "c").returncode == 0
        assert rig("boot", "c").returncode == 0
        assert rig("reboot", "c").returncode == 0
        assert rig("run", "b", "true").stderr == "b is off\n"
        assert rig("boot", "b").returncode == 0
        assert rig("add", "d").returncode == 0
        assert rig("run", "d", "--", "getent", "hosts", "a").returncode == 0
        assert "sshd" in rig("ps", "d").stdout
        assert "tcp 0.0.0.0:22" in rig("ports", "d").stdout
        eventually(lambda: Rig.find(base=tmp_path)["b"].file("/data/booted").exists())
        namespaces |= footprint(Rig.find(base=tmp_path))
    finally:
        assert rig("down").returncode == 0
    assert_nothing_left(tmp_path, namespaces)
    assert rig("down").returncode == 0
    assert rig("down", "--all").stdout == "removed: nothing\n"
    assert not list(find_inits(KEEPER_MODULE)) or str(tmp_path) not in str(
        list(find_inits(KEEPER_MODULE))
    )


def test_who_cannot_have_a_rig_is_told_why(rig: Rig) -> None:
    done = rig["m1"].run(
        PYTHON,
        "-c",
        "from tests.support.rig import Rig; Rig.up()",
        user="hcna-admin",
        env={"PYTHONPATH": str(REPOSITORY)},
        check=False,
    )
    assert done.err.splitlines()[-1].endswith("RigUnavailable: no hosts on this machine: not root")


def test_a_door_leads_to_a_hosts_own_loopback_and_stays_over_a_boot(rig: Rig) -> None:
    w1 = rig["w1"]
    serve = ("python3", "-m", "http.server", "--bind", "127.0.0.1", "--directory", "/root/shown")
    here = namespace(os.getpid(), "net")

    def get(url: str) -> str | None:
        try:
            return httpx.get(f"{url}/said", trust_env=False, timeout=5).text
        except httpx.TransportError:
            return None

    with Door(w1, 8000) as door:
        for said in ("before", "after"):
            w1.write("/root/shown/said", said)
            with w1.running(*serve):
                eventually(lambda: get(door.url))
                assert get(door.url) == said
                assert connect(rig["m1"], w1.address, 8000) == REFUSED
            assert get(door.url) is None
            w1.reboot()
    assert get(door.url) is None
    assert namespace(os.getpid(), "net") == here


def test_a_test_can_listen_on_a_host(rig: Rig) -> None:
    with network_of(rig["client"]):
        ear = socket.create_server(("0.0.0.0", 9000))
    with ear:
        assert connect(rig["m1"], rig["client"].address, 9000) == OPEN
        assert connect(rig["client"], "127.0.0.1", 9000) == OPEN
        assert connect(rig["m1"], "127.0.0.1", 9000) == REFUSED
    assert connect(rig["m1"], rig["client"].address, 9000) == REFUSED
    rig["w2"].unplug()
    with pytest.raises(RigError, match="w2 is off"), network_of(rig["w2"]):
        pass
