"""The audit: for each source, every number from the first to the last is accounted for, or reported as missing.

A source numbers its events without gaps. In the database each number is a row, or an outcome that is no row. With
the producer's outbox at hand, the audit also knows the numbers after the last one in the database, and compares each
entry by its number and its event's id. Copies of an outbox may have used the same numbers for other events: then gaps
can be seen only with each of the outboxes, and the audit says so.

An audit `since` a time leaves out events that were recorded earlier, whose rows may have been moved to another table. A
lost event has no time, so the audit goes by numbers: a source numbers its events in the order of recording, so an event
that it recorded at or after the time has a higher number than all events that the database had decided before it. The
proof of a source therefore begins after the highest number whose row or outcome has a `created_at` before the time.
Only the database's clock counts: neither a controller's clock nor the times of the events matter, and an old number
that was stored late (after a requeue or an outage) opens no gap. That highest number must still be in the table: the
recipe for moving rows in consumers/db/GROWTH.md leaves the last row of each source. Copies of an outbox number
independently: an event that one copy recorded after the time, under a number that another had used before it, is not in
the proof.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from redis import Redis
from rq import Queue
from rq.intermediate_queue import IntermediateQueue
from rq.serializers import JSONSerializer
from sqlalchemy import TextClause, text

from consumers.db.engine import get_db
from producers.acknowledgements import shown
from producers.entries import OutboxSource
from producers.events import IMPORT_PREFIX, KINDS
from producers.outbox import Outbox
from producers.redis_keys import delivery_of, owners_key, reserved_key

_MOST_SHARED = 10_000  # numbers that are looked at, of a source whose numbers were used twice

# A refused event may have a number and no valid source: it is in no source's account.
_COUNTS = """
    {before} SELECT source, sum(stored) AS stored, sum(duplicate) AS duplicate, sum(rejected) AS rejected,
        sum(discarded) AS discarded, max(last) AS last, max(last_before) AS last_before
    FROM (
        {rows}
        UNION ALL
        SELECT source, 0, count(*) FILTER (WHERE outcome = 'duplicate' AND {proven}),
            count(*) FILTER (WHERE outcome = 'rejected' AND {proven}),
            count(*) FILTER (WHERE outcome = 'discarded' AND {proven}), max(sequence), max({last_before})
        FROM event_outcomes {join} WHERE source IS NOT NULL AND sequence IS NOT NULL GROUP BY source
    ) AS tables GROUP BY source ORDER BY source
"""
_ROWS = """
    SELECT source, count(*) FILTER (WHERE {proven}) AS stored, 0 AS duplicate, 0 AS rejected, 0 AS discarded,
        max(sequence) AS last, max({last_before}) AS last_before
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

# Source by source, each is an ordered pass over the indexes; all at once would be a sort of everything. Each part has
# its ORDER BY, without which PostgreSQL sorts the result of the UNION ALL.
_GAPS = """
    SELECT previous + 1 AS first, sequence - 1 AS last, sequence FROM (
        SELECT sequence, lag(sequence, 1, CAST(:first AS bigint) - 1) OVER (ORDER BY sequence) AS previous
        FROM ({numbers}) AS numbered) AS steps
    WHERE sequence <> previous + 1 ORDER BY sequence
"""
_NUMBERS = "(SELECT sequence FROM {table} WHERE source = :source AND sequence >= :first ORDER BY sequence)"

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
    """One source's numbers from `proven_from` on, counted by outcome.

    `proven_from` is its first number, or with `since` the first that the audit proves; earlier ones are not counted.
    `missing` are inclusive ranges of numbers that are neither in the database nor under way. `mismatched` are numbers
    under which the database has only other events than this outbox. `shared` are the first 10,000 numbers that several
    events have, since copies of one outbox have used them. `under_way` numbers are still in the outbox or the queue. If
    `tail_known` is false, events after `last` cannot be checked: that needs the outbox, or each of its copies.
    """

    source: str
    since: datetime | None
    proven_from: int
    stored: int
    duplicate: int
    rejected: int
    discarded: int
    last: int
    under_way: int
    missing: Ranges
    mismatched: list[int]
    shared: list[int]
    copied: bool
    tail_known: bool

    @property
    def complete(self) -> bool:
        """Whether every number and every entry that can be seen from here is accounted for."""
        return not self.missing and not self.mismatched


@dataclass(frozen=True)
class _Recorded:
    """The numbers of one source in the database, from `first` on."""

    first: int
    stored: int = 0
    duplicate: int = 0
    rejected: int = 0
    discarded: int = 0
    last: int = 0
    gaps: tuple[tuple[int, int], ...] = ()
    shared: tuple[int, ...] = ()


