"""The rig's verbs as commands: ``python -m tests.support.rig VERB ...``."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from .host import TIMED_OUT, Host, end_session
from .rig import DEFAULT_HOSTS, Rig
from .state import RigError

_DEFAULT_NAME = "rig"


def say(text: str) -> None:
    """Print a line at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def up(options: argparse.Namespace) -> int:
    """Make a rig that stays."""
    started = time.monotonic()
    rig = Rig.up(
        [*options.hosts, *options.with_hosts],
        name=options.name or _DEFAULT_NAME,
        owned=False,
        data_size=options.data_size,
        tmp_size=options.tmp_size,
        shm_size=options.shm_size,
    )
    say(rig.status())
    say(f"up in {time.monotonic() - started:.1f} s; python -m tests.support.rig shell m1, ... down")
    return 0


def down(options: argparse.Namespace) -> int:
    """Take down a rig, all, or what crashed ones have left."""
    if options.all or options.left:
        names = Rig.sweep(running=options.all)
        say(f"removed: {', '.join(names) or 'nothing'}")
        return 0
    found = [rig for rig in Rig.all() if options.name in (None, rig.name)]
    if not found:
        say("there is no such rig")
    elif len(found) > 1:
        raise RigError(f"which rig? There are: {', '.join(rig.name for rig in found)}")
    for rig in found:
        rig.down()
    return 0


def show(options: argparse.Namespace) -> int:
    """Describe a rig, or all there are."""
    found = [rig for rig in Rig.all() if options.name in (None, rig.name)]
    for rig in found:
        say(rig.status())
    if not found:
        say("there is no rig" if options.name is None else f"there is no rig {options.name}")
    return 0 if found else 1


def run(options: argparse.Namespace) -> int:
    """Run a command with this one's input and output; return its exit code."""
    if not options.command:
        raise RigError("run what? run HOST [--user U] -- COMMAND ...")
    return _pass_through(_host(options), options.command, options.user, options.timeout)


def ssh(options: argparse.Namespace) -> int:
    """Run a command line from one host on another one."""
    rig = _rig(options)
    words = ["ssh", rig[options.receiver].hostname, *options.command]
    return _pass_through(rig[options.host], words, options.user, options.timeout)


def shell(options: argparse.Namespace) -> int:
    """Become a login shell on a host."""
    command = _host(options).command("bash", "--login", "-i", user=options.user)
    os.execvp(command[0], command)


def ps(options: argparse.Namespace) -> int:
    """List processes: number here, number there, state, command."""
    for one in _host(options).processes():
        say(f"{one.pid:>8} {one.inner_pid:>6} {one.state} {one.command}")
    return 0


def ports(options: argparse.Namespace) -> int:
    """List listening sockets."""
    for one in _host(options).ports():
        say(f"{one.protocol} {one.address}:{one.number:<6} {one.process} {one.pid or ''}".rstrip())
    return 0


def partition(options: argparse.Namespace) -> int:
    """Cut two hosts off from each other."""
    cut = _rig(options).partition(
        options.a,
        options.b,
        one_way=options.one_way,
        port=options.port,
        reject=options.reject,
        output=options.output,
    )
    say(f"cut {cut}")
    return 0


def heal(options: argparse.Namespace) -> int:
    """Undo cuts."""
    _rig(options).heal(options.a, options.b)
    return 0


def at_boot(options: argparse.Namespace) -> int:
    """Have lines of bash run at each boot."""
    _host(options).at_boot(options.script_name, options.script + "\n")
    return 0


def fill(options: argparse.Namespace) -> int:
    """Fill a disk."""
    say(f"{_host(options).fill(options.path, leave=options.leave)} bytes were free")
    return 0


def add(options: argparse.Namespace) -> int:
    """Put another host beside the others."""
    _rig(options).add(options.host, data_size=options.data_size)
    return 0


def nic(options: argparse.Namespace) -> int:
    """Give a host a second card."""
    say(_host(options).add_card())
    return 0


def simple(verb: Callable[[Host], None]) -> Callable[[argparse.Namespace], int]:
    """Return the command for something that is done to a host and says nothing."""

    def command(options: argparse.Namespace) -> int:
        for name in options.hosts:
            verb(_rig(options)[name])
        return 0

    return command


def _rig(options: argparse.Namespace) -> Rig:
    return Rig.find(options.name)


def _host(options: argparse.Namespace) -> Host:
    return _rig(options)[options.host]


