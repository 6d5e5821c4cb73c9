"""The process's engine, one transaction at a time, and the schema."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from pydantic import SecretStr
from sqlalchemy import Connection, Engine, Row, create_engine, text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError, StatementError

from consumers.database_url import parse_database_url, session_attributes, try_hosts_in_turn
from consumers.errors import OldSchema, StoreUnavailable
from consumers.settings import StoreSettings
from producers.errors import InvalidEvent

CONNECT_TIMEOUT_SECONDS = 5
# What ails the whole database, so that the next statement has no better prospects: connection, transaction state (such
# as read-only), authorization, database or schema missing, objects missing or forbidden, resources, shutdown, system
# and internal errors. Any other error may be of one statement only: cancelled, a lock, a deadlock, a trigger.
_STORE_CLASSES = ("08", "25", "28", "3D", "3F", "42", "53", "57P", "58", "F0", "XX")
READ_SECONDS = 5.0  # what a statement of a reader may take
# A reader that finds no free connection for so long is told to come back, rather than to make one more. Each of its
# statements is a transaction of its own, which spares two round trips.
_READER: dict[str, Any] = {"pool_size": 8, "max_overflow": 0, "pool_timeout": 2.0, "isolation_level": "AUTOCOMMIT"}
# What is stored after a statement began to wait must be seen by the next one, whatever the database's default is.
_WRITER: dict[str, Any] = {"pool_size": 2, "isolation_level": "READ COMMITTED"}
_LOCK_SECONDS = 5.0
_ISOLATED_LOCK_SECONDS = 0.5
_IN_THE_WAY = "TH001"  # raised by schema.sql
# SQLSTATE classes that the event itself causes: data exception, integrity constraint violation.
_REFUSED_CLASSES = ("22", "23")
_ROW_NUMBERS = ("portfolio_history_pk", "signal_archives_pk")
_ENCODING = "UTF8"
_SCHEMA_VERSION = re.compile(r"schema version (\d+)")
_DATABASE = text("""
    SELECT current_database() AS name, current_setting('server_encoding') AS encoding,
        quote_ident(current_database() || '_utf8') AS another,
        obj_description(to_regclass('event_outcomes'), 'pg_class') AS comment
