"""Old history as events: where its entries come from, the event of each, and the statistics of an import.

It can be read again: its source and its numbers are the same each time.
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
)
from producers.errors import HistoryError, InvalidEvent
from producers.events import IMPORT_PREFIX, Event, PortfolioSnapshot, SignalArchive, event_of
from producers.redis_keys import job_id_of

Kind = Literal["snapshot", "archive"]

_NOT_IN_SOURCES = re.compile(r"[^A-Za-z0-9._~-]+")
_NAME_CHARACTERS = 100
_DIGEST_CHARACTERS = 32
CHUNK_WEIGHT = 1000  # entries and their signals, processed together
_NULLED = "NaN or Infinity in signals taken as null; verify needs --nan-as-null too"
_MOST_NOTES = 20  # different ones of one import source; a file of a thousand odd keys needs no thousand lines


@dataclass(frozen=True)
class ImportSource:
    """Where old entries come from: a file, or a table of the old shape.

    `entries` gives all of them, in the same order and with the same numbers each time, as snapshot_from or
    archive_from read them; it may raise Damaged at its end. `position` counts up to `size` meanwhile, in `unit`;
    a size of 0 is unknown.
    """

    name: str
    kind: Kind
    entries: Callable[[], Iterator[Entry]]
    size: int = 0
    position: Callable[[], int] = lambda: 0
    unit: Literal["bytes", "rows"] = "bytes"


def file_sources(directory: Path) -> list[ImportSource]:
    """The history files of a folder.

    Raises:
        HistoryError: there are none.
    """
    if not directory.is_dir():
        raise HistoryError(f"{directory}: is not a folder")
    files = history_files(directory)
    if not files:
        raise HistoryError(f"{directory}: has no {SNAPSHOTS_FILE} and no {archives_file('*')}")
    return [_file_source(path) for path in files]


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
    """Entries of one import source by outcome. `damage` says where reading had to end; `notes` count corrections."""

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
    """Reads one import source as events; counts in `statistics`.

    `source` and `source_id` are known from the first chunk on, and do not depend on any option. An entry with NaN or
    Infinity in it stands for no event; with `nan_as_null`, those in signals are read as null and counted in a note.
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
        self._envelope: Event | None = None

    def job_id(self, index: int) -> str:
        return job_id_of(self.source_id, index)

    def chunks(self, weight: int = CHUNK_WEIGHT) -> Iterator[list[Entry]]:
        """Every entry, in order, in chunks of at least `weight` entries and signals; the last one may be smaller.

        Damage ends it, or that the file cannot be read, and is noted in the statistics.
        """
        chunk: list[Entry] = []
        chunk_weight = 0
        for entry in self._entries():
            chunk.append(entry)
            chunk_weight += 1 + len(signals_in(entry.data))
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
        # Not of the portfolio or the zone: the same file, read with others, must be known again.
        identity = simplejson.dumps(
            [self.import_source.name, first.data], use_decimal=True, allow_nan=True, sort_keys=True
        )
        name = _NOT_IN_SOURCES.sub("-", self.import_source.name)[:_NAME_CHARACTERS]
        self.source_id = sha256(identity.encode("utf-8", "surrogatepass")).hexdigest()[:_DIGEST_CHARACTERS]
        self.source = f"{IMPORT_PREFIX}{name}/{self.source_id}"

    def event(self, entry: Entry) -> Event:
        """The event of `entry`. Entries must come in order: a time that exists twice is read by the one before it.

        Raises:
            InvalidEvent: the entry stands for no event.
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
        """`error`, with the option that would take the entry if nothing but NaN in its signals is in the way."""
        data, nulled = null_for_nan(data) if self.import_source.kind == "archive" else (data, 0)
        if not nulled:
            return error
        try:
            payload = self._payload(data)
        except InvalidEvent:
            return error
        # Times of later entries must not depend on the option.
        self._after = payload.instant.astimezone(UTC)
        return InvalidEvent(f"{error} (--nan-as-null takes NaN in signals as null)", error.field)

    def _enveloped(self, payload: PortfolioSnapshot | SignalArchive, index: int) -> Event:
        """The same as event_of, in a tenth of the time: the envelope is checked once for the source."""
        if self._envelope is None:
            self._envelope = event_of(payload, source=self.source, sequence=index)
            return self._envelope
        changed = {
            "id": payload.event_id,
            "sequence": index,
            "time": payload.instant,
            "subject": payload.subject,
            "data": payload,
        }
        return self._envelope.model_copy(update=changed)
