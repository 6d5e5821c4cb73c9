"""Engines and transactions of the process, and the translation of driver errors."""

from __future__ import annotations

import os
import re
import select
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache, lru_cache
from typing import Any

import psycopg2
from pydantic import SecretStr
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.exc import DBAPIError, InvalidatePoolError, SQLAlchemyError, StatementError

from consumers.db.database_url import parse_database_url, session_attributes, split_schema, try_hosts_in_turn
from consumers.db.schema_comparison import other_schema_problem
from consumers.errors import StoreUnavailable, first_line
from consumers.settings import StoreSettings
from producers.errors import InvalidEvent
from producers.events import KINDS

CONNECT_TIMEOUT_SECONDS = 5
# SQLSTATE classes of errors after which the next statement would fail too: connection, transaction state (such as
# read-only), authorization, database or schema missing, objects missing or forbidden, resources, shutdown, system and
# internal errors. Any other error may concern one statement only: cancelled, a lock, a deadlock, a trigger.
_OUTAGE_CLASSES = ("08", "25", "28", "3D", "3F", "42", "53", "57P", "58", "F0", "XX")
READ_SECONDS = 5.0  # statement timeout of readers
# A reader that gets no free connection within 2 s fails; the pool never grows.
_READER: dict[str, Any] = {"pool_size": 8, "max_overflow": 0, "pool_timeout": 2.0}
_WRITER: dict[str, Any] = {"pool_size": 2}
_LOCK_SECONDS = 5.0
_TRANSACTION_TIMEOUT_VERSION = (17,)  # the first release of PostgreSQL that has transaction_timeout
_ISOLATED_LOCK_SECONDS = 0.5
# SQLSTATE classes of errors that the event's values cause: data exception, integrity constraint violation.
_VALUE_CLASSES = ("22", "23")
# A connection that was used more recently is checked by its socket only, without a round trip.
PING_AFTER_SECONDS = 5.0
ENCODING = "UTF8"
_SEARCH_PATH = "trading_history_search_path"  # execution option of an engine
_UNDEFINED_TABLE, _READ_ONLY = "42P01", "25006"
_OUR_TABLE = re.compile(rf"\b({'|'.join(kind.table for kind in KINDS.values())}|event_outcomes|withdrawals)\b")
_SETTING = "DATABASE_URL or the POSTGRES_ variables"
# For errors of connecting, which have no SQLSTATE. The first match wins. The server may write in another language. An
# outage that ends by itself has no advice. The last entry is for errors without an answer from the server.
_CONNECTION_ADVICE = (
    (
        "unsupported startup parameter",
        "this is a pooler, such as pgbouncer, and it refuses startup options: remove options= from DATABASE_URL, and"
        " PGOPTIONS. For a search_path, write schema=NAME in DATABASE_URL",
    ),
    (
        "no such (user|database)|Tenant or user not found",
        "this is a pooler whose own list has no such user or database: correct the name in DATABASE_URL or there",
    ),
    (
        'database ".*" does not exist',
        f"correct the name of the database in {_SETTING}, or create the database and run trading-history init-db",
    ),
    (
        "channel binding",
        "channel_binding=require needs TLS and a password by SCRAM: add sslmode=require to DATABASE_URL, or remove"
        " channel_binding",
    ),
    (
        "support SSL|SSL error|certificate",
        "this is about TLS: correct sslmode and sslrootcert in DATABASE_URL, or PGSSLMODE and PGSSLROOTCERT",
    ),
    ('authentication|password|role ".*" does not exist', f"correct user and password in {_SETTING}"),
    ("starting up|shutting down|recovery mode|too many |connection slots|terminating connection", ""),
    (
        "FATAL:|failed: [^\x00-\x7f][^ ]*: ",
        f"if this does not end by itself, check the name of the database, user and password in {_SETTING}",
    ),
    (
        "server closed the connection unexpectedly",
        "check that PostgreSQL runs; a pooler, such as pgbouncer, must have pool_mode transaction or session: in mode"
        " statement, it closes each connection that begins a transaction",
    ),
    (
        "timeout expired",  # pgbouncer lets clients wait after the server has refused a connection
        f"check that PostgreSQL runs, and host and port in {_SETTING}; if a pooler answers there, check the name of"
        " the database too: the log of the pooler has the reason",
    ),
    (
        "could not translate host name|connection to server|no usable host|no answer from the server"
        # Without the server, if this process waits for the answers itself, as a worker does.
        "|Connection refused|No such file or directory|No route to host|unreachable|timed out",
        f"check that PostgreSQL runs, and host and port in {_SETTING}",
    ),
)


