"""Where a PostgreSQL database is: noted in it, so that a copy of it can be told from itself.

A dump carries the note along, but not what the note tells of: the server's own number, the numbers
of the database and of a table in it. Files that are put back carry those along; but a server that
goes on from a past of its own (a standby that was promoted, a recovery to a point in time) begins a
new timeline.
"""

from __future__ import annotations

from dataclasses import dataclass

from hcna_ray.store.postgres_session import Session, StoreUnfit

_TABLE = """
CREATE TABLE IF NOT EXISTS origin (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    server bigint,
    database bigint NOT NULL,
    relation bigint NOT NULL,
    timeline text COLLATE "C"
)
"""
_MAY = (
    "SELECT has_function_privilege('pg_control_system()', 'execute'), "
    "has_function_privilege('pg_walfile_name(pg_lsn)', 'execute') "
    "AND has_function_privilege('pg_current_wal_lsn()', 'execute')"
)
_SERVER = "(SELECT system_identifier FROM pg_control_system())"
# The first eight letters of what the server writes to; the control file knows it only later.
_TIMELINE = "left(pg_walfile_name(pg_current_wal_lsn()), 8)"
_NOW = (
    "SELECT {server}::bigint, oid::bigint, 'leader'::regclass::oid::bigint, {timeline}::text "
    "FROM pg_database WHERE datname = current_database()"
)
_KNOWN = "SELECT server, database, relation, timeline FROM origin"
_SETTLE = (
    "INSERT INTO origin (server, database, relation, timeline) VALUES (%s, %s, %s, %s) "
    "ON CONFLICT (one) DO UPDATE SET server = excluded.server, database = excluded.database, "
    "relation = excluded.relation, timeline = excluded.timeline"
)


class StoreRestored(StoreUnfit):
    """The database was put back or copied: what was given out since is unknown to it."""

    code = "store_restored"

    def __init__(self, how: str) -> None:
        super().__init__(
            f"the database was restored from a dump or copied ({how}), so it may know nothing of "
            "leases and numbers that are out: run hcna store restored, once, and never let the "
            "original and the copy both serve"
        )


@dataclass(frozen=True, slots=True)
class Place:
    """Where a database is. ``None``: this role may not know."""

    server: int | None
    database: int
    relation: int
    timeline: str | None


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a database is, and where it was when that was noted."""

    now: Place
    known: Place | None

    def moved(self) -> str:
        """Say what has changed of what only a copy changes; nothing if it is the same database."""
        if self.known is None:
            return ""
        known, now = self.known, self.now
        if None not in (known.server, now.server) and known.server != now.server:
            return "another server wrote it"
        if known.database != now.database:
            return "another database of this server held it"
        return "its tables were made anew" if known.relation != now.relation else ""

    def branched(self) -> bool:
        """Whether the server has gone on from a past of its own since."""
        known = self.known
        if known is None or known.timeline is None or self.now.timeline is None:
            return False
        return known.timeline != self.now.timeline

    def settle(self, session: Session) -> None:
        """Note where the database is now, if that is not noted yet."""
        if self.known != self.now:
            now = self.now
            session.run(_SETTLE, (now.server, now.database, now.relation, now.timeline))


def prepare(session: Session) -> None:
    """Make the table. It is none of the schema's: its only row tells of this database alone."""
    if not _is_there(session):
        session.run(_TABLE)


def check(session: Session) -> None:
    """Refuse a database that was restored or copied and not taken over yet.

    Raises:
        StoreRestored: it is one.
    """
    if _is_there(session) and (how := look(session).moved()):
        raise StoreRestored(how)


def _is_there(session: Session) -> bool:
    return session.run("SELECT to_regclass('origin') IS NOT NULL") == [(True,)]


def look(session: Session) -> Origin:
    """Return where the database of a session is, and where it was."""
    ((may_server, may_timeline),) = session.run(_MAY)
    sql = _NOW.format(
        server=_SERVER if may_server else "NULL", timeline=_TIMELINE if may_timeline else "NULL"
    )
    ((server, database, relation, timeline),) = session.run(sql)
    known = session.run(_KNOWN)
    return Origin(
        now=Place(server, database, relation, timeline),
        known=Place(*known[0]) if known else None,
    )
