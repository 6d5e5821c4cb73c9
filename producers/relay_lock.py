"""Who may relay an outbox: one thread of one process at a time."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from producers.errors import OutboxError

# In a forked child SQLite forbids even to close what the parent has open: it is kept, untouched.
inherited_connections: list[object] = []


class RelayLock:
    """A lock across processes and threads that the kernel releases when its holder dies.

    It is an open exclusive transaction on a small SQLite file of its own: unlike flock it is not inherited
    by a forked child, and unlike bare POSIX locks it also excludes other threads of the same process.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._connection: sqlite3.Connection | None = None

    def acquire(self) -> bool:
        """True when held, now or already; never waits."""
        if self._connection is not None:
            return True
        with sqlite_errors(self._path):
            connection = sqlite3.connect(self._path, timeout=0, isolation_level=None, check_same_thread=False)
            try:
                connection.execute("BEGIN EXCLUSIVE")
            except sqlite3.OperationalError as error:
                connection.close()
                if error.sqlite_errorcode == sqlite3.SQLITE_BUSY:
                    return False
                raise
        self._connection = connection
        return True

    def release(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def abandon_after_fork(self) -> None:
        inherited_connections.append(self._connection)
        self._connection = None


@contextmanager
def sqlite_errors(path: Path) -> Iterator[None]:
    """SQLite's errors as OutboxError, which names the file."""
    try:
        yield
    except sqlite3.Error as error:
        raise OutboxError(f"outbox {path}: {error}") from error
