"""Jobs of rejected events in Redis, by hundreds: put them back into the queue, or delete them.

RQ needs some ten round trips for each job. Here, RQ's own objects write the same commands for many jobs into one
transaction. The keys of the jobs are watched from before they are read: if another program changes one of them, nothing
is done, and all are read again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

from redis import Redis, RedisError, WatchError
from redis.client import Pipeline
from rq import Queue
from rq.exceptions import InvalidJobOperation
from rq.job import Job, JobStatus
from rq.results import Result
from rq.serializers import JSONSerializer

from consumers.ops.redis_errors import is_wrong_type
from producers.errors import HistoryError

logger = logging.getLogger(__name__)

_TRIES = 10
_WAITING = frozenset({JobStatus.QUEUED, JobStatus.STARTED, JobStatus.DEFERRED, JobStatus.SCHEDULED})
_UNREAD = (b"data", b"exc_info")


class LostJob(NamedTuple):
    """Job that Redis no longer has, or that RQ cannot read: what is needed to make it anew."""

    job_id: str
    job_function: str
    text: str


class _UnopenedJob(Job):
    """Job whose call and error stay unread in Redis. RQ would decompress both, without a limit."""

    def to_dict(self, include_meta: bool = True, include_result: bool = True) -> dict[str, Any]:
        written: dict[str, Any] = super().to_dict(include_meta, include_result)
        del written["data"]
        return written

    @property
    def is_plain(self) -> bool:
        """Whether RQ has no records of the job beside its hash, results and place in a list, as for all of ours."""
        is_elsewhere = self.get_status(refresh=False) in _WAITING - {JobStatus.QUEUED}
        return not (is_elsewhere or self._dependency_ids or self.rate_limit_key or self.group_id)

    def forget_run(self) -> None:
        """Remove the times and the error of the last run, as RQ does before it requeues a job."""
        self.started_at = self.ended_at = None
        self._exc_info = ""


Jobs = dict[str, _UnopenedJob | None]  # by id; None if Redis has lost it, or RQ cannot read it


class FailedJobs:
    """The jobs of rejected events, most of which are in the failed registry of one queue.

    Raises:
        RedisError: from every method, if Redis cannot be read or written now. Nothing was changed.
    """

    def __init__(self, redis: Redis, queue_name: str) -> None:
        self._redis = redis
        self._name = queue_name
        self._queue = cache(lambda name: Queue(name, connection=redis, serializer=JSONSerializer))
        self._failed_key = self._queue(queue_name).failed_job_registry.key

    def requeue(self, job_ids: Sequence[str]) -> tuple[int, list[str]]:
        """Put jobs at the end of the queue from which they came. A job that waits or runs stays as it is.

        Returns:
            The number of requeued jobs, and the ids of those that Redis has lost or that RQ cannot read.
        """

        failed: list[_UnopenedJob] = []

        def write(jobs: Jobs, pipe: Pipeline) -> None:
            failed[:] = [job for job in jobs.values() if job and job.get_status(refresh=False) not in _WAITING]
            for job in failed:
                if job.is_plain:
                    pipe.zrem(self._failed_key, job.id)
                    job.forget_run()
                    self._queue(job.origin or self._name).enqueue_job(job, pipeline=pipe)

        lost = [job_id for job_id, job in self._changed(job_ids, write).items() if job is None]
        requeued = len(failed)
        for job in failed:
            if not job.is_plain and not self._requeue_by_rq(job):
                requeued -= 1
                lost.append(job.id)
        return requeued, lost

    def _requeue_by_rq(self, job: _UnopenedJob) -> bool:
        """Return whether the failed registry had the job."""
        try:
            self._queue(self._name).failed_job_registry.requeue(job)
        except InvalidJobOperation:
            return False
        return True

    def delete(self, job_ids: Sequence[str], *, even_waiting: bool) -> list[str]:
        """Delete jobs, wherever they are listed. A worker that has reserved one sees that it was deleted.

        Unless `even_waiting`, a job that waits or runs stays as it is.

        Returns:
            The ids of all but those that stay.
        """

        def stays(job: _UnopenedJob | None) -> bool:
            return not even_waiting and job is not None and job.get_status(refresh=False) in _WAITING

        def write(jobs: Jobs, pipe: Pipeline) -> None:
            for job_id, job in jobs.items():
                if stays(job):
                    continue
                if job is None:
                    pipe.delete(Job.key_for(job_id), Result.get_key(job_id))
                elif job.is_plain:
                    self._delete_plain(job, pipe)
                pipe.zrem(self._failed_key, job_id)

        deleted = {job_id: job for job_id, job in self._changed(job_ids, write).items() if not stays(job)}
        for job in deleted.values():
            if job and not job.is_plain:
                job.delete()
        return [*deleted]

    def _delete_plain(self, job: _UnopenedJob, pipe: Pipeline) -> None:
        """Delete what RQ's `Job.delete` deletes. That would read status and executions of each job first."""
        queue = self._queue(job.origin or self._name)
        queue.remove(job.id, pipeline=pipe)
        for registry in (queue.failed_job_registry, queue.finished_job_registry, queue.canceled_job_registry):
            registry.remove(job.id, pipeline=pipe)
        pipe.delete(job.key, job.dependents_key, job.dependencies_key, Result.get_key(job.id))

    def enqueue_anew(self, lost: Sequence[LostJob]) -> None:
        """Enqueue new jobs under these ids, in place of what is there."""
        queue = self._queue(self._name)
        with self._redis.pipeline() as pipe:
            pipe.multi()  # RQ would call it after the first commands, where it is an error
            for one in lost:
                pipe.delete(Job.key_for(one.job_id))
                pipe.zrem(self._failed_key, one.job_id)
                queue.enqueue(one.job_function, one.text, job_id=one.job_id, failure_ttl=-1, pipeline=pipe)
            pipe.execute()

    def _changed(self, job_ids: Sequence[str], write: Callable[[Jobs, Pipeline], None]) -> Jobs:
        """Read the jobs, let `write` add commands to one transaction, and execute it. Return the jobs as they were."""
        for _ in range(_TRIES if job_ids else 0):
            with self._redis.pipeline() as pipe:
                pipe.watch(*map(Job.key_for, job_ids))
                jobs = self._read(job_ids)  # through another connection: after WATCH, this one buffers nothing
                pipe.multi()
                write(jobs, pipe)
                try:
                    pipe.execute()
                except WatchError:
                    continue
                return jobs
        if job_ids:
            raise HistoryError("other programs change the same jobs all the time: run this again later")
        return {}

    def _read(self, job_ids: Sequence[str]) -> Jobs:
        keys = [Job.key_for(job_id) for job_id in job_ids]
        with self._redis.pipeline(transaction=False) as pipe:
            for key in keys:
                pipe.hkeys(key)
            found = pipe.execute(raise_on_error=False)
        names = [_names(one) for one in found]
        with self._redis.pipeline(transaction=False) as pipe:
            for key, some in zip(keys, names, strict=True):
                if some:
                    pipe.hmget(key, some)
            values = iter(pipe.execute())
        jobs: Jobs = {}
        for job_id, some in zip(job_ids, names, strict=True):
            jobs[job_id] = self._restored(job_id, dict(zip(some, next(values), strict=True))) if some else None
        return jobs

    def _restored(self, job_id: str, found: dict[bytes, Any]) -> _UnopenedJob | None:
        job = _UnopenedJob(job_id, connection=self._redis, serializer=JSONSerializer)
        try:
            job.restore({name: value for name, value in found.items() if value is not None} | {b"data": b""})
        except Exception as error:  # RQ raises a different type of error for each field
            logger.debug("job %s cannot be read: %s", job_id, type(error).__name__)
            return None
        return job


def _names(found: Any) -> list[bytes]:
    """Return the fields to read, from the answer to HKEYS; none if Redis has no such job, or a key of another type."""
    if isinstance(found, RedisError) and not is_wrong_type(found):
        raise found
    if isinstance(found, RedisError):
        return []
    return [name for name in found if name not in _UNREAD] if b"data" in found else []
