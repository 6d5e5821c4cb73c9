"""What an operator may change: put failed jobs into the queue again, and take jobs out of Redis.

Neither reads what a job asks for, however large it is. What the outbox of a producer still waits for is sent again when
it was taken out, and what was refused for good stays in event_outcomes. An event that another program has enqueued,
without an outbox, and that no worker has read yet is lost with its job.
"""

from __future__ import annotations

import logging
from typing import Any

from redis import Redis, RedisError
from redis.client import Pipeline
from rq import Queue
from rq.exceptions import InvalidJobOperation, NoSuchJobError
from rq.job import Job
from rq.results import Result
from rq.serializers import JSONSerializer

from consumers.errors import is_wrong_type
from consumers.web.dashboard.bounded import read_without
from consumers.web.dashboard.stored_jobs import REGISTRIES, registry_key, shown
from producers.errors import HistoryError
from producers.redis_keys import delays_key, held_key, holders_key, strays_key, suspects_key

logger = logging.getLogger(__name__)


class _LightJob(Job):
    """A job without what may be large, which stays as it is in Redis."""

    def refresh(self) -> None:
        found = read_without(self.connection, self.key, "data", "meta", "result", "exc_info")
        if found is None:
            raise ValueError("its fields are too large")
        if not found:
            raise NoSuchJobError(self.key)
        self.restore(found)

    def to_dict(self, include_meta: bool = True, include_result: bool = True) -> dict[str, Any]:
        fields: dict[str, Any] = super().to_dict(include_meta, include_result)
        del fields["data"]
        return fields


class NotRequeued(HistoryError):
    """A job that cannot go through again, and why."""


class NotFailed(NotRequeued):
    """A job that somebody else has sent through again, or taken out."""


def requeue(redis: Redis, job_id: str) -> None:
    """Put a failed job into its queue again.

    Raises:
        NotRequeued: it is gone, not failed, or cannot be read.
    """
    try:
        job = _LightJob.fetch(job_id, connection=redis, serializer=JSONSerializer)
        Queue(job.origin, connection=redis, serializer=JSONSerializer).failed_job_registry.requeue(job)
    except InvalidJobOperation:
        raise NotFailed(f"job {job_id} is not failed any more") from None
    except NoSuchJobError:
        raise NotRequeued(_unreadable(job_id)) from None
    except Exception as error:
        _raise_redis_trouble(error)
        # Whatever somebody has done to it: RQ raises as many kinds of errors as there are fields.
        raise NotRequeued(f"{_unreadable(job_id)} ({type(error).__name__})") from error
    logger.info("job %s: sent through again", job_id)


def _unreadable(job_id: str) -> str:
    return f"job {job_id} cannot be read: trading-history failed requeue {job_id} takes its event from the database"


def requeue_all(redis: Redis, queue_name: str) -> tuple[int, int]:
    """Every failed job of the queue, in their order: how many went, and how many could not.

    What somebody else sends through meanwhile is neither.
    """
    went = failed = 0
    job_ids: Any = redis.zrange(registry_key(queue_name, "failed"), 0, -1)
    for job_id in job_ids:
        try:
            requeue(redis, shown(job_id))
        except NotFailed:
            pass
        except NotRequeued as error:
            logger.warning("%s", error)
            failed += 1
        else:
            went += 1
    return went, failed


def delete(redis: Redis, job_id: str) -> None:
    """Take a job, harmed or gone, out of Redis: itself, its result, and its id wherever it is listed.

    A worker that has it at hand goes on: its event is stored and acknowledged all the same.
    """
    try:
        _LightJob.fetch(job_id, connection=redis, serializer=JSONSerializer).delete()
    except Exception as error:
        _raise_redis_trouble(error)
        logger.info("job %s is deleted unread: %s", job_id, type(error).__name__)
    queues: Any = redis.smembers(Queue.redis_queues_keys)
    names = [shown(key).removeprefix(Queue.redis_queue_namespace_prefix) for key in queues]
    held = _held_lists(redis, names)
    with redis.pipeline() as pipe:
        for queue_name in names:
            _unlist(pipe, queue_name, job_id)
        for key in held:
            pipe.lrem(key, 0, job_id)
        pipe.delete(Job.key_for(job_id), Result.get_key(job_id), Job.dependents_key_for(job_id))
        answers = pipe.execute(raise_on_error=False)
    for answer in answers:
        # A list or a registry that is of another type holds no job.
        if isinstance(answer, Exception):
            _raise_redis_trouble(answer)
    logger.info("job %s: deleted", job_id)


def _unlist(pipe: Pipeline, queue_name: str, job_id: str) -> None:
    pipe.lrem(Queue.redis_queue_namespace_prefix + queue_name, 0, job_id)
    for registry_name in REGISTRIES:
        pipe.zrem(registry_key(queue_name, registry_name), job_id)
    for key in (suspects_key, delays_key, strays_key):
        pipe.hdel(key(queue_name), job_id)


def _held_lists(redis: Redis, queue_names: list[str]) -> list[str]:
    """What workers, alive or dead, have at hand."""
    with redis.pipeline(transaction=False) as pipe:
        for queue_name in queue_names:
            pipe.hkeys(holders_key(queue_name))
        answers = pipe.execute(raise_on_error=False)
    for answer in answers:
        if isinstance(answer, Exception):
            _raise_redis_trouble(answer)
    return [
        held_key(queue_name, shown(holder))
        for queue_name, holders in zip(queue_names, answers, strict=True)
        for holder in (() if isinstance(holders, Exception) else holders)
    ]


def _raise_redis_trouble(error: Exception) -> None:
    """Raise it again, unless it is what somebody has put there."""
    if isinstance(error, RedisError) and not is_wrong_type(error):
        raise error


def empty(redis: Redis, queue_name: str, registry_name: str) -> None:
    """Delete every job of the queue or of one of its registries."""
    if registry_name == "queued":
        Queue(queue_name, connection=redis, serializer=JSONSerializer).empty()
    else:
        key = registry_key(queue_name, registry_name)
        entries: Any = redis.zrange(key, 0, -1)
        for entry in entries:
            delete(redis, shown(entry).split(":")[0] if registry_name == "started" else shown(entry))
            redis.zrem(key, entry)  # also what is no text, or names an execution
    logger.info("queue %s: %s emptied", queue_name, registry_name)


def compact(redis: Redis, queue_name: str) -> int:
    """Take out of the queue what Redis has no job of any more. Returns how many."""
    key = Queue.redis_queue_namespace_prefix + queue_name
    removed = 0
    job_ids: Any = redis.lrange(key, 0, -1)
    # RQ's own empties the queue into a list of its own first, which would stay if this process died.
    for job_id in job_ids:
        if not redis.exists(Job.redis_job_namespace_prefix.encode() + job_id):
            removed += redis.lrem(key, 0, job_id)
    return removed
