"""The import: old history into the tables, in this process, by the worker's own processing of a batch.

Old history can be read again, so it is its own outbox: its source and its numbers are the same on each run, and a run
inserts the entries that the database does not have yet.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from consumers.db.engine import drop_connections, get_db
from consumers.db.outcomes import NoRow, forget_outcomes, record_outcomes
from consumers.errors import PoisonEvent, StoreUnavailable
from consumers.legacy.entries_in_work import EntriesInWork
from consumers.legacy.import_report import Report, as_json
from consumers.legacy.import_state import (
    ImportState,
    PoisonRejection,
    import_states,
    poison_rejections,
    rows_of_numbers,
)
from consumers.legacy.json_arrays import Entry
from consumers.legacy.old_history import CHUNK_WEIGHT, OldHistory
from consumers.worker.batch import Delivery
from consumers.worker.batch import Unsettled as Deferred
from consumers.worker.batch import settle as process_batch
from producers.acknowledgements import Outcome
from producers.backoff import backoff_seconds
from producers.errors import HistoryError, InvalidEvent
from producers.events import MODELS, Event, encode

_FIRST_BACKOFF_SECONDS = 0.2
_LAST_BACKOFF_SECONDS = 5.0
_BATCH_CHARACTERS = 4 * 1024 * 1024
_MOST_CRASHES = 2  # of this process, while it had nothing but the entry in work
_MOST_FAILURES = 3  # of processing the entry alone
_MOST_DEFERRED = 1000

_Answer = TypeVar("_Answer")


class _Refusal(NamedTuple):
    """An entry that is not inserted, and why; `text` is the event's if it could be made, else the entry's."""

    entry: Entry
    reason: str
    text: str
    event: Event | None = None


class _Converted(NamedTuple):
    entry: Entry
    event: Event
    text: str


@dataclass
class _Undecided:
    """An event that is to be inserted; `failures` counts defects met while it was processed alone."""

    made: _Converted
    delivery: Delivery
    failures: int = 0


def dry_run(history: OldHistory, report: Report, advance: Callable[[], None]) -> None:
    """Only read it: entries that can be imported count as read, the others go into the report."""
    for chunk in history.chunks():
        for entry in chunk:
            try:
                encode(history.event(entry))
            except InvalidEvent as error:
                history.statistics.rejected += 1
                report.add(history.import_source.name, entry.index, str(error), entry.data)
        advance()


class Importer:
    """Imports one old history. `say` gets a message when the database is away; `advance` is called after each portion.

    With `rate`, at most so many events a second are inserted, in portions of at most a second's.
    """

    def __init__(
        self,
        history: OldHistory,
        report: Report,
        in_work: EntriesInWork,
        *,
        say: Callable[[str], None],
        advance: Callable[[], None],
        rate: int | None = None,
    ) -> None:
        self._history = history
        self._report = report
        self._in_work = in_work
        self._say = say
        self._advance = advance
        self._rate = rate
        self._poison: dict[int, PoisonRejection] = {}
        self._deferred: dict[str, _Undecided] = {}

    def run(self) -> None:
        """Decide every entry: a row, or a line in the report and a recorded rejection.

        Outages of the database are waited for.
        """
        history = self._history
        for number, chunk in enumerate(history.chunks(min(CHUNK_WEIGHT, self._rate or CHUNK_WEIGHT))):
            if number == 0:
                self._poison = self._when_available(self._poison_rejections)
            for entries in self._in_work.portions(history.source, chunk):
                self._import(entries)
                self._advance()
        self._retry_deferred()
        self._advance()

    def _poison_rejections(self) -> dict[int, PoisonRejection]:
        with get_db() as db:
            return poison_rejections(db, self._history.source)

    def _import(self, entries: list[Entry]) -> None:
        started = time.monotonic()
        made: list[_Converted] = []
        refused: list[_Refusal] = []
        for entry in entries:
            one = self._converted(entry)
            if isinstance(one, _Refusal):
                refused.append(one)
            else:
                made.append(one)
        states, rows = self._when_available(lambda: self._record_known(made, refused))
        for refusal in refused:
            row = rows.get(refusal.entry.index)
            earlier = "" if row is None else f"; an earlier import stored this number as row {row}"
            self._reject(refusal.entry, refusal.reason + earlier)
        missing = dict(self._missing(made, states))
        for batch in _batches(missing):
            self._when_available(lambda batch=batch: self._decide(batch))  # type: ignore[misc]  # mypy wants a type
            self._deferred |= batch
        if len(self._deferred) > _MOST_DEFERRED:
            self._retry_deferred()
        if self._rate is not None:
            time.sleep(max(0.0, len(missing) / self._rate - (time.monotonic() - started)))

    def _converted(self, entry: Entry) -> _Converted | _Refusal:
        """The event of an entry, or why it is refused: because it is none, or because of the crashes that it caused."""
        crashes = self._in_work.crashes(self._history.source, entry.index)
        poison = self._poison.get(entry.index)
        if poison is not None and poison.event == as_json(entry.data):
            return _Refusal(entry, poison.reason, poison.event)
        if crashes > _MOST_CRASHES:  # it was to be refused, and even so the process ended: it is not converted again
            return _Refusal(entry, str(PoisonEvent(crashes)), as_json(entry.data))
        try:
            event = self._history.event(entry)
            text = encode(event)
        except InvalidEvent as error:
            return _Refusal(entry, str(error), as_json(entry.data))
        if crashes == _MOST_CRASHES:
            return _Refusal(entry, str(PoisonEvent(crashes)), text, event)
        if poison is not None and poison.event == text:
            return _Refusal(entry, poison.reason, text, event)
        return _Converted(entry, event, text)

    def _record_known(
        self, made: list[_Converted], refused: list[_Refusal]
    ) -> tuple[list[ImportState], dict[int, int]]:
        """Record the refusals and look the others up; a rejection of an entry that is a row by now is forgotten.

        The number of a refused entry may have a row, from a run with other options or from before the file was changed.
        Then the row alone accounts for the number: its id is in the second result, and no refusal is recorded.
        """
        history = self._history
        with get_db() as db:
            states = import_states(db, [(history.job_id(one.entry.index), one.event) for one in made])
            rows = rows_of_numbers(db, history.import_source.kind, history.source, [one.entry.index for one in refused])
            record_outcomes(db, [self._no_row(one) for one in refused if one.entry.index not in rows])
            forget_outcomes(
                db,
                [
                    history.job_id(one.entry.index)
                    for one, state in zip(made, states, strict=True)
                    if state.outcome == "rejected" and state.is_own(history.source, one.entry.index)
                ],
            )
        return states, rows

    def _no_row(self, refusal: _Refusal) -> NoRow:
        index = refusal.entry.index
        event_id = None if refusal.event is None else refusal.event.id
        return NoRow(
            self._history.job_id(index), "rejected", self._history.source, index, event_id, refusal.reason, refusal.text
        )

    def _missing(self, made: list[_Converted], states: list[ImportState]) -> Iterator[tuple[str, _Undecided]]:
        """The events that the database does not have, by job id; the others are counted."""
        for one, state in zip(made, states, strict=True):
            reason = state.refusal()
            if state.is_settled(self._history.source, one.entry.index):
                self._history.statistics.already_there += 1
            elif reason is not None:
                self._reject(one.entry, reason)
            else:
                job_id = self._history.job_id(one.entry.index)
                yield job_id, _Undecided(one, Delivery(job_id, one.text, MODELS[one.event.type]))

    def _decide(self, batch: dict[str, _Undecided], *, last: bool = False) -> None:
        """Insert the batch; `batch` keeps what could not be decided now.

        Raises:
            StoreUnavailable: nothing of the batch was decided, for the database's trouble. One event alone is deferred
                instead, so that it does not hold up the others, unless it is of the `last`.
        """
        decided = False
        waiting: list[HistoryError] = []
        for results in process_batch([one.delivery for one in batch.values()]):
            for result in results:
                if not isinstance(result, Deferred):
                    decided = True
                    self._count(batch.pop(result.job_id).made.entry, result.outcome)
                elif isinstance(result.error, StoreUnavailable):
                    waiting.append(result.error)
                else:
                    self._count_failure(batch, result)
            if waiting and not decided and (last or len(waiting) > 1):
                raise waiting[0]

    def _retry_deferred(self) -> None:
        while self._deferred:
            self._when_available(lambda: self._decide(self._deferred, last=True))

    def _count_failure(self, batch: dict[str, _Undecided], deferred: Deferred) -> None:
        """Count a defect that the event met alone; after _MOST_FAILURES of them, reject the event as poison."""
        one = batch[deferred.job_id]
        one.failures += 1
        if one.failures < _MOST_FAILURES:
            return
        made, reason = one.made, str(PoisonEvent(one.failures, deferred.error))
        with get_db() as db:
            record_outcomes(db, [self._no_row(_Refusal(made.entry, reason, made.text, made.event))])
        self._reject(made.entry, reason)
        del batch[deferred.job_id]

    def _count(self, entry: Entry, outcome: Outcome) -> None:
        if outcome.kind == "rejected":
            self._reject(entry, outcome.reason or "no reason was given")
        elif outcome.kind == "stored":
            self._history.statistics.stored += 1
        else:
            self._history.statistics.already_there += 1

    def _reject(self, entry: Entry, reason: str) -> None:
        self._history.statistics.rejected += 1
        self._report.add(self._history.import_source.name, entry.index, reason, entry.data)

    def _when_available(self, work: Callable[[], _Answer]) -> _Answer:
        """The answer of `work`, which is called again, after growing pauses, while the database cannot take it."""
        failures = 0
        while True:
            try:
                answer = work()
            except StoreUnavailable as error:
                failures += 1
                if failures == 1:
                    self._say(f"waiting for the database: {error}")
                drop_connections()
                time.sleep(backoff_seconds(failures, first=_FIRST_BACKOFF_SECONDS, last=_LAST_BACKOFF_SECONDS))
            else:
                if failures:
                    self._say("the database is back, going on")
                return answer


def _batches(missing: dict[str, _Undecided]) -> Iterator[dict[str, _Undecided]]:
    """In order, each with at most _BATCH_CHARACTERS of text unless a single event has more."""
    batch: dict[str, _Undecided] = {}
    size = 0
    for job_id, one in missing.items():
        if batch and size + len(one.made.text) > _BATCH_CHARACTERS:
            yield batch
            batch, size = {}, 0
        batch[job_id] = one
        size += len(one.made.text)
    if batch:
        yield batch
