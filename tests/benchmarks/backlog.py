"""Events that wait in the queue before a worker starts, enqueued through a real outbox."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from uuid import uuid4

from redis import Redis
from rq import Queue
from rq.job import Job
from rq.serializers import JSONSerializer

from producers.events import PortfolioSnapshot, encode, event_of
from producers.outbox import Outbox
from producers.redis_keys import acknowledgement_key, orphans_key
from producers.rq_queue import ACTIVE_STATUSES, enqueue
from tests.benchmarks.checks import require, wait_for_progress
from tests.benchmarks.environment import queue_name
from tests.factories import a_snapshot

_APPEND_EVENTS = 5000
_PARKED = "benchmark:parked"
_SEND_ENTRIES = 500
_LAST_JOBS = 1000


def snapshots(count: int, first: int = 0) -> Iterator[PortfolioSnapshot]:
    """Yield `count` different snapshots, one second apart."""
    return (a_snapshot(after=timedelta(seconds=number)) for number in range(first, first + count))


def texts(count: int) -> list[str]:
    """Return the JSON texts of `count` snapshot events, without a queue."""
    return [
        encode(event_of(payload, source="bench/0", sequence=number))
        for number, payload in enumerate(snapshots(count), start=1)
    ]


@dataclass(frozen=True)
class Backlog:
    """`count` jobs in a parked list, which no worker reads until `release`."""

    redis: Redis
    queue: Queue
    count: int
    source: str
    last_job_ids: Sequence[str]

    def release(self) -> None:
        """Move all jobs into the queue atomically."""
        self.redis.rename(_PARKED, self.queue.key)

    def wait(self) -> int:
        """Wait until every event is acknowledged (which is after its commit) and the last jobs are finished.

        Returns:
            The number of Redis commands that the wait itself used.
        """
        key = acknowledgement_key(self.source)
        commands = wait_for_progress(lambda: int(self.redis.hlen(key)), self.count)
        while True:
            commands += len(self.last_job_ids)
            if not self._has_active_jobs():
                return commands
            time.sleep(0.002)

    def _has_active_jobs(self) -> bool:
        """Return whether one of the last jobs is queued or started."""
        with self.redis.pipeline(transaction=False) as pipe:
            for job_id in self.last_job_ids:
                pipe.hget(Job.key_for(job_id), "status")
            statuses = pipe.execute()
        return any(status and status.decode() in ACTIVE_STATUSES for status in statuses)


def park_snapshots(redis: Redis, folder: Path, count: int, first: int = 0) -> Backlog:
    """Record and enqueue `count` snapshots, numbered from `first`, then park the queue's list under another key."""
    queue = Queue(queue_name(), connection=redis, serializer=JSONSerializer)
    with Outbox(folder / f"backlog-{uuid4().hex}.db") as outbox:
        for done in range(0, count, _APPEND_EVENTS):
            outbox.append("bench", list(snapshots(min(_APPEND_EVENTS, count - done), first + done)))
        job_ids: deque[str] = deque(maxlen=_LAST_JOBS)
        # The relay itself would stop sending before the queue is this long.
        while entries := outbox.deliveries.pending(_SEND_ENTRIES):
            with redis.pipeline(transaction=True) as pipe:
                enqueue(pipe, queue, entries)
                pipe.execute()
            outbox.deliveries.mark_sent({entry.position: 0.0 for entry in entries})
            job_ids.extend(entry.job_id for entry in entries)
        sent = outbox.status().sent
        (source,) = outbox.sources()
    require(sent == queue.count == count, f"{sent} events sent and {queue.count} queued of {count}")
    redis.rename(queue.key, _PARKED)
    # Suppress the workers' search for orphans: parked jobs are in no list that it knows.
    redis.set(f"{orphans_key(queue.name)}:looked", "1", ex=3600)
    for file in folder.glob("backlog-*"):
        file.unlink()
    return Backlog(redis, queue, count, source.full_name, tuple(job_ids))
