"""Keeps SQLite out of forks: no connection may cross one, not even unused, or locks and files go wrong.

Before a fork every connection of this process is closed, while its owner's lock is held; afterwards parent and
child each open their own when they need one.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from producers.errors import OutboxError


class HasConnections(Protocol):
    """Uses its connections only while it holds `lock`."""

    lock: Any  # a threading.RLock, which has no public type

    def close_connections(self) -> None: ...


_owners: weakref.WeakSet[HasConnections] = weakref.WeakSet()
_stopped: list[HasConnections] = []
_one_fork_at_a_time = threading.Lock()


def close_before_fork(owner: HasConnections) -> None:
    """From now on, for as long as `owner` lives."""
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
        # Threads that waited for the old one do not exist here.
        owner.lock = threading.RLock()
    _stopped.clear()
    _one_fork_at_a_time.release()


os.register_at_fork(before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child)


@contextmanager
def sqlite_errors(path: Path) -> Iterator[None]:
    """SQLite's errors as OutboxError, which names the file."""
    try:
        yield
    except sqlite3.Error as error:
        raise OutboxError(f"outbox {path}: {error}") from error
