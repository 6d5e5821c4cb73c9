"""The relay's view of an outbox: which entries to send or check, and how to store the results."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from typing import Any, Literal

from producers.acknowledgements import Acknowledgement
from producers.entries import Entry, EntryHead, SettledKeys
from producers.outbox_clock import OutboxClock
from producers.outbox_file import OutboxFile

LAST_CHECK_SECONDS = 300.0  # the longest interval between two checks of a sent entry

_BATCH_BYTES = 4 * 2**20  # an event may have 8 MiB: sending a hundred of those at once would take gigabytes of memory
_PRUNED_ENTRIES = 1000  # per transaction, so that appends wait only briefly

# A subquery reads the source: with a join, SQLite might begin with the sources and sort.
_HEAD = """
SELECT position, source_id, sequence, nonce, (SELECT name FROM sources WHERE id = source_id) || '/' || source_id, checks
"""
SELECT_ENTRIES = _HEAD + ", type, summary, event FROM entries "
_PENDING = SELECT_ENTRIES + "WHERE state = 'pending' ORDER BY position LIMIT ?"
_ENTRY = SELECT_ENTRIES + "WHERE position = ?"
# No check is due later than after the longest interval: a later time was written by a clock that was ahead.
_OVERDUE = f"""
SELECT * FROM ({_HEAD} FROM entries WHERE state = 'sent' AND check_at <= :now ORDER BY check_at LIMIT :limit)
UNION ALL
SELECT * FROM ({_HEAD} FROM entries WHERE state = 'sent' AND check_at > :latest ORDER BY check_at DESC LIMIT :limit)
LIMIT :limit
"""  # noqa: S608  # constants
_SENT = _HEAD + ", recorded_at FROM entries WHERE state = 'sent' AND position > ? ORDER BY position LIMIT ?"

_MARK_SENT = (
    "UPDATE entries SET state = 'sent', checks = checks + 1, check_at = ? WHERE position = ? AND state = 'pending'"
)
_POSTPONE = "UPDATE entries SET checks = checks + 1, check_at = ? WHERE position = ? AND state = 'sent'"

# A late acknowledgement of an earlier delivery must not change a settled entry, with one exception: an event that was
# rejected, and that an operator then requeued, can still be stored. The event's id is compared because entries of
# earlier releases have no nonce.
_SETTLE = """
UPDATE entries SET state = :state, row_id = :row_id, reason = :reason, settled_at = :now, check_at = NULL
WHERE source_id = :source_id AND sequence = :sequence AND nonce = :nonce
    AND (:event_id IS NULL OR event_id = :event_id)
    AND (state IN ('pending', 'sent') OR (state = 'rejected' AND :state = 'stored'))
"""
_IS_KEPT = "SELECT 1 FROM entries WHERE source_id = ? AND sequence = ? AND nonce = ?"
_IS_SETTLED = _IS_KEPT + " AND state IN ('stored', 'rejected')"

_AWAITING = """
SELECT id, name, resends FROM sources WHERE EXISTS
    (SELECT 1 FROM entries WHERE entries.source_id = sources.id AND state = ?)
"""

_PRUNE = """
DELETE FROM entries WHERE position IN (
    SELECT position FROM entries WHERE state IN ('stored', 'rejected') AND settled_at < ?
    ORDER BY settled_at LIMIT ?)
