"""The import: old history into the tables, in this process, by the worker's own processing of a batch.

Old history can be read again, so it is its own outbox: its source and its numbers are the same on each run, and a run
inserts the entries that the database does not have yet.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from consumers.db.engine import get_db
from consumers.db.outcomes import OutcomeRow, forget_outcomes, record_outcomes
from consumers.errors import PoisonEvent
from consumers.legacy.entries_in_progress import EntriesInProgress
from consumers.legacy.import_batches import ImportBatches, retry_until_available
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
from consumers.worker.deliveries import Delivery
from producers.acknowledgements import Outcome
from producers.errors import InvalidEvent
from producers.events import KINDS, Event, encode

_MOST_CRASHES = 2  # of this process, while it processed only this entry


class _Converted(NamedTuple):
    entry: Entry
    event: Event
    delivery: Delivery


class _Refused(NamedTuple):
    """An entry that does not become an event."""

    entry: Entry
    reason: str


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
        in_progress: EntriesInProgress,
        *,
        say: Callable[[str], None],
        advance: Callable[[], None],
        rate: int | None = None,
    ) -> None:
        self._history = history
        self._report = report
        self._in_progress = in_progress
        self._say = say
        self._advance = advance
        self._rate = rate
        self._poison: dict[int, PoisonRejection] = {}
        self._raw: dict[str, Entry] = {}  # by job id, of events that are not decided yet
        self._batches = ImportBatches(decided=self._count, say=say)

    def run(self) -> None:
        """Decide every entry: a row, or a line in the report and a recorded rejection.

        Outages of the database are waited for.
        """
        history = self._history
        for number, chunk in enumerate(history.chunks(min(CHUNK_WEIGHT, self._rate or CHUNK_WEIGHT))):
            if number == 0:
                self._poison = retry_until_available(self._poison_rejections, self._say)
            for entries in self._in_progress.portions(history.source, chunk):
                self._import(entries)
                self._advance()
        self._batches.finish()
        self._advance()

    def _poison_rejections(self) -> dict[int, PoisonRejection]:
        with get_db() as db:
            return poison_rejections(db, self._history.source)

    def _import(self, entries: list[Entry]) -> None:
        started = time.monotonic()
        converted: list[_Converted] = []
        refused: list[_Refused] = []
        for entry in entries:
            one = self._convert(entry)
            if isinstance(one, _Refused):
                refused.append(one)
            else:
                converted.append(one)
        states, rows = retry_until_available(lambda: self._record_known(converted, refused), self._say)
        for entry, reason in refused:
            row = rows.get(entry.index)
            self._reject(
                entry, reason + ("" if row is None else f"; an earlier import stored this number as row {row}")
            )
        missing = list(self._missing(converted, states))
        self._batches.insert(missing)
        if self._rate is not None:
            time.sleep(max(0.0, len(missing) / self._rate - (time.monotonic() - started)))

    def _convert(self, entry: Entry) -> _Converted | _Refused:
        """Convert an entry. One that crashed the process too often is delivered as poison, or not even converted."""
        crashes = self._in_progress.crashes(self._history.source, entry.index)
        poison = self._poison.get(entry.index)
        if poison is not None and poison.event == as_json(entry.data):
            return _Refused(entry, poison.reason)
        if crashes > _MOST_CRASHES:  # it was to be rejected unread, and the process ended all the same
            return _Refused(entry, str(PoisonEvent(crashes)))
        try:
            event = self._history.event(entry)
            text = encode(event)
        except InvalidEvent as error:
            return _Refused(entry, str(error))
        refusal = PoisonEvent(crashes) if crashes == _MOST_CRASHES else None
        job_id = self._history.job_id(entry.index)
        return _Converted(entry, event, Delivery(job_id, text, KINDS[event.type].model, refusal))

    def _record_known(
        self, converted: list[_Converted], refused: list[_Refused]
    ) -> tuple[list[ImportState], dict[int, int]]:
        """Record the refused entries, look the others up, and delete rejections of entries that have a row by now.

        The number of a refused entry may have a row, if an earlier run had other options or another file. Then the row
        accounts for the number: its id is in the second result, and no rejection is recorded.
        """
        history = self._history
        with get_db() as db:
            states = import_states(db, [(one.delivery.job_id, one.event) for one in converted])
            rows = rows_of_numbers(db, history.import_source.kind, history.source, [one.entry.index for one in refused])
            record_outcomes(db, [self._no_row(*one) for one in refused if one.entry.index not in rows])
            forget_outcomes(
                db,
                [
                    one.delivery.job_id
                    for one, state in zip(converted, states, strict=True)
                    if state.outcome == "rejected" and state.is_own(history.source, one.entry.index)
                ],
            )
        return states, rows

    def _no_row(self, entry: Entry, reason: str) -> OutcomeRow:
        job_id = self._history.job_id(entry.index)
        return OutcomeRow(job_id, "rejected", self._history.source, entry.index, None, reason, as_json(entry.data))

    def _missing(self, converted: list[_Converted], states: list[ImportState]) -> Iterator[Delivery]:
        """The events that the database does not have, and that are to be inserted; the others are counted."""
        for (entry, _, delivery), state in zip(converted, states, strict=True):
            poison = self._poison.get(entry.index)
            known_poison = poison.reason if poison is not None and poison.event == delivery.text else None
            reason = state.refusal() or known_poison
            if state.is_accounted_for(self._history.source, entry.index):
                self._history.statistics.already_there += 1
            elif reason is not None:
                self._reject(entry, reason)
            else:
                self._raw[delivery.job_id] = entry
                yield delivery

    def _count(self, job_id: str, outcome: Outcome) -> None:
        entry = self._raw.pop(job_id)
        if outcome.kind == "rejected":
            self._reject(entry, outcome.reason or "no reason was given")
        elif outcome.kind == "stored":
            self._history.statistics.stored += 1
        else:
            self._history.statistics.already_there += 1

    def _reject(self, entry: Entry, reason: str) -> None:
        self._history.statistics.rejected += 1
        self._report.add(self._history.import_source.name, entry.index, reason, entry.data)
