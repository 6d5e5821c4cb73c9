"""The worker: RQ's own, in one process, with our handlers imported and JSON as the only serializer."""

from __future__ import annotations

from redis import Redis
from rq import Queue, SimpleWorker
from rq.serializers import JSONSerializer

import consumers.handlers  # noqa: F401  # imported once, here, rather than with the first job


def run_worker(redis: Redis, queue: str, *, burst: bool = False) -> None:
    """Work on `queue` until told to stop; with `burst`, until it is empty.

    SIGINT and SIGTERM end it after the job at hand.
    """
    worker = SimpleWorker(
        [Queue(queue, connection=redis, serializer=JSONSerializer)],
        connection=redis,
        serializer=JSONSerializer,
    )
    worker.work(burst=burst, logging_level="WARNING")
