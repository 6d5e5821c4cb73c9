"""The damaged files beside an outbox: which wait to be salvaged, and which numbers could not be read in them."""

from __future__ import annotations

import glob
import logging
from collections.abc import Generator
from pathlib import Path

from producers.file_operations import folder_lock
from producers.outbox_carry_over import is_in_use
from producers.outbox_file import OutboxFile
from producers.outbox_place import DAMAGED, TAKEN_OUT
from producers.outbox_salvage import Salvage, has_readable_entries, salvage_pages

logger = logging.getLogger(__name__)

_SALVAGED = ".salvaged-"
_LOG = "-wal"


class Quarantine:
    """Quarantined files of the outbox in `file`.

    Raises:
        OutboxError: from every method, when the outbox cannot be read or written.
        OSError: from `salvage`, when the damaged file cannot be opened.
    """

    def __init__(self, file: OutboxFile) -> None:
        self._file = file

    def finish_renames(self) -> None:
        """Complete the renames of processes that died after they renamed a file or its log, but not both.

        If only the log was moved to quarantine, create an empty file beside it, so that its entries are salvaged.
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
        """Return the files that are not salvaged yet, including entries that a dead process was carrying over."""
        return self._files(DAMAGED) + [file for file in self._files(TAKEN_OUT) if not is_in_use(file)]

    def salvaged_files(self) -> list[Path]:
        """Return the damaged files whose readable entries are in this outbox."""
        return self._files(_SALVAGED)

    def lossy_files(self) -> list[Path]:
        """Return the salvaged files in which numbers were not found, or no entry at all."""
        with self._file.reading() as db:
            lossy = {name for (name,) in db.execute("SELECT file FROM losses")}
        return [file for file in self.salvaged_files() if file.name in lossy or not has_readable_entries(file)]

    def _files(self, mark: str) -> list[Path]:
        real = self._file.place.real
        found = real.parent.glob(f"{glob.escape(real.name)}{mark}*")
        return sorted(one for one in found if not one.name.endswith((_LOG, "-shm", "-journal")))

    def salvage(self, file: Path) -> Salvage:
        """Copy the readable entries of a damaged file into this outbox, and log the numbers that were not found."""
        steps = self.salvaging(file)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                found: Salvage = end.value
                return found

    def salvaging(self, file: Path) -> Generator[None, None, Salvage]:
        """Do the work of `salvage` step by step, one page of entries at each step."""
        found = yield from salvage_pages(file, _salvaged_name(file), self._file.transaction)
        logger.error("%s", found.summary())
        for end in ("", _LOG):  # the file first: after a crash, `finish_renames` also renames the log
            part = file.with_name(file.name + end)
            if TAKEN_OUT in part.name and found.is_recognized:
                part.unlink(missing_ok=True)
            elif part.exists() and part.name != _salvaged_name(part):
                part.rename(part.with_name(_salvaged_name(part)))
        return found

    def losses(self) -> dict[str, list[tuple[int, int]]]:
        """Return the numbers that could not be read in damaged files, as inclusive ranges by source."""
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
    return file.name.replace(DAMAGED, _SALVAGED).replace(TAKEN_OUT, _SALVAGED)
