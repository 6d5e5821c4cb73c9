"""One SQLite file for any number of threads and processes, bounded in size, with two degrees of durability.

The file may be removed, replaced or damaged while it is open. A transaction never ends in a file that no path leads to:
what such a file still holds is carried into the file at the path. A damaged file is given another name.
"""

from __future__ import annotations

import fcntl
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from producers.errors import OutboxDamaged, OutboxError
from producers.sqlite_forks import close_before_fork, sqlite_errors

logger = logging.getLogger(__name__)

_BUSY_TIMEOUT_SECONDS = 5.0
_BUSY_PAUSE_SECONDS = 0.005
_OPEN_TRIES = 5
DAMAGED = ".damaged-"
_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_CHECK_STEPS = 10_000  # of SQLite's virtual machine, between two looks at the clock

Prepare = Callable[[sqlite3.Connection], None]
CarryOver = Callable[[sqlite3.Connection, sqlite3.Connection], int]


class OutboxFile:
    """The file at `path`, made with its folders when it is first used. It holds at most `max_bytes`.

    `prepare` makes the tables in a file that was just opened. `carry_over` copies, from a file that no path leads to
    any more into the one at the path, in a transaction of the latter, and returns how many entries.

    Raises:
        OutboxDamaged: from every method, when the content of the file cannot be read.
        OutboxError: from every method, when the file cannot be read or written.
    """

    def __init__(self, path: Path, max_bytes: int, *, prepare: Prepare, carry_over: CarryOver) -> None:
        # A program may change its working folder, and the outbox must not change with it.
        self.path = path.absolute()
        self.lock = threading.Lock()
        self.generation = 0  # how often another file was found at the path
        self._max_bytes = max_bytes
        self._prepare = prepare
        self._carry_over = carry_over
        self._connections: dict[str, sqlite3.Connection] = {}  # by synchronous mode
        self._identity: tuple[int, int] | None = None  # of the file that they have open
        close_before_fork(self)

    @property
    def real_path(self) -> Path:
        """Where SQLite has the file, and its own files beside it, when the path is a symbolic link."""
        return Path(os.path.realpath(self.path))

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
            if not self._is_at_path():
                self._go_on_at_path()

    def used_bytes(self, db: sqlite3.Connection) -> int:
        """Without what deleted entries have left free; the file itself never shrinks."""
        pages, free, page_bytes = (
            db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
        )
        return int((pages - free) * page_bytes)

    def is_half_full(self, db: sqlite3.Connection) -> bool:
        return 2 * self.used_bytes(db) > self._max_bytes

    def quick_check(self, seconds: float) -> str | None:
        """The first fault that SQLite finds, None when it finds none, or `unfinished` after so many seconds."""
        deadline = time.monotonic() + seconds
        with self.lock, self._translated():
            db = self._connection(durable=False)
            db.set_progress_handler(lambda: time.monotonic() > deadline, _CHECK_STEPS)
            try:
                (found,) = db.execute("PRAGMA quick_check(1)").fetchone()
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode != sqlite3.SQLITE_INTERRUPT:
                    raise
                return "unfinished"
            finally:
                db.set_progress_handler(None, 0)
        return None if found == "ok" else str(found)

    def set_aside(self) -> Path | None:
        """Give the damaged file another name, `<name>.damaged-<number>`, so that the next use makes a new one.

        Returns its new path, or None when another process has done so already.
        """
        with self.lock:
            identity = self._identity or _identity_of(self.path)
            self.close_connections()
            real = self.real_path
            with alone_in(real.parent):
                if identity is None or _identity_of(self.path) != identity:
                    return None
                aside = _free_name(real.with_name(f"{real.name}{DAMAGED}{identity[1]}"))
                # The log of what was not yet written into the file goes first. If this process dies in between, the
                # file at the path is still found damaged, and the next one to set it aside brings both together; or it
                # is sound without its log, and a relay salvages the log alone.
                for end in ("-wal", ""):
                    if real.with_name(real.name + end).exists():
                        real.with_name(real.name + end).rename(aside.with_name(aside.name + end))
                real.with_name(real.name + "-shm").unlink(missing_ok=True)
                self.generation += 1
                return aside

    def close(self) -> None:
        """A closed file is opened again when it is used again."""
        with self.lock:
            self.close_connections()

    def close_connections(self) -> None:
        """For who holds `lock`."""
        if self._connections and not self._is_at_path():
            try:
                self._go_on_at_path()
            except (OutboxError, sqlite3.Error, OSError) as error:
                logger.error("outbox %s was removed, and its entries could not be carried over: %s", self.path, error)
        while self._connections:
            self._connections.popitem()[1].close()
        self._identity = None

    def __del__(self) -> None:
        # Nobody has it any more, so nobody holds the lock either.
        while self._connections:
            self._connections.popitem()[1].close()

    def _is_at_path(self) -> bool:
        """Whether the path leads to the file that is open."""
        return _identity_of(self.path) == self._identity

    def _connection(self, *, durable: bool) -> sqlite3.Connection:
        """FULL waits for the disk at each commit, NORMAL leaves that to the next one that does."""
        if self._connections and not self._is_at_path():
            self._go_on_at_path()
        mode = "FULL" if durable else "NORMAL"
        if mode not in self._connections:
            connection, identity = self._opened(mode)
            if self._identity not in (None, identity):  # replaced in this moment
                connection.close()
                self._go_on_at_path()
                return self._connection(durable=durable)
            self._connections[mode], self._identity = connection, identity
        return self._connections[mode]

    def _go_on_at_path(self) -> None:
        """Carry what the open file still holds into the file at the path, and have that one open instead."""
        new, identity = self._opened("FULL")
        try:
            source = next(iter(self._connections.values()))
            new.execute("BEGIN IMMEDIATE")
            carried = self._carry_over(source, new)
            new.execute("COMMIT")
        except BaseException:
            new.close()
            raise
        before, self._connections = self._connections, {"FULL": new}
        self._identity = identity
        self.generation += 1
        for connection in before.values():
            connection.close()
        logger.warning(
            "outbox %s was removed or replaced while it was in use: going on in the file that is there now,"
            " with %d entries carried over",
            self.path,
            carried,
        )

    def _opened(self, mode: str) -> tuple[sqlite3.Connection, tuple[int, int]]:
        """A new connection with its tables made, and which file it has open."""
        for _ in range(_OPEN_TRIES):
            before = _identity_of(self.path)
            connection = self._connected(mode)
            identity = _identity_of(self.path)
            if identity is not None and before in (None, identity):
                return connection, identity
            connection.close()
        raise OutboxError(f"outbox {self.path}: is replaced again and again while it is opened")

    def _connected(self, mode: str) -> sqlite3.Connection:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutboxError(f"outbox {self.path}: {error.strerror or error}") from error
        connection = sqlite3.connect(
            self.path, timeout=_BUSY_TIMEOUT_SECONDS, isolation_level=None, check_same_thread=False
        )
        try:
            _use_wal(connection)
            connection.execute(f"PRAGMA synchronous = {mode}")
            (page_bytes,) = connection.execute("PRAGMA page_size").fetchone()
            # Marks get some room beyond what appends may fill: a full outbox must still be able to empty.
            room = self._max_bytes if mode == "FULL" else self._max_bytes + self._max_bytes // 16
            connection.execute(f"PRAGMA max_page_count = {room // page_bytes}")
            self._prepare(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    @contextmanager
    def _translated(self) -> Iterator[None]:
        with sqlite_errors(self.path):
            try:
                yield
            except sqlite3.Error as error:
                # What Python's module itself raises has no code, such as for text that is no UTF-8.
                code = getattr(error, "sqlite_errorcode", None)
                if code is None and "UTF-8" not in str(error):
                    raise
                if code is None or code & 0xFF in _DAMAGE:
                    raise OutboxDamaged(f"outbox {self.path}: {error}") from error
                if code != sqlite3.SQLITE_FULL:
                    raise
                raise OutboxError(
                    f"outbox {self.path} is full: its disk, or its limit of {self._max_bytes // 2**20} MiB;"
                    " events leave it when Redis and a worker run"
                ) from error


def _identity_of(path: Path) -> tuple[int, int] | None:
    """Device and number of the file that the path leads to; None when there is none."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise OutboxError(f"outbox {path}: {error.strerror or error}") from error
    return found.st_dev, found.st_ino


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """One process at a time; the kernel ends it with the process."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _free_name(wanted: Path) -> Path:
    name, number = wanted, 1
    while name.exists():
        number += 1
        name = wanted.with_name(f"{wanted.name}-{number}")
    return name


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