def audit(
    redis: Redis | None = None, outbox: Outbox | None = None, queue: str = "history", *, since: datetime | None = None
) -> list[SourceAudit]:
    """Account for every source in the database, and every source of `outbox`; `redis` has the RQ queue `queue`.

    With `since` (aware) only for what was recorded at or after it, and only for sources that have any of that.

    Raises:
        StoreUnavailable: the database cannot be read now.
        OutboxError: the outbox cannot be read.
    """
    # The outbox and the queue first: what is on its way when they are read may be stored a moment later, but cannot be
    # missing; and what is accepted from now on is not expected in the database.
    kept = {} if outbox is None else {source.full_name: source for source in outbox.sources()}
    unsettled = {name: outbox.unsettled(source.id) for name, source in kept.items()} if outbox is not None else {}
    queued = {} if redis is None else _numbers_in_queue(redis, queue)
    recorded = _recorded(since)
    lasts = {} if outbox is None else {source.full_name: source.last_sequence for source in outbox.sources()}
    audits = []
    for name in sorted(recorded.keys() | kept.keys()):
        found = recorded.get(name) or _Recorded(_first_number(name))
        if name not in kept and found.last < found.first:
            continue  # it recorded nothing since then
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
    """`kept` is the source as the outbox had it before the database was read, `last_now` its last number afterwards."""
    gaps, last = list(found.gaps), found.last
    copied = bool(found.shared)
    if kept is not None:
        # A number that this outbox has never used: a copy has, or this is an older copy that was put back.
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
        last=last,
        under_way=_size(gaps) - _size(missing),
        missing=missing,
        mismatched=mismatched,
        shared=list(found.shared),
        copied=copied,
        tail_known=kept is not None and not copied,
    )


def _recorded(since: datetime | None) -> dict[str, _Recorded]:
    """The numbers of each source in the database, from one snapshot."""
    with get_db() as db:
        # One snapshot: an event that is stored meanwhile must not be counted in one query and missing in another.
        db.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
        found = {}
        gaps_of = text(_GAPS.format(numbers=_of_all_tables(_NUMBERS)))
        shared_of = text(_SHARED.format(events=_of_all_tables(_EVENTS)))
        for row in db.execute(_counts(since), {} if since is None else {"since": since}):
            first = _first_number(row.source) if row.last_before is None else row.last_before + 1
            steps = db.execute(gaps_of, {"source": row.source, "first": first}).all()
            gaps = tuple((step.first, step.last) for step in steps if step.last >= step.first)
            again = sorted({step.sequence for step in steps if step.last < step.first})[:_MOST_SHARED]
            shared = db.execute(shared_of, {"source": row.source, "numbers": again}).scalars().all() if again else ()
            found[row.source] = _Recorded(
                first,
                stored=int(row.stored),
                duplicate=int(row.duplicate),
                rejected=int(row.rejected),
                discarded=int(row.discarded),
                last=row.last,
                gaps=gaps,
                shared=tuple(shared),
            )
        return found


def _counts(since: datetime | None) -> TextClause:
    parts = dict(_ALL if since is None else _SINCE)
    parts["before"] = parts["before"].format(earlier=_of_all_tables(_EARLIER))
    return text(_COUNTS.format(rows=_of_history_tables(_ROWS, **parts), **parts))


def _of_history_tables(part: str, *others: str, **values: str) -> str:
    """`part` of every table that events become rows of, and of `others`, as one."""
    tables = [*(kind.table for kind in KINDS.values()), *others]
    return " UNION ALL ".join(part.format(table=table, **values) for table in tables)


def _of_all_tables(part: str) -> str:
    return _of_history_tables(part, "event_outcomes")


def _first_number(source: str) -> int:
    """Outboxes count from 1, an import numbers the entries of a file from 0."""
    return 0 if source.startswith(IMPORT_PREFIX) and source.count("/") == 2 else 1


def _up_to(ranges: Ranges, last_stored: int, last_used: int) -> Ranges:
    """The gaps up to the last number that the outbox had used, the tail behind the last stored one included."""
    if last_used > last_stored:
        return [*ranges, (last_stored + 1, last_used)]
    return [(first, min(last, last_used)) for first, last in ranges if first <= last_used]


def _mismatched(source: OutboxSource, outbox: Outbox, first: int) -> list[int]:
    """The numbers from `first` on under which the database has other events than the outbox, and not the outbox's own.

    An entry that is under way is not looked for. Of what was rejected the database may not know the event's id.
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
    """By the id of their source, the numbers of the deliveries that wait or are worked on."""
    queue = Queue(queue_name, connection=redis, serializer=JSONSerializer)
    owners: Any = redis.hkeys(owners_key(queue_name))
    with redis.pipeline(transaction=True) as pipe:
        pipe.lrange(queue.key, 0, -1)
        pipe.lrange(IntermediateQueue.get_intermediate_queue_key(queue.key), 0, -1)
        for owner in owners:
            pipe.lrange(reserved_key(queue_name, shown(owner)), 0, -1)
        pipe.zrange(queue.started_job_registry.key, 0, -1)
        lists = pipe.execute(raise_on_error=False)  # a key of another type is somebody else's
    numbers: dict[str, set[int]] = {}
    for job_id in (shown(member).partition(":")[0] for one in lists if isinstance(one, list) for member in one):
        if delivery := delivery_of(job_id):
            numbers.setdefault(delivery[0], set()).add(delivery[1])
    return numbers


def _without(ranges: Ranges, known: set[int]) -> Ranges:
    """The `ranges` without the numbers that are known, in order."""
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
