"""Jobs on the queue `history` as a producer without an outbox would send them, and a worker that takes them all."""

from __future__ import annotations

from datetime import timedelta

from redis import Redis
from rq import Queue
from rq.serializers import JSONSerializer

from consumers.worker import HistoryWorker
from producers.events import encode, event_of
from tests.factories import a_snapshot


def history_queue(redis: Redis) -> Queue:
    return Queue("history", connection=redis, serializer=JSONSerializer)


def enqueue_snapshots(redis: Redis, count: int) -> list[str]:
    """Snapshots of `count` consecutive seconds, numbered from 0; the ids of their jobs."""
    jobs = []
    for number in range(count):
        event = event_of(a_snapshot(after=timedelta(seconds=number)), source="other/1", sequence=number)
        jobs.append(history_queue(redis).enqueue("consumers.handlers.record_portfolio_snapshot", encode(event)))
    return [job.id for job in jobs]


def burst(redis: Redis) -> HistoryWorker:
    """Run a HistoryWorker in this process until the queue is empty."""
    worker = HistoryWorker([history_queue(redis)], connection=redis)
    worker.work(burst=True, logging_level="WARNING")
    return worker
