"""The durable local store of a producer: an event is accepted once its entry is committed here.

One SQLite file serves any number of threads and processes. An entry is `pending` until it was handed to
Redis, then `sent`, and ends as `stored` or `rejected` when its acknowledgement was read. Only appending
waits for the disk: marks that a crash forgets merely cause a re-send, which the worker finds to be a duplicate.

Settled entries, stored or rejected, stay for a while, so that they can be sent again after the database was
restored from a backup.
"""

from __future__ import annotations

import logging
import math
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, Literal, NamedTuple, ParamSpec, Self, TypeVar
from uuid import UUID, uuid4

from producers.acknowledgements import Acknowledgement
from producers.entries import Accepted, Entry, EntryHead, Fate, Numbered, OutboxStatus, Settled, Source, source_of
from producers.errors import OutboxDamaged, OutboxError
from producers.events import Payload, encode, event_of
from producers.outbox_clock import OutboxClock
from producers.outbox_file import OutboxFile
from producers.outbox_identity import OutboxIdentity
from producers.outbox_place import LOCK
from producers.outbox_recovery import Rescue, carry_over, copy_out, has_content_of_an_outbox
from producers.outbox_schema import ensure_tables
from producers.relay_lock import RelayLock

P = ParamSpec("P")
T = TypeVar("T")

logger = logging.getLogger(__name__)

MAX_BYTES = 2**30
LAST_CHECK_SECONDS = 300.0  # an entry is looked at again after so long at the latest

_BATCH_BYTES = 4 * 2**20  # of texts, which may be 8 MiB each: handing over a hundred of those takes gigabytes of memory
_PAGE_ENTRIES = 1000  # at once: a short transaction, which no append waits for long
_NUMBERS_PAGE = 5000
_CHECK_STEPS = 10_000  # of SQLite's virtual machine, between two looks at the clock

_TAKE_SEQUENCES = """
INSERT INTO sources (id, name, last_sequence) VALUES (:id, :name, :count)
ON CONFLICT (name) WHERE current DO UPDATE SET last_sequence = last_sequence + :count
RETURNING id, last_sequence
"""

_APPEND = """
INSERT INTO entries (source_id, sequence, nonce, recorder, event_id, type, summary, event, recorded_at)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
"""

# The source by a query of its own: with a join SQLite might begin with the sources, and sort.
_HEAD = """
SELECT position, source_id, sequence, nonce, (SELECT name FROM sources WHERE id = source_id) || '/' || source_id, checks
"""
_SELECT_ENTRIES = _HEAD + ", type, summary, event FROM entries "
_PENDING = _SELECT_ENTRIES + "WHERE state = 'pending' ORDER BY position LIMIT ?"
_ENTRIES = _SELECT_ENTRIES + "ORDER BY position"
_ENTRY = _SELECT_ENTRIES + "WHERE position = ?"
# Nothing is due later than the longest interval: a time beyond it was written by a clock that was ahead.
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
# What this look counts as another one is taken off before: the next one must not be put off by it.
_CHECK_NOW = "UPDATE entries SET check_at = 0, checks = max(checks - 1, 0) WHERE state = 'sent' AND position <= ?"

# A late acknowledgement of an earlier delivery must not undo what is known already, with one exception: what was
# rejected and then requeued by an operator can still be stored. The event's id is compared for entries without a nonce.
_SETTLE = """
UPDATE entries SET state = :state, row_id = :row_id, reason = :reason, settled_at = :now, check_at = NULL
WHERE source_id = :source_id AND sequence = :sequence AND nonce = :nonce
    AND (:event_id IS NULL OR event_id = :event_id)
    AND (state IN ('pending', 'sent') OR (state = 'rejected' AND :state = 'stored'))
"""
_IS_KEPT = "SELECT 1 FROM entries WHERE source_id = ? AND sequence = ? AND nonce = ?"

_AWAITING = """
SELECT id, name, resends FROM sources WHERE EXISTS
    (SELECT 1 FROM entries WHERE entries.source_id = sources.id AND state = ?)
"""

