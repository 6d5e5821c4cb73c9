"""The relay's view of an outbox: which entries to send or check, and how to store the results."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from typing import Any, Literal

from producers.acknowledgements import Acknowledgement
from producers.entries import Entry, EntryHead, SettledKeys
from producers.outbox_clock import OutboxClock
from producers.outbox_file import OutboxFile
from producers.outbox_schema import IS_PLAIN, SKIP_SETTLED
from producers.outbox_segments import add_to_chain, one_page, settled_event
from producers.segments import SettledEvent

LAST_CHECK_SECONDS = 300.0  # the longest interval between two checks of a sent entry

_BATCH_BYTES = 4 * 2**20  # an event may have 8 MiB: sending a whole batch of those would take gigabytes of memory
_PRUNED_ENTRIES = 1000  # per transaction, so that appends wait only briefly

# A subquery reads the source: with a join, SQLite might begin with the sources and sort.
HEAD = """
SELECT position, source_id, sequence, nonce, (SELECT name FROM sources WHERE id = source_id) || '/' || source_id, checks
"""
WITH_EVENT = HEAD + ", type, summary, event "
_PENDING_RETRIES = f"""{WITH_EVENT}
FROM retries CROSS JOIN entries USING (position) WHERE check_at IS NULL ORDER BY position LIMIT ?
"""  # constants
_PENDING_TAIL = f"""{WITH_EVENT}
FROM (SELECT *, 0 AS checks FROM entries) AS entries WHERE position > (SELECT sent_through FROM outbox) AND {IS_PLAIN}
ORDER BY position LIMIT ?
"""  # noqa: S608  # constants
_SETTLED_UNSENT = "SELECT sent_through < (SELECT max(position) FROM entries) FROM outbox"  # if no entry is pending
_RETRY = WITH_EVENT + "FROM retries CROSS JOIN entries USING (position) WHERE position = ?"
# No check is due later than after the longest interval: a later time was written by a clock that was ahead.
_IS_DUE = "(check_at <= :now OR check_at > :latest)"
_OVERDUE = f"""
SELECT * FROM ({HEAD} FROM retries CROSS JOIN entries USING (position) WHERE check_at <= :now
    ORDER BY check_at LIMIT :limit)
UNION ALL
SELECT * FROM ({HEAD} FROM retries CROSS JOIN entries USING (position) WHERE check_at > :latest
    ORDER BY check_at DESC LIMIT :limit)
LIMIT :limit
"""  # noqa: S608  # constants
_SENT = f"""{HEAD}, recorded_at
FROM sent CROSS JOIN entries USING (position) WHERE position > ? ORDER BY position LIMIT ?
"""  # constants

_HAS_DUE_BATCH = f"SELECT EXISTS (SELECT 1 FROM batches WHERE {_IS_DUE})"  # noqa: S608  # constants
# A check that `check_now` asked for is not counted, so that the interval to the next one does not grow.
_SPLIT_DUE_BATCHES = (
    f"""
INSERT INTO retries (position, why, checks, check_at)
SELECT position, 'not settled', iif(check_at = 0, 0, 1), check_at
FROM batches CROSS JOIN entries ON position BETWEEN first AND last
WHERE {_IS_DUE} AND {IS_PLAIN}
""",  # noqa: S608  # constants
    f"DELETE FROM batches WHERE {_IS_DUE}",  # noqa: S608  # constants
)
_DELETE_SETTLED_BATCHES = f"""
DELETE FROM batches WHERE NOT EXISTS (SELECT 1 FROM entries WHERE position BETWEEN first AND last AND {IS_PLAIN})
"""  # noqa: S608  # constants
_SET_CHECK = "UPDATE retries SET checks = checks + 1, check_at = ? WHERE position = ? AND check_at IS "
_MARK_RETRY = _SET_CHECK + "NULL"
_POSTPONE = _SET_CHECK + "NOT NULL"
# The range that is sent for the first time: from the first pending entry to the last of these positions. Those that are
# retries are not in it, nor those that another relay has sent or settled meanwhile.
_UNSENT = f"""
SELECT position FROM entries WHERE position > (SELECT sent_through FROM outbox) AND {IS_PLAIN}
"""  # noqa: S608  # constants
_NEW_RANGE = f"""
SELECT ({_UNSENT} ORDER BY position LIMIT 1),
    ({_UNSENT} AND position IN (SELECT value FROM json_each(?)) ORDER BY position DESC LIMIT 1)
"""  # noqa: S608  # constants

# CROSS JOIN makes SQLite begin with the acknowledgements instead of all entries of the source.
_ACKNOWLEDGED = """
SELECT sequence, nonce, position, event_id, settled_at IS NOT NULL, row_id
FROM json_each(?) AS numbers CROSS JOIN entries ON source_id = ? AND sequence = numbers.value
    LEFT JOIN outcomes USING (position)
