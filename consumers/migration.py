"""The import: old history as events through the same queue and workers as live traffic.

What is read can be read again, so it is its own outbox: its source and numbers are the same on each run, and a run
sends what the database does not have yet.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, tzinfo
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, NamedTuple

import simplejson
from redis import Redis

from consumers.connection import get_db
from consumers.errors import StoreUnavailable
from consumers.flight import Flight
from consumers.import_report import Report, as_json
from consumers.outcomes import NoRow, forget_outcomes, record_outcomes
from consumers.standing import Standing, standings
from producers.errors import HistoryError, InvalidEvent
from producers.events import Event, PortfolioSnapshot, SignalArchive, encode, event_of
from producers.json_arrays import Damaged, Entry, read_entries
from producers.legacy_json import SNAPSHOTS_FILE, archive_from, archives_file, history_files, notes_on, snapshot_from
from producers.outbox import Entry as OutboxEntry
from producers.outcomes import Outcome

Kind = Literal["snapshot", "archive"]

_SOURCE_NAME = "import"
_NOT_IN_SOURCES = re.compile(r"[^A-Za-z0-9._~-]+")
_NAME_CHARACTERS = 100
_DIGEST_CHARACTERS = 32
_CHUNK_WEIGHT = 1000  # snapshots, or signals, looked up together
_FIRST_BACKOFF_SECONDS = 0.1
_LAST_BACKOFF_SECONDS = 5.0
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

    `source` and `source_id` are known from the first item on.
    """

    def __init__(self, origin: Origin, *, zone: tzinfo | None, portfolio_id: int | None) -> None:
        self.origin = origin
        self.tally = Tally(origin.name)
        self.source = self.source_id = ""
        self._convert = snapshot_from if origin.kind == "snapshot" else archive_from
        self._zone = zone
        self._portfolio_id = portfolio_id
        self._after: datetime | None = None
        self._envelope: Event | None = None

    def job_id(self, index: int) -> str:
        return f"{self.source_id}-{index}"

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
        told = simplejson.dumps([self.origin.name, first.data], use_decimal=True, sort_keys=True)
        name = _NOT_IN_SOURCES.sub("-", self.origin.name)[:_NAME_CHARACTERS]
        self.source_id = sha256(told.encode("utf-8", "surrogatepass")).hexdigest()[:_DIGEST_CHARACTERS]
        self.source = f"{_SOURCE_NAME}/{name}/{self.source_id}"

    def _event(self, entry: Entry) -> Event | InvalidEvent:
        try:
            payload = self._convert(entry.data, zone=self._zone, portfolio_id=self._portfolio_id, after=self._after)
            event = self._enveloped(payload, entry.index)
        except InvalidEvent as error:
            return error
        self._after = payload.instant.astimezone(UTC)
        for note in notes_on(entry.data, payload):
            if note in self.tally.notes or len(self.tally.notes) < _MOST_NOTES:
                self.tally.notes[note] += 1
        return event

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


def look(history: OldHistory, report: Report, advance: Callable[[], None]) -> None:
    """Only read it: what is an event counts as read, what is none goes into the report."""
    for chunk in history.chunks():
        for entry, event in chunk:
            try:
                if isinstance(event, InvalidEvent):
                    raise event
                encode(event)
            except InvalidEvent as error:
                history.tally.rejected += 1
                report.add(history.origin.name, entry.index, str(error), entry.data)
        advance()


class Importer:
    """Carries old histories into the tables. `say` hears what hinders it, `advance` is called every now and then."""

    def __init__(
        self, redis: Redis, queue: str, report: Report, *, say: Callable[[str], None], advance: Callable[[], None]
    ) -> None:
        self._redis = redis
        self._queue = queue
        self._report = report
        self._say = say
        self._advance = advance
        self._raw: dict[int, Any] = {}

    def run(self, history: OldHistory) -> None:
        """Bring every entry to its end: a row, or a line in the report and a recorded rejection.

        Outages of Redis, of the database and of the workers are waited for.
        """
        flight: Flight | None = None
        for chunk in history.chunks():
            if flight is None:
                flight = self._flight(history)
            flight.send(self._to_send(history, chunk))
            self._advance()
        if flight is not None:
            flight.drain()
        self._advance()

    def _flight(self, history: OldHistory) -> Flight:
        def settled(index: int, outcome: Outcome) -> None:
            raw = self._raw.pop(index)
            if outcome.kind == "rejected":
                self._reject(history, Entry(index, raw), outcome.reason or "no reason was given")
            elif outcome.kind == "stored":
                history.tally.stored += 1
            else:
                history.tally.already_there += 1
            self._advance()

        return Flight(self._redis, self._queue, history.source, settled=settled, say=self._say)

    def _reject(self, history: OldHistory, entry: Entry, reason: str) -> None:
        history.tally.rejected += 1
        self._report.add(history.origin.name, entry.index, reason, entry.data)

    def _to_send(self, history: OldHistory, chunk: list[Item]) -> Iterator[OutboxEntry]:
        """What the database does not have; the rest is counted. Those that are no events are recorded as rejected."""
        refused: list[NoRow] = []
        events: list[tuple[Entry, Event, str]] = []
        for entry, event in chunk:
            try:
                if isinstance(event, InvalidEvent):
                    raise event
                events.append((entry, event, encode(event)))
            except InvalidEvent as error:
                refused.append(self._refusal(history, entry, str(error)))
                self._reject(history, entry, str(error))
        known = self._settle_known(history, [(entry, event) for entry, event, _ in events], refused)
        for (entry, event, text), standing in zip(events, known, strict=True):
            reason = standing.refusal()
            if standing.is_settled(history.source, entry.index):
                history.tally.already_there += 1
            elif reason is not None:
                self._reject(history, entry, reason)
            else:
                self._raw[entry.index] = entry.data
                yield OutboxEntry(
                    position=entry.index,
                    source_id=history.source_id,
                    sequence=entry.index,
                    type=event.type,
                    summary=event.data.summary,
                    event=text,
                    checks=0,
                )

    def _refusal(self, history: OldHistory, entry: Entry, reason: str) -> NoRow:
        job_id = history.job_id(entry.index)
        return NoRow(job_id, "rejected", history.source, entry.index, None, reason, as_json(entry.data))

    def _settle_known(
        self, history: OldHistory, events: list[tuple[Entry, Event]], refused: list[NoRow]
    ) -> list[Standing]:
        """Record refusals, look up the others; a refusal of what is a row by now no longer stands."""
        failures = 0
        while True:
            try:
                with get_db() as db:
                    known = standings(db, [(history.job_id(entry.index), event) for entry, event in events])
                    record_outcomes(db, refused)
                    forget_outcomes(
                        db,
                        [
                            history.job_id(entry.index)
                            for (entry, _), standing in zip(events, known, strict=True)
                            if standing.outcome == "rejected" and standing.is_own(history.source, entry.index)
                        ],
                    )
            except StoreUnavailable as error:
                failures += 1
                if failures == 1:
                    self._say(f"waiting for the database: {error}")
                time.sleep(min(_FIRST_BACKOFF_SECONDS * 2.0 ** min(failures, 10), _LAST_BACKOFF_SECONDS))
            else:
                if failures:
                    self._say("the database is back, going on")
                return known
