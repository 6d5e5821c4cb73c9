"""The path of an outbox and the files beside it, which may be replaced, linked or emptied while it is not open.

SQLite finds its log and the log's index by their names. If the file was replaced, it would open the log and index of
the earlier file.
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


def check_is_no_folder(path: Path) -> None:
    """Raise OutboxError if the path of an outbox is a folder, with the path of a file in it as an example."""
    if os.path.isdir(path):  # unlike Path.is_dir, it tolerates a missing permission
        raise OutboxError(f"outbox {path} is a folder: give the path of a file, such as {path / 'outbox.db'}")


class OutboxPlace:
    """Path of an outbox, and operations on the files beside it.

    Raises:
        OutboxDamaged: from `refuse_emptied`.
        OutboxError: from every method, when a system call fails.
    """

    def __init__(self, path: Path) -> None:
        # A program may change its working directory; the outbox must stay where it is.
        self.path = path.absolute()
        self.look_up()

    def look_up(self) -> None:
        """Follow symbolic links: SQLite keeps its own files beside the real file."""
        self.real = Path(os.path.realpath(self.path))

    def sibling(self, end: str) -> Path:
        """Return the path beside the outbox with this text appended to its name."""
        return self.real.with_name(self.real.name + end)

    def sqlite_files(self) -> list[Path]:
        """Return the paths of SQLite's own files: the log of changes that are not yet in the file, and its index."""
        return [self.sibling("-wal"), self.sibling("-shm")]

    def make_folder(self) -> None:
        with os_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)

    def make_file(self) -> None:
        """Create the file if there is none, and remove a log that SQLite left beside an earlier file."""
        check_is_no_folder(self.path)
        if file_id(self.path) is not None:
            return
        self.make_folder()
        with os_errors(self.path), folder_lock(self.real.parent):
            if file_id(self.path) is None:
                for file in self.sqlite_files():
                    file.unlink(missing_ok=True)
                self.make_new(self.real.parent)

    def make_new(self, like: Path) -> None:
        """Create a new file under another name and rename it, so that the file at the path is never empty.

        If root creates it, it gets the owner of `like`.
        """
        new = self.sibling(_NEW)
        new.unlink(missing_ok=True)  # left by a process that died
        make_as_root(new, like)
        with closing(sqlite3.connect(new, isolation_level=None)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
        new.rename(self.real)

    def refuse_emptied(self) -> None:
        """Raise OutboxDamaged if the file was in use and is empty: SQLite would treat it as new and remove its log."""
        # Read the size last: a file that is being created has content before any other file is beside it.
        ends = [end for end in (LOCK, _PAIR) if self.sibling(end).exists()]
        if file_size(self.sibling("-wal")):
            ends.append("-wal")
        if ends and file_size(self.path) == 0:
            raise OutboxDamaged(
                f"outbox {self.path}: the file is empty (0 bytes), but not new: {self.path.name}{ends[0]} exists"
            )

    def has_been_used(self) -> bool:
        """Return whether the files beside it show that the file at the path is, or was, an outbox."""
        used = any(self.sibling(end).exists() for end in (LOCK, _PAIR))
        return used or (file_size(self.path) == 0 and bool(file_size(self.sibling("-wal"))))

    def break_hard_links(self) -> None:
        """Replace a file that has a second name, for example after `cp -al`, by a copy of it.

        SQLite would use one log for each name, and from each log overwrite changes that came from the other.
        """
        real = self.real
        with os_errors(self.path), folder_lock(real.parent):
            if not has_hard_link(real):  # another process has replaced it meanwhile
                return
            copies = self._copies_of_file_and_log()
            # Replace the log first: if this process dies after that, the file still has two names and this is repeated.
            # Remove the index, because it belongs to the other log.
            for end in ("-wal", "-shm", ""):
                if end in copies:
                    copies[end].rename(self.sibling(end))
                elif self.sibling(end).exists():
                    self.sibling(end).unlink()
            for end in (_PAIR, LOCK):  # they are created again when they are needed
                if has_hard_link(self.sibling(end)):
                    self.sibling(end).unlink()
        logger.warning(
            "outbox %s had a second name (a hard link, as `cp -al` makes it) and was replaced by a copy. The file under"
            " the other name is a separate outbox from now on",
            self.path,
        )

    def _copies_of_file_and_log(self) -> dict[str, Path]:
        """Copy the file and its log, unchanged between both copies, and return the copies by the end of the name."""
        copies: dict[str, Path] = {}
        for tries_left in reversed(range(_COPY_TRIES)):
            before = self._written_at()
            for end in ("", "-wal"):
                if self.sibling(end).exists():
                    copies[end] = self.sibling(f"{_COPY}{end}")
                    copy_file(self.sibling(end), copies[end])
            after = self._written_at()
            # At the last try, accept a log that grew meanwhile: SQLite ignores an incomplete transaction, and a process
            # that has the file open by this name carries over the missing entries.
            if before == after or (before[0] == after[0] and not tries_left):
                return copies
        raise OutboxError(
            f"outbox {self.path}: has a second name (a hard link), and another process keeps writing to it under that"
            " name. It is copied when that process has ended"
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
        """Move away the log of an earlier file at the path: SQLite would apply it to the file that is there now.

        A process may still have the earlier file and its log open. The small file `<name>-pair` stores the ids of the
        file and the log that belong together.
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
                    "outbox %s was replaced, and the log of the earlier file was left beside it. The log was moved to"
                    " %s-wal, and a relay salvages it",
                    self.path,
                    moved_to,
                )
            # Store this before the file gets its own log, which may get the inode of a log that was removed.
            self._note_pair((now[0], None))

    def note_pair(self, of: FileId | None) -> None:
        """Store that this file and the log beside it belong together, unless another file is at the path.

        If this user has no permission to write, store nothing.
        """
        with os_errors(self.path), folder_lock(self.real.parent), suppress(PermissionError):
            if file_id(self.path) == of and self._noted_pair() != (pair := self._pair()):
                self._note_pair(pair)

    def _pair(self) -> tuple[Any, Any]:
        return file_id(self.path), file_id(self.sibling("-wal"))

    def _noted_pair(self) -> tuple[Any, Any] | None:
        try:
            file, log = json.loads(self.sibling(_PAIR).read_text(encoding="ascii"))
            return tuple(file), log and tuple(log)
        except (OSError, ValueError, TypeError):  # missing or incomplete: treat as unknown
            return None

    def _note_pair(self, pair: tuple[Any, Any]) -> None:
        make_as_root(self.sibling(_PAIR), self.real)
        self.sibling(_PAIR).write_text(json.dumps(pair), encoding="ascii")
