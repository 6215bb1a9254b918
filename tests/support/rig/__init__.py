"""Real, separate hosts on one Linux machine, for tests and for people. They need root.

Every host has a network, a process table, a host name, /tmp, /run, /dev/shm, /etc, /root, /home,
/data, /var/log and a disk of its own, and a real sshd. All see the checkout, its ``.venv`` and the
rest of this machine's files read-only: at their own paths and, the checkout, as ``~/hcna-ray``.
Nothing of the caller's environment gets in; there is no name server and no way out of the two nets.

By default there are ``m1``, ``w1``, ``w2`` and ``client``: 10.77.0.11 and so on, by the names
``hcna-m1.local``, ``hcna-m1`` and ``m1``. ``root`` and ``hcna-admin`` (who may sudo) log in from
each host to each other one with the key ``~/.ssh/id_ed25519``.

In a test::

    with Rig.up() as rig:                        # it goes when this process goes
        m1, w1 = rig["m1"], rig["w1"]
        m1.sh("hcna-ray/.venv/bin/hcna up", timeout_s=120)
        rig.ssh("client", "m1", "hostname").out  # "hcna-m1\\n"
        rig.partition("m1", "w1")                # silent; rig.heal() ends it
        w1.unplug(); w1.boot()                   # or w1.reboot(), w1.pause(), w1.resume()

or `rig_for_tests` of ``testing.py``, which skips where there can be no rig. The same by hand, with
a rig that stays until it is taken down::

    .venv/bin/python -m tests.support.rig up
    .venv/bin/python -m tests.support.rig shell m1
    .venv/bin/python -m tests.support.rig partition m1 w1 --one-way --port 6379
    .venv/bin/python -m tests.support.rig down

``up --name`` makes several; commands find the only one, or the one that ``--name`` says, those of
running tests too: ``status`` lists them.

How it works: the *keeper* is the first process of a PID namespace in which all hosts are, and owns
the switch (two bridges). An *init* per host is the first process of namespaces of its own below
that. So ending the keeper ends everything, and pulling a plug is ending an init. What a host keeps
is in ``$TMPDIR/hcna-hosts-NAME/hosts/HOST/disk``. A test's keeper watches the process of the test
and clears away after it, also when that is killed; what is left when the keeper itself is killed is
a directory, which ``down --left`` (`Rig.sweep`) removes.

What is not as on real machines: one kernel, so one clock for the time of day, one memory, one set
of kernel parameters outside ``net``, and no loss of written but not synchronised data; a paused
host's clocks go on; no systemd; no delay on the network; what is made in ``/`` itself is gone after
a boot. A program has a wrong clock if it is run by ``FAKETIME_DONT_FAKE_MONOTONIC=1 faketime -f
+600s PROGRAM``.
"""

from .host import TIMED_OUT, CommandFailed, Done, Host, Port
from .processes import HostProcess
from .rig import DEFAULT_HOSTS, Rig, check_machine
from .state import Cut, RigError, RigUnavailable

__all__ = [
    "DEFAULT_HOSTS",
    "TIMED_OUT",
    "CommandFailed",
    "Cut",
    "Done",
    "Host",
    "HostProcess",
    "Port",
    "Rig",
    "RigError",
    "RigUnavailable",
    "check_machine",
]
