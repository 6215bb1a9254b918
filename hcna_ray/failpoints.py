"""Failpoints: named moments at which a test may have this very process fail.

``hit("store.commit.before")`` does nothing unless a test switched failpoints on, with the
variables ``HCNA_TEST=1`` and ``HCNA_FAILPOINTS=<directory>``. Then a file of the point's name in
the directory arms it; so a running cluster is armed by writing a file. Its text is what is to
happen:

=================  ============================================================
``kill``           SIGKILL to this process
``stop``           SIGSTOP to this process
``exit:CODE``      end at once, without cleaning up
``sleep:SECONDS``  go on later
``eio``            raise `OSError` with ``EIO``
``enospc``         raise `OSError` with ``ENOSPC``
=================  ============================================================

``@N`` after it means: at this process's N-th arrival, counted from when the file was first seen. A
point fires once: its file gets the suffix ``.fired`` before anything happens.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path

#: Every point and its moment, with its number where it is one of those that every fault is tried
#: at: m1 read, not committed; m2 committed, not answered; m4 leased, the worker not told; m5 the
#: worker told, nothing started; m6 running; m7 ended, not told; m8 told, not confirmed; m9 a cancel
#: on its way; m11 checkpoint, backup; m13 recovery; m14 migration; m15 certificates.
POINTS: Mapping[str, str] = {
    # The writer and the moderator.
    "writer.batch.taken": "m1: calls were taken from the inbox, nothing is decided",
    "moderator.commit.written": "m1: all of a batch is written, inside the transaction",
    "moderator.commit.done": "m2, m4, m8: committed; memory does not follow, nobody is answered",
    "writer.batch.published": "m3: answers are on their way",
    "moderator.rebuild.begun": "m13: leases were read, nothing was made of them",
    "moderator.rebuild.done": "m13: memory follows the store again, nothing was decided since",
    "moderator.prune.written": "old tasks are deleted, inside the transaction",
    "ledger.tasks.written": "m1: tasks and keys are written; attempts, counters, history are not",
    "ledger.schedules.written": "m1: tasks and their schedules are written, not committed",
    "ledger.audit.written": "m1: audit lines are written, history is not",
    # The stores.
    "store.file.created": "m13: the database's file is there and empty",
    "store.commit.before": "m1: everything is written, COMMIT comes next (SQLite)",
    "store.commit.after": "m2: SQLite has committed",
    "store.checkpoint.before": "m11: the log is about to be carried into the database",
    "store.checkpoint.after": "m11: the log was carried into the database",
    "schema.step.applied": "m14: a migration's statements were run, its ledger line is missing",
    "schema.step.committed": "m14: one migration is durable, the next ones are not",
    "postgres.commit.before": "m1: everything is written, COMMIT comes next (PostgreSQL)",
    "postgres.commit.after": "m2: PostgreSQL has committed",
    "postgres.step.applied": "m14: a migration's statements were run, its ledger line is missing",
    "copy.table.sent": "one table was sent to PostgreSQL and not compared",
    "copy.store.compared": "all of a store is in PostgreSQL, COMMIT comes next",
    "copy.store.committed": "all of a store is in PostgreSQL, nobody was told",
    "copy.back.sent": "one table was written to a SQLite file and not compared",
    "copy.file.compared": "all of a store is in a SQLite file beside its place",
    "copy.file.named": "all of a store is in its SQLite file, nobody was told",
    # Artifacts.
    "artifact.part.flushed": "a part of an upload is on the disk, nobody was answered",
    "artifact.rename.before": "an artifact is complete and flushed under another name",
    "artifact.rename.after": "an artifact has its name, the directory is not flushed",
    "artifact.upload.complete": "an upload became an artifact, nobody was answered",
    "cache.file.fetched": "a worker's copy of an artifact is complete under another name",
    # Backup and restore.
    "backup.store.copied": "m11: the store's pages were copied and not looked at",
    "backup.artifact.added": "an artifact is in the archive, others are missing",
    "backup.data.added": "a worker's file is in the archive, others are missing",
    "backup.secrets.sealed": "keys and certificates are in the archive",
    "backup.manifest.before": "everything but the manifest is in the archive",
    "backup.archive.flushed": "an archive is complete and flushed, it has no name",
    "backup.archive.named": "an archive has its name, the directory is not flushed",
    "restore.file.extracted": "a file was written beside its place",
    "restore.generation.before": "the store is beside its place, with the old generation",
    "restore.generation.raised": "the generation is raised, leases live on",
    "restore.leases.ended": "the store is as it shall be, still beside its place",
    "restore.mark.written": "a restore is under way for all to see, nothing was moved",
    "restore.aside.moved": "something that stood in the way was moved aside",
    "restore.artifact.put": "an artifact is in its place",
    "restore.secret.put": "a key or certificate is in its place",
    "restore.config.put": "all but the store, or a worker's files, is in its place",
    "restore.store.put": "the store is in its place, the mark is still there",
    "restore.data.put": "one of a worker's files is in its place",
    "restore.mark.before_removal": "all is in its place and flushed, the mark is still there",
    "restore.mark.removed": "the mark is gone, the directory is not flushed",
    # C1, and the calls between Ray's actors.
    "c1.request.admitted": "m1: a request is admitted, its body was not read",
    "c1.submit.before": "m1: tasks were read and checked, the moderator was not asked",
    "c1.submit.answered": "m2: the moderator has answered, no request was",
    "c1.answer.made": "m2: a request's answer is made and not sent",
    "actor.call.received": "m1: a call has reached the moderator's actor, not its writer",
    "actor.call.decided": "m2: the writer's answer is there, the caller does not have it",
    "actor.call.before": "a call to an actor is about to leave",
    "actor.call.answered": "an actor's answer is there, nothing was made of it",
    # A worker's agent.
    "agent.hello.before": "leftovers were collected, the moderator does not know",
    "agent.hello.answered": "the moderator knows what this worker left, it is still there",
    "agent.heartbeat.before": "a heartbeat is about to be sent",
    "agent.heartbeat.answered": "a heartbeat was answered, nothing was made of it",
    "agent.exchange.before": "the agent is about to ask for heavy attempts and orders",
    "agent.exchange.answered": "m4, m9: grants and orders have reached the agent alone",
    "agent.heavy.granted": "m4: a heavy attempt is leased, Ray was not asked for it",
    "agent.attach.received": "m5: a process is ready to host work, nobody told it to",
    "agent.stop.written": "m9: a stop order is in its file",
    "agent.gone.before": "m7: a dead member's last words were read and not sent",
    "agent.gone.answered": "m8: a dead member's last words arrived, its files are still there",
    "agent.goodbye.before": "every process was ended, the moderator does not know",
    "agent.goodbye.answered": "the moderator has let the worker go, its files are still there",
    "agent.goodbye.delivered": "the goodbye is over, the supervisor does not know",
    # A slot's host, its nursery and its executors.
    "slot.process.begun": "m5: Ray has started a slot's process, the agent does not know",
    "slot.process.attached": "m5: the agent let a slot's process begin",
    "slot.exchange.before": "m7: a slot is about to give outcomes and ask for work",
    "slot.exchange.answered": "m4, m8: a grant has reached the host alone",
    "slot.grant.handed_over": "m5: a grant was sent to an executor, no start is written down",
    "slot.executor.forked": "an executor lives, its host does not know it yet",
    "slot.executor.mourned": "m7: a dead executor's last words were read and not sent",
    "slot.mourning.confirmed": "m8: a dead executor's last words arrived, its files are there",
    "slot.report.before": "m7: reports are about to be sent",
    "slot.report.answered": "m8: reports were answered, the executor does not know",
    "slot.stop.written": "m9: an executor's stop order is in its file, no signal was sent",
    "nursery.executor.forked": "an executor lives, nobody was told",
    "executor.idle.before": "m7: an executor is about to say that it is idle, with what it owes",
    "runner.start.before": "m5: an attempt is about to start, nothing is written down",
    "runner.start.journaled": "m6: an attempt's start is written down, its handler did not begin",
    "runner.handler.before": "m6: a handler is about to be called",
    "runner.handler.ended": "m7: a handler has ended, its outcome is in memory alone",
    "runner.outcome.journaled": "m7: an outcome is written down and not sent",
    "runner.report.before": "m7: an executor is about to send reports by itself",
    "runner.report.answered": "m8: an executor's reports were answered, it keeps them still",
    "runner.journal.confirmed": "m8: every report is confirmed, the journal holds them still",
    "runner.journal.forgotten": "m8: the journal was emptied",
    # Joining, certificates, private files.
    "gate.join.redeemed": "an invitation is used, the machine is no member yet",
    "gate.join.stored": "a machine is a member, it was not told",
    "gate.leave.removed": "a machine is no member any more, it was not told",
    "join.answer.received": "M1 has made this machine a member, nothing is written down here",
    "join.membership.written": "this machine has written down that it is a member",
    "certificate.key.written": "m15: a new key is in its place, its certificate is not",
    "certificate.pair.written": "m15: a new certificate is in its place, nobody uses it",
    "certificate.issue.listed": "m15: a certificate is on the list, nobody has it",
    "certificate.node.written": "m15: M1's own certificate is in its place, nobody uses it",
    "certificate.trust.written": "m15: a member believes what M1 told it, its certificate is old",
    "certificate.answer.installed": "m15: a member's new certificate is in its place",
    "certificate.revoke.listed": "m15: a certificate is revoked on the list alone",
    "certificate.revocations.written": "m15: the revocation list is in its place",
    "certificate.rollover.begun": "m15: a new authority is made, the old one signs",
    "certificate.rollover.kept": "m15: the old authority was kept, and still signs",
    "certificate.rollover.signing": "m15: the new authority signs, nobody was told",
    "certificate.rollover.ended": "m15: the old authority is gone, its key and trust are not",
    "credentials.round.announced": "m15: a new token is there for the members, M1 runs on the old",
    "credentials.token.taken": "m15: M1 has its new token, the restart is not noted as done",
    "credentials.round.ended": "m15: a restart with new credentials is noted as done",
    "private.file.flushed": "a private file is complete under another name",
    "private.file.named": "a private file has its name, the directory is not flushed",
}

_ERRORS = {"eio": errno.EIO, "enospc": errno.ENOSPC}


def _directory() -> Path | None:
    named = os.environ.get("HCNA_FAILPOINTS", "")
    return Path(named) if named and os.environ.get("HCNA_TEST") == "1" else None


_armed_in: Path | None = _directory()
_arrivals: dict[str, int] = {}
_lock = threading.Lock()


def hit(name: str) -> None:
    """Arrive at a point: nothing happens, unless a test armed it.

    Args:
        name: A key of `POINTS`.

    Raises:
        OSError: the point is armed with an error.
        LookupError: failpoints are on, and there is no such point.
    """
    if _armed_in is not None:
        _arrive(_armed_in, name)


def _arrive(directory: Path, name: str) -> None:
    if name not in POINTS:
        raise LookupError(f"no failpoint is called {name!r}")
    order = directory / name
    with _lock:
        try:
            text = order.read_text().strip()
        except FileNotFoundError:
            return
        action, _, at = text.partition("@")
        _arrivals[name] = _arrivals.get(name, 0) + 1
        if _arrivals[name] < int(at or 1):
            return
        _arrivals[name] = 0
        try:
            order.rename(order.with_name(f"{name}.fired"))
        except FileNotFoundError:
            return  # Another process was first.
    _act(action, name)


def _act(action: str, name: str) -> None:
    kind, _, argument = action.partition(":")
    match kind:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "exit":
            os._exit(int(argument))
        case "sleep":
            time.sleep(float(argument))
        case "eio" | "enospc":
            number = _ERRORS[kind]
            raise OSError(number, os.strerror(number), f"failpoint {name}")
        case _:
            raise ValueError(f"failpoint {name}: there is no action {action!r}")
