"""Read old history as events: import sources, the event of each entry, and the statistics of an import.

Reading it again gives the same source and the same sequences.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, tzinfo
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import simplejson

from consumers.legacy.json_arrays import Damaged, Entry, read_entries
from consumers.legacy.legacy_json import (
    SNAPSHOTS_FILE,
    archive_from,
    archives_file,
    history_files,
    notes_on,
    null_for_nan,
    signals_in,
    snapshot_from,
    unread_files,
)
from producers.errors import HistoryError, InvalidEvent
from producers.events import IMPORT_PREFIX, Event, PortfolioSnapshot, SignalArchive, event_of, unchecked_event_of
from producers.redis_keys import job_id_of

Kind = Literal["snapshot", "archive"]

_NOT_IN_SOURCES = re.compile(r"[^A-Za-z0-9._~-]+")
_NAME_CHARACTERS = 100
_DIGEST_CHARACTERS = 32
CHUNK_WEIGHT = 1000  # entries plus their signals, processed together
_NULLED = "NaN or Infinity in signals was read as null; verify needs --nan-as-null too"
_SHOWN_FILES = 3
_MOST_NOTES = 20  # different notes of one import source: a thousand unknown keys must not print a thousand lines


@dataclass(frozen=True)
class ImportSource:
    """Source of old entries: a file, or an adopted table.

    `entries` returns all of them, in the same order and with the same numbers each time, in the form that snapshot_from
    or archive_from reads. Its iterator may end with Damaged. `position` returns how far it has read, up to `size`, in
    `unit`. A size of 0 means unknown.
    """

    name: str
    kind: Kind
    entries: Callable[[], Iterator[Entry]]
    size: int = 0
    position: Callable[[], int] = lambda: 0
    unit: Literal["bytes", "rows"] = "bytes"


def file_sources(directory: Path) -> list[ImportSource]:
    """Return the history files of a folder, and its files with nearly their names, which count as damaged.

    Raises:
        HistoryError: the folder has no such file.
    """
    files = history_files(directory)
    unread = unread_files(directory)
    if not files:
        others = [path.name for path in unread[:_SHOWN_FILES]]
        more = f", but {' and '.join(others)}: unpack or rename them" if others else ""
        raise HistoryError(f"{directory}: has no {SNAPSHOTS_FILE} and no {archives_file('*')}{more}")
    return [*map(_file_source, files), *map(_unread_source, unread)]


def _unread_source(path: Path) -> ImportSource:
    is_snapshots = path.name.startswith(SNAPSHOTS_FILE.partition(".")[0])
    right_name = SNAPSHOTS_FILE if is_snapshots else archives_file("YYYY-MM")

    def entries() -> Iterator[Entry]:
        raise Damaged(
            path, 0, None, f"is not read: unpack it, or rename it to {right_name}, or move it to another folder"
        )

    # A size of 0 would mean that the size of all files is unknown.
    return ImportSource(path.name, "snapshot" if is_snapshots else "archive", entries, 1, lambda: 1)


def _file_source(path: Path) -> ImportSource:
    read = 0

    def progress(position: int) -> None:
        nonlocal read
        read = position

    return ImportSource(
        path.name,
        "snapshot" if path.name == SNAPSHOTS_FILE else "archive",
        lambda: read_entries(path, progress=progress),
        path.stat().st_size if path.is_file() else 0,
        lambda: read,
    )


@dataclass
class ImportStatistics:
    """Number of entries of one import source by outcome.

    `damage` says where and why reading stopped. `notes` counts the corrections by their text.
    """

    name: str
    read: int = 0
    stored: int = 0
    already_there: int = 0
    rejected: int = 0
    damage: str | None = None
    notes: Counter[str] = field(default_factory=Counter)

    @property
    def clean(self) -> bool:
        return not self.rejected and self.damage is None

    @property
    def decided(self) -> int:
        return self.stored + self.already_there + self.rejected


class OldHistory:
    """Reads one import source as events, and counts the entries in `statistics`.

    `source` and `source_id` are set when the first chunk is read, and do not depend on any option. An entry that
    contains NaN or Infinity has no event. With `nan_as_null`, NaN and Infinity in signals are read as null and counted
    in a note.
    """

    def __init__(
        self, import_source: ImportSource, *, zone: tzinfo | None, portfolio_id: int | None, nan_as_null: bool = False
    ) -> None:
        self.import_source = import_source
        self.statistics = ImportStatistics(import_source.name)
        self.source = self.source_id = ""
        self._convert = snapshot_from if import_source.kind == "snapshot" else archive_from
        self._zone = zone
        self._portfolio_id = portfolio_id
        self._nan_as_null = nan_as_null
        self._after: datetime | None = None
        self._source_is_checked = False

    def job_id(self, index: int) -> str:
        return job_id_of(self.source_id, index)

    def chunks(self, weight: int = CHUNK_WEIGHT) -> Iterator[list[Entry]]:
        """Yield every entry, in order, in chunks of at least `weight` entries plus signals; the last may be smaller.

        Damage, or a file that cannot be read, ends the chunks and is recorded in `statistics.damage`.
        """
        chunk: list[Entry] = []
        chunk_weight = 0
        has_signals = self.import_source.kind == "archive"
        for entry in self._entries():
            chunk.append(entry)
            chunk_weight += 1 + (len(signals_in(entry.data)) if has_signals else 0)
            if chunk_weight >= weight:
                yield chunk
                chunk, chunk_weight = [], 0
        if chunk:
            yield chunk

    def _entries(self) -> Iterator[Entry]:
        try:
            for entry in self.import_source.entries():
                if not self.source:
                    self._identify(entry)
                self.statistics.read += 1
                yield entry
        except Damaged as damage:
            self.statistics.damage = str(damage)
        except OSError as error:
            self.statistics.damage = f"{self.import_source.name}: cannot be read: {error.strerror}"

    def _identify(self, first: Entry) -> None:
        # Without the portfolio and the zone: the same file must get the same source with any options.
        identity = simplejson.dumps(
            [self.import_source.name, first.data], use_decimal=True, allow_nan=True, sort_keys=True
        )
        name = _NOT_IN_SOURCES.sub("-", self.import_source.name)[:_NAME_CHARACTERS]
        self.source_id = sha256(identity.encode("utf-8", "surrogatepass")).hexdigest()[:_DIGEST_CHARACTERS]
        self.source = f"{IMPORT_PREFIX}{name}/{self.source_id}"

    def event(self, entry: Entry) -> Event:
        """Return the event of `entry`.

        Call it for the entries in order: the meaning of a local time that exists twice depends on the entry before.

        Raises:
            InvalidEvent: the entry has no valid event.
        """
        data, nulled = (
            null_for_nan(entry.data) if self._nan_as_null and self.import_source.kind == "archive" else (entry.data, 0)
        )
        try:
            payload = self._payload(data)
            event = self._enveloped(payload, entry.index)
        except InvalidEvent as error:
            raise (error if self._nan_as_null else self._advised(error, entry.data)) from None
        self._after = payload.instant.astimezone(UTC)
        if nulled:
            self.statistics.notes[_NULLED] += nulled
        for note in notes_on(data, payload):
            if note in self.statistics.notes or len(self.statistics.notes) < _MOST_NOTES:
                self.statistics.notes[note] += 1
        return event

    def _payload(self, data: Any) -> PortfolioSnapshot | SignalArchive:
        return self._convert(data, zone=self._zone, portfolio_id=self._portfolio_id, after=self._after)

    def _advised(self, error: InvalidEvent, data: Any) -> InvalidEvent:
        """Return `error`. If NaN in signals is the only problem, name the option that accepts it."""
        data, nulled = null_for_nan(data) if self.import_source.kind == "archive" else (data, 0)
        if not nulled:
            return error
        try:
            payload = self._payload(data)
        except InvalidEvent:
            return error
        # The times of later entries must not depend on the option.
        self._after = payload.instant.astimezone(UTC)
        return InvalidEvent(f"{error} (--nan-as-null reads NaN in signals as null)", error.field)

    def _enveloped(self, payload: PortfolioSnapshot | SignalArchive, index: int) -> Event:
        """Return the event of `payload`. The envelope is checked once for each source: a check takes 20 µs."""
        if self._source_is_checked:
            return unchecked_event_of(payload, source=self.source, sequence=index)
        event = event_of(payload, source=self.source, sequence=index)
        self._source_is_checked = True
        return event
