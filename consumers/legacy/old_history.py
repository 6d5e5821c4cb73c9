"""Old history as events: where it comes from, what each entry stands for, and what became of it.

What is read can be read again: an origin's source and numbers are the same each time.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, tzinfo
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, NamedTuple

import simplejson

from consumers.legacy.json_arrays import Damaged, Entry, read_entries
from consumers.legacy.legacy_json import (
    SNAPSHOTS_FILE,
    archive_from,
    archives_file,
    history_files,
    notes_on,
    null_for_nan,
    snapshot_from,
)
from producers.errors import HistoryError, InvalidEvent
from producers.events import Event, PortfolioSnapshot, SignalArchive, event_of
from producers.redis_keys import job_id_of

Kind = Literal["snapshot", "archive"]

_SOURCE_NAME = "import"
_NOT_IN_SOURCES = re.compile(r"[^A-Za-z0-9._~-]+")
_NAME_CHARACTERS = 100
_DIGEST_CHARACTERS = 32
_CHUNK_WEIGHT = 1000  # snapshots, or signals, looked up together
_NULLED = "NaN or Infinity in signals taken as null; verify needs --nan-as-null too"
_MOST_NOTES = 20  # different ones of an origin; a file of a thousand odd keys needs no thousand lines


@dataclass(frozen=True)
class Origin:
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


def file_origins(directory: Path) -> list[Origin]:
    """The history files of a folder.

    Raises:
        HistoryError: there are none.
    """
    if not directory.is_dir():
        raise HistoryError(f"{directory}: is not a folder")
    files = history_files(directory)
    if not files:
        raise HistoryError(f"{directory}: has no {SNAPSHOTS_FILE} and no {archives_file('*')}")
    return [_file_origin(path) for path in files]


def _file_origin(path: Path) -> Origin:
    read = 0

    def progress(position: int) -> None:
        nonlocal read
        read = position

    return Origin(
        path.name,
        "snapshot" if path.name == SNAPSHOTS_FILE else "archive",
        lambda: read_entries(path, progress=progress),
        path.stat().st_size if path.is_file() else 0,
        lambda: read,
    )


@dataclass
class Tally:
    """What became of one origin's entries. `damage` says where reading had to end; `notes` what was put right."""

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
    def settled(self) -> int:
        return self.stored + self.already_there + self.rejected


class Item(NamedTuple):
    """One entry with the event that it stands for, or why it stands for none."""

    entry: Entry
    event: Event | InvalidEvent


class OldHistory:
    """Reads one origin as events of its source; what it counts stands in `tally`.

    `source` and `source_id` are known from the first item on, and do not depend on any option. An entry with NaN or
    Infinity in it stands for no event; with `nan_as_null`, those in signals are read as null and counted in a note.
    """

    def __init__(
        self, origin: Origin, *, zone: tzinfo | None, portfolio_id: int | None, nan_as_null: bool = False
    ) -> None:
        self.origin = origin
        self.tally = Tally(origin.name)
        self.source = self.source_id = ""
        self._convert = snapshot_from if origin.kind == "snapshot" else archive_from
        self._zone = zone
        self._portfolio_id = portfolio_id
        self._nan_as_null = nan_as_null
        self._after: datetime | None = None
        self._envelope: Event | None = None

    def job_id(self, index: int) -> str:
        return job_id_of(self.source_id, index)

    def items(self) -> Iterator[Item]:
        """Every entry, in order. Damage ends it, or that the file cannot be read, and is noted in the tally."""
        try:
            for entry in self.origin.entries():
                if not self.source:
                    self._identify(entry)
                self.tally.read += 1
                yield Item(entry, self._event(entry))
        except Damaged as damage:
            self.tally.damage = str(damage)
        except OSError as error:
            self.tally.damage = f"{self.origin.name}: cannot be read: {error.strerror}"

    def chunks(self) -> Iterator[list[Item]]:
        """The items, in portions of about the same weight."""
        chunk: list[Item] = []
        weight = 0
        for item in self.items():
            chunk.append(item)
            data = None if isinstance(item.event, InvalidEvent) else item.event.data
            weight += 1 + (len(data.signals) if isinstance(data, SignalArchive) else 0)
            if weight >= _CHUNK_WEIGHT:
                yield chunk
                chunk, weight = [], 0
        if chunk:
            yield chunk

    def _identify(self, first: Entry) -> None:
        # Not of the portfolio or the zone: the same file, read with others, must be known again.
        told = simplejson.dumps([self.origin.name, first.data], use_decimal=True, allow_nan=True, sort_keys=True)
        name = _NOT_IN_SOURCES.sub("-", self.origin.name)[:_NAME_CHARACTERS]
        self.source_id = sha256(told.encode("utf-8", "surrogatepass")).hexdigest()[:_DIGEST_CHARACTERS]
        self.source = f"{_SOURCE_NAME}/{name}/{self.source_id}"

    def _event(self, entry: Entry) -> Event | InvalidEvent:
        data, nulled = (
            null_for_nan(entry.data) if self._nan_as_null and self.origin.kind == "archive" else (entry.data, 0)
        )
        try:
            payload = self._payload(data)
            event = self._enveloped(payload, entry.index)
        except InvalidEvent as error:
            return error if self._nan_as_null else self._advised(error, entry.data)
        self._after = payload.instant.astimezone(UTC)
        if nulled:
            self.tally.notes[_NULLED] += nulled
        for note in notes_on(data, payload):
            if note in self.tally.notes or len(self.tally.notes) < _MOST_NOTES:
                self.tally.notes[note] += 1
        return event

    def _payload(self, data: Any) -> PortfolioSnapshot | SignalArchive:
        return self._convert(data, zone=self._zone, portfolio_id=self._portfolio_id, after=self._after)

    def _advised(self, error: InvalidEvent, data: Any) -> InvalidEvent:
        """`error`, with the option that would take the entry if nothing but NaN in its signals is in the way."""
        data, nulled = null_for_nan(data) if self.origin.kind == "archive" else (data, 0)
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
        """What event_of makes, at a tenth of its price: of one source, it checks the envelope once."""
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
