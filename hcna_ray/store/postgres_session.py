"""One connection to a PostgreSQL server: opened with care, spoken to in bulk, errors in our words.

What psycopg must be told so that a Python value arrives as the same bytes that SQLite would store:
every parameter has one fixed type, columns of a bulk write travel as binary arrays, and text may
hold U+0000, which PostgreSQL's cannot.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import psycopg
from psycopg import adapt, conninfo, pq
from psycopg.abc import Buffer, PQGen
from psycopg.types.numeric import FloatBinaryDumper, Int8BinaryDumper
from psycopg.types.string import BytesBinaryDumper

from hcna_ray.config import secrets_of
from hcna_ray.core.clock import boottime
from hcna_ray.core.errors import HcnaError, StoreFull, StoreUnavailable
from hcna_ray.store.rows import Row

T = TypeVar("T")

#: The oldest server that is taken: older ones get no more fixes.
SERVER_MIN = 14

#: What a URL may set otherwise. A peer that is gone is noticed within ten seconds or so.
_CONNECTING = {
    "connect_timeout": "5",
    "keepalives": "1",
    "keepalives_idle": "5",
    "keepalives_interval": "2",
    "keepalives_count": "3",
    "tcp_user_timeout": "10000",
    # With several hosts in the URL: the one that is not a standby.
    "target_session_attrs": "read-write",
}

#: A queue's tables are small when their statistics are taken and large soon after. Every statement
#: here has an index, so what is left to choose is taken away.
_PLANNING = {
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "jit": "off",
}


class StoreUnfit(HcnaError):
    """The database server could not keep what hcna-ray promises, or may not be used by us."""

    code = "store_unfit"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        return self.message


class ConnectionLost(StoreUnavailable):
    """The connection broke; whether the server did what it was last asked is not known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manners:
    """How a session behaves."""

    #: Shown in the server's list of sessions.
    name: str
    read_only: bool = False
    #: Longest statement, until the server gives up.
    statement_s: float = 30.0
    #: Longest wait for any answer, also to a commit (whose wait for a standby the server never
    #: gives up): then the connection counts as lost.
    answer_s: float = 40.0
    #: Longest wait for a lock of somebody else.
    lock_s: float = 10.0
    #: The server ends a session that pauses this long inside a transaction.
    idle_in_transaction_s: float = 15.0
    #: Plan each statement anew for its values, instead of once for all.
    custom_plans: bool = False
    #: Take a server that may forget commits.
    unsafe: bool = False


class Statement(NamedTuple):
    """Something to execute."""

    sql: str
    values: Sequence[Any] = ()
    #: Rows that it must touch, if that is known.
    expect: int | None = None


class _Connection(psycopg.Connection[Row]):
    """A connection that hangs up when an answer takes too long."""

    answer_s = 40.0

    def wait(self, gen: PQGen[T], interval: float = 0.1, timeout: float | None = None) -> T:
        """Wait for what the server answers. Every method of psycopg comes through here."""
        started = time.monotonic()
        try:
            return super().wait(gen, interval, timeout=timeout or self.answer_s)
        except psycopg.OperationalError:
            if time.monotonic() - started >= self.answer_s:
                self.pgconn.finish()
            raise