"""


class OutboxDeliveries:
    """Deliveries of the outbox in `file`.

    Raises:
        OutboxError: from every method, when the file cannot be read or written.
    """

    def __init__(self, file: OutboxFile, clock: OutboxClock) -> None:
        self._file = file
        self._clock = clock

    def pending(self, limit: int) -> list[Entry]:
        """Return the oldest pending entries: one batch of at most `limit` entries."""
        with self._file.reading() as db, closing(db.execute(_PENDING, (limit,))) as rows:
            return _one_batch(rows)

    def overdue(self, limit: int) -> list[EntryHead]:
        """Return at most `limit` sent entries whose next check is due."""
        with self._file.reading() as db:
            now = self._clock.now(db)
            latest = now + 1.2 * LAST_CHECK_SECONDS
            rows = db.execute(_OVERDUE, {"now": now, "latest": latest, "limit": limit})
            return [EntryHead(*row) for row in rows]

    def sent(self, after: int, limit: int) -> list[tuple[EntryHead, float]]:
        """Return sent entries after a position, in the order of recording, each with its age in seconds."""
        with self._file.reading() as db:
            now = self._clock.now(db)
            return [(EntryHead(*head), max(now - at, 0.0)) for *head, at in db.execute(_SENT, (after, limit))]

    def with_events(self, heads: Iterable[EntryHead]) -> list[Entry]:
        """Return the first of these entries with their events: one batch."""
        with self._file.reading() as db:
            return _one_batch(row for head in heads for row in db.execute(_ENTRY, (head.position,)))

    def mark_sent(self, check_after: Mapping[int, float]) -> None:
        """Mark entries as sent; `check_after` maps each position to the seconds until its first check."""
        self._mark(_MARK_SENT, check_after)

    def postpone(self, check_after: Mapping[int, float]) -> None:
        """Set the next check of sent entries; `check_after` maps each position to the seconds until then."""
        self._mark(_POSTPONE, check_after)

    def _mark(self, statement: str, check_after: Mapping[int, float]) -> None:
        with self._file.transaction(durable=False) as db:
            now = self._clock.now(db)
            db.executemany(statement, [(now + seconds, position) for position, seconds in check_after.items()])
            self._clock.keep(db)

    def awaiting(self, state: Literal["sent", "rejected"]) -> list[tuple[str, str, int]]:
        """Return (id, name, number of resends) of each source that has entries in this state."""
        with self._file.reading() as db:
            return db.execute(_AWAITING, (state,)).fetchall()

    def settle(self, source_id: str, resends: int, acknowledgements: Mapping[Any, Acknowledgement]) -> SettledKeys:
        """Settle entries of one source by their acknowledgements, which may have any keys.

        If the source has another number of resends than `resends`, nothing is settled: it was resent meanwhile, and the
        acknowledgements are of the replaced database.

        Returns:
            The keys of the acknowledgements whose entries this outbox has; the other keys are left out.
        """
        done = SettledKeys([], [])
        with self._file.transaction(durable=False) as db:
            if db.execute("SELECT resends FROM sources WHERE id = ?", (source_id,)).fetchone() != (resends,):
                return done
            now = self._clock.now(db)
            for key, one in acknowledgements.items():
                if one.source_id != source_id:
                    continue
                if db.execute(_SETTLE, _settled_columns(one, now)).rowcount:
                    done.changed.append(key)
                elif db.execute(_IS_KEPT, (source_id, one.sequence, one.nonce)).fetchone():
                    done.known.append(key)
            self._clock.keep(db)
        return done

    def has(self, delivery: tuple[str, int, str] | None) -> bool:
        """Return whether the outbox still has the entry of this source id, number and nonce."""
        with self._file.reading() as db:
            return delivery is not None and db.execute(_IS_KEPT, delivery).fetchone() is not None

    def is_settled(self, delivery: tuple[str, int, str] | None) -> bool:
        """Return whether the entry of this source id, number and nonce is stored or rejected."""
        with self._file.reading() as db:
            return delivery is not None and db.execute(_IS_SETTLED, delivery).fetchone() is not None

    def prune(self, keep_seconds: float) -> int:
        """Delete some of the oldest settled entries, if they were settled longer ago or the file is half full.

        Entries that are not settled are never deleted.

        Returns:
            How many were deleted. Call it again until that is 0.
        """
        with self._file.transaction(durable=False) as db:
            settled_before = self._clock.now(db) - keep_seconds
            if self._file.is_half_full(db):
                settled_before = math.inf
            return db.execute(_PRUNE, (settled_before, _PRUNED_ENTRIES)).rowcount


def _settled_columns(one: Acknowledgement, now: float) -> dict[str, Any]:
    return {
        "source_id": one.source_id,
        "sequence": one.sequence,
        "nonce": one.nonce,
        "event_id": one.event_id,
        "state": "rejected" if one.outcome.kind == "rejected" else "stored",
        "row_id": one.outcome.row_id,
        "reason": one.outcome.reason,
        "now": now,
    }


def _one_batch(rows: Iterable[Sequence[Any]]) -> list[Entry]:
    """Return the first entries, up to _BATCH_BYTES of events but at least one; the remaining rows are not read."""
    entries: list[Entry] = []
    room = _BATCH_BYTES
    for row in rows:
        entry = Entry(*row)
        room -= len(entry.event.encode())
        if room < 0 and entries:
            break
        entries.append(entry)
    return entries