""")
_CHECKED = "trading-history: checked"  # in the info of a pooled connection


def create_store_engine(url: SecretStr, *, statement_timeout_seconds: float = 0, read_only: bool = False) -> Engine:
    """An engine that speaks UTF8, shows times in UTC, checks a pooled connection before use and never logs values.

    A statement may take `statement_timeout_seconds`, and wait for a lock for five at most; 0 is no limit. With
    `read_only` PostgreSQL refuses every statement that would change something.

    Raises:
        SettingsError: the URL cannot be read.
    """
    parsed = parse_database_url(url)
    limits = {
        "statement_timeout": statement_timeout_seconds,
        "lock_timeout": min(_LOCK_SECONDS, statement_timeout_seconds),
    }
    limit = "".join(f" -c {name}={round(seconds * 1000)}" for name, seconds in limits.items() if seconds)
    limit += " -c default_transaction_read_only=on" if read_only else ""
    store = create_engine(
        parsed,
        connect_args={
            "connect_timeout": CONNECT_TIMEOUT_SECONDS,
            # A server that vanished without a word is noticed within half a minute, not in hours.
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            "tcp_user_timeout": 30_000,
            "application_name": "trading-history",
            "client_encoding": _ENCODING,  # an invalid PGCLIENTENCODING would prevent connecting
            "options": f"{parsed.query.get('options', '')} -c timezone=UTC{limit}".strip(),
            **session_attributes(parsed, read_only=read_only),
        },
        pool_pre_ping=True,
        # By a statement after connecting. The role's own setting and the URL's are replaced by it.
        client_encoding=_ENCODING,
        **(_READER if read_only else _WRITER),
        executemany_mode="values_plus_batch",
        hide_parameters=True,
    )
    try_hosts_in_turn(store)
    return store


_statement_timeout_seconds = 0.0


def limit_statements(seconds: float) -> None:
    """For this process, before its first use of the engine: a worker must not wait for one row for ever."""
    global _statement_timeout_seconds
    _statement_timeout_seconds = seconds


@cache
def engine() -> Engine:
    """The engine of this process, made at the first use from the settings."""
    url = StoreSettings.from_environment().url()
    return create_store_engine(url, statement_timeout_seconds=_statement_timeout_seconds)


def reader() -> Engine:
    """The engine of this process for reading: it cannot change anything, and each statement has READ_SECONDS."""
    return _reader_of(engine())


@lru_cache(maxsize=1)
def _reader_of(store: Engine) -> Engine:
    url = SecretStr(store.url.render_as_string(hide_password=False))
    return create_store_engine(url, statement_timeout_seconds=READ_SECONDS, read_only=True)


@contextmanager
def get_reader() -> Iterator[Connection]:
    """A connection that can only read.

    Raises:
        StoreUnavailable: the database cannot be reached, has trouble of its own, or a statement took too long.
        SettingsError: the settings name no database.
    """
    with translated_errors(), reader().connect() as connection:
        yield connection


def drop_connections() -> None:
    """The next use connects anew: what a session was given at its start, such as being read-only, it keeps."""
    if engine.cache_info().currsize:
        engine().dispose()


def _forget_after_fork() -> None:
    # The parent goes on using these sockets: the child must let go of them without closing them.
    if engine.cache_info().currsize:
        if _reader_of.cache_info().currsize:
            _reader_of(engine()).dispose(close=False)
            _reader_of.cache_clear()
        engine().dispose(close=False)
        engine.cache_clear()


os.register_at_fork(after_in_child=_forget_after_fork)


@contextmanager
def get_db(*, statement_seconds: float | None = None) -> Iterator[Connection]:
    """One transaction: committed when the block ends, rolled back when it raises.

    `statement_seconds` limits each of its statements, and then a lock is waited for only shortly.

    Raises:
        StoreUnavailable: the database cannot be reached, or has trouble of its own.
        SettingsError: the settings name no database.
    """
    with translated_errors(), engine().begin() as connection:
        if statement_seconds is not None:
            connection.exec_driver_sql(f"SET LOCAL statement_timeout = {round(statement_seconds * 1000)}")
            connection.exec_driver_sql(f"SET LOCAL lock_timeout = {round(_ISOLATED_LOCK_SECONDS * 1000)}")
        yield connection


@contextmanager
def translated_errors() -> Iterator[None]:
    """Turn driver errors into StoreUnavailable; what only the insert of an event means is `refused_values`' to say."""
    try:
        yield
    except DBAPIError as error:
        sqlstate = _sqlstate(error)
        if sqlstate.startswith(_REFUSED_CLASSES):
            numbers = _constraint(error) in _ROW_NUMBERS
            advice = "" if numbers else ": if the tables are of an earlier version, run trading-history init-db"
            message = f"PostgreSQL: {_cause(error)} (SQLSTATE {sqlstate}){advice}"
            # Not chained: the driver's error carries the row's values into every traceback.
            raise StoreUnavailable(message, one_statement=not numbers) from None
        alone = sqlstate != "" and not sqlstate.startswith(_STORE_CLASSES)
        raise StoreUnavailable(f"PostgreSQL: {_cause(error)}", one_statement=alone) from error
    except StatementError as error:  # raised before the driver was called: not the database's
        raise (error.orig or error) from None
    except SQLAlchemyError as error:
        raise StoreUnavailable(f"PostgreSQL: {type(error).__name__}") from error


@contextmanager
def refused_values() -> Iterator[None]:
    """Around the insert of events into their own table, and nothing else.

    Raises:
        InvalidEvent: the database refused the values for good.
    """
    try:
        yield
    except DBAPIError as error:
        # When the sequence of row numbers is behind the rows, as after a restore, the events are not to blame.
        if not _sqlstate(error).startswith(_REFUSED_CLASSES) or _constraint(error) in _ROW_NUMBERS:
            raise
        raise InvalidEvent(f"PostgreSQL refused it: {_cause(error)} (SQLSTATE {_sqlstate(error)})") from None


def _sqlstate(error: DBAPIError) -> str:
    return getattr(error.orig, "pgcode", None) or ""


def _constraint(error: DBAPIError) -> str | None:
    return getattr(getattr(error.orig, "diag", None), "constraint_name", None)


def check_database(db: Connection) -> None:
    """Check once for each connection that events can be stored in this database, by this version of the program.

    Raises:
        StoreUnavailable: the encoding is not UTF8, or the tables are older than this program.
    """
    if _CHECKED in db.info:
        return
    found = db.execute(_DATABASE).one()
    if problem := wrong_encoding(found) or old_tables(found.comment):
        raise StoreUnavailable(problem)
    db.info[_CHECKED] = True


