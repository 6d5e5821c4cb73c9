"""The durable local log of a producer: an event is accepted once its entry is committed here.

One SQLite file serves any number of threads and processes. An entry is `pending` until Redis has its job, then `sent`,
and becomes `stored` or `rejected` when its acknowledgement is read. Entries are a log that is only appended to; other
tables have their states (see outbox_schema). Only appending waits for the disk: if a crash undoes another change, the
entry is sent again, and the worker finds a duplicate.

Settled entries (stored or rejected) are kept for some days, so that they can be sent again after the database was
restored from a backup.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import wraps
from pathlib import Path
from typing import Concatenate, NamedTuple, ParamSpec, Self, TypeVar
from uuid import UUID, uuid4

from producers import outbox_counts
from producers.digests import digest_of_text
from producers.entries import (
    Accepted,
    AuditEntry,
    Entry,
    EntryStatus,
    OutboxGrowth,
    OutboxSource,
    OutboxStatus,
    full_source,
)
from producers.errors import OutboxDamaged, OutboxError
from producers.events import Payload, draft_of
from producers.outbox_check import find_fault
from producers.outbox_clock import OutboxClock
from producers.outbox_deliveries import WITH_EVENT, OutboxDeliveries
from producers.outbox_file import OutboxFile
from producers.outbox_header import OutboxHeader
from producers.outbox_place import LOCK
from producers.outbox_quarantine import Quarantine
from producers.outbox_salvage import has_content_of_an_outbox
from producers.outbox_schema import ensure_tables
from producers.outbox_segments import one_page, segments_of
from producers.relay_lock import RelayLock
from producers.segments import Segment, SettledEvent, continued
from producers.trace_context import TraceContext

P = ParamSpec("P")
T = TypeVar("T")

logger = logging.getLogger(__name__)

MAX_BYTES = 2**30

_RESENT_ENTRIES = 1000  # per transaction, so that appends wait only briefly
_AUDITED_ENTRIES = 5000
_ID_CHARACTERS = 32  # of a source's id

_TAKE_SEQUENCES = """
INSERT INTO sources (id, name, last_sequence) VALUES (:id, :name, :count)
ON CONFLICT (name) WHERE current DO UPDATE SET last_sequence = last_sequence + :count
RETURNING id, last_sequence
"""

_APPEND = """
INSERT INTO entries (source_id, sequence, nonce, recorder, recorded_at, event_id, type, summary, event)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
"""

# This check is early and is not counted, so that the interval to the next check does not grow.
_CHECK_NOW = (
    "UPDATE batches SET check_at = 0 WHERE first <= ?",
    "UPDATE retries SET check_at = 0, checks = max(checks - 1, 0) WHERE check_at IS NOT NULL AND position <= ?",
)

_RESEND = """
INSERT INTO retries (position, why, checks)
SELECT position, 'resend', 0 FROM outcomes CROSS JOIN entries USING (position)
WHERE position > ? AND position <= ? AND recorded_at >= ?
"""
_DELETE_RESENT = """
DELETE FROM outcomes WHERE position > ? AND position <= ?
    AND EXISTS (SELECT 1 FROM retries WHERE retries.position = outcomes.position)
"""
_END_OF_PAGE = """
SELECT max(position) FROM (SELECT position FROM entries WHERE position > ? AND position <= ? ORDER BY position LIMIT ?)
"""

_ENTRIES = f"""{WITH_EVENT}
FROM (SELECT entries.*, coalesce(checks, 0) AS checks FROM entries LEFT JOIN retries USING (position)) ORDER BY position
"""  # noqa: S608  # constants
_ENTRY_STATUS = "SELECT state, row_id, reason FROM entry_states WHERE source_id = ? AND sequence = ? AND nonce = ?"
_AUDIT_PAGE = """
SELECT sequence, nonce, event_id, state FROM entry_states
WHERE source_id = ? AND (sequence, nonce) > (?, ?) ORDER BY sequence, nonce LIMIT ?
"""

_SETTLED = """
SELECT sequence, nonce, row_id IS NULL, type, event FROM entries CROSS JOIN outcomes USING (position)
WHERE source_id = ? AND (sequence, nonce) > (?, ?) ORDER BY sequence, nonce
"""

_UNSETTLED = """
SELECT sequence FROM (SELECT position FROM pending UNION ALL SELECT position FROM sent) CROSS JOIN entries
    USING (position) WHERE source_id = ?
