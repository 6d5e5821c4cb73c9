"""The lock of an outbox's relay, which one thread of one process holds at a time."""

from __future__ import annotations

import logging
import sqlite3
import threading
from pathlib import Path

from producers.file_operations import FileId, file_id, folder_lock, make_as_root, os_errors
from producers.sqlite_connections import close_before_fork, is_damage, sqlite_errors

logger = logging.getLogger(__name__)


class RelayLock:
    """Lock across processes and threads. The kernel releases it when the process that has it dies.

    It is an open exclusive transaction on a small, separate SQLite file: unlike a POSIX lock, it also excludes other
    threads of the same process. A fork releases it, and the first relay that asks gets it.
    """

    def __init__(self, path: Path, outbox: Path) -> None:
        self._path = path
        self._outbox = outbox  # if root creates the lock file, it gets the owner of the outbox
        self.lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._file_id: FileId | None = None
        close_before_fork(self)

    @property
    def held(self) -> bool:
        """Whether this object has the lock. It is lost if the lock file was removed: others may lock a new one."""
        with self.lock:
            if self._connection is not None and file_id(self._path) != self._file_id:
                self.close_connections()
            return self._connection is not None

    def acquire(self) -> bool:
        """Take the lock without waiting, and return whether this object has it now."""
        with self.lock, sqlite_errors(self._path):
            if self._connection is not None:
                return True
            found = file_id(self._path)
            try:
                connection = self._locked()
            except sqlite3.DatabaseError as error:
                if not is_damage(error):
                    raise
                self._replace(found, error)
                connection = self._locked()
            if connection is None:
                return False
            self._connection, self._file_id = connection, file_id(self._path)
            return True

    def _locked(self) -> sqlite3.Connection | None:
        """Return a connection that has the lock, or None if another relay has it."""
        with os_errors(self._path):
            make_as_root(self._path, self._outbox)
        connection = sqlite3.connect(self._path, timeout=0, isolation_level=None, check_same_thread=False)
        try:
            connection.execute("BEGIN EXCLUSIVE")
        except sqlite3.Error as error:
            connection.close()
            if error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY:
                return None
            raise
        return connection

    def _replace(self, damaged: FileId | None, error: sqlite3.Error) -> None:
        """Remove the lock file if it is still the damaged one. It has no content of value; SQLite creates a new one."""
        with os_errors(self._path), folder_lock(self._path.parent):
            if file_id(self._path) == damaged:  # pragma: no branch - another relay may have replaced it meanwhile
                self._path.unlink(missing_ok=True)
                logger.error("the relay's lock file %s was damaged and was replaced: %s", self._path, error)

    def release(self) -> None:
        with self.lock:
            self.close_connections()

    def __del__(self) -> None:
        self.close_connections()

    def close_connections(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
