"""Where an outbox lies: its path, the files beside it, and what may have been done to them.

SQLite finds its log and the index of that by their names, so that a file that is replaced, linked or emptied would be
opened with those of another one.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from producers.errors import OutboxDamaged, OutboxError

logger = logging.getLogger(__name__)

DAMAGED = ".damaged-"
TAKEN_OUT = ".taken-out-"
LOCK = "-relay"
_PAIR = "-pair"
_NEW = ".new"
_COPY = ".copy"
_COPY_BYTES = 2**20
_COPY_TRIES = 5

Identity = tuple[int, int]  # device and number of a file


class OutboxPlace:
    """The place of the outbox at `path`.

    Raises:
        OutboxDamaged: from `refuse_emptied`.
        OutboxError: from every method, when the system refuses.
    """

    def __init__(self, path: Path) -> None:
        # A program may change its working folder, and the outbox must not change with it.
        self.path = path.absolute()
        self.look_up()

    def look_up(self) -> None:
        """Find the file itself: there SQLite has its own files beside it, also when the path is a symbolic link."""
        self.real = Path(os.path.realpath(self.path))

    def beside(self, end: str) -> Path:
        """The file beside the outbox whose name has this end."""
        return self.real.with_name(self.real.name + end)

    def sqlite_files(self) -> list[Path]:
        """SQLite's own: the log of what is not yet in the file, and an index of that."""
        return [self.beside("-wal"), self.beside("-shm")]

    def make_folder(self) -> None:
        with os_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)

    def make_file(self) -> None:
        """A new one, if there is none. What SQLite left beside an earlier one is not its."""
        if identity_of(self.path) is not None:
            return
        self.make_folder()
        with os_errors(self.path), alone_in(self.real.parent):
            if identity_of(self.path) is None:
                for file in self.sqlite_files():
                    file.unlink(missing_ok=True)
                self.make_new(self.real.parent)

    def make_new(self, like: Path) -> None:
        """Under another name first: a file at the path is never empty, not even for a moment.

        If root makes it, it gets the owner of `like`.
        """
        new = self.beside(_NEW)
        new.unlink(missing_ok=True)  # of a process that died
        make_as_root(new, like)
        with closing(sqlite3.connect(new, isolation_level=None)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
        new.rename(self.real)

    def refuse_emptied(self) -> None:
        """SQLite takes an empty file for a new one, and removes the log beside it."""
        # The size last: a file that is being made has content before any of the others is beside it.
        ends = [end for end in (LOCK, _PAIR) if self.beside(end).exists()]
        if _size_of(self.beside("-wal")):
            ends.append("-wal")
        if ends and _size_of(self.path) == 0:
            raise OutboxDamaged(
                f"outbox {self.path}: the file is empty (0 bytes), but not new: {self.path.name}{ends[0]} exists"
            )

    def has_been_used(self) -> bool:
        """Whether the files beside it show that the file at the path is, or was, an outbox."""
        used = any(self.beside(end).exists() for end in (LOCK, _PAIR))
        return used or (_size_of(self.path) == 0 and bool(_size_of(self.beside("-wal"))))

    def break_hard_links(self) -> None:
        """Replace a file that has a second name, as after `cp -al`, by a copy of it.

        Through two names SQLite uses two logs, and each overwrites in the file what the other has written.
        """
        if not _has_two_names(self.path):
            return
        real = self.real
        with os_errors(self.path), alone_in(real.parent):
            if not _has_two_names(real):  # another process was first
                return
            copies = self._copies_of_file_and_log()
            # The log first: if this process dies in between, the file still has two names. An index of another log
            # must not be found beside it.
            for end in ("-wal", "-shm", ""):
                if end in copies:
                    copies[end].rename(self.beside(end))
                elif self.beside(end).exists():
                    self.beside(end).unlink()
            for end in (_PAIR, LOCK):  # they are made anew when they are needed
                if _has_two_names(self.beside(end)):
                    self.beside(end).unlink()
        logger.warning(
            "outbox %s had a second name (a hard link, such as `cp -al` makes): it was replaced by a copy, and the file"
            " under the other name is an outbox of its own from now on",
            self.path,
        )

    def _copies_of_file_and_log(self) -> dict[str, Path]:
        """By the end of the name. A process that has the file open by its other name may write it meanwhile."""
        copies: dict[str, Path] = {}
        for tries_left in reversed(range(_COPY_TRIES)):
            before = self._written_at()
            for end in ("", "-wal"):
                if self.beside(end).exists():
                    copies[end] = self.beside(f"{_COPY}{end}")
                    _copy(self.beside(end), copies[end])
            after = self._written_at()
            # The log may be longer in the end: SQLite ignores half a transaction, and a process that has the file open
            # by this name carries over what is missing.
            if before == after or (before[0] == after[0] and not tries_left):
                return copies
        raise OutboxError(
            f"outbox {self.path}: has a second name (a hard link), by which another process writes it again and again;"
            " it is copied when that has ended"
        )

    def _written_at(self) -> list[tuple[int, int] | None]:
        found: list[tuple[int, int] | None] = []
        for end in ("", "-wal"):
            try:
                one = os.stat(self.beside(end))
                found.append((one.st_mtime_ns, one.st_size))
            except FileNotFoundError:
                found.append(None)
        return found

    def leave_foreign_log(self) -> None:
        """Set aside the log of an earlier file at the path: SQLite would take it for that of the file there now.

        A process may still have both of the earlier file open. Which files belong together stands in a small file.
        """
        with os_errors(self.path), alone_in(self.real.parent):
            now, before = self._pair(), self._noted_pair()
            if before is None or now[0] == before[0]:
                return
            if now[1] is not None and now[1] == before[1]:
                aside = free_name(self.beside(f"{DAMAGED}{before[0][1]}"))
                self.beside("-wal").rename(aside.with_name(aside.name + "-wal"))
                self.beside("-shm").unlink(missing_ok=True)
                aside.touch()
                logger.warning(
                    "outbox %s was replaced, and the log of the file before was left beside it: set aside as %s-wal",
                    self.path,
                    aside,
                )
            # At once: the file's own log may get the number of one that is gone.
            self._note_pair((now[0], None))

    def note_pair(self, identity: Identity | None) -> None:
        """Note that the file of this identity, if it is at the path, and the log beside it belong together.

        A user who may only read does not.
        """
        with os_errors(self.path), alone_in(self.real.parent), suppress(PermissionError):
            if identity_of(self.path) == identity and self._noted_pair() != (pair := self._pair()):
                self._note_pair(pair)

    def _pair(self) -> tuple[Any, Any]:
        return identity_of(self.path), identity_of(self.beside("-wal"))

    def _noted_pair(self) -> tuple[Any, Any] | None:
        try:
            file, log = json.loads(self.beside(_PAIR).read_text(encoding="ascii"))
            return tuple(file), log and tuple(log)
        except (OSError, ValueError, TypeError):  # none yet, or half of one: nothing is known
            return None

    def _note_pair(self, pair: tuple[Any, Any]) -> None:
        make_as_root(self.beside(_PAIR), self.real)
        self.beside(_PAIR).write_text(json.dumps(pair), encoding="ascii")


def identity_of(path: Path) -> Identity | None:
    """Device and number of the file that the path leads to; None when there is none."""
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise OutboxError(f"outbox {path}: {error.strerror or error}") from error
    return found.st_dev, found.st_ino


@contextmanager
def os_errors(path: Path) -> Iterator[None]:
    """The system's errors as OutboxError, which names the file."""
    try:
        yield
    except OSError as error:
        raise OutboxError(f"outbox {path}: {error.strerror or error}") from error


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """One process at a time; the kernel ends it with the process."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def make_as_root(path: Path, like: Path) -> None:
    """If this is root and there is no such file, make an empty one with the owner, group and mode of `like`.

    Else an operator's command would leave files that the producer may not write. `like` may be a folder.
    """
    if os.geteuid() != 0:
        return
    try:
        found = os.stat(like)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except (FileExistsError, FileNotFoundError):
        return
    try:
        with suppress(OSError):  # in some containers root may not
            os.fchown(descriptor, found.st_uid, found.st_gid)
        os.fchmod(descriptor, stat.S_IMODE(found.st_mode) & (0o664 if stat.S_ISDIR(found.st_mode) else 0o666))
    finally:
        os.close(descriptor)


def _size_of(path: Path) -> int | None:
    try:
        return os.stat(path).st_size
    except OSError:
        return None


def _has_two_names(path: Path) -> bool:
    try:
        return os.stat(path).st_nlink > 1
    except OSError:
        return False


def _copy(file: Path, copy: Path) -> None:
    """Copy content, owner and mode, and wait for the disk."""
    # Never closed: closing it would end the locks that SQLite has on the file in this process.
    source = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    found = os.fstat(source)
    copy.unlink(missing_ok=True)  # of a process that died
    target = os.open(copy, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        if os.geteuid() == 0:
            with suppress(OSError):  # in some containers root may not
                os.fchown(target, found.st_uid, found.st_gid)
        os.fchmod(target, stat.S_IMODE(found.st_mode))
        while part := os.read(source, _COPY_BYTES):
            rest = memoryview(part)
            while rest:
                rest = rest[os.write(target, rest) :]
        os.fsync(target)
    finally:
        os.close(target)


def free_name(wanted: Path) -> Path:
    name, number = wanted, 1
    while name.exists():
        number += 1
        name = wanted.with_name(f"{wanted.name}-{number}")
    return name
