"""Our deliveries as RQ jobs: what RQ's own enqueue writes, for many at once and at a fraction of its price.

RQ's takes about 330 µs of the interpreter a job, during which a caller's thread does not run; this takes about 50.
A test reads these jobs back through RQ, beside ones that RQ enqueued.

Everything on the producing side that knows RQ's key layout is in this module.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from redis.client import Pipeline
from rq import Queue
from rq.job import Job, JobStatus
from rq.registry import FailedJobRegistry, FinishedJobRegistry
from rq.serializers import JSONSerializer
from rq.utils import utcformat

from producers.events import ARCHIVE_TYPE, SNAPSHOT_TYPE
from producers.outbox import Entry

# By name: the producer never imports the consumer. A test resolves each.
JOB_FUNCTIONS = {
    SNAPSHOT_TYPE: "consumers.handlers.record_portfolio_snapshot",
    ARCHIVE_TYPE: "consumers.handlers.record_signal_archive",
}
TIMEOUT_SECONDS = 180  # RQ's default, for the stock worker, which ends a job that takes longer
_COMPRESS_BYTES = 2048  # RQ reads both; below this, zlib costs more time than its bytes are worth


def enqueue(pipe: Pipeline, queue: Queue, entries: Sequence[Entry]) -> None:
    """Add to `pipe`: each entry as a new job at the tail of the queue, whatever a job of its id was before.

    The last command's answer is the length of the queue.
    """
    job_ids = [entry.job_id for entry in entries]
    # An id that is queued and in a registry of ended jobs as well would be a riddle to whoever looks.
    for registry in (FailedJobRegistry, FinishedJobRegistry):
        pipe.zrem(registry.key_template.format(queue.name), *job_ids)
    pipe.delete(*map(Job.key_for, job_ids))
    pipe.sadd(Queue.redis_queues_keys, queue.key)
    at = utcformat(datetime.now(UTC))
    for entry in entries:
        pipe.hset(Job.key_for(entry.job_id), mapping=_fields(entry, queue.name, at))
    pipe.rpush(queue.key, *job_ids)


def _fields(entry: Entry, origin: str, at: str) -> dict[Any, Any]:
    data = JSONSerializer.dumps((JOB_FUNCTIONS[entry.type], None, (entry.event,), {}))
    return {
        "created_at": at,
        "enqueued_at": at,
        "data": data if len(data) < _COMPRESS_BYTES else zlib.compress(data),
        "status": JobStatus.QUEUED.value,
        "origin": origin,
        "description": entry.summary,
        "timeout": TIMEOUT_SECONDS,
        # What failed waits for a person; it does not disappear by itself.
        "failure_ttl": -1,
    }
