"""A file that names the entries in progress, so that after a crash the next import can find the entry that caused it.

A crash leaves the file behind. The next run processes the named entries in smaller portions. If it crashes again, the
file names fewer entries, and in the end a single one, whose crashes are counted. Kill -9 leaves the file behind too;
then the next run only processes these entries in smaller portions.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple, Self, TextIO

from consumers.legacy.json_arrays import Entry
from producers.errors import HistoryError

_SUFFIX = ".in-progress"
_PORTIONS = 32  # after a crash, split its entries into this many portions: a thousand reach single entries in two runs
_CLEAN_EXITS = (KeyboardInterrupt, SystemExit, HistoryError, OSError)


class _Note(NamedTuple):
    """Entries `first` to `last` of a source. `crashes` counts the crashes while the note named a single entry."""

    source: str
    first: int
    last: int
    crashes: int


class EntriesInProgress:
    """Context manager of the file, which is beside the report at `report`.

    The end of the block removes the file, except after an exception that shows a defect. If the report is a device or a
    pipe, or if another import uses the file, no file is kept, and crashes are not noticed.
    """

    def __init__(self, report: Path) -> None:
        self._path = report.with_name(report.name + _SUFFIX)
        self._usable = report.is_file() or not report.exists()
        self._file: TextIO | None = None
        self._left: _Note | None = None
        self._before: dict[str, int] = {}  # source -> first entry of the portion before

    @property
    def after_crash(self) -> bool:
        """Whether an earlier import has left the file behind."""
        return self._left is not None

    def portions(self, source: str, chunk: Sequence[Entry]) -> Iterator[list[Entry]]:
        """Yield `chunk` in order, in portions; entries of an earlier crash come in small ones.

        The file names a portion until the caller asks for the second one after it, because the caller may convert a
        portion while it stores the one before. After a crash, it names one portion: then the caller stores each one
        before it asks for the next.
        """
        left = self._left
        for of_crash, group in groupby(chunk, key=lambda entry: self._is_left(source, entry.index)):
            entries = list(group)
            size = max(1, (left.last - left.first + 1) // _PORTIONS) if left and of_crash else len(entries)
            for start in range(0, len(entries), size):
                portion = entries[start : start + size]
                first, last = portion[0].index, portion[-1].index
                if self.after_crash:
                    self._write(_Note(source, first, last, self.crashes(source, first)))
                else:
                    before = self._before.get(source, first)
                    self._write(_Note(source, before, last, 0))
                    self._before = {source: first}
                yield portion

    def crashes(self, source: str, index: int) -> int:
        """Return how often the process crashed while only this entry was in progress."""
        left = self._left
        return left.crashes if left is not None and (source, index, index) == left[:3] else 0

    def _is_left(self, source: str, index: int) -> bool:
        left = self._left
        return left is not None and left.source == source and left.first <= index <= left.last

    def __enter__(self) -> Self:
        if self._usable:
            file = os.fdopen(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644), "r+", encoding="utf-8")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
            else:
                self._file, self._left = file, _read(file)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._file is not None:
            if kind is None or issubclass(kind, _CLEAN_EXITS):
                self._path.unlink(missing_ok=True)
            self._file.close()

    def _write(self, note: _Note) -> None:
        if self._file is not None:
            self._file.seek(0)
            self._file.write(json.dumps(note._asdict()) + "\n")
            self._file.truncate()
            self._file.flush()


def _read(file: TextIO) -> _Note | None:
    """Return the note that a crash left, with this crash counted. Return None if it is missing or unreadable."""
    try:
        found = json.loads(file.readline())
        note = _Note(str(found["source"]), int(found["first"]), int(found["last"]), int(found["crashes"]))
    except (LookupError, TypeError, ValueError):
        return None
    return note._replace(crashes=note.crashes + 1) if note.first == note.last else note
