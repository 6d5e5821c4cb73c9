"""Damaged files beside an outbox: they were moved away, wait to be salvaged, and keep a record of what was lost."""

from __future__ import annotations

import glob
import logging
from collections.abc import Generator
from pathlib import Path

from producers.file_operations import folder_lock
from producers.outbox_carry_over import is_in_use
from producers.outbox_file import OutboxFile
from producers.outbox_place import DAMAGED, TAKEN_OUT
from producers.outbox_salvage import Salvage, salvage_pages

logger = logging.getLogger(__name__)

_SALVAGED = ".salvaged-"
_LOG = "-wal"


class Quarantine:
    """Damaged files of the outbox in `file`.

    Raises:
        OutboxError: from every method, when the outbox cannot be read or written.
        OSError: from `salvage`, when the damaged file cannot be opened.
    """

    def __init__(self, file: OutboxFile) -> None:
        self._file = file

    def finish_renames(self) -> None:
        """Complete the work of processes that died between renaming a damaged file and renaming its log.

        A log that was moved alone has entries of its own: it is salvaged beside an empty file.
        """
        real = self._file.place.real
        with folder_lock(real.parent):
            for log in real.parent.glob(f"{glob.escape(real.name)}{DAMAGED}*{_LOG}"):
                file = log.with_name(log.name.removesuffix(_LOG))
                salvaged = file.with_name(_salvaged_name(file))
                if salvaged.exists():
                    log.rename(salvaged.with_name(salvaged.name + _LOG))
                else:
                    file.touch()

    def damaged_files(self) -> list[Path]:
        """Files that are not salvaged yet; also those with entries that a dead process had not carried over yet."""
        return self._files(DAMAGED) + [file for file in self._files(TAKEN_OUT) if not is_in_use(file)]

    def salvaged_files(self) -> list[Path]:
        """Damaged files whose readable entries are in this outbox."""
        return self._files(_SALVAGED)

    def _files(self, mark: str) -> list[Path]:
        real = self._file.place.real
        found = real.parent.glob(f"{glob.escape(real.name)}{mark}*")
        return sorted(one for one in found if not one.name.endswith((_LOG, "-shm", "-journal")))

    def salvage(self, file: Path) -> Salvage:
        """Copy the readable entries of a damaged file into this outbox, and log which could not be read."""
        steps = self.salvaging(file)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                found: Salvage = end.value
                return found

    def salvaging(self, file: Path) -> Generator[None, None, Salvage]:
        """The steps of `salvage`, a page each."""
        found = yield from salvage_pages(file, _salvaged_name(file), self._file.transaction)
        logger.error("%s", found.summary())
        for end in ("", _LOG):  # the file first: a log alone is salvaged once more
            part = file.with_name(file.name + end)
            if TAKEN_OUT in part.name:
                part.unlink(missing_ok=True)
            elif DAMAGED in part.name and part.exists():
                part.rename(part.with_name(_salvaged_name(part)))
        return found

    def losses(self) -> dict[str, list[tuple[int, int]]]:
        """By source, the inclusive ranges of numbers that could not be read in damaged files."""
        found: dict[str, list[tuple[int, int]]] = {}
        with self._file.reading() as db:
            query = """
                SELECT name || '/' || source_id, first, last FROM losses JOIN sources ON id = source_id
                ORDER BY source_id, first
            """
            for source, first, last in db.execute(query):
                found.setdefault(source, []).append((first, last))
        return found


def _salvaged_name(file: Path) -> str:
    return file.name.replace(DAMAGED, _SALVAGED)