"""


class Position(NamedTuple):
    """Place of an entry in the order of recording, in the file that was at the path at that time."""

    number: int
    generation: int


def _once_more_after_repair(method: Callable[Concatenate[Outbox, P], T]) -> Callable[Concatenate[Outbox, P], T]:
    """If the method finds the file damaged, quarantine it and call the method once more, on a new file."""

    @wraps(method)
    def repaired(self: Outbox, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with self.repaired():
            return method(self, *args, **kwargs)
        return method(self, *args, **kwargs)

    return repaired


class Outbox:
    """Outbox in the file at `path`, which is created if it is missing. Appends fail when it has `max_bytes`.

    Producers and relays open it with `repair`: a damaged file is quarantined (renamed to `<name>.damaged-<number>`) and
    replaced by a new one. Commands that only read open it without `repair`: such a file is left unchanged, and
    OutboxDamaged is raised.

    Relays, doctor and audit use its parts `header`, `deliveries` and `quarantine`.

    Raises:
        OutboxDamaged: here and from every method, when the content of the file cannot be read.
        OutboxError: here and from every method, when the file cannot be read or written.
    """

    def __init__(self, path: Path | str, *, max_bytes: int = MAX_BYTES, repair: bool = False) -> None:
        self._file = OutboxFile(Path(path), max_bytes, prepare=lambda db: ensure_tables(db, self.path), repair=repair)
        self.path = self._file.path
        self._repair = repair
        self._clock = OutboxClock(lambda: self._file.generation)
        self.header = OutboxHeader(self._file, self._clock)
        self.deliveries = OutboxDeliveries(self._file, self._clock)
        self.quarantine = Quarantine(self._file)
        try:
            with self.repaired():
                self._open()
        except OutboxError:
            self.close()
            raise

    def _open(self) -> None:
        with self._file.reading() as db:
            is_of_this_boot = self._clock.is_of_this_boot(db)
        if self._repair and not is_of_this_boot:
            # Keep a reading before another process reads the clock: if the wall clock were set in between, the two
            # processes would have different times.
            with self._file.transaction(durable=False) as db:
                self._clock.keep(db)

    @property
    def generation(self) -> int:
        """Number of times that another file was found at the path."""
        return self._file.generation

    @contextmanager
    def repaired(self) -> Iterator[None]:
        """If the block finds the file damaged, quarantine the file and leave the block; the caller repeats its work.

        Raises:
            OutboxDamaged: without `repair`, or when the file does not look like an outbox.
        """
        try:
            yield
        except OutboxDamaged as error:
            # A file that never was an outbox belongs to another program and was configured by mistake.
            is_outbox = self._file.place.has_been_used() or self._has_content_of_an_outbox()
            if not is_outbox:
                error.advice = "the file is of another program: set HISTORY_OUTBOX to another path"
            if not self._repair or not is_outbox:
                raise
            moved_to = self._file.quarantine()
            if moved_to is not None:
                logger.error(
                    "%s: the file is damaged and was moved to %s. New events go into a new file. A relay salvages the"
                    " readable entries of the damaged file",
                    error,
                    moved_to,
                )

    def _has_content_of_an_outbox(self) -> bool:
        self._file.close()  # reading the file would release the locks that SQLite has on it in this process
        return has_content_of_an_outbox(self._file.place.real)

    @_once_more_after_repair
    def append(
        self, name: str, payloads: Sequence[Payload], producer_id: int = 0, trace: TraceContext | None = None
    ) -> list[Accepted]:
        """Append all of `payloads` in one durable commit, or none of them; sequences follow their order.

        `producer_id` identifies the caller, so that it can count its own entries later. `trace` is that of each event.

        Returns:
            The identifiers of each event, in the order of `payloads`.
        """
        # Before the transaction, because relays and other callers wait for its end.
        drafts = [draft_of(payload, full_source(name, "0" * _ID_CHARACTERS), trace=trace) for payload in payloads]
        accepted, rows = [], []
        random = os.urandom(8 * len(payloads)).hex()
        with self._file.transaction() as db:
            now = self._clock.now(db)
            taken = {"id": uuid4().hex, "name": name, "count": len(payloads)}
            source_id, last = db.execute(_TAKE_SEQUENCES, taken).fetchone()
            source = full_source(name, source_id)
            for n, draft in enumerate(drafts):
                sequence, nonce = last - len(drafts) + 1 + n, random[16 * n : 16 * n + 16]
                texts = (str(draft.event_id), draft.type, draft.summary, draft.text(source, sequence))
                rows.append((source_id, sequence, nonce, producer_id, now, *texts))
                accepted.append(Accepted(draft.event_id, source, source_id, sequence, nonce))
            db.executemany(_APPEND, rows)
            self._clock.keep(db)
        return accepted

    @_once_more_after_repair
    def set_destination(self, redis: str, queue: str) -> None:
        """Store the Redis and the queue that the entries go to; a relay process compares them with its own."""
        self.header.set_destination(redis, queue)

    def status_of(self, accepted: Accepted) -> EntryStatus:
        """Return the state of one entry. Raises OutboxError if it was settled and has been deleted since."""
        (status,) = self.statuses_of([accepted])
        if status is None:
            raise self.no_longer_kept(accepted)
        return status

    def no_longer_kept(self, accepted: Accepted) -> OutboxError:
        """Return the error for an entry without a status."""
        return OutboxError(f"outbox {self.path}: entry {accepted.sequence} is no longer kept")

    @_once_more_after_repair
    def statuses_of(self, accepted: Sequence[Accepted]) -> list[EntryStatus | None]:
        """Return the state of each entry, or None if it was settled and has been deleted since."""
        with self._file.reading() as db:
            keys = [(one.source_id, one.sequence, one.nonce) for one in accepted]
            rows = [db.execute(_ENTRY_STATUS, key).fetchone() for key in keys]
        missing = None
        # A missing entry may be in a damaged file, which a relay salvages soon.
        if None in rows and self.quarantine.damaged_files():
            missing = EntryStatus("pending", None, None)
        return [missing if row is None else EntryStatus(*row) for row in rows]

    @_once_more_after_repair
    def last_position(self) -> Position:
        """Return the position of the entry that was recorded last."""
        with self._file.reading() as db:
            (position,) = db.execute("SELECT max(position) FROM entries").fetchone()
            return Position(position or 0, self.generation)

    @_once_more_after_repair
    def pending_count(self, until: Position | None = None) -> int:
        """Return the number of pending entries up to this position, or of all pending entries."""
        with self._file.reading() as db:
            return outbox_counts.pending(db, self._number(until))

    @_once_more_after_repair
    def unsettled_count(self, *, producer_id: int | None = None, until: Position | None = None) -> int:
        """Return the number of pending and sent entries, optionally of one producer or up to a position only."""
        number = self._number(until)
        with self._file.snapshot() as db:
            if producer_id is not None:
                return outbox_counts.unsettled_of_producer(db, producer_id, number)
            return outbox_counts.pending(db, number) + outbox_counts.sent(db, number)

    def _number(self, until: Position | None) -> int:
        """Return the position as a number; one beyond all entries if the file at the path was replaced since then."""
        return outbox_counts.ALL if until is None or until.generation != self.generation else until.number

    @_once_more_after_repair
    def check_now(self, until: Position) -> None:
        """Make sent entries up to this position overdue, so that the next sweep checks them."""
        with self._file.transaction(durable=False) as db:
            for statement in _CHECK_NOW:
                db.execute(statement, (self._number(until),))

    @_once_more_after_repair
    def resend(self, since: float) -> int:
        """Make settled entries recorded since `since` (seconds since the epoch) pending again; return how many.

        If it fails halfway, some of them are pending and the others are unchanged; it may be called again.
        """
        with self._file.transaction() as db:
            # Compare ages, because entries have times of the outbox's own clock.
            recorded_since = self._clock.now(db) - (time.time() - since)
            # Before the first page: acknowledgements of earlier deliveries must not settle an entry of any page.
            db.execute("UPDATE sources SET resends = resends + 1")
        after, until, count = Position(0, self.generation), self.last_position(), 0
        while True:
            began_at = time.monotonic()
            with self._file.transaction() as db:
                start = after.number if after.generation == self.generation else 0
                last = self._number(until)
                (end,) = db.execute(_END_OF_PAGE, (start, last, _RESENT_ENTRIES)).fetchone()
                if end is None:
                    return count
                count += db.execute(_RESEND, (start, end, recorded_since)).rowcount
                db.execute(_DELETE_RESENT, (start, end))
                after = Position(end, self.generation)
            if end == last:
                return count
            time.sleep(time.monotonic() - began_at)  # otherwise appends would hardly ever find the file unlocked

    @_once_more_after_repair
    def status(self) -> OutboxStatus:
        """Count the entries by state."""
        with self._file.snapshot() as db:
            return outbox_counts.status(db, self._clock.now(db))

    def growth(self, seconds: float) -> OutboxGrowth | None:
        """Return by how much the unsettled entries have grown in the last seconds, see `outbox_counts.growth`."""
        with self._file.snapshot() as db:
            return outbox_counts.growth(db, self._clock.now(db), seconds)

    def oldest_pending_seconds(self) -> float | None:
        """Return the age of the oldest pending entry in seconds, or None if no entry is pending."""
        with self._file.reading() as db:
            return outbox_counts.oldest_seconds(db, "pending", self._clock.now(db))

    def used_bytes(self) -> int:
        """Return how many of the `max_bytes` are in use."""
        with self._file.reading() as db:
            return self._file.used_bytes(db)

    def quick_check(self, seconds: float) -> str | None:
        """Return the first fault of the file, see `outbox_check.find_fault`. With `repair`, rebuild stale indexes."""
        return find_fault(self._file, seconds, repair=self._repair)

    def entries(self) -> list[Entry]:
        """Return all kept entries in the order of recording."""
        with self._file.reading() as db:
            return [Entry(*row) for row in db.execute(_ENTRIES)]

    def sources(self) -> list[OutboxSource]:
        """Return all sources, the oldest first."""
        with self._file.reading() as db:
            rows = db.execute("SELECT id, name, last_sequence, current, left_because FROM sources ORDER BY rowid")
            return [OutboxSource(source_id, name, last, bool(now), why) for source_id, name, last, now, why in rows]

    def unsettled(self, source_id: str) -> set[int]:
        """Return the numbers of one source whose entries are pending or sent."""
        with self._file.reading() as db:
            return {sequence for (sequence,) in db.execute(_UNSETTLED, (source_id,))}

    def audit_pages(self, source_id: str) -> Iterator[list[AuditEntry]]:
        """Yield the kept entries of one source in pages, in the order of their numbers.

        Two entries may have the same number if the outbox and a copy of it used it and entries were carried over.
        """
        after = (-1, "")
        while True:
            with self._file.reading() as db:
                rows = db.execute(_AUDIT_PAGE, (source_id, *after, _AUDITED_ENTRIES)).fetchall()
            if not rows:
                return
            yield [AuditEntry(sequence, UUID(event_id), state) for sequence, _, event_id, state in rows]
            after = rows[-1][:2]

    def digest_chain(self, source_id: str) -> list[Segment]:
        """Return the segments of all settled entries of one source, including deleted ones.

        Those of entries that are still kept come last. They are made for this call and are not stored.
        """
        # The kept entries first: one that is deleted meanwhile is read twice, instead of not at all.
        kept: list[SettledEvent] = []
        after = (-1, "")
        while True:
            with self._file.reading() as db, closing(db.execute(_SETTLED, (source_id, *after))) as found:
                rows = one_page(found)
            if not rows:
                break
            kept += [SettledEvent(number, bool(no), digest_of_text(kind, event)) for number, _, no, kind, event in rows]
            after = rows[-1][:2]
        with self._file.reading() as db:
            segments = list(segments_of(db, source_id))
        return segments + continued(segments[-1].empty_successor() if segments else None, kept)

    def relay_lock(self) -> RelayLock:
        """Return the lock for relaying this outbox, which one thread of one process holds at a time."""
        # Beside the real file, so that two paths to it share one lock.
        return RelayLock(self._file.place.sibling(LOCK), self._file.place.real)

    def close(self) -> None:
        """Close the file. The outbox opens it again when it is used again."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
