"""What the rows tell of those who write them: who has stopped, who goes around the queue, what was refused."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

from sqlalchemy import Connection, text

from consumers.operations import DIRECT_SOURCE
from consumers.ops.doctor.checks import Check, duration

_INTERVALS = 200
_FEW_INTERVALS = 5
_LATE = 1.5  # times the longest usual interval
_SHORTEST_SECONDS = 600.0
_RETIRED_SECONDS = 90 * 86400.0
_MOST_PORTFOLIOS = 500
_NEWEST_ROWS = 10_000
_DIRECT_DAYS = 7

# A step from portfolio to portfolio, then a few rows of each: all of it from one index, whatever the table's size.
# Ordered by the portfolio too: for rows without one the planner would else walk another index, past those of others.
_INSTANTS = """
    WITH RECURSIVE known (id) AS (
        (SELECT portfolio_id FROM {table} WHERE portfolio_id IS NOT NULL ORDER BY portfolio_id LIMIT 1)
        UNION ALL
        SELECT (SELECT portfolio_id FROM {table} WHERE portfolio_id > known.id ORDER BY portfolio_id LIMIT 1)
        FROM known WHERE known.id IS NOT NULL
    ), portfolios (id) AS ((SELECT id FROM known WHERE id IS NOT NULL LIMIT :most) UNION ALL SELECT NULL)
    SELECT id, CASE
        WHEN id IS NULL THEN ARRAY(SELECT {instant} FROM {table} WHERE portfolio_id IS NULL
            ORDER BY portfolio_id, {order} LIMIT :rows)
        ELSE ARRAY(SELECT {instant} FROM {table} WHERE portfolio_id = portfolios.id
            ORDER BY portfolio_id, {order} LIMIT :rows)
    END AS instants FROM portfolios
"""
_SNAPSHOTS = text(
    _INSTANTS.format(table="portfolio_history", instant='"timestamp"', order='snapshot_date DESC, "timestamp" DESC')
)
_ARCHIVES = text(_INSTANTS.format(table="signal_archives", instant="archived_at", order="archived_at DESC"))

_DIRECT = text("""
    SELECT count(*) FROM (
        (SELECT source, created_at FROM portfolio_history ORDER BY id DESC LIMIT :rows)
        UNION ALL (SELECT source, created_at FROM signal_archives ORDER BY id DESC LIMIT :rows)) AS newest
    WHERE source = :direct AND created_at > now() - make_interval(days => :days)
""")

# One reason, whatever ids and numbers it names; the newest of them as its example.
_REJECTED = text("""
    SELECT count(*), (array_agg(reason ORDER BY created_at DESC))[1] AS example FROM event_outcomes
    WHERE outcome = 'rejected' AND created_at > now() - interval '1 day'
    GROUP BY regexp_replace(reason, '[0-9a-f]{8}-[0-9a-f-]{27}|[0-9]+', '', 'g')
    ORDER BY count(*) DESC, example
""")


def newest_snapshots(db: Connection) -> Iterator[Check]:
    """Whether each portfolio's newest snapshot is as young as usual; see `lateness`."""
    yield _newest(db, _SNAPSHOTS, "newest snapshots")


def newest_archives(db: Connection) -> Iterator[Check]:
    """Whether each portfolio's newest archive is as young as usual; see `lateness`."""
    yield _newest(db, _ARCHIVES, "newest archives")


def _newest(db: Connection, statement: Any, name: str) -> Check:
    rows = db.execute(statement, {"most": _MOST_PORTFOLIOS, "rows": _INTERVALS + 1}).all()
    instants = {row.id: row.instants for row in rows if row.instants}
    if not instants:
        return Check(name, "ok", "no rows yet")
    now = datetime.fromtimestamp(time.time(), UTC)
    late = {portfolio: told for portfolio, own in instants.items() if (told := lateness(own, now))}
    youngest = duration((now - max(max(own) for own in instants.values())).total_seconds())
    if not late:
        return Check(name, "ok", f"the newest {youngest} ago, none of {len(instants)} portfolios later than usual")
    first = [f"{_named(portfolio)}: {told}" for portfolio, told in list(late.items())[:3]]
    more = f"; and {len(late) - 3} more" if len(late) > 3 else ""
    return Check(name, "warn", "; ".join(first) + more, "does their controller still run, and record?")


def lateness(instants: Sequence[datetime], now: datetime) -> str | None:
    """Says how late the next row is, or None when it is not.

    Late is 1.5 times the longest interval between the last 201 rows, and 10 minutes at least. When none of them falls
    on a Saturday or Sunday (UTC), these days do not count. Nothing is said with fewer than 5 intervals, nor of a
    portfolio that has been silent for 90 days: it is retired.
    """
    ordered = sorted(instants)
    if len(ordered) <= _FEW_INTERVALS or (now - ordered[-1]).total_seconds() > _RETIRED_SECONDS:
        return None
    weekends = any(moment.astimezone(UTC).weekday() >= 5 for moment in ordered)
    usual = max(_elapsed(*pair, weekends=weekends) for pair in pairwise(ordered))
    silent = _elapsed(ordered[-1], now, weekends=weekends)
    if silent <= max(_LATE * usual, _SHORTEST_SECONDS):
        return None
    return f"silent for {duration((now - ordered[-1]).total_seconds())}, at most {duration(usual)} before"


def _elapsed(start: datetime, end: datetime, *, weekends: bool) -> float:
    """Seconds, with or without those of Saturdays and Sundays."""
    if weekends:
        return (end - start).total_seconds()
    start, end = start.astimezone(UTC), end.astimezone(UTC)
    seconds, moment = 0.0, start
    while moment < end:
        midnight = moment.replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(days=1)
        if moment.weekday() < 5:
            seconds += (min(midnight, end) - moment).total_seconds()
        moment = midnight
    return seconds


def direct_inserts(db: Connection) -> Iterator[Check]:
    """Rows of the last week among the newest of each table that came without the queue."""
    values = {"rows": _NEWEST_ROWS, "direct": DIRECT_SOURCE, "days": _DIRECT_DAYS}
    count = db.execute(_DIRECT, values).scalar_one()
    if count:
        yield Check(
            "direct inserts",
            "warn",
            f"{count} rows of the last {_DIRECT_DAYS} days have source {DIRECT_SOURCE}",
            "a program still inserts by itself: let it record, so that nothing is lost while the database is away",
        )
    else:
        yield Check("direct inserts", "ok", f"none in the last {_DIRECT_DAYS} days: all came through the queue")


def rejected_lately(db: Connection) -> Iterator[Check]:
    """Events refused in the last day, with the most frequent reason."""
    name, reasons = "rejected in the last day", db.execute(_REJECTED).all()
    total = sum(count for count, _ in reasons)
    if reasons:
        count, example = reasons[0]
        found = f"{total} events, {count} of them like: {example.splitlines()[0]}"
        yield Check(name, "warn", found, "trading-history failed list; mend the cause, then failed requeue or discard")
    else:
        yield Check(name, "ok", "none")


def _named(portfolio_id: int | None) -> str:
    return "without portfolio" if portfolio_id is None else f"portfolio {portfolio_id}"
