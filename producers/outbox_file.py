"""One SQLite file for any number of threads and processes, bounded in size, with two degrees of durability."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from producers.errors import OutboxError
from producers.sqlite_forks import close_before_fork, sqlite_errors

_BUSY_TIMEOUT_SECONDS = 5.0
_BUSY_PAUSE_SECONDS = 0.005


class OutboxFile:
    """Makes the folders of `path`; the file itself comes with the first transaction. It holds at most `max_bytes`.

    Raises:
        OutboxError: here and from every method, when the file cannot be read or written.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self.lock = threading.Lock()
        self._connections: dict[str, sqlite3.Connection] = {}  # by synchronous mode
        close_before_fork(self)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutboxError(f"outbox {path}: {error.strerror or error}") from error

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A connection for reading, which no other thread uses in the block."""
        with self.lock, self._translated():
            yield self._connection(durable=False)

    @contextmanager
    def transaction(self, *, durable: bool = True) -> Iterator[sqlite3.Connection]:
        """A transaction that can write; `durable` waits for the disk at its end."""
        with self.lock, self._translated():
            db = self._connection(durable=durable)
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise

    def used_bytes(self, db: sqlite3.Connection) -> int:
        """Without what deleted entries have left free; the file itself never shrinks."""
        pages, free, page_bytes = (
            db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
        )
        return int((pages - free) * page_bytes)

    def is_half_full(self, db: sqlite3.Connection) -> bool:
        return 2 * self.used_bytes(db) > self._max_bytes

    def close(self) -> None:
        """A closed file is opened again when it is used again."""
        with self.lock:
            self.close_connections()

    def close_connections(self) -> None:
        """For who holds `lock`."""
        while self._connections:
            self._connections.popitem()[1].close()

    def __del__(self) -> None:
        # Nobody has it any more, so nobody holds the lock either.
        self.close_connections()

    def _connection(self, *, durable: bool) -> sqlite3.Connection:
        """FULL waits for the disk at each commit, NORMAL leaves that to the next one that does."""
        mode = "FULL" if durable else "NORMAL"
        if mode not in self._connections:
            connection = sqlite3.connect(
                self._path, timeout=_BUSY_TIMEOUT_SECONDS, isolation_level=None, check_same_thread=False
            )
            self._connections[mode] = connection
            # Marks get some room beyond what appends may fill: a full outbox must still be able to empty.
            room = self._max_bytes if durable else self._max_bytes + self._max_bytes // 16
            try:
                _use_wal(connection)
                connection.execute(f"PRAGMA synchronous = {mode}")
                (page_bytes,) = connection.execute("PRAGMA page_size").fetchone()
                connection.execute(f"PRAGMA max_page_count = {room // page_bytes}")
            except sqlite3.Error:
                self._connections.pop(mode).close()
                raise
        return self._connections[mode]

    @contextmanager
    def _translated(self) -> Iterator[None]:
        with sqlite_errors(self._path):
            try:
                yield
            except sqlite3.OperationalError as error:
                # What this module itself raises, such as for text that is no UTF-8, has no code.
                if getattr(error, "sqlite_errorcode", None) != sqlite3.SQLITE_FULL:
                    raise
                raise OutboxError(
                    f"outbox {self._path} is full: its disk, or its limit of {self._max_bytes // 2**20} MiB;"
                    " events leave it when Redis and a worker run"
                ) from error


def _use_wal(connection: sqlite3.Connection) -> None:
    """Of several that open a new file at once one changes its mode; SQLite lets the others fail, not wait."""
    give_up_at = time.monotonic() + _BUSY_TIMEOUT_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > give_up_at:
                raise
            time.sleep(_BUSY_PAUSE_SECONDS)
