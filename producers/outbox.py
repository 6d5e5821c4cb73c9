"""The durable local store of a producer: an event is accepted once its entry is committed here.

One SQLite file serves any number of threads and processes. An entry is `pending` until it was handed to
Redis, then `sent`, and ends as `confirmed` or `rejected` when its acknowledgement was read. Only appending
waits for the disk: marks that a crash forgets merely cause a re-send, which the consumer absorbs.

Settled entries, confirmed or rejected, stay for a while, so that they can be sent again after the database was
restored from a backup.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self
from uuid import UUID, uuid4

from producers.errors import OutboxError
from producers.events import Payload, encode, event_of
from producers.outbox_file import OutboxFile
from producers.outcomes import Outcome
from producers.redis_keys import job_id_of
from producers.relay_lock import RelayLock

MAX_BYTES = 2**30

_BATCH_BYTES = 4 * 2**20  # of texts, which may be 8 MiB each: handing over a hundred of those takes gigabytes of memory
_PRUNE_ENTRIES = 1000  # at once: a short transaction, which no append has to wait for

_VERSION = 2
_SCHEMA = """
CREATE TABLE IF NOT EXISTS sources (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    last_sequence INTEGER NOT NULL,
    resends INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE IF NOT EXISTS entries (
    position INTEGER PRIMARY KEY,
    source_id TEXT NOT NULL REFERENCES sources (id),
    sequence INTEGER NOT NULL,
    event_id TEXT NOT NULL,
    type TEXT NOT NULL,
    summary TEXT NOT NULL,
    event TEXT NOT NULL,
    state TEXT NOT NULL DEFAULT 'pending' CHECK (state IN ('pending', 'sent', 'confirmed', 'rejected')),
    recorded_at REAL NOT NULL,
    checks INTEGER NOT NULL DEFAULT 0,
    check_at REAL,
    settled_at REAL,
    row_id INTEGER,
    reason TEXT,
    UNIQUE (source_id, sequence)
);
CREATE INDEX IF NOT EXISTS entries_pending ON entries (position) WHERE state = 'pending';
CREATE INDEX IF NOT EXISTS entries_unconfirmed ON entries (check_at) WHERE state = 'sent';
CREATE INDEX IF NOT EXISTS entries_settled ON entries (settled_at) WHERE state IN ('confirmed', 'rejected');
CREATE INDEX IF NOT EXISTS entries_awaiting ON entries (source_id) WHERE state = 'sent';
CREATE INDEX IF NOT EXISTS entries_rejected ON entries (source_id) WHERE state = 'rejected';
"""
_UPGRADE_FROM_1 = """
ALTER TABLE sources ADD COLUMN resends INTEGER NOT NULL DEFAULT 0;
DROP INDEX entries_confirmed;
DROP INDEX entries_awaiting;
"""

_TAKE_SEQUENCES = """
INSERT INTO sources (id, name, last_sequence) VALUES (:id, :name, :count)
ON CONFLICT (name) DO UPDATE SET last_sequence = last_sequence + :count
"""
_LAST_TAKEN = "SELECT id, last_sequence FROM sources WHERE name = ?"

_APPEND = """
INSERT INTO entries (source_id, sequence, event_id, type, summary, event, recorded_at)
VALUES (?, ?, ?, ?, ?, ?, ?)
"""

# The source by a query of its own: with a join SQLite might begin with the sources, and sort.
_SELECT_ENTRIES = """
SELECT position, source_id, sequence, (SELECT name FROM sources WHERE id = source_id) || '/' || source_id, checks,
    type, summary, event
FROM entries
"""
_PENDING = _SELECT_ENTRIES + "WHERE state = 'pending' ORDER BY position LIMIT ?"
_ENTRIES = _SELECT_ENTRIES + "ORDER BY position"
_ENTRY = _SELECT_ENTRIES + "WHERE position = ?"
_OVERDUE = """
SELECT position, source_id, sequence, (SELECT name FROM sources WHERE id = source_id) || '/' || source_id, checks
FROM entries WHERE state = 'sent' AND check_at <= ? ORDER BY check_at LIMIT ?
"""

_MARK_SENT = "UPDATE entries SET state = 'sent', checks = checks + 1, check_at = ? WHERE position = ?"
_POSTPONE = "UPDATE entries SET checks = checks + 1, check_at = ? WHERE position = ? AND state = 'sent'"

# A late word on an earlier delivery must not undo what is known already, with one exception: what was rejected
# and then requeued by an operator can still be stored.
_SETTLE = """
UPDATE entries SET state = :state, row_id = :row_id, reason = :reason, settled_at = :now, check_at = NULL
WHERE source_id = :source_id AND sequence = :sequence
    AND (state IN ('pending', 'sent') OR (state = 'rejected' AND :state = 'confirmed'))
"""

_AWAITING = """
SELECT id, name, resends FROM sources WHERE EXISTS
    (SELECT 1 FROM entries WHERE entries.source_id = sources.id AND state = ?)
"""

_RESEND = """
UPDATE entries SET state = 'pending', checks = 0, check_at = NULL, settled_at = NULL, row_id = NULL, reason = NULL
WHERE state IN ('confirmed', 'rejected') AND recorded_at >= ?
"""

_PRUNE = """
DELETE FROM entries WHERE position IN (
    SELECT position FROM entries WHERE state IN ('confirmed', 'rejected') AND settled_at < ?
    ORDER BY settled_at LIMIT ?)
"""

_UNSETTLED = "SELECT sequence FROM entries WHERE source_id = ? AND state IN ('pending', 'sent')"

_NUMBERS = """
SELECT sequence, event_id FROM entries WHERE source_id = ? AND sequence > ? ORDER BY sequence LIMIT ?
"""

# By the indexes alone: going through all that is kept would take seconds, whenever somebody watches.
_STATUS = """
SELECT 'pending', count(*), (SELECT recorded_at FROM entries WHERE state = 'pending' ORDER BY position LIMIT 1)
    FROM entries WHERE state = 'pending'
UNION ALL SELECT 'sent', count(*), min(recorded_at) FROM entries WHERE state = 'sent'
UNION ALL SELECT 'rejected', count(*), NULL FROM entries WHERE state = 'rejected'
UNION ALL SELECT 'settled', count(*), NULL FROM entries WHERE state IN ('confirmed', 'rejected')
"""


@dataclass(frozen=True)
class Accepted:
    """What one append gave its event: the source's name and id, and the number in its sequence."""

    event_id: UUID
    source: str
    source_id: str
    sequence: int


@dataclass(frozen=True)
class EntryHead:
    """One event on its way, without its text. `source` is as the event has it, and its acknowledgement."""

    position: int
    source_id: str
    sequence: int
    source: str
    checks: int

    @property
    def job_id(self) -> str:
        return job_id_of(self.source_id, self.sequence)


@dataclass(frozen=True)
class Entry(EntryHead):
    """One event on its way, with the exact bytes of every delivery of it."""

    type: str
    summary: str
    event: str


@dataclass(frozen=True)
class OutboxStatus:
    """Entries by state, and the time (seconds since the epoch) of the oldest that is not settled."""

    pending: int
    sent: int
    confirmed: int
    rejected: int
    oldest_unsettled: float | None

    @property
    def depth(self) -> int:
        return self.pending + self.sent


def _one_batch(rows: Iterable[Sequence[Any]]) -> list[Entry]:
    """Those before _BATCH_BYTES are exceeded, the first one in any case; the rows behind them are not read."""
    entries: list[Entry] = []
    room = _BATCH_BYTES
    for row in rows:
        entry = Entry(*row)
        room -= len(entry.event.encode())
        if room < 0 and entries:
            break
        entries.append(entry)
    return entries


def source_of(name: str, source_id: str) -> str:
    return f"{name}/{source_id}"


class Outbox:
    """Opens or creates the file at `path`, which holds at most `max_bytes`.

    Raises:
        OutboxError: here and from every method, when the file cannot be read or written.
    """

    def __init__(self, path: Path | str, *, max_bytes: int = MAX_BYTES) -> None:
        self.path = Path(path)
        self._file = OutboxFile(self.path, max_bytes)
        try:
            self._ensure_tables()
        except OutboxError:
            self.close()
            raise

    def _ensure_tables(self) -> None:
        with self._file.reading() as db:
            (version,) = db.execute("PRAGMA user_version").fetchone()
        if version > _VERSION:
            raise OutboxError(f"{self.path} was made by a newer release (version {version}, this one knows {_VERSION})")
        if version != _VERSION:
            with self._file.transaction() as db:
                (version,) = db.execute("PRAGMA user_version").fetchone()  # another process may have been first
                for statement in ((_UPGRADE_FROM_1 if version == 1 else "") + _SCHEMA).split(";"):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {_VERSION}")

    def append(self, name: str, payloads: Sequence[Payload]) -> list[Accepted]:
        """Record all of `payloads` in one durable commit, or none; the order is the order of sequences."""
        now = time.time()
        accepted = []
        with self._file.transaction() as db:
            db.execute(_TAKE_SEQUENCES, {"id": uuid4().hex, "name": name, "count": len(payloads)})
            source_id, last = db.execute(_LAST_TAKEN, (name,)).fetchone()
            source = source_of(name, source_id)
            for sequence, payload in enumerate(payloads, start=last - len(payloads) + 1):
                event = event_of(payload, source=source, sequence=sequence)
                row = (source_id, sequence, str(event.id), event.type, payload.summary, encode(event), now)
                db.execute(_APPEND, row)
                accepted.append(Accepted(event.id, source, source_id, sequence))
        return accepted

    def entries(self) -> list[Entry]:
        """Everything that is kept, in the order of recording."""
        with self._file.reading() as db:
            return [Entry(*row) for row in db.execute(_ENTRIES)]

    def pending(self, limit: int) -> list[Entry]:
        """The oldest entries that were not yet handed to Redis: one batch, `limit` entries at the most."""
        with self._file.reading() as db, closing(db.execute(_PENDING, (limit,))) as rows:
            return _one_batch(rows)

    def overdue(self, now: float, limit: int) -> list[EntryHead]:
        """Sent entries whose acknowledgement should have come by `now`."""
        with self._file.reading() as db:
            return [EntryHead(*row) for row in db.execute(_OVERDUE, (now, limit))]

    def with_texts(self, heads: Iterable[EntryHead]) -> list[Entry]:
        """The first of these: one batch."""
        with self._file.reading() as db:
            return _one_batch(row for head in heads for row in db.execute(_ENTRY, (head.position,)))

    def mark_sent(self, check_at: Mapping[int, float]) -> None:
        """Entries (by position) that Redis has now, and when to look for what became of them."""
        with self._file.transaction(durable=False) as db:
            db.executemany(_MARK_SENT, [(at, position) for position, at in check_at.items()])

    def postpone(self, check_at: Mapping[int, float]) -> None:
        """Sent entries (by position) that are still under way, and when to look again."""
        with self._file.transaction(durable=False) as db:
            db.executemany(_POSTPONE, [(at, position) for position, at in check_at.items()])

    def awaiting(self, state: Literal["sent", "rejected"]) -> list[tuple[str, str, int]]:
        """(id, name, number of its resends) of each source that has entries in this state."""
        with self._file.reading() as db:
            return db.execute(_AWAITING, (state,)).fetchall()

    def settle(self, source_id: str, resends: int, outcomes: Iterable[tuple[int, Outcome]]) -> None:
        """Store what became of entries of one source, by sequence.

        Nothing is stored when the source was sent again since it had this number of resends: what was read before
        that tells of a database that is no more.
        """
        now = time.time()
        rows = [
            {
                "state": "rejected" if outcome.kind == "rejected" else "confirmed",
                "row_id": outcome.row_id,
                "reason": outcome.reason,
                "now": now,
                "source_id": source_id,
                "sequence": sequence,
            }
            for sequence, outcome in outcomes
        ]
        with self._file.transaction(durable=False) as db:
            if db.execute("SELECT resends FROM sources WHERE id = ?", (source_id,)).fetchone() == (resends,):
                db.executemany(_SETTLE, rows)

    def resend(self, since: float) -> int:
        """Make settled entries recorded since then (seconds since the epoch) pending again; returns how many."""
        with self._file.transaction() as db:
            db.execute("UPDATE sources SET resends = resends + 1")
            return db.execute(_RESEND, (since,)).rowcount

    def prune(self, keep_seconds: float) -> int:
        """Drop some of the oldest settled entries, if they are older than wanted or the file is half full.

        Returns how many; a large backlog needs more calls. What is not settled is never dropped.
        """
        with self._file.transaction(durable=False) as db:
            settled_before = time.time() - keep_seconds
            if self._file.is_half_full(db):
                settled_before = math.inf
            return db.execute(_PRUNE, (settled_before, _PRUNE_ENTRIES)).rowcount

    def outcome(self, source_id: str, sequence: int) -> Outcome | None:
        """What became of one entry; None while it is under way."""
        with self._file.reading() as db:
            row = db.execute(
                "SELECT state, row_id, reason FROM entries WHERE source_id = ? AND sequence = ?",
                (source_id, sequence),
            ).fetchone()
        if row is None:
            raise OutboxError(f"outbox {self.path}: entry {sequence} is no longer kept")
        state, row_id, reason = row
        if state == "confirmed":
            return Outcome("stored", row_id=row_id)
        return Outcome("rejected", reason=reason) if state == "rejected" else None

    def pending_count(self) -> int:
        with self._file.reading() as db:
            return int(db.execute("SELECT count(*) FROM entries WHERE state = 'pending'").fetchone()[0])

    def status(self) -> OutboxStatus:
        with self._file.reading() as db:
            found = {state: (count, oldest) for state, count, oldest in db.execute(_STATUS)}
        (pending, oldest_pending), (sent, oldest_sent) = found["pending"], found["sent"]
        rejected = found["rejected"][0]
        oldest = min((at for at in (oldest_pending, oldest_sent) if at is not None), default=None)
        return OutboxStatus(pending, sent, found["settled"][0] - rejected, rejected, oldest)

    def used_bytes(self) -> int:
        """How much of `max_bytes` is taken."""
        with self._file.reading() as db:
            return self._file.used_bytes(db)

    def relay_lock(self) -> RelayLock:
        """The right to relay this outbox, which one thread of one process has at a time."""
        return RelayLock(self.path.with_name(self.path.name + "-relay"))

    def sources(self) -> list[tuple[str, str, int]]:
        """(id, name, last number used) of each source of this outbox."""
        with self._file.reading() as db:
            return db.execute("SELECT id, name, last_sequence FROM sources").fetchall()

    def unsettled(self, source_id: str) -> set[int]:
        """The numbers of one source that are pending or sent."""
        with self._file.reading() as db:
            return {sequence for (sequence,) in db.execute(_UNSETTLED, (source_id,))}

    def numbers(self, source_id: str, after: int, limit: int) -> list[tuple[int, UUID]]:
        """(sequence, event id) of the kept entries of one source, in order, for going through all."""
        with self._file.reading() as db:
            rows = db.execute(_NUMBERS, (source_id, after, limit)).fetchall()
        return [(sequence, UUID(event_id)) for sequence, event_id in rows]

    def close(self) -> None:
        """A closed outbox opens its file again when it is used again."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