"""
_SETTLE = "INSERT OR REPLACE INTO outcomes (position, settled_at, row_id, reason) VALUES (?, ?, ?, ?)"
_DELETE_RETRIES = "DELETE FROM retries WHERE position IN (SELECT value FROM json_each(?))"

_OUTCOME = """
SELECT settled_at IS NOT NULL FROM entries LEFT JOIN outcomes USING (position)
WHERE source_id = ? AND sequence = ? AND nonce = ?
"""

_AWAITING = {
    # Sources without such an entry may be among them: to look for those would cost more than to look in Redis.
    "sent": "SELECT id, name, resends FROM sources WHERE EXISTS (SELECT 1 FROM sent)",
    "rejected": "SELECT id, name, resends FROM sources WHERE EXISTS (SELECT 1 FROM outcomes WHERE row_id IS NULL)",
}

# Without the events: SQLite would read all of them to sort the entries. Each source's are in their order.
_PRUNED = """
SELECT position, source_id, sequence, type, row_id IS NULL
FROM (SELECT position, row_id FROM outcomes WHERE settled_at < ? AND position <= (SELECT sent_through FROM outbox)
    ORDER BY settled_at LIMIT ?) CROSS JOIN entries USING (position)
ORDER BY sequence, nonce
"""
_EVENT = "SELECT event FROM entries WHERE position = ?"
_DELETE_ENTRIES = "DELETE FROM entries WHERE position IN (SELECT value FROM json_each(?))"
_DELETE_OUTCOMES = "DELETE FROM outcomes WHERE position IN (SELECT value FROM json_each(?)) RETURNING position"


class OutboxDeliveries:
    """Deliveries of the outbox in `file`, for one relay.

    Positions are those of the file from which `pending` or `overdue` read them last. If the file at the path was
    replaced since then, `mark_sent` and `postpone` change nothing: in it, they are positions of other entries.

    Raises:
        OutboxError: from every method, when the file cannot be read or written.
    """

    def __init__(self, file: OutboxFile, clock: OutboxClock) -> None:
        self._file = file
        self._clock = clock
        self._read_in = 0  # generation of the file

    def pending(self, limit: int) -> list[Entry]:
        """Return the oldest pending entries: one batch of at most `limit` entries."""
        with self._file.reading() as db:
            self._read_in = self._file.generation
            with closing(db.execute(_PENDING_RETRIES, (limit,))) as retries:
                entries = _one_batch(retries)
            if not entries:
                with closing(db.execute(_PENDING_TAIL, (limit,))) as tail:
                    entries = _one_batch(tail)
            skips = not entries and db.execute(_SETTLED_UNSENT).fetchone()[0]
        if skips:
            with self._file.transaction(durable=False) as db:
                db.execute(SKIP_SETTLED)
        return entries

    def overdue(self, limit: int) -> list[EntryHead]:
        """Return at most `limit` sent entries whose next check is due."""
        with self._file.reading() as db:
            now = self._clock.now(db)
            due = {"now": now, "latest": now + 1.2 * LAST_CHECK_SECONDS}
            (has_due_batch,) = db.execute(_HAS_DUE_BATCH, due).fetchone()
        if has_due_batch:
            with self._file.transaction(durable=False) as db:
                for statement in _SPLIT_DUE_BATCHES:
                    db.execute(statement, due)
        with self._file.reading() as db:
            self._read_in = self._file.generation
            return [EntryHead(*row) for row in db.execute(_OVERDUE, due | {"limit": limit})]

    def sent(self, after: int, limit: int) -> list[tuple[EntryHead, float]]:
        """Return sent entries after a position, in the order of recording, each with its age in seconds."""
        with self._file.reading() as db:
            now = self._clock.now(db)
            return [(EntryHead(*head), max(now - at, 0.0)) for *head, at in db.execute(_SENT, (after, limit))]

    def with_events(self, heads: Iterable[EntryHead]) -> list[Entry]:
        """Return the first of these overdue entries with their events: one batch."""
        with self._file.reading() as db:
            return _one_batch(row for head in heads for row in db.execute(_RETRY, (head.position,)))

    def mark_sent(self, check_after: Mapping[int, float]) -> bool:
        """Mark a whole batch of `pending` as sent; `check_after` maps each position to the seconds until its check.

        Entries that were never sent before share the check of the last one.

        Returns:
            False if the file at the path was replaced since then, and nothing was marked.
        """
        with self._file.transaction(durable=False) as db:
            if self._file.generation != self._read_in:
                return False
            now = self._clock.now(db)
            first, last = db.execute(_NEW_RANGE, (json.dumps([*check_after]),)).fetchone()
            db.executemany(_MARK_RETRY, [(now + seconds, position) for position, seconds in check_after.items()])
            if last is not None:
                db.execute("INSERT INTO batches VALUES (?, ?, ?)", (first, last, now + check_after[last]))
                db.execute("UPDATE outbox SET sent_through = ?", (last,))
            self._clock.keep(db)
        return True

    def postpone(self, check_after: Mapping[int, float]) -> None:
        """Set the next check of overdue entries; `check_after` maps each position to the seconds until then."""
        with self._file.transaction(durable=False) as db:
            if self._file.generation != self._read_in:
                return
            now = self._clock.now(db)
            db.executemany(_POSTPONE, [(now + seconds, position) for position, seconds in check_after.items()])
            self._clock.keep(db)

    def awaiting(self, state: Literal["sent", "rejected"]) -> list[tuple[str, str, int]]:
        """Return (id, name, number of resends) of each source that may have entries in this state."""
        with self._file.reading() as db:
            return db.execute(_AWAITING[state]).fetchall()

    def settle(self, source_id: str, resends: int, acknowledgements: Mapping[Any, Acknowledgement]) -> SettledKeys:
        """Settle entries of one source by their acknowledgements, which may have any keys.

        If the source has another number of resends than `resends`, nothing is settled: it was resent meanwhile, and the
        acknowledgements are of the replaced database.

        Returns:
            The keys of the acknowledgements whose entries this outbox has; the other keys are left out.
        """
        done = SettledKeys([], [])
        own = {key: one for key, one in acknowledgements.items() if one.source_id == source_id}
        with self._file.transaction(durable=False) as db:
            if db.execute("SELECT resends FROM sources WHERE id = ?", (source_id,)).fetchone() != (resends,):
                return done
            numbers = json.dumps([*{one.sequence for one in own.values()}])
            entries = {tuple(row[:2]): row[2:] for row in db.execute(_ACKNOWLEDGED, (numbers, source_id))}
            now, outcomes = self._clock.now(db), {}
            for key, one in own.items():
                delivery = (one.sequence, one.nonce)
                if delivery not in entries:
                    continue
                position, event_id, is_settled, row_id = entries[delivery]
                is_rejected = is_settled and row_id is None
                # A late acknowledgement of an earlier delivery must not change a settled entry, with one exception: an
                # event that was rejected, and that an operator then requeued, can still be stored.
                is_new = not is_settled or (is_rejected and one.outcome.row_id is not None)
                if is_new and one.event_id in (None, event_id):
                    outcomes[position] = (position, now, one.outcome.row_id, one.outcome.reason)
                    entries[delivery] = (position, event_id, True, one.outcome.row_id)
                    done.changed.append(key)
                else:
                    done.known.append(key)
            if outcomes:
                db.executemany(_SETTLE, outcomes.values())
                db.execute(_DELETE_RETRIES, (json.dumps([*outcomes]),))
                db.execute(_DELETE_SETTLED_BATCHES)
            self._clock.keep(db)
        return done

    def has(self, delivery: tuple[str, int, str] | None) -> bool:
        """Return whether the outbox still has the entry of this source id, number and nonce."""
        return self._find(delivery) is not None

    def is_settled(self, delivery: tuple[str, int, str] | None) -> bool:
        """Return whether the entry of this source id, number and nonce is stored or rejected."""
        return bool(self._find(delivery))

    def _find(self, delivery: tuple[str, int, str] | None) -> bool | None:
        """Return whether the entry is settled; None if the outbox does not have it."""
        if delivery is None:
            return None
        with self._file.reading() as db:
            row = db.execute(_OUTCOME, delivery).fetchone()
            return None if row is None else bool(row[0])

    def prune(self, keep_seconds: float) -> int:
        """Delete some entries that were settled over `keep_seconds` ago; if the file is half full, any settled ones.

        Entries that are not settled are never deleted. The digests of the deleted ones are added to the chains of their
        sources.

        Returns:
            How many were deleted. Call it again until that is 0.
        """
        with self._file.transaction(durable=False) as db:
            settled_before = self._clock.now(db) - keep_seconds
            if self._file.is_half_full(db):
                settled_before = math.inf
            db.execute(SKIP_SETTLED)
            generation = self._file.generation
            found = db.execute(_PRUNED, (settled_before, _PRUNED_ENTRIES)).fetchall()
            rows = one_page((*row, *db.execute(_EVENT, row[:1]).fetchone()) for row in found)
        # Compute the digests between two transactions: appends wait while one is open.
        settled: dict[str, dict[int, SettledEvent | None]] = {}
        for position, source_id, sequence, event_type, is_rejected, event in rows:
            one = settled_event(sequence, bool(is_rejected), event_type, event)
            settled.setdefault(source_id, {})[position] = one
        return self._delete_and_chain(settled, generation) if settled else 0

    def _delete_and_chain(self, settled: Mapping[str, Mapping[int, SettledEvent | None]], generation: int) -> int:
        """Delete the entries at these positions, by source, that are still settled; return how many."""
        deleted = 0
        with self._file.transaction(durable=False) as db:
            if self._file.generation != generation:  # in another file, these positions have other entries
                return 0
            for source_id, entries in settled.items():
                still = {position for (position,) in db.execute(_DELETE_OUTCOMES, (json.dumps([*entries]),))}
                db.execute(_DELETE_ENTRIES, (json.dumps([*still]),))
                add_to_chain(db, source_id, [one for position, one in entries.items() if one and position in still])
                deleted += len(still)
        return deleted


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