_RESEND = """
UPDATE entries SET state = 'pending', checks = 0, check_at = NULL, settled_at = NULL, row_id = NULL, reason = NULL
WHERE position > ? AND position <= ? AND state IN ('stored', 'rejected') AND recorded_at >= ?
"""
_END_OF_PAGE = """
SELECT max(position) FROM (SELECT position FROM entries WHERE position > ? AND position <= ? ORDER BY position LIMIT ?)
"""

_PRUNE = """
DELETE FROM entries WHERE position IN (
    SELECT position FROM entries WHERE state IN ('stored', 'rejected') AND settled_at < ?
    ORDER BY settled_at LIMIT ?)
"""

_FATE = "SELECT state, row_id, reason FROM entries WHERE source_id = ? AND sequence = ? AND nonce = ?"
_NUMBERS = """
SELECT sequence, nonce, event_id, state FROM entries
WHERE source_id = ? AND (sequence, nonce) > (?, ?) ORDER BY sequence, nonce LIMIT ?
"""

# State by state, each along its own index.
_OF_ASKED = "(:recorder IS NULL OR recorder = :recorder) AND (:until IS NULL OR position <= :until)"
_UNSETTLED_COUNT = f"""
SELECT (SELECT count(*) FROM entries WHERE state = 'pending' AND {_OF_ASKED})
    + (SELECT count(*) FROM entries WHERE state = 'sent' AND {_OF_ASKED})
"""  # noqa: S608  # constants

# By the indexes alone: going through all that is kept would take seconds, whenever somebody watches.
_STATUS = """
SELECT 'pending', count(*), (SELECT recorded_at FROM entries WHERE state = 'pending' ORDER BY position LIMIT 1)
    FROM entries WHERE state = 'pending'
UNION ALL SELECT 'sent', count(*), min(recorded_at) FROM entries WHERE state = 'sent'
UNION ALL SELECT 'rejected', count(*), NULL FROM entries WHERE state = 'rejected'
UNION ALL SELECT 'settled', count(*), NULL FROM entries WHERE state IN ('stored', 'rejected')
"""


# Each with the entries that it has. The last one is of the unique columns, and has all.
INDEXES = {
    "entries_pending": "state = 'pending'",
    "entries_sent": "state = 'sent'",
    "entries_awaiting": "state = 'sent'",
    "entries_settled": "state IN ('stored', 'rejected')",
    "entries_rejected": "state = 'rejected'",
    "sqlite_autoindex_entries_1": "true",
}
# What is in them, and what should be, as one statement: both as of one moment.
_BY_INDEX = ", ".join(
    f"(SELECT count(*) || ':' || total(position) FROM entries INDEXED BY {index} WHERE {has})"  # noqa: S608  # constants
    for index, has in INDEXES.items()
)
_BY_TABLE = ", ".join(
    f"count(*) FILTER (WHERE {has}) || ':' || total(position) FILTER (WHERE {has})" for has in INDEXES.values()
)
_COMPARE_INDEXES = f"SELECT {_BY_INDEX}, {_BY_TABLE} FROM entries NOT INDEXED"  # noqa: S608  # constants


class Position(NamedTuple):
    """The place of an entry, in the order of recording, in the file that was at the path then."""

    number: int
    generation: int


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


