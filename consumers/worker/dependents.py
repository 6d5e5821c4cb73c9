"""Dependents: jobs of other programs that wait for one of ours. RQ's own functions enqueue them.

RQ decompresses any job without a limit; BoundedJob adds one.
"""

from __future__ import annotations

import logging
from typing import Any

from redis import Redis
from rq import Queue
from rq.job import Job, validate_job_id
from rq.rate_limit import RateLimitRegistry, release_slot
from rq.serializers import JSONSerializer

from consumers.errors import OversizedJob, UnsupportedJob, first_line
from consumers.ops.redis_errors import is_redis_outage
from consumers.worker.deliveries import decompressed_call
from producers.redis_url import is_forbidden

logger = logging.getLogger(__name__)


class BoundedJob(Job):
    """A job of RQ that is read only if it decompresses to no more bytes than a job of ours can have."""

    def restore(self, raw_data: Any) -> Any:
        for name in (b"data", b"exc_info"):
            try:
                decompressed_call(raw_data.get(name, b"["))
            except OversizedJob:
                raise
            except UnsupportedJob:
                pass  # not compressed: RQ reads it as it is
        restored = super().restore(raw_data)
        # RQ reads dependency ids of any type, but could not write them again.
        if not isinstance(self._dependency_ids, list):
            raise UnsupportedJob("its dependencies cannot be read")
        for dependency_id in self._dependency_ids:
            validate_job_id(dependency_id)
        return restored


class Dependents:
    """Jobs that wait for jobs of one queue: their dependents, and jobs that wait for a slot of a rate limit."""

    def __init__(self, redis: Redis, queue: Queue) -> None:
        self._queue = Queue(queue.name, connection=redis, job_class=BoundedJob, serializer=JSONSerializer)

    def enqueue(self, job_id: str) -> None:
        """Have RQ enqueue the jobs that wait for this completed job. If RQ cannot, that is logged.

        Raises:
            RedisError: Redis fails. The job must stay reserved, so that this is tried again.
        """
        try:
            job = BoundedJob.fetch(job_id, connection=self._queue.connection, serializer=JSONSerializer)
            self._queue.enqueue_dependents(job)
            release_slot(job)
        except Exception as error:
            if is_redis_outage(error):
                raise
            # Another program can have written the keys, and RQ raises errors of any class. The dependents may be jobs
            # of another queue, which this user of Redis may not be allowed to write.
            reason = first_line(error) if is_forbidden(error) else type(error).__name__
            logger.error("RQ cannot enqueue the dependents of job %s; they stay deferred: %s", job_id, reason)

    def free_slots(self) -> None:
        """Have RQ free the slots of rate limits whose jobs have ended, and enqueue the jobs that wait for them."""
        for registry in RateLimitRegistry.all(self._queue.connection):
            registry.cleanup()

    def enqueue_ready(self) -> None:
        """Have RQ enqueue the jobs that a crash left between deferred and queued."""
        self._queue.ready_job_registry.cleanup()
