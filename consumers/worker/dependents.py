"""Jobs of other programs that wait for one of ours: RQ's own functions enqueue them, within limits of memory."""

from __future__ import annotations

import logging
from typing import Any

from redis import Redis
from rq import Queue
from rq.job import Job, validate_job_id
from rq.rate_limit import release_slot
from rq.serializers import JSONSerializer

from consumers.errors import OversizedJob, RefusedJob, is_redis_outage
from consumers.worker.deliveries import inflated

logger = logging.getLogger(__name__)


class BoundedJob(Job):
    """A job that RQ reads without inflating more than a job of ours can have, and whose dependencies are job ids."""

    def restore(self, raw_data: Any) -> Any:
        for name in (b"data", b"exc_info"):
            try:
                inflated(raw_data.get(name, b"["))
            except OversizedJob:
                raise
            except RefusedJob:
                pass  # not compressed: RQ takes it as it is
        restored = super().restore(raw_data)
        # RQ reads these whatever they are, and could not write them again.
        if not isinstance(self._dependency_ids, list):
            raise RefusedJob("its job cannot be read")
        for dependency_id in self._dependency_ids:
            validate_job_id(dependency_id)
        return restored


class Dependents:
    """Jobs that wait for jobs of one queue: their dependents, and those that share a rate limit with a refused job."""

    def __init__(self, redis: Redis, queue: Queue) -> None:
        self._queue = Queue(queue.name, connection=redis, job_class=BoundedJob, serializer=JSONSerializer)

    def enqueue(self, job_id: str) -> None:
        """Have RQ enqueue the jobs that waited for this completed one. If it cannot, that is logged.

        Raises:
            RedisError: Redis fails. The job must stay reserved then, so that this is done again.
        """
        try:
            job = BoundedJob.fetch(job_id, connection=self._queue.connection, serializer=JSONSerializer)
            self._queue.enqueue_dependents(job)
            release_slot(job)
        except Exception as error:
            if is_redis_outage(error):
                raise
            # Another program's keys; RQ raises as many kinds of errors as there are fields.
            logger.error(
                "the jobs that wait for job %s stay where they are, since RQ cannot enqueue them: %s",
                job_id, type(error).__name__,
            )  # fmt: skip

    def enqueue_ready(self) -> None:
        """Have RQ enqueue the jobs that it left between deferred and queued, as a crash in between does."""
        self._queue.ready_job_registry.cleanup()
