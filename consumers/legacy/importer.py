"""Import old history into the tables, in this process, with the code by which a worker processes a batch.

Old history can be read again, so it serves as its own outbox: its source and sequences are the same on each run, and
each run inserts the entries that the database does not have yet.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
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
from producers.events import Event, encode

_MOST_CRASHES = 2  # crashes of this process while only one entry was in progress


class _Converted(NamedTuple):
    entry: Entry
    event: Event
    delivery: Delivery


class _Rejected(NamedTuple):
    """An entry that does not become an event."""

    entry: Entry
    reason: str


def dry_run(history: OldHistory, report: Report, advance: Callable[[], None]) -> None:
    """Read and convert the entries without inserting them. Those that cannot be imported go into the report."""
    for chunk in history.chunks():
        for entry in chunk:
            try:
                encode(history.event(entry))
            except InvalidEvent as error:
                history.statistics.rejected += 1
                report.add(history.import_source.name, entry.index, str(error), entry.data)
        advance()


class Importer:
    """Imports one old history.

    `say` is called with a message when the database is away. `advance` is called after each portion. `rate` limits the
    inserted events per second; a portion then has at most `rate` entries.
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
        self._raw: dict[str, Entry] = {}  # entries of undecided events, by job id
        self._stopped = threading.Event()  # a thread that waits for the database ends
        self._batches = ImportBatches(decided=self._count, say=say, stopped=self._stopped)

    def run(self) -> None:
        """Decide every entry: make a row, or record a rejection and add a line to the report.

        While one portion is stored by a thread, this one reads and converts the next. During an outage of the
        database, wait.
        """
        with ThreadPoolExecutor(1) as database:
            try:
                self._run(database)
            except BaseException:
                self._stopped.set()
                raise

    def _run(self, database: ThreadPoolExecutor) -> None:
        history = self._history
        stored: Future[None] | None = None
        for number, chunk in enumerate(history.chunks(min(CHUNK_WEIGHT, self._rate or CHUNK_WEIGHT))):
            if number == 0:
                self._poison = retry_until_available(self._poison_rejections, self._say, self._stopped)
            for entries in self._in_progress.portions(history.source, chunk):
                converted, rejected = self._converted(entries)
                if stored is not None:
                    stored.result()
                stored = database.submit(self._store, converted, rejected)
                if self._in_progress.after_crash:  # only these entries may be the cause of the next one
                    stored.result()
                self._advance()
        if stored is not None:
            stored.result()
        database.submit(self._batches.finish).result()
        self._advance()

    def _poison_rejections(self) -> dict[int, PoisonRejection]:
        with get_db() as db:
            return poison_rejections(db, self._history.source)

    def _converted(self, entries: list[Entry]) -> tuple[list[_Converted], list[_Rejected]]:
        converted: list[_Converted] = []
        rejected: list[_Rejected] = []
        for entry in entries:
            one = self._convert(entry)
            if isinstance(one, _Rejected):
                rejected.append(one)
            else:
                converted.append(one)
        return converted, rejected

    def _store(self, converted: list[_Converted], rejected: list[_Rejected]) -> None:
        started = time.monotonic()
        states, rows = retry_until_available(lambda: self._record_known(converted, rejected), self._say, self._stopped)
        for entry, reason in rejected:
            row = rows.get(entry.index)
            self._reject(
                entry, reason + ("" if row is None else f"; an earlier import stored this sequence as row {row}")
            )
        missing = list(self._missing(converted, states))
        self._batches.insert(missing)
        if self._rate is not None:
            time.sleep(max(0.0, len(missing) / self._rate - (time.monotonic() - started)))

    def _convert(self, entry: Entry) -> _Converted | _Rejected:
        """Convert an entry.

        An entry that crashed the process too often becomes a poison event. If even that crashed the process, it is
        rejected without conversion.
        """
        crashes = self._in_progress.crashes(self._history.source, entry.index)
        poison = self._poison.get(entry.index)
        if poison is not None and poison.event == as_json(entry.data):
            return _Rejected(entry, poison.reason)
        if crashes > _MOST_CRASHES:  # the process crashed although the event was to be rejected unread
            return _Rejected(entry, str(PoisonEvent(crashes)))
        try:
            event = self._history.event(entry)
            text = encode(event) if self._history.import_source.kind == "archive" else ""  # it may be too large
        except InvalidEvent as error:
            return _Rejected(entry, str(error))
        poison_error = PoisonEvent(crashes) if crashes == _MOST_CRASHES else None
        job_id = self._history.job_id(entry.index)
        return _Converted(entry, event, Delivery(job_id, text, type(event), poison_error, event))

    def _record_known(
        self, converted: list[_Converted], rejected: list[_Rejected]
    ) -> tuple[list[ImportState], dict[int, int]]:
        """Record the rejected entries, look up the others, and delete rejections of entries that have a row by now.

        If an earlier run had other options or another file, the sequence of a rejected entry may have a row. Then that
        row accounts for the sequence, and no rejection is recorded.

        Returns:
            The import state of each converted entry, and the row ids of rejected entries by sequence.
        """
        history = self._history
        with get_db() as db:
            states = import_states(db, [(one.delivery.job_id, one.event) for one in converted])
            rows = rows_of_numbers(
                db, history.import_source.kind, history.source, [one.entry.index for one in rejected]
            )
            record_outcomes(db, [self._no_row(*one) for one in rejected if one.entry.index not in rows])
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
        """Yield the deliveries that the database does not have and that must be inserted. Count the others."""
        for (entry, _, delivery), state in zip(converted, states, strict=True):
            poison = self._poison.get(entry.index)
            known_poison = poison.reason if poison is not None and poison.event == delivery.event_text else None
            reason = state.rejection_reason() or known_poison
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
            self._reject(entry, outcome.reason or "the reason is unknown")
        elif outcome.kind == "stored":
            self._history.statistics.stored += 1
        else:
            self._history.statistics.already_there += 1

    def _reject(self, entry: Entry, reason: str) -> None:
        self._history.statistics.rejected += 1
        self._report.add(self._history.import_source.name, entry.index, reason, entry.data)
