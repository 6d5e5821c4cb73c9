"""The audit: find every sequence number of a source that has neither a row nor an outcome.

A source numbers its events without gaps. In the database, each number has a row, a withdrawn row or another outcome. If
the producer's outbox is on this machine, the audit also checks the numbers after the last one in the database, and
compares each entry by its number and its event's id. If an outbox was copied, its copies may have used the same numbers
for different events. Gaps can then be found only with all of the copies, and the audit reports that.

An audit `since` a time leaves out the events that were recorded earlier, whose rows may have been moved to another
table. A lost event has no time, so this works by numbers. A source numbers its events in the order of recording: an
event recorded at or after the time has a higher number than every event that was decided before it. The audit of a
source therefore begins after the highest number whose row or outcome has a `created_at` before the time. Only the
database's clock matters, so that a controller with a wrong clock, and an old event that was stored late, cause no gap.
That highest number must still be in the table: the SQL in consumers/db/GROWTH.md that moves rows keeps the last row of
each source. Copies of an outbox number their events independently: if one copy has recorded an event after the time,
under a number that another copy had used before it, the event is not checked.
"""

from __future__ import annotations

import socket
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from redis import Redis, RedisError
from rq import Queue
from rq.intermediate_queue import IntermediateQueue
from rq.serializers import JSONSerializer
from sqlalchemy import TextClause, text

from consumers.db.engine import get_db, long_read
from consumers.ops.redis_errors import redis_problem
from producers.acknowledgements import shown
from producers.entries import OutboxSource
from producers.events import IMPORT_PREFIX, KINDS
from producers.outbox import Outbox
from producers.redis_keys import delivery_of, owners_key, reserved_key

_MOST_SHARED = 10_000  # numbers checked per source whose numbers were used more than once

# A rejected event may have a number but no valid source: it is not counted.
_COUNTS = """
    {before} SELECT source, sum(stored) AS stored, sum(duplicate) AS duplicate, sum(rejected) AS rejected,
        sum(discarded) AS discarded, sum(withdrawn) AS withdrawn, max(last) AS last, max(last_before) AS last_before
    FROM (
        {rows}
        UNION ALL
        SELECT source, 0, count(*) FILTER (WHERE outcome = 'duplicate' AND {proven}),
            count(*) FILTER (WHERE outcome = 'rejected' AND {proven}),
            count(*) FILTER (WHERE outcome = 'discarded' AND {proven}), 0, max(sequence), max({last_before})
        FROM event_outcomes {join} WHERE source IS NOT NULL AND sequence IS NOT NULL GROUP BY source
        UNION ALL
        SELECT source, 0, 0, 0, 0, count(*) FILTER (WHERE {proven}), max(sequence), max({last_before})
        FROM withdrawals {join} WHERE sequence IS NOT NULL GROUP BY source
    ) AS tables GROUP BY source ORDER BY source
"""
_ROWS = """
    SELECT source, count(*) FILTER (WHERE {proven}) AS stored, 0 AS duplicate, 0 AS rejected, 0 AS discarded,
        0 AS withdrawn, max(sequence) AS last, max({last_before}) AS last_before
    FROM {table} {join} WHERE sequence IS NOT NULL GROUP BY source
"""
_ALL = {"before": "", "join": "", "last_before": "CAST(NULL AS bigint)", "proven": "true"}
_SINCE = {
    "before": "WITH before AS (SELECT source, max(sequence) AS last FROM ({earlier}) AS earlier GROUP BY source)",
    "join": "LEFT JOIN before USING (source)",
    "last_before": "before.last",
    "proven": "sequence > coalesce(before.last, -1)",
}
_EARLIER = "SELECT source, sequence FROM {table} WHERE created_at < :since"