def _pass_through(host: Host, words: Sequence[str], user: str, timeout_s: float | None) -> int:
    process = subprocess.Popen(
        host.command(*words, user=user),
        start_new_session=timeout_s is not None,
        text=True,
    )
    try:
        return process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        end_session(process)
        sys.stderr.write(f"ended after {timeout_s:g} s\n")
        return TIMED_OUT


def parser() -> argparse.ArgumentParser:
    """Return the parser of all verbs."""
    top = argparse.ArgumentParser(prog="python -m tests.support.rig", description=__doc__)
    verbs = top.add_subparsers(required=True, metavar="VERB")

    def verb(
        name: str, action: Callable[[argparse.Namespace], int], words: str, *, host: bool = True
    ) -> argparse.ArgumentParser:
        one = verbs.add_parser(name, help=words, description=words)
        one.add_argument("--name", help="which rig, if there are several")
        one.set_defaults(action=action)
        if host:
            one.add_argument("host", metavar="HOST")
        return one

    one = verb("up", up, "make a rig that stays", host=False)
    one.add_argument("--hosts", nargs="+", default=list(DEFAULT_HOSTS))
    one.add_argument("--with-hosts", nargs="+", default=[], help="besides those")
    one.add_argument("--data-size", help="of each host's disk, such as 64m")
    one.add_argument("--tmp-size", default="1g")
    one.add_argument("--shm-size", default="1g")
    one = verb("down", down, "end all processes of a rig and remove it", host=False)
    one.add_argument("--all", action="store_true", help="every rig, running ones too")
    one.add_argument("--left", action="store_true", help="what crashed rigs have left")
    verb("status", show, "show hosts and cuts", host=False)
    one = verb("add", add, "put another host beside the others")
    one.add_argument("--data-size")
    for name, action, words in (
        ("boot", Host.boot, "switch hosts on"),
        ("unplug", Host.unplug, "pull the plug"),
        ("reboot", Host.reboot, "pull the plug, and switch on again"),
        ("pause", Host.pause, "close the lid: nothing of a host runs"),
        ("resume", Host.resume, "open the lid"),
        ("free", Host.free, "undo fill"),
    ):
        one = verb(name, simple(action), words, host=False)
        one.add_argument("hosts", metavar="HOST", nargs="+")
    for name, act, words in (
        ("run", run, "run a command: run HOST [--user U] -- COMMAND ..."),
        ("ssh", ssh, "run a command line from HOST on TO, over SSH: ssh HOST TO -- COMMAND ..."),
    ):
        one = verb(name, act, words)
        if name == "ssh":
            one.add_argument("receiver", metavar="TO")
        one.add_argument("--user", default="root")
        one.add_argument("--timeout", type=float)
        one.add_argument("command", nargs="*", metavar="COMMAND")
    one = verb("shell", shell, "a login shell")
    one.add_argument("--user", default="root")
    verb("ps", ps, "processes: number here, number there, state, command")
    verb("ports", ports, "listening sockets")
    one = verb("partition", partition, "cut two hosts off from each other", host=False)
    one.add_argument("a", metavar="A")
    one.add_argument("b", metavar="B")
    one.add_argument("--one-way", action="store_true", help="only what A sends to B is lost")
    one.add_argument("--port", type=int)
    one.add_argument("--reject", action="store_true", help="refuse instead of dropping")
    one.add_argument("--output", action="store_true", help="by iptables OUTPUT on A")
    one = verb("heal", heal, "undo cuts: all, those of A, or those between A and B", host=False)
    one.add_argument("a", metavar="A", nargs="?")
    one.add_argument("b", metavar="B", nargs="?")
    one = verb("at-boot", at_boot, "have a line of bash run at each boot")
    one.add_argument("script_name", metavar="SCRIPT_NAME")
    one.add_argument("script", metavar="SCRIPT")
    one = verb("fill", fill, "fill the disk that PATH is on")
    one.add_argument("path", metavar="PATH")
    one.add_argument("--leave", type=int, default=0, metavar="BYTES")
    verb("nic", nic, "give a host a second card, and print its address")
    return top


def main() -> int:
    """Run one verb."""
    words = sys.argv[1:]
    # What follows is another command's business; argparse would look for options there.
    end = words.index("--") if "--" in words else len(words)
    options = parser().parse_args(words[:end])
    if rest := words[end + 1 :]:
        options.command = [*getattr(options, "command", []), *rest]
    try:
        code: int = options.action(options)
    except RigError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return code


if __name__ == "__main__":
    sys.exit(main())