class Session:
    """A connection in autocommit mode: a transaction begins and ends with a statement of its own.

    After a `ConnectionLost` it is closed; whoever uses it opens another.
    """

    def __init__(self, url: str, manners: Manners) -> None:
        """Connect, set the manners, and judge the server.

        Raises:
            StoreUnfit: the URL cannot be read, or the server does not fit.
            StoreUnavailable: it cannot be reached now.
        """
        self._secrets = secrets_of(url)
        self._warnings: list[str] = []
        #: When the last request that was answered was sent, on the clock of `boottime`.
        self.answered_at = boottime()
        try:
            given = conninfo.conninfo_to_dict(url)
        except psycopg.Error:
            # Its text may hold a part of a password that was not escaped.
            raise StoreUnfit(
                "store.url is not a PostgreSQL URL; a special character in user or password "
                "must be percent-encoded, e.g. %40 for @"
            ) from None
        parameters: dict[str, Any] = {**_CONNECTING, "application_name": manners.name, **given}
        parameters["client_encoding"] = "UTF8"
        try:
            self._db = _Connection.connect(**parameters, autocommit=True, prepare_threshold=0)
        except psycopg.Error as error:
            raise StoreUnavailable(
                f"the task store cannot be reached: {self._told(error)}", 5
            ) from None
        try:
            self._db.answer_s = manners.answer_s
            self._db.prepared_max = None
            self._db.add_notice_handler(self._notice)
            _register(self._db.adapters)
            self._judge(manners)
        except BaseException:
            self._db.close()
            raise

    def _judge(self, manners: Manners) -> None:
        settings = {
            "statement_timeout": f"{manners.statement_s * 1000:.0f}",
            "lock_timeout": f"{manners.lock_s * 1000:.0f}",
            "idle_in_transaction_session_timeout": f"{manners.idle_in_transaction_s * 1000:.0f}",
            "tcp_user_timeout": "10000",
            "tcp_keepalives_idle": "5",
            "tcp_keepalives_interval": "2",
            "tcp_keepalives_count": "3",
            "default_transaction_isolation": "read committed",
            "default_transaction_read_only": "on" if manners.read_only else "off",
            "plan_cache_mode": "force_custom_plan" if manners.custom_plans else "auto",
            **_PLANNING,
        }
        if not manners.custom_plans:
            settings["plan_cache_mode"] = "force_generic_plan"
        calls = ", ".join(["set_config(%s, %s, false)"] * len(settings))
        self.run(f"SELECT {calls}", [word for pair in settings.items() for word in pair])
        ((version, encoding, schema, fsync, full_page_writes, synchronous_commit),) = self.run(
            "SELECT current_setting('server_version_num')::bigint, "
            "current_setting('server_encoding'), current_schema()::text, "
            "current_setting('fsync'), current_setting('full_page_writes'), "
            "current_setting('synchronous_commit')"
        )
        self.version = int(version)
        if version < SERVER_MIN * 10_000:
            raise StoreUnfit(
                f"PostgreSQL {version // 10_000} is too old for the task store: "
                f"{SERVER_MIN} or newer is needed"
            )
        if encoding != "UTF8":
            raise StoreUnfit(
                f"the database keeps text as {encoding}; create one with ENCODING 'UTF8'"
            )
        if schema is None:
            raise StoreUnfit("no schema of the search_path exists: create it, or change the path")
        self.schema = str(schema)
        #: Settings of the server for which it may lose what it has committed.
        self.risks = tuple(
            f"{name} is off"
            for name, value in (
                ("fsync", fsync),
                ("full_page_writes", full_page_writes),
                ("synchronous_commit", synchronous_commit),
            )
            if value == "off"
        )
        if self.risks and not (manners.unsafe or manners.read_only):
            raise StoreUnfit(
                f"PostgreSQL may lose what it has committed: {' and '.join(self.risks)}. "
                "Turn it on for this server, database and role (store.unsafe takes it as it is)"
            )
        # From here on a change of the server's configuration does not reach this session.
        self.run("SELECT set_config('synchronous_commit', %s, false)", (synchronous_commit,))

    @property
    def pid(self) -> int:
        """Process id of the server's side."""
        return self._db.info.backend_pid

    @property
    def closed(self) -> bool:
        """Whether it can be used no more."""
        return self._db.closed

    def close(self) -> None:
        """Hang up. Harmless twice."""
        self._db.close()

    # -- speaking ---------------------------------------------------------------------------------

    def run(self, sql: str, values: Sequence[Any] = ()) -> list[Row]:
        """Execute one statement and return the rows it found."""
        return self.run_all([Statement(sql, values)])[0]

    def run_all(self, statements: Sequence[Statement]) -> list[list[Row]]:
        """Execute statements in one round trip, and return the rows of each.

        After the first that fails none is executed.

        Raises:
            ConnectionLost: the connection broke.
            StoreUnavailable: the server refused for now.
            ValueError: a constraint was violated.
            AssertionError: a statement touched more or fewer rows than expected.
        """
        asked = boottime()
        try:
            if len(statements) == 1:
                cursors = [self._execute(statements[0])]
            else:
                with self._db.pipeline():
                    cursors = [self._execute(statement) for statement in statements]
            for statement, cursor in zip(statements, cursors, strict=True):
                if statement.expect is not None and cursor.rowcount != statement.expect:
                    raise AssertionError(
                        f"{cursor.rowcount} rows instead of {statement.expect}: {statement.sql}"
                    )
            self.answered_at = asked
            return [cursor.fetchall() if cursor.description else [] for cursor in cursors]
        except psycopg.Error as error:
            raise self._translated(error) from error

    def _execute(self, statement: Statement) -> psycopg.Cursor[Row]:
        return self._db.execute(statement.sql.encode(), statement.values or None, binary=True)

    def commit(self) -> None:
        """Commit the open transaction.

        Raises:
            ConnectionLost: whether it is committed is not known.
            StoreUnavailable: it is rolled back.
        """
        self._warnings.clear()
        asked = boottime()
        try:
            told = self._db.execute(b"COMMIT", prepare=False).statusmessage
        except psycopg.Error as error:
            raise self._translated(error) from error
        self.answered_at = asked
        if told != "COMMIT":
            raise StoreUnavailable("the server rolled the transaction back", 1)
        if self._warnings:
            # Committed here, but somebody cancelled the wait for the synchronous standby.
            self._db.close()
            raise ConnectionLost(f"the commit is not confirmed: {self._warnings[0]}", 5)

    def roll_back(self) -> None:
        """Roll back whatever is open. A connection that cannot do so is closed."""
        try:
            if self._db.info.transaction_status is not pq.TransactionStatus.IDLE:
                self._db.execute(b"ROLLBACK", prepare=False)
        except psycopg.Error:
            self._db.close()

    def script(self, sql: str) -> None:
        """Execute several statements without values, as one request."""
        try:
            self._db.execute(sql.encode(), prepare=False)
        except psycopg.Error as error:
            raise self._translated(error) from error

    def copy_in(
        self, table: str, columns: Sequence[str], types: Sequence[str], values: Iterable[Row]
    ) -> None:
        """Add rows to a table, as fast as there is.

        Args:
            table: Its name.
            columns: What each row holds.
            types: The columns' types, as the server names them.
            values: The rows.
        """
        names = ", ".join(f'"{column}"' for column in columns)
        sql = f'COPY "{table}" ({names}) FROM STDIN (FORMAT BINARY)'
        try:
            with self._db.cursor() as cursor, cursor.copy(sql.encode()) as copy:
                copy.set_types(types)
                for row in values:
                    copy.write_row(row)
        except psycopg.Error as error:
            raise self._translated(error) from error

    def stream(self, sql: str, page: int = 1000) -> Iterator[Row]:
        """Return rows as they come, inside a transaction: for results that exceed the memory."""
        try:
            with psycopg.ServerCursor(self._db, "hcna_stream") as cursor:
                cursor.itersize = page
                cursor.execute(sql.encode(), binary=True)
                yield from cursor
        except psycopg.Error as error:
            raise self._translated(error) from error

    # -- trouble ----------------------------------------------------------------------------------

    def _notice(self, notice: psycopg.errors.Diagnostic) -> None:
        if notice.severity_nonlocalized == "WARNING":
            self._warnings.append(notice.message_primary or "")

    def _translated(self, error: psycopg.Error) -> Exception:
        """Return what the contract says for an error of PostgreSQL; bugs stay as they are."""
        state = error.sqlstate or ""
        text = self._told(error)
        if self._db.closed or self._db.broken or state.startswith("08") or state in _ENDED:
            self._db.close()
            return ConnectionLost(f"the connection to the task store broke: {text}", 2)
        if state == "53100":
            return StoreFull(f"the task store's disk is full: {text}", 10)
        if state.startswith(_FOR_NOW) or isinstance(error, psycopg.OperationalError):
            return StoreUnavailable(f"the task store cannot be used now: {text}", 5)
        if state == "42501" or state == "3F000":
            return StoreUnfit(f"the task store may not be used like this: {text}")
        if isinstance(error, psycopg.IntegrityError):
            return ValueError(text)
        return error

    def _told(self, error: psycopg.Error) -> str:
        text = " ".join(str(error).split()) or type(error).__name__
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text