def create_store_engine(
    url: SecretStr,
    *,
    statement_timeout_seconds: float = 0,
    long_transactions: bool = False,
    read_only: bool = False,
    search_path: tuple[str, ...] = (),
) -> Engine:
    """Return an engine with UTF8, times in UTC, a check of each pooled connection before use, and no values in logs.

    Each statement has a timeout of `statement_timeout_seconds`, and waits for a lock for at most 5 s; 0 means no
    limit for both. With `long_transactions`, no limit of the role or the server ends a transaction. With `read_only`
    PostgreSQL refuses every statement that would change data. The names of tables are looked up in the schemas of
    `search_path`; by default, in the schema that the URL names, or else in the search_path of the role.

    Raises:
        SettingsError: the URL cannot be parsed.
    """
    parsed, schemas = split_schema(parse_database_url(url))
    schemas = search_path or schemas
    store = create_engine(
        parsed,
        connect_args={
            "connect_timeout": CONNECT_TIMEOUT_SECONDS,
            # If the server disappears without closing the connection, notice it within 30 s, not after hours.
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            "tcp_user_timeout": 30_000,
            "application_name": "trading-history",
            "client_encoding": ENCODING,  # an invalid PGCLIENTENCODING would prevent connecting
            **session_attributes(parsed, read_only=read_only),
        },
        # SQLAlchemy sets it by a statement after connecting, which overrides the role's setting and the URL's.
        client_encoding=ENCODING,
        isolation_level="READ COMMITTED",
        **(_READER if read_only else _WRITER),
        # Not set for writers, because False would override default_transaction_read_only, with which an operator
        # stops all writes.
        execution_options={_SEARCH_PATH: schemas} | ({"postgresql_readonly": True} if read_only else {}),
        executemany_mode="values_plus_batch",
        hide_parameters=True,
    )
    settings = transaction_settings(statement_timeout_seconds, schemas)
    if long_transactions:  # in the first statement: the limit may be a few milliseconds
        settings = f"{_NO_IDLE_LIMIT}; {settings}"
    event.listen(store, "begin", lambda connection: connection.exec_driver_sql(settings))
    if long_transactions:
        event.listen(store, "begin", _lift_transaction_timeout)
    try_hosts_in_turn(store)
    _check_before_use(store)
    return store


def _check_before_use(store: Engine) -> None:
    """If the server has closed a connection, discard all pooled connections and open a new one."""

    def check(connection: Any, record: Any, _: Any) -> None:
        used_at = record.info.get("used_at")
        if used_at is None:  # it was just opened
            return
        try:
            if connection.closed or is_readable(connection.fileno()):
                raise InvalidatePoolError
            if time.monotonic() - used_at > PING_AFTER_SECONDS:
                store.dialect.do_ping(connection)
        except psycopg2.Error as error:
            raise InvalidatePoolError from error

    event.listen(store, "checkout", check)
    event.listen(store, "checkin", lambda _, record: record.info.update(used_at=time.monotonic()))


def is_readable(descriptor: int) -> bool:
    """Return whether an idle connection is readable: then the server has closed it, or sent its last message."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))


def search_path_of(store: Engine) -> tuple[str, ...]:
    """Return the schemas that were given to this engine, by argument or URL; empty: the role's search_path applies."""
    schemas: tuple[str, ...] = store.get_execution_options().get(_SEARCH_PATH, ())
    return schemas


def quoted(name: str) -> str:
    """Return the name of an object, such as a schema, as SQL writes it."""
    return '"' + name.replace('"', '""') + '"'


