"""Processes that die, before or after their n-th operation on Redis, PostgreSQL or SQLite.

An operation is a packet of commands to Redis, a statement or a commit of PostgreSQL, or a commit of SQLite. One process
acts at a time, in the block of its method `acting`. While it acts, all connections count its operations. Once it is
dead, each further operation raises ProcessDied too, so that no cleanup code of the process has an effect.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal
from weakref import WeakSet

import psycopg2
import psycopg2.extensions
from redis.connection import UnixDomainSocketConnection
from redis.exceptions import ResponseError
from sqlalchemy import Engine, event

# "stop": the process gets a stop signal before that operation. With "commit", only commits to a database count. With
# "lost", the connection to PostgreSQL is closed before or after that commit, and the process lives.
When = Literal["before", "after", "stop", "before commit", "after commit", "lost before commit", "lost after commit"]
Fault = tuple[int, When]  # number of the operation, from 1


class ProcessDied(KeyboardInterrupt):
    """The process that acts was killed. The product lets a KeyboardInterrupt pass everywhere."""


class Process:
    """One process. It dies at most once; its SQLite connections are closed then, as the kernel closes its files."""

    def __init__(self) -> None:
        self.dead = False
        self.connections: WeakSet[sqlite3.Connection] = WeakSet()
        self._operations_left, self._when = 0, ""
        self._on_stop: Callable[[], object] = lambda: None

    @contextmanager
    def acting(self, fault: Fault | None = None, on_stop: Callable[[], object] = lambda: None) -> Iterator[None]:
        """Let this process act in the block, and end the block if it dies."""
        global _acting
        self._operations_left, self._when = fault or (0, "")
        self._on_stop = on_stop
        _acting = self
        try:
            with suppress(ProcessDied):
                yield
        finally:
            _acting = None
            if self.dead:
                self.kill()

    def kill(self) -> None:
        self.dead = True
        for connection in list(self.connections):
            connection.close()

    def begin_operation(self, *, commit: bool = False) -> str:
        """Die before this operation, if that is the plan. Return what happens after it or to its connection, or ""."""
        if self.dead:
            raise ProcessDied
        if commit != self._when.endswith("commit"):
            return ""
        self._operations_left -= 1  # negative after the fault, and without a fault
        if self._operations_left:
            return ""
        when = self._when.removesuffix(" commit")
        if when == "before":
            self.die()
        if when == "stop":
            self._on_stop()
        return when

    def die(self) -> None:
        self.dead = True
        raise ProcessDied


class WriteCounts:
    """Counts of writes to each storage, by which a reader notices that nothing has changed."""

    redis = postgres = sqlite = 0


write_counts = WriteCounts()
_acting: Process | None = None


@contextmanager
def _operation() -> Iterator[bool]:
    """Run an operation in the block; yields whether the process dies after it."""
    dies_after = _acting is not None and _acting.begin_operation() == "after"
    yield dies_after
    if dies_after and _acting is not None:
        _acting.die()


@contextmanager
def _commit() -> Iterator[str]:
    """Run a commit in the block; yields what happens to its connection, or to the process after it."""
    planned = _acting.begin_operation(commit=True) if _acting is not None else ""
    yield planned
    if planned == "after" and _acting is not None:
        _acting.die()


class FaultyRedisConnection(UnixDomainSocketConnection):
    """Connection to Redis. One packet, which may be a transaction or a script, is one operation."""

    _connecting = False

    def on_connect_check_health(self, check_health: bool = True) -> None:
        self._connecting = True
        try:
            super().on_connect_check_health(check_health)
        finally:
            self._connecting = False

    def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        # redis-py sends UNWATCH for an abandoned pipeline at any time, when its memory is freed. It writes nothing.
        if self._connecting or any(b"UNWATCH" in part for part in command):
            super().send_packed_command(command, check_health)  # type: ignore[no-untyped-call]
            return
        write_counts.redis += 1
        with _operation() as dies_after:
            super().send_packed_command(command, check_health)  # type: ignore[no-untyped-call]
            if dies_after:
                self._wait_until_executed()

    def _wait_until_executed(self) -> None:
        self._connecting = True
        try:
            self.send_command("ECHO", "end of the last write")  # type: ignore[no-untyped-call]
            answer: Any = None
            while answer != b"end of the last write":
                with suppress(ResponseError):
                    answer = self.read_response()
        finally:
            self._connecting = False
            self.disconnect()  # type: ignore[no-untyped-call]


class _FaultyCursor(psycopg2.extensions.cursor):
    def execute(self, query: Any, values: Any = None) -> None:
        with _operation():
            super().execute(query, values)


class _FaultyPostgres(psycopg2.extensions.connection):
    def commit(self) -> None:
        write_counts.postgres += 1
        with _operation(), _commit() as planned:
            if planned == "lost before":
                self._lose()
            super().commit()
            if planned == "lost after":
                self._lose()

    def _lose(self) -> None:
        self.close()
        raise psycopg2.OperationalError("server closed the connection unexpectedly")


@contextmanager
def faulty_postgres(engine: Engine) -> Iterator[None]:
    """Make each connection that this engine opens in the block die with the acting process.

    Each statement and each commit is an operation. When the block ends, the engine closes its connections.
    """

    def connect(dialect: Any, record: Any, arguments: Any, options: dict[str, Any]) -> None:
        options |= {"connection_factory": _FaultyPostgres, "cursor_factory": _FaultyCursor}

    event.listen(engine, "do_connect", connect, insert=True)
    try:
        yield
    finally:
        event.remove(engine, "do_connect", connect)
        engine.dispose()


class _FaultySqlite(sqlite3.Connection):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if _acting is not None:
            _acting.connections.add(self)

    def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
        if sql == "COMMIT":
            write_counts.sqlite += 1
            with _operation(), _commit():
                return super().execute(sql, *values)
        if _acting is not None and _acting.dead:
            raise ProcessDied
        return super().execute(sql, *values)


@contextmanager
def faulty_sqlite() -> Iterator[None]:
    """Make each SQLite connection opened in the block die with the acting process. Each COMMIT is an operation."""
    connect = sqlite3.connect
    sqlite3.connect = lambda *arguments, **options: connect(*arguments, **{"factory": _FaultySqlite} | options)
    try:
        yield
    finally:
        sqlite3.connect = connect