# For one source this reads the indexes in order; for all sources at once, PostgreSQL would sort all rows. Each part has
# an ORDER BY: without it, PostgreSQL sorts the result of the UNION ALL.
_GAPS = """
    SELECT previous + 1 AS first, sequence - 1 AS last, sequence FROM (
        SELECT sequence, lag(sequence, 1, CAST(:first AS bigint) - 1) OVER (ORDER BY sequence) AS previous
        FROM ({numbers}) AS numbered) AS steps
    WHERE sequence <> previous + 1 ORDER BY sequence
"""
_NUMBERS = "(SELECT sequence FROM {table} WHERE source = :source AND sequence >= :first ORDER BY sequence)"

_LAST_AT = "SELECT max(created_at) FROM ({times}) AS times"
_TIMES = "SELECT created_at FROM {table} WHERE source = :source AND sequence = :last"

_IDENTITIES = """
    SELECT sequence, event_id FROM ({events}) AS events WHERE source = :source AND sequence BETWEEN :first AND :last
"""
_SHARED = """
    SELECT sequence FROM ({events}) AS events WHERE source = :source AND sequence = ANY (:numbers)
    GROUP BY sequence HAVING count(DISTINCT event_id) > 1 ORDER BY sequence
"""
_EVENTS = "SELECT source, sequence, event_id FROM {table}"

Ranges = list[tuple[int, int]]


@dataclass(frozen=True)
class SourceAudit:
    """Result for one source: its numbers from `proven_from` on, counted by outcome.

    proven_from: the source's first number; with `since`, the first number that is checked.
    under_way: number of events that are still in the outbox or the queue.
    missing: inclusive ranges of numbers that are neither in the database nor under way.
    mismatched: numbers under which the database has another event than the outbox.
    shared: the first 10,000 numbers that several events have, because copies of one outbox have used them.
    tail_known: false if events after `last` cannot be checked, because that needs the outbox, or each of its copies.
    host: this machine's name if the outbox is here, otherwise None: events do not name their host.
    last_at: when the event with the highest number in the database was decided, or None if there is no event.
    """

    source: str
    since: datetime | None
    proven_from: int
    stored: int
    duplicate: int
    rejected: int
    discarded: int
    withdrawn: int
    last: int
    under_way: int
    missing: Ranges
    mismatched: list[int]
    shared: list[int]
    copied: bool
    tail_known: bool
    host: str | None
    last_at: datetime | None

    @property
    def complete(self) -> bool:
        """True if no number is missing and no entry mismatches, as far as this machine can check."""
        return not self.missing and not self.mismatched


@dataclass(frozen=True)
class _Recorded:
    """Numbers of one source in the database, from `first` on."""

    first: int
    stored: int = 0
    duplicate: int = 0
    rejected: int = 0
    discarded: int = 0
    withdrawn: int = 0
    last: int = 0
    last_at: datetime | None = None
    gaps: tuple[tuple[int, int], ...] = ()
    shared: tuple[int, ...] = ()


class Audits(list[SourceAudit]):
    """Results in the order of the sources' names. `left_out` sources have no event since the given time.

    `redis_problem` says why the queue could not be read. Events that are only there then count as missing.
    """

    left_out = 0
    redis_problem: str | None = None