def transaction_settings(statement_timeout_seconds: float, search_path: tuple[str, ...] = ()) -> str:
    """Return the statements with which each transaction begins; they replace the settings of role, database and server.

    They are not startup options of the connection: a pooler refuses those or drops them, and in transaction mode it
    gives each transaction another connection.
    """
    lock_seconds = min(_LOCK_SECONDS, statement_timeout_seconds)
    schemas = ", ".join(map(quoted, search_path)).replace("%", "%%")  # psycopg2 reads %% as %
    return (
        (f"SET LOCAL search_path = {schemas}; " if schemas else "")
        + "SET LOCAL TimeZone = 'UTC'; SET LOCAL DateStyle = 'ISO, YMD'; SET LOCAL extra_float_digits = 1;"
        # Otherwise NULL in an array is an error, an index finds a part of the rows, names are quoted without need, and
        # any error ends the session.
        " SET LOCAL array_nulls = on; SET LOCAL gin_fuzzy_search_limit = 0; SET LOCAL quote_all_identifiers = off;"
        " SET LOCAL exit_on_error = off;"
        f" SET LOCAL statement_timeout = {round(1000 * statement_timeout_seconds)};"
        f" SET LOCAL lock_timeout = {round(1000 * lock_seconds)}"
    )


_NO_IDLE_LIMIT = "SET LOCAL idle_in_transaction_session_timeout = 0"


def _lift_transaction_timeout(connection: Connection) -> None:
    if (connection.dialect.server_version_info or ()) >= _TRANSACTION_TIMEOUT_VERSION:
        connection.exec_driver_sql("SET LOCAL transaction_timeout = 0")


_statement_timeout_seconds = 0.0
_long_transactions = False


def limit_statements(seconds: float, *, long_transactions: bool = False) -> None:
    """Set the time limits of this process, see `create_store_engine`; call it before the first use of the engine."""
    global _statement_timeout_seconds, _long_transactions
    _statement_timeout_seconds, _long_transactions = seconds, long_transactions


@cache
def engine() -> Engine:
    """Return the engine of this process. The first call creates it from the settings."""
    url = StoreSettings.from_environment().url()
    return create_store_engine(
        url, statement_timeout_seconds=_statement_timeout_seconds, long_transactions=_long_transactions
    )


def reader() -> Engine:
    """Return the read-only engine of this process; its statement timeout is READ_SECONDS."""
    return _reader_of(engine())


@lru_cache(maxsize=1)
def _reader_of(store: Engine) -> Engine:
    url = SecretStr(store.url.render_as_string(hide_password=False))
    schemas = search_path_of(store)
    return create_store_engine(url, statement_timeout_seconds=READ_SECONDS, read_only=True, search_path=schemas)


@contextmanager
def read_transaction() -> Iterator[Connection]:
    """Run one read-only transaction that sees one state of the database (REPEATABLE READ).

    Raises:
        StoreUnavailable: the database is away, cannot execute a statement now, or a statement timed out.
        SettingsError: the settings name no database.
    """
    store = reader()
    with translated_errors(store), store.connect() as pooled:
        connection = pooled.execution_options(isolation_level="REPEATABLE READ")
        # JIT compilation takes hundreds of milliseconds for queries that run for tens.
        connection.exec_driver_sql("SET LOCAL jit = off")
        yield connection


def drop_connections() -> None:
    """Close the pooled connections, since a session keeps settings of its start, such as being read-only."""
    engine().dispose()


def _forget_after_fork() -> None:
    # The parent still uses these connections, so the child forgets them without closing their sockets.
    if engine.cache_info().currsize:
        if _reader_of.cache_info().currsize:
            _reader_of(engine()).dispose(close=False)
            _reader_of.cache_clear()
        engine().dispose(close=False)
        engine.cache_clear()


os.register_at_fork(after_in_child=_forget_after_fork)


@contextmanager
def get_db(*, statement_seconds: float | None = None) -> Iterator[Connection]:
    """Run one transaction: commit it when the block ends, roll it back when the block raises.

    `statement_seconds` is the timeout of each of its statements; the lock timeout is then 0.5 s.

    Raises:
        StoreUnavailable: the database is away or cannot execute a statement now.
        SettingsError: the settings name no database.
    """
    store = engine()
    with translated_errors(store), store.begin() as connection:
        if statement_seconds is not None:
            connection.exec_driver_sql(f"SET LOCAL statement_timeout = {round(statement_seconds * 1000)}")
            connection.exec_driver_sql(f"SET LOCAL lock_timeout = {round(_ISOLATED_LOCK_SECONDS * 1000)}")
        yield connection


