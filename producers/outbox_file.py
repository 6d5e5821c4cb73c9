"""One SQLite file for any number of threads and processes, bounded in size, with two degrees of durability.

The file may be removed, replaced or damaged while it is open. A transaction never ends in a file that no path leads to:
what such a file still holds is carried into the file at the path. A damaged file is given another name.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from producers.errors import OutboxDamaged, OutboxError
from producers.outbox_place import DAMAGED, TAKEN_OUT, OutboxPlace, alone_in, free_name, identity_of, os_errors
from producers.sqlite_forks import close_before_fork, sqlite_errors

logger = logging.getLogger(__name__)

_BUSY_TIMEOUT_SECONDS = 5.0
_BUSY_PAUSE_SECONDS = 0.005
_OPEN_TRIES = 5
_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_CUT_OFF = sqlite3.SQLITE_IOERR_SHORT_READ  # the log ends before a page that is in it
_CHECK_STEPS = 10_000  # of SQLite's virtual machine, between two looks at the clock

Prepare = Callable[[sqlite3.Connection], None]
CarryOver = Callable[[sqlite3.Connection], int]


class OutboxFile:
    """The file at `path`, made with its folders when it is first used. It holds at most `max_bytes`.

    `prepare` makes the tables in a file that was just opened. When no path leads to the open file any more, `copy_out`
    copies what is of use in it into the attached database `taken_out`, and `carry_over` from there into the file at the
    path, in its transaction; it returns how many entries it has carried. With `repair`, a file that has a second name
    (a hard link) is replaced by a copy before it is opened.

    Raises:
        OutboxDamaged: from every method, when the content of the file cannot be read.
        OutboxError: from every method, when the file cannot be read or written.
    """

    def __init__(
        self,
        path: Path,
        max_bytes: int,
        *,
        prepare: Prepare,
        copy_out: Prepare,
        carry_over: CarryOver,
        repair: bool = False,
    ) -> None:
        self.place = OutboxPlace(path)
        self.path = self.place.path
        self.lock = threading.RLock()  # `_alone` takes it
        self._in_use = False
        self.generation = 0  # how often another file was found at the path
        self._max_bytes = max_bytes
        self._prepare = prepare
        self._copy_out = copy_out
        self._carry_over = carry_over
        self._repair = repair
        self._connections: dict[str, sqlite3.Connection] = {}  # by synchronous mode
        self._identity: tuple[int, int] | None = None  # of the file that they have open
        self._beside: list[tuple[int, int] | None] = []  # of SQLite's files that belong to it
        # What files that are gone still held and is not in the next one yet, each locked while this process lives.
        self._taken_out: dict[Path, int] = {}
        close_before_fork(self)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One thread at a time. A signal handler, which runs in the midst of its thread's work, cannot wait for it."""
        with self.lock:
            if self._in_use:
                raise OutboxError(
                    f"outbox {self.path}: record was called by a signal handler while this thread was recording;"
                    " record outside the handler, e.g. set a flag"
                )
            self._in_use = True
            try:
                yield
            finally:
                self._in_use = False

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A connection for reading, which no other thread uses in the block."""
        with self._alone(), self._translated():
            yield self._connection(durable=False)

    @contextmanager
    def transaction(self, *, durable: bool = True) -> Iterator[sqlite3.Connection]:
        """A transaction that can write; `durable` waits for the disk at its end.

        Raises:
            OutboxDamaged: also after a durable commit into a file that was replaced meanwhile, if it cannot be carried
                into the file at the path.
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
            if not self._is_at_path() and not self._go_on_at_path() and durable:
                # Another process has set the damaged file aside meanwhile, and may have salvaged it without this.
                self._close_all()  # the file at the path is another one: it was not found damaged
                raise OutboxDamaged(
                    f"outbox {self.path}: was set aside before a commit, which cannot be read there and has to be"
                    " repeated"
                )

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
        with self._alone(), self._translated():
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
        with self._alone(), self._translated():
            identity = self._damaged_at_path()
            real = self.place.real
            with os_errors(self.path), alone_in(real.parent):
                if identity is None or identity_of(self.path) != identity:
                    return None
                aside = free_name(real.with_name(f"{real.name}{DAMAGED}{identity[1]}"))
                # The log of what was not yet written into the file goes first. If this process dies in between, the
                # file at the path is still found damaged, and the next one to set it aside brings both together; or it
                # is sound without its log, and a relay salvages the log alone.
                for end in ("-wal", ""):
                    if self.place.beside(end).exists():
                        self.place.beside(end).rename(aside.with_name(aside.name + end))
                self.place.beside("-shm").unlink(missing_ok=True)
                self.generation += 1
                if os.geteuid() == 0:  # at once: the next one to use it might not know whose it was
                    self.place.make_new(aside)
                return aside

    def _damaged_at_path(self) -> tuple[int, int] | None:
        """Which file at the path is damaged, after this one has met damage; None when another process was first."""
        found = identity_of(self.path)
        if self._connections and found == self._identity:
            self.close_connections()
            return found
        # Either the file that was opened just now, or the open one, which is not at the path any more.
        try:
            self._opened("FULL")[0].close()
        except OutboxDamaged:
            return found
        except sqlite3.Error as error:
            if not is_damage(error):
                raise
            return found  # what the open one holds is carried over as soon as there is a new file
        self.close_connections()
        self.generation += 1
        return None

    def close(self) -> None:
        """A closed file is opened again when it is used again."""
        with self._alone():
            self.close_connections()

    def close_connections(self) -> None:
        """For who holds `lock`."""
        if self._connections:
            try:
                if not self._is_at_path():
                    self._go_on_at_path()
            except (OutboxError, sqlite3.Error, OSError) as error:
                logger.error("outbox %s was removed, and its entries could not be carried over: %s", self.path, error)
        self._close_all()

    def __del__(self) -> None:
        self._close_all()  # nobody has it any more, so nobody holds the lock either

    def _close_all(self) -> None:
        while self._connections:
            self._connections.popitem()[1].close()
        self._identity = None

    def _is_at_path(self) -> bool:
        """Whether the path leads to the file that is open, and its log is still beside it."""
        if identity_of(self.path) != self._identity:
            return False
        log = self._beside[0] if self._beside else None
        return log is None or log == identity_of(self._log)

    def _connection(self, *, durable: bool) -> sqlite3.Connection:
        """FULL waits for the disk at each commit, NORMAL leaves that to the next one that does."""
        if self._taken_out or (self._connections and not self._is_at_path()):
            self._go_on_at_path()
        mode = "FULL" if durable else "NORMAL"
        if mode not in self._connections:
            connection, identity = self._opened(mode)
            if self._identity not in (None, identity):  # replaced in this moment
                connection.close()
                self._go_on_at_path()
                return self._connection(durable=durable)
            self._connections[mode], self._identity = connection, identity
            self._note_beside()
        return self._connections[mode]

    def _go_on_at_path(self) -> bool:
        """Carry what the open file still holds into the file at the path, and have that one open instead.

        False when damage made that impossible: the file at the path is open, without it.
        """
        is_whole = True
        # First out of the old file, then into the new one: SQLite's own files beside them have the same names, and what
        # is read of one while the other is open may be mixed up. If the new one cannot be used, the next use tries.
        if self._connections and not self._is_at_path():
            is_whole = self._take_out()
            self._remove_own_files_beside()  # while they are open: nothing else can have their numbers
            self._close_all()
        if "FULL" not in self._connections:
            self._connections["FULL"], self._identity = self._opened("FULL")
            self._note_beside()
            self.generation += 1
        carried = 0
        for file in list(self._taken_out):
            if file.exists():  # else a child of this process was first
                carried += self._put_in(self._connections["FULL"], file)
                file.unlink(missing_ok=True)
            os.close(self._taken_out.pop(file))
        logger.warning(
            "outbox %s was removed or replaced while it was in use: going on in the file that is there now,"
            " with %d entries carried over",
            self.path,
            carried,
        )
        return is_whole

    def _take_out(self) -> bool:
        """Copy what the open file still holds into a file of its own; False when damage keeps it from being read.

        Should this process die before the content is in an outbox again, the next relay finds the file.
        """
        self.place.make_folder()
        file = self.place.beside(f"{TAKEN_OUT}{secrets.token_hex(8)}")
        lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.flock(lock, fcntl.LOCK_EX)
        connection = next(iter(self._connections.values()))
        connection.execute("ATTACH ? AS taken_out", (str(file),))
        try:
            self._copy_out(connection)
        except sqlite3.Error as error:
            file.unlink(missing_ok=True)
            os.close(lock)
            if not is_damage(error):
                raise
            logger.error("outbox %s was removed, and what it still held cannot be read: %s", self.path, error)
            return False
        finally:
            connection.execute("DETACH taken_out")
        self._taken_out[file] = lock
        return True

    def _put_in(self, connection: sqlite3.Connection, taken_out: Path) -> int:
        connection.execute("ATTACH ? AS taken_out", (str(taken_out),))
        try:
            connection.execute("BEGIN IMMEDIATE")
            carried = self._carry_over(connection)
            connection.execute("COMMIT")
            return carried
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            connection.execute("DETACH taken_out")

    def _opened(self, mode: str) -> tuple[sqlite3.Connection, tuple[int, int]]:
        """A new connection with its tables made, and which file it has open."""
        for _ in range(_OPEN_TRIES):
            before = identity_of(self.path)
            connection = self._connected(mode)
            identity = identity_of(self.path)
            if identity is not None and before in (None, identity):
                return connection, identity
            connection.close()
        raise OutboxError(f"outbox {self.path}: is replaced again and again while it is opened")

    def _note_beside(self) -> None:
        self._log = self.place.beside("-wal")
        self._beside = [identity_of(file) for file in self.place.sqlite_files()]
        self.place.note_pair(self._identity)

    def _remove_own_files_beside(self) -> None:
        """If the open file alone was removed: SQLite would take its log for one of the file that is at the path now.

        The connections that have these files open, here and in other processes, keep them.
        """
        for file, own in zip(self.place.sqlite_files(), self._beside, strict=True):
            if own is not None and identity_of(file) == own:
                file.unlink(missing_ok=True)

    def _connected(self, mode: str) -> sqlite3.Connection:
        self.place.look_up()
        self.place.make_file()
        self.place.refuse_emptied()
        if self._repair:
            self.place.break_hard_links()
        self.place.leave_foreign_log()
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
                if is_damage(error):
                    raise OutboxDamaged(f"outbox {self.path}: {error}") from error
                if getattr(error, "sqlite_errorcode", None) != sqlite3.SQLITE_FULL:
                    raise
                raise OutboxError(
                    f"outbox {self.path} is full: its disk, or its limit of {self._max_bytes // 2**20} MiB;"
                    " events leave it when Redis and a worker run"
                ) from error


def is_damage(error: sqlite3.Error) -> bool:
    # What Python's module itself raises has no code, such as for text that is no UTF-8.
    code = getattr(error, "sqlite_errorcode", None)
    return "UTF-8" in str(error) if code is None else code & 0xFF in _DAMAGE or code == _CUT_OFF


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