def audit(
    redis: Redis | None = None, outbox: Outbox | None = None, queue: str = "history", *, since: datetime | None = None
) -> Audits:
    """Audit every source in the database and in `outbox`. Events in the queue (`redis`, `queue`) are under way.

    `since` (aware) restricts the audit to events recorded at or after it, and to sources that have such events. The
    others are counted in `left_out`.

    Raises:
        StoreUnavailable: the database cannot be read now.
        OutboxError: the outbox cannot be read.
    """
    # The outbox and the queue are read before the database. An event that is under way then may be stored in the
    # meantime, but is never missing; an event that is accepted later is not expected in the database.
    kept = {} if outbox is None else {source.full_name: source for source in outbox.sources()}
    unsettled = {name: outbox.unsettled(source.id) for name, source in kept.items()} if outbox is not None else {}
    audits = Audits()
    queued: dict[str, set[int]] = {}
    if redis is not None:
        try:
            queued = _numbers_in_queue(redis, queue)
        except RedisError as error:
            audits.redis_problem = redis_problem(error)
    recorded = _recorded(since)
    lasts = {} if outbox is None else {source.full_name: source.last_sequence for source in outbox.sources()}
    for name in sorted(recorded.keys() | kept.keys()):
        found = recorded.get(name) or _Recorded(_first_number(name))
        if name not in kept and found.last < found.first:
            audits.left_out += 1  # it has recorded nothing since then
            continue
        one = _audited(
            name,
            found,
            kept.get(name),
            since=since,
            last_now=lasts.get(name, 0),
            under_way=unsettled.get(name, set()) | queued.get(name.rpartition("/")[2], set()),
            mismatched=_mismatched(kept[name], outbox, found.first) if outbox is not None and name in kept else [],
        )
        audits.append(one)
    return audits


def _audited(
    name: str,
    found: _Recorded,
    kept: OutboxSource | None,
    *,
    since: datetime | None,
    last_now: int,
    under_way: set[int],
    mismatched: list[int],
) -> SourceAudit:
    """Combine the numbers of one source in the database (`found`) with its state in the outbox.

    `kept` is that state before the database was read, `last_now` the outbox's last number afterwards.
    """
    gaps, last = list(found.gaps), found.last
    copied = bool(found.shared)
    if kept is not None:
        # If this outbox has never used the last number, a copy has, or this outbox was restored from a backup.
        copied |= kept.left_because == "copied" or found.last > last_now
        gaps, last = _up_to(gaps, found.last, kept.last_sequence), max(kept.last_sequence, found.last if copied else 0)
    missing = _without(gaps, under_way)
    return SourceAudit(
        source=name,
        since=since,
        proven_from=found.first,
        stored=found.stored,
        duplicate=found.duplicate,
        rejected=found.rejected,
        discarded=found.discarded,
        withdrawn=found.withdrawn,
        last=last,
        under_way=_size(gaps) - _size(missing),
        missing=missing,
        mismatched=mismatched,
        shared=list(found.shared),
        copied=copied,
        tail_known=kept is not None and not copied,
        host=None if kept is None else socket.gethostname(),
        last_at=found.last_at,
    )


def _recorded(since: datetime | None) -> dict[str, _Recorded]:
    """Read the numbers of each source from one snapshot of the database."""
    with long_read() as db:
        # Otherwise an event that is stored meanwhile could be counted in one query and missing in the next.
        found = {}
        gaps_of = text(_GAPS.format(numbers=_of_all_tables(_NUMBERS)))
        shared_of = text(_SHARED.format(events=_of_all_tables(_EVENTS)))
        last_at_of = text(_LAST_AT.format(times=_of_all_tables(_TIMES)))
        for row in db.execute(_counts(since), {} if since is None else {"since": since}):
            first = _first_number(row.source) if row.last_before is None else row.last_before + 1
            steps = db.execute(gaps_of, {"source": row.source, "first": first}).all()
            gaps = tuple((step.first, step.last) for step in steps if step.last >= step.first)
            repeated = sorted({step.sequence for step in steps if step.last < step.first})[:_MOST_SHARED]
            # An import has no outbox. After a withdrawal, another zone can give its entries other event ids.
            numbers = [] if _is_import(row.source) else repeated
            shared = db.scalars(shared_of, {"source": row.source, "numbers": numbers}).all() if numbers else ()
            found[row.source] = _Recorded(
                first,
                stored=int(row.stored),
                duplicate=int(row.duplicate),
                rejected=int(row.rejected),
                discarded=int(row.discarded),
                withdrawn=int(row.withdrawn),
                last=row.last,
                last_at=db.scalar(last_at_of, {"source": row.source, "last": row.last}),
                gaps=gaps,
                shared=tuple(shared),
            )
        return found


