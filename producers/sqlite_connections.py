"""SQLite connections: closing them before a fork, switching to a write-ahead log, and telling damage from other errors.

No connection may survive a fork, not even an unused one: locks would be lost and files damaged. Before a fork, every
connection of this process is closed while its owner's lock is held. Parent and child then open new ones when they need
them.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from producers.errors import OutboxError

_BUSY_PAUSE_SECONDS = 0.005
_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_SHORT_LOG = sqlite3.SQLITE_IOERR_SHORT_READ  # the log ends before a page that is in it


class HasConnections(Protocol):
    """Object that uses its SQLite connections only while it has `lock`."""

    lock: Any  # a threading.RLock, which has no public type

    def close_connections(self) -> None: ...


_owners: weakref.WeakSet[HasConnections] = weakref.WeakSet()
_stopped: list[HasConnections] = []
_one_fork_at_a_time = threading.Lock()


def close_before_fork(owner: HasConnections) -> None:
    """Close the connections of `owner` before each fork, as long as `owner` exists."""
    _owners.add(owner)


def _before() -> None:
    _one_fork_at_a_time.acquire()
    _stopped.extend(_owners)
    for owner in _stopped:
        owner.lock.acquire()
        owner.close_connections()


def _after_in_parent() -> None:
    for owner in _stopped:
        owner.lock.release()
    _stopped.clear()
    _one_fork_at_a_time.release()


def _after_in_child() -> None:
    for owner in _stopped:
        # The old lock may have waiting threads, which do not exist in the child.
        owner.lock = threading.RLock()
    _stopped.clear()
    _one_fork_at_a_time.release()


os.register_at_fork(before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child)


@contextmanager
def sqlite_errors(path: Path) -> Iterator[None]:
    """Translate SQLite's errors into OutboxError, which names the file."""
    try:
        yield
    except sqlite3.Error as error:
        raise OutboxError(f"outbox {path}: {error}") from error


def is_damage(error: sqlite3.Error) -> bool:
    """Return whether the error means that the content of the file is damaged."""
    # Errors of Python's own module have no code; one of them is text that is not UTF-8.
    code = getattr(error, "sqlite_errorcode", None)
    return "UTF-8" in str(error) if code is None else code & 0xFF in _DAMAGE or code == _SHORT_LOG


def use_wal(connection: sqlite3.Connection, timeout: float) -> None:
    """Switch to a write-ahead log. Retry for `timeout` seconds: SQLite lets only one connection switch at a time."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(_BUSY_PAUSE_SECONDS)
