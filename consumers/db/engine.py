"""The process's engine, and one transaction at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import Any

from pydantic import SecretStr
from sqlalchemy import Connection, Engine, create_engine
from sqlalchemy.exc import DBAPIError, SQLAlchemyError, StatementError

from consumers.db.database_url import parse_database_url, session_attributes, try_hosts_in_turn
from consumers.errors import StoreUnavailable, first_line
from consumers.settings import StoreSettings
from producers.errors import InvalidEvent
from producers.events import KINDS

CONNECT_TIMEOUT_SECONDS = 5
# Errors of the whole database, after which the next statement would fail too: connection, transaction state (such
# as read-only), authorization, database or schema missing, objects missing or forbidden, resources, shutdown, system
# and internal errors. Any other error may be of one statement only: cancelled, a lock, a deadlock, a trigger.
_STORE_CLASSES = ("08", "25", "28", "3D", "3F", "42", "53", "57P", "58", "F0", "XX")
READ_SECONDS = 5.0  # what a statement of a reader may take
# A reader that finds no free connection for this time gets an error; no further connection is made for it. Each of its
# statements is a transaction of its own, which spares two round trips.
_READER: dict[str, Any] = {"pool_size": 8, "max_overflow": 0, "pool_timeout": 2.0, "isolation_level": "AUTOCOMMIT"}
# Each statement must see rows that were committed while the one before waited, whatever the database's default is.
_WRITER: dict[str, Any] = {"pool_size": 2, "isolation_level": "READ COMMITTED"}
_LOCK_SECONDS = 5.0
_ISOLATED_LOCK_SECONDS = 0.5
# SQLSTATE classes that the event itself causes: data exception, integrity constraint violation.
_REFUSED_CLASSES = ("22", "23")
ENCODING = "UTF8"


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
            "client_encoding": ENCODING,  # an invalid PGCLIENTENCODING would prevent connecting
            "options": f"{parsed.query.get('options', '')} -c timezone=UTC{limit}".strip(),
            **session_attributes(parsed, read_only=read_only),
        },
        pool_pre_ping=True,
        # By a statement after connecting. The role's own setting and the URL's are replaced by it.
        client_encoding=ENCODING,
        **(_READER if read_only else _WRITER),
        executemany_mode="values_plus_batch",
        hide_parameters=True,
    )
    try_hosts_in_turn(store)
    return store


_statement_timeout_seconds = 0.0


def limit_statements(seconds: float) -> None:
    """Limit each statement of this process; call it before the first use of the engine."""
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


@contextmanager
def read_transaction() -> Iterator[Connection]:
    """One consistent transaction that can only read, otherwise as `get_reader`."""
    with get_reader() as connection, connection.execution_options(isolation_level="REPEATABLE READ").begin():
        # Compiling costs more than it saves: hundreds of milliseconds for queries that take tens.
        connection.exec_driver_sql("SET LOCAL jit = off")
        yield connection


def drop_connections() -> None:
    """Close the pooled connections: a session keeps the settings of its start, such as being read-only."""
    if engine.cache_info().currsize:
        engine().dispose()


def _forget_after_fork() -> None:
    # The parent still uses these connections: the child drops them without closing their sockets.
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

    `statement_seconds` limits each of its statements; then its wait for a lock is short as well.

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
    """Turn driver errors into StoreUnavailable; `refused_values` translates those of an event's insert first."""
    try:
        yield
    except DBAPIError as error:
        sqlstate = _sqlstate(error)
        if sqlstate.startswith(_REFUSED_CLASSES):
            taken = _is_primary_key_violation(error)
            advice = "" if taken else ": if the tables are of an earlier version, run trading-history init-db"
            message = f"PostgreSQL: {first_line(error)} (SQLSTATE {sqlstate}){advice}"
            # Not chained: the driver's error carries the row's values into every traceback.
            raise StoreUnavailable(message, one_statement=not taken) from None
        alone = sqlstate != "" and not sqlstate.startswith(_STORE_CLASSES)
        raise StoreUnavailable(f"PostgreSQL: {first_line(error)}", one_statement=alone) from error
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
        # If a table's id sequence is behind its rows, as after a restore, the events are valid.
        if not _sqlstate(error).startswith(_REFUSED_CLASSES) or _is_primary_key_violation(error):
            raise
        raise InvalidEvent(f"PostgreSQL refused it: {first_line(error)} (SQLSTATE {_sqlstate(error)})") from None


def _sqlstate(error: DBAPIError) -> str:
    return getattr(error.orig, "pgcode", None) or ""


def _is_primary_key_violation(error: DBAPIError) -> bool:
    """Whether a history table gave a new row an id that another row has."""
    constraint = getattr(getattr(error.orig, "diag", None), "constraint_name", None)
    return constraint in {f"{kind.table}_pk" for kind in KINDS.values()}