#: The server ends the session: administrator, crash of another session, start-up, dropped database.
_ENDED = ("57P01", "57P02", "57P03", "57P04", "57P05", "25P03")
#: Nothing is wrong with what was asked: no resources (disk full is 53100), a transaction to be
#: repeated (40), a read-only server (25006), an object in use (55), a statement that took too long
#: (57014), an I/O error of the server, which it has rolled back (58).
_FOR_NOW = ("53", "40", "25006", "55", "57014", "58")


# -- values ----------------------------------------------------------------------------------------

# U+0000 becomes two characters, and so does the first of those. Order and equality stay the same.
_MARK = "\x01"


def escaped(text: str) -> str:
    """Return text as it is stored: without U+0000."""
    if "\x00" not in text and _MARK not in text:
        return text
    return text.replace(_MARK, "\x01\x02").replace("\x00", "\x01\x01")


def unescaped(text: str) -> str:
    """Return the text that `escaped` was given."""
    if _MARK not in text:
        return text
    return text.replace("\x01\x01", "\x00").replace("\x01\x02", _MARK)


class _TextDumper(adapt.Dumper):
    format = pq.Format.BINARY
    oid = 25

    def dump(self, obj: str) -> Buffer:
        return escaped(obj).encode()


class _TextLoader(adapt.Loader):
    format = pq.Format.BINARY

    def load(self, data: Buffer) -> str:
        return unescaped(bytes(data).decode())


