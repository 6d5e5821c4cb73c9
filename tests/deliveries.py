"""Jobs on the queue `history` as a producer without an outbox enqueues them, and a worker that empties the queue."""

from __future__ import annotations

from datetime import timedelta

from redis import Redis
from rq import Queue
from rq.serializers import JSONSerializer
from sqlalchemy import text

from consumers.db.engine import get_db
from consumers.operations import get_portfolio_history
from consumers.worker.history_worker import HistoryWorker
from producers.events import encode, event_of
from tests.factories import a_snapshot


def history_queue(redis: Redis) -> Queue:
    """Return RQ's queue `history`, with the JSON serializer."""
    return Queue("history", connection=redis, serializer=JSONSerializer)


def enqueue_snapshots(redis: Redis, count: int, *, first: int = 0) -> list[str]:
    """Enqueue snapshots of `count` consecutive seconds, numbered from `first`. Returns the ids of their jobs."""
    jobs = []
    for number in range(first, first + count):
        event = event_of(a_snapshot(after=timedelta(seconds=number)), source="other/1", sequence=number)
        jobs.append(history_queue(redis).enqueue("consumers.handlers.record_portfolio_snapshot", encode(event)))
    return [job.id for job in jobs]


def burst(redis: Redis) -> HistoryWorker:
    """Run a HistoryWorker in this process until the queue is empty."""
    worker = HistoryWorker([history_queue(redis)], connection=redis)
    worker.work(burst=True, logging_level="WARNING")
    return worker


def assert_stored_once(redis: Redis, count: int) -> None:
    """Check that snapshots 0 to `count` - 1 are rows, no outcome is recorded, and no job or reservation is left."""
    assert sorted(row["sequence"] for row in get_portfolio_history()) == list(range(count))
    with get_db() as db:
        assert db.scalar(text("SELECT count(*) FROM event_outcomes")) == 0
    queue = history_queue(redis)
    assert (queue.count, queue.failed_job_registry.count, queue.started_job_registry.count) == (0, 0, 0)
    assert redis.keys("history:reserved:*") + redis.keys("history:lease:*") + redis.keys("history:crashes:*") == []