def check_encoding(db: Connection) -> None:
    """Raises StoreUnavailable when the database's encoding is not UTF8; the message says how to make another."""
    if problem := wrong_encoding(db.execute(_DATABASE).one()):
        raise StoreUnavailable(f"{problem}. Nothing was changed.")


def wrong_encoding(found: Row[Any]) -> str | None:
    """The problem and its solution as one line; `found` has `name`, `encoding` and `another`, a name to use."""
    if found.encoding == _ENCODING:
        return None
    return f"the encoding of database {found.name} is {found.encoding}, not UTF8: {encoding_advice(found.another)}"


def encoding_advice(another: str) -> str:
    # Without the locale the server's own is taken, which may not go together with UTF8.
    create = f"CREATE DATABASE {another} TEMPLATE template0 ENCODING 'UTF8' LC_COLLATE 'C' LC_CTYPE 'C'"
    return f"create another database ({create}), name it in DATABASE_URL and run trading-history init-db"


def old_tables(comment: str | None) -> str | None:
    """The problem as one line when tables with this comment on event_outcomes are older than this program's."""
    needed, found = _version_in(schema_sql()), _version_in(comment or "")
    if found >= needed:
        return None
    return f"the tables are missing or older (schema version {found}, needed is {needed}): run trading-history init-db"


def _version_in(words: str) -> int:
    found = _SCHEMA_VERSION.search(words)
    return 1 if found is None else int(found[1])  # the first did not say


def _cause(error: DBAPIError) -> str:
    """The server's or the driver's first line. The lines after it may hold the row's values."""
    diagnostics = getattr(error.orig, "diag", None)
    message = getattr(diagnostics, "message_primary", None) or str(error.orig)
    return (message.strip().splitlines() or [type(error.orig).__name__])[0]


@cache
def schema_sql() -> str:
    """The text of schema.sql, from the wheel or from the source tree."""
    packaged = Path(__file__).with_name("schema.sql")
    return (packaged if packaged.exists() else Path(__file__).parent.parent / "schema.sql").read_text("utf-8")


def schema_body() -> str:
    """schema.sql without its BEGIN and COMMIT, for a transaction that does more."""
    return re.sub(r"^(BEGIN|COMMIT);\n", "", schema_sql(), flags=re.M)


class _Notices:
    """Where psycopg2 puts what the server tells; no list, which SQLAlchemy would empty."""

    def __init__(self) -> None:
        self.of_roles: list[str] = []

    def append(self, notice: str) -> None:
        _, found, note = notice.partition("NOTICE:  roles: ")
        if found:
            self.of_roles.append(note.strip())


@contextmanager
def role_notes(connection: Connection) -> Iterator[list[str]]:
    """What schema.sql tells inside the block about roles that it could not make, or not let in."""
    session: Any = connection.connection.driver_connection
    session.notices = notices = _Notices()
    try:
        yield notices.of_roles
    finally:
        session.notices = []


def apply_schema(store: Engine) -> list[str]:
    """Make the tables that are missing; safe to run at any time and by several at once. Notes for the user.

    Raises:
        OldSchema: tables of another shape have our names; nothing was changed.
        StoreUnavailable: the database cannot be reached, refuses, or is not encoded in UTF8.
    """
    try:
        with translated_errors(), store.connect() as pooled:
            # The file has its own BEGIN and COMMIT, so that psql runs it the same way. Autocommit lets them be, and a
            # connection on which they failed is in a transaction that nobody will end: away with it.
            connection = pooled.execution_options(isolation_level="AUTOCOMMIT", no_parameters=True)
            check_encoding(connection)
            try:
                with role_notes(connection) as notes:
                    connection.exec_driver_sql(schema_sql())
                return notes
            except DBAPIError:
                connection.invalidate()
                raise
    except StoreUnavailable as error:
        cause = error.__cause__
        if isinstance(cause, DBAPIError) and getattr(cause.orig, "pgcode", None) == _IN_THE_WAY:
            hint = getattr(getattr(cause.orig, "diag", None), "message_hint", None)
            raise OldSchema(f"{_cause(cause)}. {hint}") from cause
        raise
