"""The proof: for each source, every number from the first to the last is accounted for, or named as missing.

A source numbers its events without gaps. In the database each number is a row, or an outcome that is no row. With
the producer's outbox at hand, the audit also knows the numbers after the last one in the database.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from itertools import islice
from typing import Any

from redis import Redis
from rq.job import Job
from rq.utils import as_text
from sqlalchemy import text

from consumers.connection import get_db
from producers.outbox import Outbox, source_of
from producers.redis_keys import job_id_of
from producers.rq_jobs import UNDER_WAY

_PAGE = 5000

# What was refused may have a number and no source that is one: it is in no source's account.
_COUNTS = text("""
    SELECT source, sum(stored) AS stored, sum(duplicate) AS duplicate, sum(rejected) AS rejected,
        sum(discarded) AS discarded, max(last) AS last
    FROM (
        SELECT source, count(*) AS stored, 0 AS duplicate, 0 AS rejected, 0 AS discarded, max(sequence) AS last
        FROM portfolio_history WHERE sequence IS NOT NULL GROUP BY source
        UNION ALL
        SELECT source, count(*), 0, 0, 0, max(sequence)
        FROM signal_archives WHERE sequence IS NOT NULL GROUP BY source
        UNION ALL
        SELECT source, 0, count(*) FILTER (WHERE outcome = 'duplicate'), count(*) FILTER (WHERE outcome = 'rejected'),
            count(*) FILTER (WHERE outcome = 'discarded'), max(sequence)
        FROM event_outcomes WHERE source IS NOT NULL AND sequence IS NOT NULL GROUP BY source
    ) AS tables GROUP BY source ORDER BY source
""")

# Source by source, each is an ordered pass over the indexes; all at once would be a sort of everything. Each part in
# its order: PostgreSQL does not look for one behind a UNION ALL of tables that have heirs.
_GAPS = text("""
    SELECT previous + 1 AS first, sequence - 1 AS last FROM (
        SELECT sequence, lag(sequence, 1, CAST(:before AS bigint)) OVER (ORDER BY sequence) AS previous FROM (
            (SELECT sequence FROM portfolio_history
                WHERE source = :source AND sequence IS NOT NULL ORDER BY sequence)
            UNION ALL (SELECT sequence FROM signal_archives
                WHERE source = :source AND sequence IS NOT NULL ORDER BY sequence)
            UNION ALL (SELECT sequence FROM event_outcomes
                WHERE source = :source AND sequence IS NOT NULL ORDER BY sequence)) AS numbered
        ) AS steps
    WHERE sequence > previous + 1 ORDER BY sequence
""")

_IDENTITIES = text("""
    SELECT sequence, event_id FROM (
        SELECT source, sequence, event_id FROM portfolio_history
        UNION ALL SELECT source, sequence, event_id FROM signal_archives
        UNION ALL SELECT source, sequence, event_id FROM event_outcomes) AS identities
    WHERE source = :source AND sequence BETWEEN :first AND :last
""")

Ranges = list[tuple[int, int]]


@dataclass(frozen=True)
class SourceAudit:
    """One source's numbers, counted by what became of them.

    `missing` are inclusive ranges of numbers that nothing is known of; `mismatched` are numbers under which the
    database has another event than the outbox. `under_way` numbers are still in the outbox or the queue. Without
    the outbox (`tail_known` false) what was accepted after `last` cannot be seen.
    """

    source: str
    stored: int
    duplicate: int
    rejected: int
    discarded: int
    last: int
    under_way: int
    missing: Ranges
    mismatched: list[int]
    tail_known: bool

    @property
    def complete(self) -> bool:
        return not self.missing and not self.mismatched


def audit(redis: Redis | None = None, outbox: Outbox | None = None) -> list[SourceAudit]:
    """Account for every source in the database, and every source of `outbox`.

    Raises:
        StoreUnavailable: the database cannot be read now.
    """
    # The outbox first: what is on its way when it is read may be stored a moment later, but cannot be missing; and
    # what it accepts from now on is not expected in the database.
    kept = {} if outbox is None else {source_of(name, key): (key, last) for key, name, last in outbox.sources()}
    unsettled = {source: outbox.unsettled(key) for source, (key, _) in kept.items()} if outbox is not None else {}
    counts, gaps = _recorded()
    audits = []
    for source in sorted(counts.keys() | kept.keys()):
        row, ranges = counts.get(source), gaps.get(source, [])
        last: int = 0 if row is None else row.last
        if source in kept:
            ranges, last = _up_to(ranges, last, kept[source][1]), kept[source][1]
        travelling = unsettled[source] if source in unsettled else _in_queue(source, ranges, redis)
        missing = _without(ranges, travelling)
        audits.append(
            SourceAudit(
                source=source,
                stored=0 if row is None else int(row.stored),
                duplicate=0 if row is None else int(row.duplicate),
                rejected=0 if row is None else int(row.rejected),
                discarded=0 if row is None else int(row.discarded),
                last=last,
                under_way=_size(ranges) - _size(missing),
                missing=missing,
                mismatched=_mismatched(source, kept[source][0], outbox) if outbox and source in kept else [],
                tail_known=source in kept,
            )
        )
    return audits


def _recorded() -> tuple[dict[str, Any], dict[str, Ranges]]:
    """Of each source in the database its row of _COUNTS, and the gaps between its numbers."""
    with get_db() as db:
        # One moment for all: what is stored while this looks would else be counted in one place and not in the other.
        db.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
        counts = {row.source: row for row in db.execute(_COUNTS)}
        gaps = {
            source: [(gap.first, gap.last) for gap in db.execute(_GAPS, {"source": source, "before": _before(source)})]
            for source in counts
        }
    return counts, gaps


def _before(source: str) -> int:
    """The number before its first: outboxes count from 1, an import numbers the entries of a file from 0."""
    return -1 if source.startswith("import/") and source.count("/") == 2 else 0


def _up_to(ranges: Ranges, last_stored: int, last_used: int) -> Ranges:
    """The gaps up to the last number that the outbox had used, the tail behind the last stored one included."""
    if last_used > last_stored:
        return [*ranges, (last_stored + 1, last_used)]
    return [(first, min(last, last_used)) for first, last in ranges if first <= last_used]


def _mismatched(source: str, source_id: str, outbox: Outbox) -> list[int]:
    """The numbers under which the database has another event than the outbox."""
    mismatched, after = [], -1
    while page := outbox.numbers(source_id, after, _PAGE):
        first, after = page[0][0], page[-1][0]
        with get_db() as db:
            rows = db.execute(_IDENTITIES, {"source": source, "first": first, "last": after})
            stored = {row.sequence: row.event_id for row in rows}
        mismatched += [number for number, event_id in page if stored.get(number, event_id) not in (event_id, None)]
    return mismatched


def _in_queue(source: str, ranges: Ranges, redis: Redis | None) -> set[int]:
    """Those numbers whose job is on its way in Redis; of a very long gap only the first."""
    numbers = list(islice((number for first, last in ranges for number in range(first, last + 1)), _PAGE))
    if redis is None or not numbers:
        return set()
    source_id = source.rsplit("/", 1)[-1]
    with redis.pipeline(transaction=False) as pipe:
        for number in numbers:
            pipe.hget(Job.key_for(job_id_of(source_id, number)), "status")
        statuses = pipe.execute()
    return {number for number, status in zip(numbers, statuses, strict=True) if status and as_text(status) in UNDER_WAY}


def _without(ranges: Ranges, known: set[int]) -> Ranges:
    """What is left of `ranges`, in order, without the numbers that are known."""
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