@dataclass(frozen=True, slots=True)
class Array:
    """A column of values as PostgreSQL's binary array: parameter of ``unnest`` and ``= ANY``."""

    data: bytes


class Integers(Array):
    """``bigint[]``."""


class Floats(Array):
    """``double precision[]``."""


class Texts(Array):
    """``text[]``."""


class Blobs(Array):
    """``bytea[]``."""


_HEAD = struct.Struct(">iiIii")
_EMPTY = struct.Struct(">iiI")
_LENGTH = struct.Struct(">i").pack
_INTEGER = struct.Struct(">iq").pack
_FLOAT = struct.Struct(">id").pack
_NULL = _LENGTH(-1)


def _array(oid: int, items: list[bytes]) -> bytes:
    if not items:
        return _EMPTY.pack(0, 0, oid)
    return _HEAD.pack(1, 1, oid, len(items), 1) + b"".join(items)


def integers(values: Iterable[int | None]) -> Integers:
    """Return a column of integers."""
    return Integers(
        _array(20, [_NULL if value is None else _INTEGER(8, value) for value in values])
    )


def floats(values: Iterable[float | None]) -> Floats:
    """Return a column of numbers."""
    return Floats(_array(701, [_NULL if value is None else _FLOAT(8, value) for value in values]))


def texts(values: Iterable[str | None]) -> Texts:
    """Return a column of texts."""
    return Texts(
        _array(
            25,
            [_NULL if value is None else _sized(escaped(value).encode()) for value in values],
        )
    )


def blobs(values: Iterable[bytes | None]) -> Blobs:
    """Return a column of bytes."""
    return Blobs(_array(17, [_NULL if value is None else _sized(value) for value in values]))


def _sized(data: bytes) -> bytes:
    return _LENGTH(len(data)) + data


class _ArrayDumper(adapt.Dumper):
    format = pq.Format.BINARY

    def dump(self, obj: Array) -> Buffer:
        return obj.data


class _IntegersDumper(_ArrayDumper):
    oid = 1016


class _FloatsDumper(_ArrayDumper):
    oid = 1022


class _TextsDumper(_ArrayDumper):
    oid = 1009


class _BlobsDumper(_ArrayDumper):
    oid = 1001


def _register(adapters: adapt.AdaptersMap) -> None:
    adapters.register_dumper(int, Int8BinaryDumper)
    adapters.register_dumper(float, FloatBinaryDumper)
    adapters.register_dumper(bytes, BytesBinaryDumper)
    adapters.register_dumper(str, _TextDumper)
    adapters.register_loader(25, _TextLoader)
    adapters.register_dumper(Integers, _IntegersDumper)
    adapters.register_dumper(Floats, _FloatsDumper)
    adapters.register_dumper(Texts, _TextsDumper)
    adapters.register_dumper(Blobs, _BlobsDumper)
