"""One SQLite file for any number of threads and processes, limited in size, with two degrees of durability.

The file may be removed, replaced or damaged while it is open. If a transaction ends in a file that is no longer at the
path, its entries are carried over into the file at the path. A damaged file is quarantined: it is renamed.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from producers.errors import OutboxDamaged, OutboxError
from producers.file_operations import FileId, file_id, folder_lock, free_name, os_errors
from producers.outbox_carry_over import CarryOver
from producers.outbox_place import DAMAGED, OutboxPlace
from producers.sqlite_connections import close_before_fork, is_damage, sqlite_errors, use_wal

logger = logging.getLogger(__name__)

_BUSY_TIMEOUT_SECONDS = 5.0
_OPEN_TRIES = 5

Prepare = Callable[[sqlite3.Connection], None]


class OutboxFile:
    """File at `path`, created with its folders when it is first used. Durable commits fail beyond `max_bytes`.

    `prepare` creates the tables in a file that was just opened. With `repair`, a file that has a second name (a hard
    link) is replaced by a copy before it is opened.

    Raises:
        OutboxDamaged: from every method, when the content of the file cannot be read.
        OutboxError: from every method, when the file cannot be read or written.
    """

    def __init__(self, path: Path, max_bytes: int, *, prepare: Prepare, repair: bool = False) -> None:
        self.place = OutboxPlace(path)
        self.path = self.place.path
        self.lock = threading.RLock()  # `_alone` takes it
        self._in_use = False
        self.generation = 0  # number of times that another file was found at the path
        self._max_bytes = max_bytes
        self._prepare = prepare
        self._repair = repair
        self._connections: dict[str, sqlite3.Connection] = {}  # by synchronous mode
        self._open_file: FileId | None = None  # the file that the connections have open
        self._open_sqlite_files: list[FileId | None] = []  # SQLite's own files of that file
        self._carry_over = CarryOver(self.place)
        close_before_fork(self)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Let one thread at a time into the block.

        Raises:
            OutboxError: a signal handler of the thread that is in the block enters it. Waiting would never end.
        """
        with self.lock:
            if self._in_use:
                raise OutboxError(
                    f"outbox {self.path}: record was called by a signal handler while its thread was recording. Record"
                    " outside the handler, for example set a flag in it"
                )
            self._in_use = True
            try:
                yield
            finally:
                self._in_use = False

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Give the block a connection for reading, which no other thread uses meanwhile."""
        with self._alone(), self._translated():
            yield self._connection(durable=False)

    @contextmanager
    def snapshot(self) -> Iterator[sqlite3.Connection]:
        """Give the block a connection for reading whose statements see the same state of the file."""
        with self.reading() as db:
            db.execute("BEGIN")
            try:
                yield db
            finally:
                if db.in_transaction:
                    db.execute("COMMIT")

    @contextmanager
    def transaction(self, *, durable: bool = True) -> Iterator[sqlite3.Connection]:
        """Run the block in a transaction that can write; if `durable`, wait for the disk after the commit.

        Raises:
            OutboxDamaged: also after a durable commit into a file that was replaced meanwhile, if the entries cannot be
                carried over into the file at the path.
        """
        with self._alone(), self._translated():
            db = self._connection(durable=durable)
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise
            if not self._is_at_path() and not self._continue_at_path() and durable:
                # Another process has quarantined the file meanwhile, and may have salvaged it without this commit.
                self._close_all()  # the file at the path is a different file, which was not found damaged
                raise OutboxDamaged(
                    f"outbox {self.path}: was moved away as damaged before a commit. The commit is unreadable there and"
                    " must be repeated"
                )

    def used_bytes(self, db: sqlite3.Connection) -> int:
        """Return the bytes in use, without free pages that deleted entries left; the file itself never shrinks."""
        pages, free, page_bytes = (
            db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
        )
        return int((pages - free) * page_bytes)

    def is_half_full(self, db: sqlite3.Connection) -> bool:
        return 2 * self.used_bytes(db) > self._max_bytes

    def quarantine(self) -> Path | None:
        """Rename the damaged file to `<name>.damaged-<number>`, so that the next use creates a new file.

        Returns:
            The new path, or None if another process has already moved the file.
        """
        with self._alone(), self._translated():
            damaged = self._damaged_at_path()
            real = self.place.real
            with os_errors(self.path), folder_lock(real.parent):
                if damaged is None or file_id(self.path) != damaged:
                    return None
                moved_to = free_name(real.with_name(f"{real.name}{DAMAGED}{damaged[1]}"))
                # First move the log, which has the changes that are not yet in the file. If this process dies after
                # that and the file at the path is found damaged without its log, the next quarantine moves it to the
                # same name; if the file is found intact, a relay salvages the log alone.
                for end in ("-wal", ""):
                    if self.place.sibling(end).exists():
                        self.place.sibling(end).rename(moved_to.with_name(moved_to.name + end))
                self.place.sibling("-shm").unlink(missing_ok=True)
                self.generation += 1
                if os.geteuid() == 0:  # now, while the owner of the damaged file is known
                    self.place.make_new(moved_to)
                return moved_to

    def _damaged_at_path(self) -> FileId | None:
        """Return the damaged file at the path, or None if another process replaced it after the damage was found."""
        found = file_id(self.path)
        if self._connections and found == self._open_file:
            self.close_connections()
            return found
        # The damaged file is the one that was just being opened, or the open one, which is no longer at the path.
        try:
            self._opened("FULL")[0].close()
        except OutboxDamaged:
            return found
        except sqlite3.Error as error:
            if not is_damage(error):
                raise
            return found  # the open file's entries are carried over as soon as there is a new file
        self.close_connections()
        self.generation += 1
        return None

    def close(self) -> None:
        """Close the file. It is opened again when it is used again."""
        with self._alone():
            self.close_connections()

    def close_connections(self) -> None:
        """Carry over the entries of a removed file and close it; the caller must hold `lock`."""
        if self._connections:
            try:
                if not self._is_at_path():
                    self._continue_at_path()
            except (OutboxError, sqlite3.Error, OSError) as error:
                logger.error("outbox %s was removed, and its entries could not be carried over: %s", self.path, error)
        self._close_all()

    def __del__(self) -> None:
        self._close_all()  # without the lock: no other thread has a reference to this object

    def _close_all(self) -> None:
        while self._connections:
            self._connections.popitem()[1].close()
        self._open_file = None

    def _is_at_path(self) -> bool:
        """Return whether the open file is still at the path and its log is still beside it."""
        if file_id(self.path) != self._open_file:
            return False
        log = self._open_sqlite_files[0] if self._open_sqlite_files else None
        return log is None or log == file_id(self._log)

    def _connection(self, *, durable: bool) -> sqlite3.Connection:
        """Return a connection that waits for the disk at each commit (FULL) if `durable`, else one that does not."""
        if self._carry_over.is_pending or (self._connections and not self._is_at_path()):
            self._continue_at_path()
        mode = "FULL" if durable else "NORMAL"
        if mode not in self._connections:
            connection, opened = self._opened(mode)
            if self._open_file not in (None, opened):  # the file was replaced just now
                connection.close()
                return self._connection(durable=durable)
            self._connections[mode], self._open_file = connection, opened
            self._note_open_files()
        return self._connections[mode]

    def _continue_at_path(self) -> bool:
        """Open the file at the path instead of the open one, and carry the unsettled entries over into it.

        Return False if damage makes them unreadable; the file at the path is open in that case too.
        """
        is_whole = True
        # Copy out of the old file before the new one is opened: SQLite's own files have the same names for both, and
        # would be mixed up. If the new file cannot be opened, the next use tries again.
        if self._connections and not self._is_at_path():
            is_whole = self._carry_over.take_out(next(iter(self._connections.values())))
            self._remove_own_sqlite_files()  # while they are open, no other file can have their inodes
            self._close_all()
        if "FULL" not in self._connections:
            self._connections["FULL"], self._open_file = self._opened("FULL")
            self._note_open_files()
            self.generation += 1
        carried = self._carry_over.put_in(self._connections["FULL"])
        logger.warning(
            "outbox %s was removed or replaced while it was in use. Continuing with the file that is there now,"
            " with %d entries carried over",
            self.path,
            carried,
        )
        return is_whole

    def _opened(self, mode: str) -> tuple[sqlite3.Connection, FileId]:
        """Return a new connection, with the tables created, and the id of the file that it has open."""
        for _ in range(_OPEN_TRIES):
            before = file_id(self.path)
            connection = self._connected(mode)
            after = file_id(self.path)
            if after is not None and before in (None, after):
                return connection, after
            connection.close()
        raise OutboxError(f"outbox {self.path}: was replaced {_OPEN_TRIES} times while it was being opened")

    def _note_open_files(self) -> None:
        self._log = self.place.sibling("-wal")
        self._open_sqlite_files = [file_id(file) for file in self.place.sqlite_files()]
        self.place.note_pair(self._open_file)

    def _remove_own_sqlite_files(self) -> None:
        """Remove SQLite's files of a file that was removed without them: they must not be used for the file there now.

        Connections that have them open, here and in other processes, can continue to use them.
        """
        for file, own in zip(self.place.sqlite_files(), self._open_sqlite_files, strict=True):
            if own is not None and file_id(file) == own:
                file.unlink(missing_ok=True)

    def _connected(self, mode: str) -> sqlite3.Connection:
        self.place.look_up()
        self.place.make_file()
        self.place.refuse_emptied()
        if self._repair:
            self.place.break_hard_links()
        self.place.quarantine_foreign_log()
        connection = sqlite3.connect(
            self.path, timeout=_BUSY_TIMEOUT_SECONDS, isolation_level=None, check_same_thread=False
        )
        try:
            use_wal(connection, _BUSY_TIMEOUT_SECONDS)
            connection.execute(f"PRAGMA synchronous = {mode}")
            connection.execute("PRAGMA secure_delete = ON")  # a salvage would read rows that were only freed
            (page_bytes,) = connection.execute("PRAGMA page_size").fetchone()
            # Appends get less room than changes of state: a full outbox must still be able to settle its entries.
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
                if is_damage(error):
                    raise OutboxDamaged(f"outbox {self.path}: {error}") from error
                if getattr(error, "sqlite_errorcode", None) != sqlite3.SQLITE_FULL:
                    raise
                raise OutboxError(
                    f"outbox {self.path} is full: its disk, or its limit of {self._max_bytes // 2**20} MiB. Entries"
                    " leave it when Redis and a worker run"
                ) from error