def _once_more_after_repair(method: Callable[Concatenate[Outbox, P], T]) -> Callable[Concatenate[Outbox, P], T]:
    """When the method meets damage, the file is set aside, and the method is called once more, on a new one."""

    @wraps(method)
    def repaired(self: Outbox, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with self.repaired():
            return method(self, *args, **kwargs)
        return method(self, *args, **kwargs)

    return repaired


class Outbox:
    """Opens or creates the file at `path`, which holds at most `max_bytes`.

    With `repair`, as producers and relays have it, a damaged file is set aside by `append` and `repaired`, and the
    next use makes a new one; a file of an earlier release is upgraded. Without, as those have it that only look,
    OutboxDamaged or OutboxOutdated is raised, and the file is left as it is.

    Raises:
        OutboxOutdated: the file is of an earlier release; without `repair` only.
        OutboxDamaged: here and from every method, when the content of the file cannot be read.
        OutboxError: here and from every method, when the file cannot be read or written.
    """

    def __init__(self, path: Path | str, *, max_bytes: int = MAX_BYTES, repair: bool = False) -> None:
        self._file = OutboxFile(
            Path(path),
            max_bytes,
            prepare=lambda db: ensure_tables(db, self.path, upgrade=repair),
            copy_out=copy_out,
            carry_over=carry_over,
            repair=repair,
        )
        self.path = self._file.path
        self._repair = repair
        self._clock = OutboxClock(lambda: self._file.generation)
        self.identity = OutboxIdentity(self._file, self._clock)
        self.rescue = Rescue(self._file)
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
            # Before another process reads it: the wall clock may be set meanwhile, and both would go on differently.
            with self._file.transaction(durable=False) as db:
                self._clock.keep(db)

    @property
    def generation(self) -> int:
        """Another number means that another file is at the path than before."""
        return self._file.generation

    @contextmanager
    def repaired(self) -> Iterator[None]:
        """In the block, damage sets the file aside; the block ends there, and its work is to be done again.

        Raises:
            OutboxDamaged: without `repair`, or when the file does not look like an outbox.
        """
        try:
            yield
        except OutboxDamaged as error:
            # A file that never was an outbox is somebody's, named by mistake.
            if not self._repair or not (self._file.place.has_been_used() or self._has_content_of_an_outbox()):
                raise
            aside = self._file.set_aside()
            if aside is not None:
                logger.error(
                    "%s: the file is damaged and was set aside as %s. New events go into a new file; what can be read"
                    " in the damaged one is carried over",
                    error,
                    aside,
                )

    def _has_content_of_an_outbox(self) -> bool:
        self._file.close()  # reading the file ends the locks that SQLite has on it in this process
        return has_content_of_an_outbox(self._file.place.real)

    @_once_more_after_repair
    def append(self, name: str, payloads: Sequence[Payload], recorder: int = 0) -> list[Accepted]:
        """Record all of `payloads` in one durable commit, or none; the order is the order of sequences.

        `recorder` is a number that the caller finds its own entries by.
        """
        accepted = []
        random = os.urandom(8 * len(payloads)).hex()
        with self._file.transaction() as db:
            now = self._clock.now(db)
            taken = {"id": uuid4().hex, "name": name, "count": len(payloads)}
            source_id, last = db.execute(_TAKE_SEQUENCES, taken).fetchone()
            source = source_of(name, source_id)
            for n, payload in enumerate(payloads):
                sequence, nonce = last - len(payloads) + 1 + n, random[16 * n : 16 * n + 16]
                event = event_of(payload, source=source, sequence=sequence)
                texts = (str(event.id), event.type, payload.summary, encode(event))
                db.execute(_APPEND, (source_id, sequence, nonce, recorder, *texts, now))
                accepted.append(Accepted(event.id, source, source_id, sequence, nonce))
            self._clock.keep(db)
        return accepted

    @_once_more_after_repair
    def set_destination(self, redis: str, queue: str) -> None:
        """Note where the entries go, for relay processes."""
        self.identity.set_destination(redis, queue)

    def entries(self) -> list[Entry]:
        """Everything that is kept, in the order of recording."""
        with self._file.reading() as db:
            return [Entry(*row) for row in db.execute(_ENTRIES)]

    def pending(self, limit: int) -> list[Entry]:
        """The oldest entries that were not yet handed to Redis: one batch, `limit` entries at the most."""
        with self._file.reading() as db, closing(db.execute(_PENDING, (limit,))) as rows:
            return _one_batch(rows)

    def overdue(self, limit: int) -> list[EntryHead]:
        """Sent entries whose acknowledgement should have come by now."""
        with self._file.reading() as db:
            now = self._clock.now(db)
            latest = now + 1.2 * LAST_CHECK_SECONDS
            rows = db.execute(_OVERDUE, {"now": now, "latest": latest, "limit": limit})
            return [EntryHead(*row) for row in rows]

    def sent(self, after: int, limit: int) -> list[tuple[EntryHead, float]]:
        """Sent entries behind a position, in the order of recording, each with its age in seconds."""
        with self._file.reading() as db:
            now = self._clock.now(db)
            return [(EntryHead(*head), max(now - at, 0.0)) for *head, at in db.execute(_SENT, (after, limit))]

    def with_texts(self, heads: Iterable[EntryHead]) -> list[Entry]:
        """The first of these: one batch."""
        with self._file.reading() as db:
            return _one_batch(row for head in heads for row in db.execute(_ENTRY, (head.position,)))

    def mark_sent(self, check_after: Mapping[int, float]) -> None:
        """Entries (by position) that Redis has now, and in how many seconds to look for what became of them."""
        self._mark(_MARK_SENT, check_after)

    def postpone(self, check_after: Mapping[int, float]) -> None:
        """Sent entries (by position) that are still under way, and in how many seconds to look again."""
        self._mark(_POSTPONE, check_after)

    def _mark(self, statement: str, check_after: Mapping[int, float]) -> None:
        with self._file.transaction(durable=False) as db:
            now = self._clock.now(db)
            db.executemany(statement, [(now + seconds, position) for position, seconds in check_after.items()])
            self._clock.keep(db)

    @_once_more_after_repair
    def check_now(self, until: Position) -> None:
        """All that is under way up to this position is overdue at once."""
        with self._file.transaction(durable=False) as db:
            db.execute(_CHECK_NOW, (self._until(until),))

    def awaiting(self, state: Literal["sent", "rejected"]) -> list[tuple[str, str, int]]:
        """(id, name, number of its resends) of each source that has entries in this state."""
        with self._file.reading() as db:
            return db.execute(_AWAITING, (state,)).fetchall()

    def settle(self, source_id: str, resends: int, told: Mapping[Any, Acknowledgement]) -> Settled:
        """Store what became of entries of one source, by acknowledgements under any keys.

        Those of entries that this outbox does not have are in neither part of the answer. Nothing is stored when the
        source was sent again since it had this number of resends: such an answer was given by another database.
        """
        done = Settled([], [])
        with self._file.transaction(durable=False) as db:
            if db.execute("SELECT resends FROM sources WHERE id = ?", (source_id,)).fetchone() != (resends,):
                return done
            now = self._clock.now(db)
            for key, one in told.items():
                outcome = one.outcome
                identity = (source_id, one.sequence, one.nonce)
                row = {
                    "state": "rejected" if outcome.kind == "rejected" else "stored",
                    "row_id": outcome.row_id,
                    "reason": outcome.reason,
                    "now": now,
                    "event_id": one.event_id,
                    **dict(zip(("source_id", "sequence", "nonce"), identity, strict=True)),
                }
                if one.source_id != source_id:
                    continue
                if db.execute(_SETTLE, row).rowcount:
                    done.changed.append(key)
                elif db.execute(_IS_KEPT, identity).fetchone():
                    done.known.append(key)
            self._clock.keep(db)
        return done

    @_once_more_after_repair
    def resend(self, since: float) -> int:
        """Make settled entries recorded since then (seconds since the epoch) pending again; returns how many.

        When it ends early, some are pending and the others as before; it may be called again.
        """
        with self._file.transaction() as db:
            # By how long ago that was: entries have times of the outbox's own clock.
            recorded_since = self._clock.now(db) - (time.time() - since)
            # First: what was acknowledged before must not settle an entry of any page.
            db.execute("UPDATE sources SET resends = resends + 1")
        after, until, count = Position(0, self.generation), self.last_position(), 0
        while True:
            began_at = time.monotonic()
            with self._file.transaction() as db:
                start = after.number if after.generation == self.generation else 0
                last = self._until(until)
                (end,) = db.execute(_END_OF_PAGE, (start, last, _PAGE_ENTRIES)).fetchone()
                if end is None:
                    return count
                count += db.execute(_RESEND, (start, end, recorded_since)).rowcount
                after = Position(end, self.generation)
            if end == last:
                return count
            time.sleep(time.monotonic() - began_at)  # else appends would hardly ever find the file free

    def prune(self, keep_seconds: float) -> int:
        """Drop some of the oldest settled entries, if they are older than wanted or the file is half full.

        Returns how many; a large backlog needs more calls. What is not settled is never dropped.
        """
        with self._file.transaction(durable=False) as db:
            settled_before = self._clock.now(db) - keep_seconds
            if self._file.is_half_full(db):
                settled_before = math.inf
            return db.execute(_PRUNE, (settled_before, _PAGE_ENTRIES)).rowcount

    @_once_more_after_repair
    def fate(self, accepted: Accepted) -> Fate:
        """What is known of one entry. Raises OutboxError when it was settled so long ago that it is no longer kept."""
        with self._file.reading() as db:
            row = db.execute(_FATE, (accepted.source_id, accepted.sequence, accepted.nonce)).fetchone()
        if row is not None:
            return Fate(*row)
        if self.rescue.damaged_files():  # the entry may be in one of them, and is carried over in a moment
            return Fate("pending", None, None)
        raise OutboxError(f"outbox {self.path}: entry {accepted.sequence} is no longer kept")

    def has(self, delivery: tuple[str, int, str] | None) -> bool:
        """Whether the entry of this source id, number and nonce is kept here."""
        with self._file.reading() as db:
            return delivery is not None and db.execute(_IS_KEPT, delivery).fetchone() is not None

    def is_settled(self, delivery: tuple[str, int, str] | None) -> bool:
        """Whether that entry is stored or rejected."""
        with self._file.reading() as db:
            row = db.execute(_FATE, delivery).fetchone() if delivery else None
            return row is not None and row[0] in ("stored", "rejected")

    @_once_more_after_repair
    def last_position(self) -> Position:
        """Of the entry that was recorded last."""
        with self._file.reading() as db:
            (position,) = db.execute("SELECT max(position) FROM entries").fetchone()
            return Position(position or 0, self.generation)

    @_once_more_after_repair
    def pending_count(self, until: Position | None = None) -> int:
        """How many are not handed to Redis yet, of those up to this position.

        A damaged file that was set aside counts as one entry until what can be read in it is here.
        """
        with self._file.reading() as db:
            query = "SELECT count(*) FROM entries WHERE state = 'pending' AND position <= ?"
            (count,) = db.execute(query, (self._until(until),)).fetchone()
        return int(count) + len(self.rescue.damaged_files())

    @_once_more_after_repair
    def unsettled_count(self, *, recorder: int | None = None, until: Position | None = None) -> int:
        """How many are pending or sent, of one recorder, of those up to this position; damaged files as above."""
        with self._file.reading() as db:
            asked = {"recorder": recorder, "until": self._until(until)}
            (count,) = db.execute(_UNSETTLED_COUNT, asked).fetchone()
        return int(count) + len(self.rescue.damaged_files())

    def _until(self, position: Position | None) -> int:
        """All there are if another file is at the path since: entries have other positions there."""
        return 2**62 if position is None or position.generation != self.generation else position.number

    @_once_more_after_repair
    def status(self) -> OutboxStatus:
        with self._file.reading() as db:
            now = self._clock.now(db)
            found = {state: (count, oldest) for state, count, oldest in db.execute(_STATUS)}
        (pending, oldest_pending), (sent, oldest_sent) = found["pending"], found["sent"]
        rejected = found["rejected"][0]
        oldest = min((at for at in (oldest_pending, oldest_sent) if at is not None), default=None)
        age = None if oldest is None else max(now - oldest, 0.0)
        return OutboxStatus(pending, sent, found["settled"][0] - rejected, rejected, age)

    def oldest_pending_seconds(self) -> float | None:
        """The age of the entry that waits longest for Redis; None when none does."""
        with self._file.reading() as db:
            query = "SELECT recorded_at FROM entries WHERE state = 'pending' ORDER BY position LIMIT 1"
            row = db.execute(query).fetchone()
            return None if row is None else max(self._clock.now(db) - row[0], 0.0)

    def used_bytes(self) -> int:
        """How much of `max_bytes` is taken."""
        with self._file.reading() as db:
            return self._file.used_bytes(db)

    def quick_check(self, seconds: float) -> str | None:
        """The first fault in the file, None when there is none, or `unfinished` after so many seconds.

        An index that does not have the entries that it should have is a fault, and with `repair` is built anew.
        """
        deadline = time.monotonic() + seconds
        try:
            stale = self._stale_indexes(seconds / 2)
        except OutboxDamaged as error:
            fault = self._file.quick_check(deadline - time.monotonic())
            return str(error) if fault in (None, "unfinished") else fault
        if self._repair and stale:
            with self._file.transaction() as db:
                for index in stale:
                    db.execute(f"REINDEX {index}")
            logger.error(
                "outbox %s: an index did not have the entries that it should have, as after a power failure, and was"
                " built anew: %s. What it had hidden is sent now; look at the disk",
                self.path,
                ", ".join(stale),
            )
        fault = self._file.quick_check(deadline - time.monotonic())
        if fault in (None, "unfinished") and stale and not self._repair:
            return f"index {', '.join(stale)} is stale: a controller or relay builds it anew when it starts"
        return fault

    def _stale_indexes(self, seconds: float) -> list[str]:
        """Those found within this time. SQLite's quick check does not compare an index with its table."""
        deadline = time.monotonic() + seconds
        with self._file.reading() as db:
            db.set_progress_handler(lambda: time.monotonic() > deadline, _CHECK_STEPS)
            try:
                found = db.execute(_COMPARE_INDEXES).fetchone()
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode != sqlite3.SQLITE_INTERRUPT:
                    raise
                return []
            finally:
                db.set_progress_handler(None, 0)
        by_table = found[len(INDEXES) :]
        return [index for index, has, should in zip(INDEXES, found, by_table, strict=False) if has != should]

    def relay_lock(self) -> RelayLock:
        """The right to relay this outbox, which one thread of one process has at a time."""
        return RelayLock(self._lock_path(), self._file.place.real)

    def _lock_path(self) -> Path:
        # Of the file itself: two paths that lead to it have one lock.
        return self._file.place.beside(LOCK)

    def sources(self) -> list[Source]:
        with self._file.reading() as db:
            rows = db.execute("SELECT id, name, last_sequence, current, left_because FROM sources ORDER BY rowid")
            return [Source(source_id, name, last, bool(current), why) for source_id, name, last, current, why in rows]

    def unsettled(self, source_id: str) -> set[int]:
        """The numbers of one source that are pending or sent."""
        with self._file.reading() as db:
            query = "SELECT sequence FROM entries WHERE source_id = ? AND state IN ('pending', 'sent')"
            return {sequence for (sequence,) in db.execute(query, (source_id,))}

    def numbers(self, source_id: str) -> Iterator[list[Numbered]]:
        """The kept entries of one source in the order of their numbers, a page at a time.

        Two entries may have one number: the outbox and a copy of it have used it, and entries were carried over.
        """
        after = (-1, "")
        while True:
            with self._file.reading() as db:
                rows = db.execute(_NUMBERS, (source_id, *after, _NUMBERS_PAGE)).fetchall()
            if not rows:
                return
            yield [Numbered(sequence, nonce, UUID(event_id), state) for sequence, nonce, event_id, state in rows]
            after = rows[-1][:2]

    def close(self) -> None:
        """A closed outbox opens its file again when it is used again."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