@contextmanager
def long_read(store: Engine | None = None) -> Iterator[Connection]:
    """Run one read-only transaction that sees one state of the database (REPEATABLE READ) and has no time limit.

    It is for commands that read many rows, such as an export. `store` is by default the engine of this process.

    Raises:
        StoreUnavailable: the database is away or cannot execute a statement now.
        SettingsError: the settings name no database.
    """
    store = store or engine()
    with translated_errors(store), store.connect() as pooled:
        connection = pooled.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        # The default limits could end a long read.
        connection.exec_driver_sql(f"SET LOCAL statement_timeout = 0; SET LOCAL lock_timeout = 0; {_NO_IDLE_LIMIT}")
        _lift_transaction_timeout(connection)
        yield connection


@contextmanager
def translated_errors(store: Engine) -> Iterator[None]:
    """Translate driver errors to StoreUnavailable. If `store` lacks the tables, look for them in its other schemas.

    Errors that an event's values cause are translated before, by `translated_value_errors`.
    """
    try:
        yield
    except DBAPIError as error:
        sqlstate = _sqlstate(error)
        if sqlstate.startswith(_VALUE_CLASSES):
            taken = _is_primary_key_violation(error)
            advice = "" if taken else ": if the tables are from an earlier version, run trading-history init-db"
            message = f"PostgreSQL: {first_line(error)} (SQLSTATE {sqlstate}){advice}"
            # Not chained: the driver's error contains the row's values, and a traceback would show them.
            raise StoreUnavailable(message, one_statement=not taken) from None
        one_statement = sqlstate != "" and not sqlstate.startswith(_OUTAGE_CLASSES)
        message, advice = _described(error, sqlstate, store)
        raise StoreUnavailable(f"PostgreSQL: {message}", one_statement=one_statement, advice=advice) from error
    except StatementError as error:  # raised before the driver was called, so not by the database
        raise (error.orig or error) from None
    except SQLAlchemyError as error:
        raise StoreUnavailable(f"PostgreSQL: {type(error).__name__}") from error


@contextmanager
def translated_value_errors() -> Iterator[None]:
    """Translate errors that an event's values cause to InvalidEvent.

    Use it only around the insert of events into their history table.

    Raises:
        InvalidEvent: the values violate a type or a constraint of the table, now and later.
    """
    try:
        yield
    except DBAPIError as error:
        # A taken primary key means that the table's id sequence is behind its rows, as after a restore. The events are
        # valid then.
        if not _sqlstate(error).startswith(_VALUE_CLASSES) or _is_primary_key_violation(error):
            raise
        raise InvalidEvent(
            f"PostgreSQL refused the values: {first_line(error)} (SQLSTATE {_sqlstate(error)})"
        ) from None


def _described(error: DBAPIError, sqlstate: str, store: Engine) -> tuple[str, str]:
    """Return the message of an error and what to do about it, as far as that is known."""
    # The import reads tables of other names, and has its own advice for them.
    if sqlstate == _UNDEFINED_TABLE and _OUR_TABLE.search(first_line(error)):
        elsewhere = None
        with suppress(SQLAlchemyError), store.connect() as db:
            elsewhere = other_schema_problem(db, search_path_of(store))
        return elsewhere or (first_line(error), "run trading-history init-db")
    if sqlstate == _READ_ONLY:
        return first_line(error), (
            "the database is read-only: turn default_transaction_read_only off for this role, database or server; if"
            f" this is a replica, point {_SETTING} to the primary"
        )
    if sqlstate:
        return first_line(error), ""
    lines = [" ".join(line.split()) for line in str(error.orig).splitlines()]
    # A name such as localhost has several addresses. The one that answers says more than those that do not.
    message = next((line for line in lines if "FATAL:" in line), first_line(error))
    return message, next((advice for pattern, advice in _CONNECTION_ADVICE if re.search(pattern, message)), "")


def _sqlstate(error: DBAPIError) -> str:
    return getattr(error.orig, "pgcode", None) or ""


def _is_primary_key_violation(error: DBAPIError) -> bool:
    """Return whether a history table gave a new row an id that another row already has."""
    constraint = getattr(getattr(error.orig, "diag", None), "constraint_name", None)
    return constraint in {f"{kind.table}_pk" for kind in KINDS.values()}
