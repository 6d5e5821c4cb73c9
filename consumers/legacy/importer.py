"""The import: old history as events through the same queue and workers as live traffic.

What is read can be read again, so it is its own outbox: its source and numbers are the same on each run, and a run
sends what the database does not have yet.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from redis import Redis

from consumers.db.engine import get_db
from consumers.db.outcomes import NoRow, forget_outcomes, record_outcomes
from consumers.errors import StoreUnavailable
from consumers.legacy.flight import Flight
from consumers.legacy.import_report import Report, as_json
from consumers.legacy.import_state import Standing, rows_of_numbers, standings
from consumers.legacy.json_arrays import Entry
from consumers.legacy.old_history import Item, OldHistory
from producers.acknowledgements import Outcome
from producers.entries import Entry as OutboxEntry
from producers.errors import InvalidEvent
from producers.events import Event, encode
from producers.times import backoff_seconds

_FIRST_BACKOFF_SECONDS = 0.2
_LAST_BACKOFF_SECONDS = 5.0


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
        refused: list[tuple[Entry, str]] = []
        events: list[tuple[Entry, Event, str]] = []
        for entry, event in chunk:
            try:
                if isinstance(event, InvalidEvent):
                    raise event
                events.append((entry, event, encode(event)))
            except InvalidEvent as error:
                refused.append((entry, str(error)))
        known, rows = self._settle_known(history, [(entry, event) for entry, event, _ in events], refused)
        for entry, why in refused:
            row = rows.get(entry.index)
            self._reject(
                history, entry, why if row is None else f"{why}; an earlier import stored this number as row {row}"
            )
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
                    nonce="",
                    source=history.source,
                    checks=0,
                    type=event.type,
                    summary=event.data.summary,
                    event=text,
                )

    def _refusal(self, history: OldHistory, entry: Entry, reason: str) -> NoRow:
        job_id = history.job_id(entry.index)
        return NoRow(job_id, "rejected", history.source, entry.index, None, reason, as_json(entry.data))

    def _settle_known(
        self, history: OldHistory, events: list[tuple[Entry, Event]], refused: list[tuple[Entry, str]]
    ) -> tuple[list[Standing], dict[int, int]]:
        """Record refusals, look up the others; a refusal of what is a row by now no longer stands.

        The number of an entry that is refused now may have a row, from a run with other options or from before the
        file was changed: then the row stands alone, and its id is in the second result.
        """
        failures = 0
        while True:
            try:
                with get_db() as db:
                    known = standings(db, [(history.job_id(entry.index), event) for entry, event in events])
                    rows = rows_of_numbers(
                        db, history.origin.kind, history.source, [entry.index for entry, _ in refused]
                    )
                    record_outcomes(db, [self._refusal(history, *one) for one in refused if one[0].index not in rows])
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
                time.sleep(backoff_seconds(failures, first=_FIRST_BACKOFF_SECONDS, last=_LAST_BACKOFF_SECONDS))
            else:
                if failures:
                    self._say("the database is back, going on")
                return known, rows
