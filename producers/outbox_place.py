"""The path of an outbox and the files beside it, which may be replaced, linked or emptied while it is not open.

SQLite finds its log and the log's index by their names: beside a file that was replaced, it would open those of another
file.
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from producers.errors import OutboxDamaged, OutboxError
from producers.file_operations import (
    FileId,
    copy_file,
    file_id,
    file_size,
    folder_lock,
    free_name,
    has_hard_link,
    make_as_root,
    os_errors,
)

logger = logging.getLogger(__name__)

DAMAGED = ".damaged-"
TAKEN_OUT = ".taken-out-"
LOCK = "-relay"
_PAIR = "-pair"
_NEW = ".new"
_COPY = ".copy"
_COPY_TRIES = 5


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
        """Follow symbolic links: SQLite keeps its own files beside the file itself."""
        self.real = Path(os.path.realpath(self.path))

    def sibling(self, end: str) -> Path:
        """The file beside the outbox whose name has this end."""
        return self.real.with_name(self.real.name + end)

    def sqlite_files(self) -> list[Path]:
        """SQLite's own: the log of changes that are not yet in the file, and its index."""
        return [self.sibling("-wal"), self.sibling("-shm")]

    def make_folder(self) -> None:
        with os_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)

    def make_file(self) -> None:
        """Make a new file if there is none, and remove the log that SQLite left beside an earlier one."""
        if file_id(self.path) is not None:
            return
        self.make_folder()
        with os_errors(self.path), folder_lock(self.real.parent):
            if file_id(self.path) is None:
                for file in self.sqlite_files():
                    file.unlink(missing_ok=True)
                self.make_new(self.real.parent)

    def make_new(self, like: Path) -> None:
        """Make a new file under another name and rename it: a file at the path is never empty, not even for a moment.

        If root makes it, it gets the owner of `like`.
        """
        new = self.sibling(_NEW)
        new.unlink(missing_ok=True)  # of a process that died
        make_as_root(new, like)
        with closing(sqlite3.connect(new, isolation_level=None)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
        new.rename(self.real)

    def refuse_emptied(self) -> None:
        """Raise OutboxDamaged for an empty file that was in use: SQLite would take it for new and remove its log."""
        # The size last: a file that is being made has content before any of the others is beside it.
        ends = [end for end in (LOCK, _PAIR) if self.sibling(end).exists()]
        if file_size(self.sibling("-wal")):
            ends.append("-wal")
        if ends and file_size(self.path) == 0:
            raise OutboxDamaged(
                f"outbox {self.path}: the file is empty (0 bytes), but not new: {self.path.name}{ends[0]} exists"
            )

    def has_been_used(self) -> bool:
        """Whether the files beside it show that the file at the path is, or was, an outbox."""
        used = any(self.sibling(end).exists() for end in (LOCK, _PAIR))
        return used or (file_size(self.path) == 0 and bool(file_size(self.sibling("-wal"))))

    def break_hard_links(self) -> None:
        """Replace a file that has a second name, as after `cp -al`, by a copy of it.

        Through two names SQLite uses two logs, and each overwrites in the file what the other has written.
        """
        if not has_hard_link(self.path):
            return
        real = self.real
        with os_errors(self.path), folder_lock(real.parent):
            if not has_hard_link(real):  # another process was first
                return
            copies = self._copies_of_file_and_log()
            # The log first: if this process dies in between, the file still has two names. An index of another log
            # must not be found beside it.
            for end in ("-wal", "-shm", ""):
                if end in copies:
                    copies[end].rename(self.sibling(end))
                elif self.sibling(end).exists():
                    self.sibling(end).unlink()
            for end in (_PAIR, LOCK):  # they are made anew when they are needed
                if has_hard_link(self.sibling(end)):
                    self.sibling(end).unlink()
        logger.warning(
            "outbox %s had a second name (a hard link, such as `cp -al` makes): it was replaced by a copy, and the file"
            " under the other name is an outbox of its own from now on",
            self.path,
        )

    def _copies_of_file_and_log(self) -> dict[str, Path]:
        """Copies by the end of the name, of one moment: a process may write the file by its other name meanwhile."""
        copies: dict[str, Path] = {}
        for tries_left in reversed(range(_COPY_TRIES)):
            before = self._written_at()
            for end in ("", "-wal"):
                if self.sibling(end).exists():
                    copies[end] = self.sibling(f"{_COPY}{end}")
                    copy_file(self.sibling(end), copies[end])
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
                one = os.stat(self.sibling(end))
                found.append((one.st_mtime_ns, one.st_size))
            except FileNotFoundError:
                found.append(None)
        return found

    def quarantine_foreign_log(self) -> None:
        """Move away the log of an earlier file at the path: SQLite would take it for that of the file there now.

        A process may still have the earlier file and its log open. A small file says which two belong together.
        """
        with os_errors(self.path), folder_lock(self.real.parent):
            now, before = self._pair(), self._noted_pair()
            if before is None or now[0] == before[0]:
                return
            if now[1] is not None and now[1] == before[1]:
                moved_to = free_name(self.sibling(f"{DAMAGED}{before[0][1]}"))
                self.sibling("-wal").rename(moved_to.with_name(moved_to.name + "-wal"))
                self.sibling("-shm").unlink(missing_ok=True)
                moved_to.touch()
                logger.warning(
                    "outbox %s was replaced, and the log of the earlier file was left beside it: moved to %s-wal, which"
                    " a relay salvages",
                    self.path,
                    moved_to,
                )
            # At once: the file's own log may get the inode of one that was removed.
            self._note_pair((now[0], None))

    def note_pair(self, of: FileId | None) -> None:
        """Note that this file, if it is at the path, and the log beside it belong together, if this user may write."""
        with os_errors(self.path), folder_lock(self.real.parent), suppress(PermissionError):
            if file_id(self.path) == of and self._noted_pair() != (pair := self._pair()):
                self._note_pair(pair)

    def _pair(self) -> tuple[Any, Any]:
        return file_id(self.path), file_id(self.sibling("-wal"))

    def _noted_pair(self) -> tuple[Any, Any] | None:
        try:
            file, log = json.loads(self.sibling(_PAIR).read_text(encoding="ascii"))
            return tuple(file), log and tuple(log)
        except (OSError, ValueError, TypeError):  # none yet, or half of one: nothing is known
            return None

    def _note_pair(self, pair: tuple[Any, Any]) -> None:
        make_as_root(self.sibling(_PAIR), self.real)
        self.sibling(_PAIR).write_text(json.dumps(pair), encoding="ascii")