def _counts(since: datetime | None) -> TextClause:
    parts = dict(_ALL if since is None else _SINCE)
    parts["before"] = parts["before"].format(earlier=_of_all_tables(_EARLIER))
    return text(_COUNTS.format(rows=_of_history_tables(_ROWS, **parts), **parts))


def _of_history_tables(part: str, *others: str, **values: str) -> str:
    """Return the UNION ALL of `part` for each history table and each table in `others`."""
    tables = [*(kind.table for kind in KINDS.values()), *others]
    return " UNION ALL ".join(part.format(table=table, **values) for table in tables)


def _of_all_tables(part: str) -> str:
    return _of_history_tables(part, "event_outcomes", "withdrawals")


def _first_number(source: str) -> int:
    """Return the first number of a source: 0 for an import, 1 for an outbox."""
    return 0 if _is_import(source) else 1


def _is_import(source: str) -> bool:
    return source.startswith(IMPORT_PREFIX) and source.count("/") == 2


def _up_to(ranges: Ranges, last_stored: int, last_used: int) -> Ranges:
    """Return the gaps up to the last number that the outbox has used, including those after the last stored number."""
    if last_used > last_stored:
        return [*ranges, (last_stored + 1, last_used)]
    return [(first, min(last, last_used)) for first, last in ranges if first <= last_used]


def _mismatched(source: OutboxSource, outbox: Outbox, first: int) -> list[int]:
    """Return the numbers from `first` on under which the database has another event than the outbox.

    Only settled entries are compared. For a rejected event, the database may have no event id: that is no mismatch.
    """
    identities = text(_IDENTITIES.format(events=_of_all_tables(_EVENTS)))
    mismatched: list[int] = []
    for page in outbox.audit_pages(source.id):
        stored: dict[int, set[UUID | None]] = {}
        with get_db() as db:
            span = {"first": page[0].sequence, "last": page[-1].sequence}
            for row in db.execute(identities, {"source": source.full_name, **span}):
                stored.setdefault(row.sequence, set()).add(row.event_id)
        mismatched += [
            one.sequence
            for one in page
            if one.sequence >= first
            and one.state in ("stored", "rejected")
            and one.sequence in stored
            and not stored[one.sequence] & {one.event_id, None}
        ]
    return mismatched


def _numbers_in_queue(redis: Redis, queue_name: str) -> dict[str, set[int]]:
    """Return the numbers of all queued, reserved and started deliveries, by the id of their source."""
    queue = Queue(queue_name, connection=redis, serializer=JSONSerializer)
    owners: Any = redis.hkeys(owners_key(queue_name))
    with redis.pipeline(transaction=True) as pipe:
        pipe.lrange(queue.key, 0, -1)
        pipe.lrange(IntermediateQueue.get_intermediate_queue_key(queue.key), 0, -1)
        for owner in owners:
            pipe.lrange(reserved_key(queue_name, shown(owner)), 0, -1)
        pipe.zrange(queue.started_job_registry.key, 0, -1)
        lists = pipe.execute(raise_on_error=False)  # a key of the wrong type is not ours
    numbers: dict[str, set[int]] = {}
    for job_id in (shown(member).partition(":")[0] for one in lists if isinstance(one, list) for member in one):
        if delivery := delivery_of(job_id):
            numbers.setdefault(delivery[0], set()).add(delivery[1])
    return numbers


def _without(ranges: Ranges, known: set[int]) -> Ranges:
    """Return `ranges` without the known numbers."""
    left: Ranges = []
    numbers = sorted(known)
    for first, last in ranges:
        start = first
        for number in numbers[bisect_left(numbers, first) : bisect_right(numbers, last)]:
            if number > start:
                left.append((start, number - 1))
            start = number + 1
        if start <= last:
            left.append((start, last))
    return left


def _size(ranges: Ranges) -> int:
    return sum(last - first + 1 for first, last in ranges)
