"""Rejections for tests: rows of event_outcomes alone, or with the jobs that a worker rejected."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from redis import Redis
from sqlalchemy import text

from consumers.db.engine import get_db
from consumers.db.inserts import insert_events
from consumers.ops.rejections import rejections
from producers.events import SNAPSHOT_TYPE, encode, event_of
from tests.deliveries import burst, history_queue
from tests.factories import a_snapshot

NOON = datetime(2026, 11, 29, 12, tzinfo=UTC)

_STORE = text("""
    INSERT INTO event_outcomes (job_id, source, sequence, event_id, outcome, reason, event, created_at)
    SELECT :prefix || number, :source, number, gen_random_uuid(), 'rejected',
        replace(:reason, '#', CAST(number AS text)), :event, :at + number * interval '1 minute'
    FROM generate_series(1, :count) AS number
""")


def store_rejections(
    reason: str,
    count: int = 1,
    *,
    prefix: str = "job-",
    source: str | None = "bot/1",
    event: str = f'{{"type":"{SNAPSHOT_TYPE}"}}',
    at: datetime = NOON,
) -> None:
    """Insert rejections with the jobs `<prefix>1`, `<prefix>2` … that Redis does not have, a minute apart after `at`.

    A # in the reason becomes the number of the job.
    """
    given = {"prefix": prefix, "source": source, "reason": reason, "event": event, "at": at, "count": count}
    with get_db() as db:
        db.execute(_STORE, given)


def reject_conflicts(redis: Redis, count: int) -> list[str]:
    """Let a worker reject snapshots whose ids have rows with other content, then delete these rows.

    Once requeued, each is stored. Returns the ids of their jobs, oldest first.
    """
    queue = history_queue(redis)
    with get_db() as db:
        others = [a_snapshot(after=timedelta(seconds=number), trade_count=9) for number in range(count)]
        insert_events(db, [event_of(one, source="other/1", sequence=n) for n, one in enumerate(others)])
    for number in range(count):
        event = event_of(a_snapshot(after=timedelta(seconds=number)), source="bot/1", sequence=number)
        queue.enqueue("consumers.handlers.record_portfolio_snapshot", encode(event), job_id=f"job-{number:06d}")
    burst(redis)
    with get_db() as db:
        db.execute(text("DELETE FROM portfolio_history"))
    found = [one.job_id for one in rejections()]
    assert len(found) == count
    return found
