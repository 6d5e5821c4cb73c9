"""Deliveries as RQ jobs: the same keys as RQ's own enqueue writes, for many jobs at once.

RQ's enqueue takes about 330 µs of Python per job, in which the caller's thread cannot run; this takes about 25 µs. A
test compares these jobs with jobs that RQ enqueued.

No other module of `producers` writes RQ's keys, except the worker for tests (`fake_worker`).
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar

from redis import Redis
from redis.client import Pipeline

from producers.entries import Entry, EntryHead
from producers.errors import SettingsError
from producers.events import KINDS
from producers.redis_keys import acknowledgement_key, key_prefix_problem, owners_key, reserved_key

try:
    from rq import Queue
    from rq.job import Job, JobStatus
    from rq.registry import FailedJobRegistry, FinishedJobRegistry
    from rq.serializers import JSONSerializer
    from rq.utils import as_text, utcformat
except ValueError as rq_error:  # RQ_KEY_PREFIX is wrong
    raise SettingsError(key_prefix_problem(rq_error)) from None

AnyHead = TypeVar("AnyHead", bound=EntryHead)

ACTIVE_STATUSES = frozenset({JobStatus.QUEUED, JobStatus.STARTED, JobStatus.DEFERRED, JobStatus.SCHEDULED})
TIMEOUT_SECONDS = 180  # RQ's default; a stock worker ends a job that takes longer
_COMPRESS_BYTES = 2048  # smaller data is not compressed, because it would save little; RQ reads both forms


def queue_named(name: str, redis: Redis) -> Queue:
    """Return RQ's queue of this name, with jobs in JSON."""
    return Queue(name, connection=redis, serializer=JSONSerializer)


def enqueue(pipe: Pipeline, queue: Queue, entries: Sequence[Entry], at: datetime | None = None) -> None:
    """Add commands to `pipe` that append each entry to the queue and replace any job with the same id.

    `at` is the time of enqueueing by Redis' clock, by default this host's time. The last command returns the length of
    the queue.
    """
    job_ids = [entry.job_id for entry in entries]
    keys = [*map(Job.key_for, job_ids)]
    # A queued job must not be listed as failed or finished too.
    for registry in (FailedJobRegistry, FinishedJobRegistry):
        pipe.zrem(registry.key_template.format(queue.name), *job_ids)
    pipe.delete(*keys)
    pipe.sadd(Queue.redis_queues_keys, queue.key)
    enqueued_at = utcformat(at or datetime.now(UTC))
    for key, entry in zip(keys, entries, strict=True):
        # Not by `pipe.hset`, which takes 1.5 times as long.
        pipe.execute_command("HSET", key, *_fields(entry, queue.name, enqueued_at))
    pipe.rpush(queue.key, *job_ids)


def _fields(entry: Entry, origin: str, at: str) -> tuple[Any, ...]:
    """Return names and values of the job's hash, in turn."""
    return (
        "created_at", at,
        "enqueued_at", at,
        "data", job_data(entry),
        "status", JobStatus.QUEUED.value,
        "origin", origin,
        "description", entry.summary,
        "timeout", TIMEOUT_SECONDS,
        "failure_ttl", -1,  # a failed job never expires: it waits for an operator
    )  # fmt: skip


def job_data(entry: Entry) -> bytes:
    """Return what RQ's JSONSerializer makes of (function, None, (event,), {}), compressed if it is large."""
    data = f'["{KINDS[entry.type].job_function}", null, [{json.dumps(entry.event)}], {{}}]'.encode()
    return data if len(data) < _COMPRESS_BYTES else zlib.compress(data)


def job_states(redis: Redis, entries: Sequence[EntryHead]) -> dict[int, str | None]:
    """Return RQ's status of each entry's job, by the entry's position; None if Redis does not have the job."""
    with redis.pipeline(transaction=False) as pipe:
        for entry in entries:
            pipe.hget(Job.key_for(entry.job_id), "status")
        statuses = pipe.execute()
    return {entry.position: status and as_text(status) for entry, status in zip(entries, statuses, strict=True)}


def without_acknowledgement(redis: Redis, entries: Sequence[AnyHead]) -> list[AnyHead]:
    """Return the entries that have no acknowledgement in Redis.

    Call it after `job_states`: a worker acknowledges a job and removes its state in one step.
    """
    with redis.pipeline(transaction=False) as pipe:
        for entry in entries:
            pipe.hexists(acknowledgement_key(entry.source), entry.job_id)
        answered = pipe.execute()
    return [entry for entry, has_answer in zip(entries, answered, strict=True) if not has_answer]


def in_no_list(redis: Redis, queue: Queue, entries: Sequence[AnyHead]) -> list[AnyHead]:
    """Return the entries whose job has an active status, but is in no list: queued, reserved, started, intermediate.

    A job of ours is never deferred or scheduled, so the registries for those are not read. All lists are read in one
    transaction, because jobs move between them at any time.
    """
    if not entries:
        return []
    owners = redis.hkeys(owners_key(queue.name))
    now, _ = redis.time()  # scores in the registry are times of Redis' clock
    with redis.pipeline(transaction=True) as pipe:
        pipe.hkeys(owners_key(queue.name))
        pipe.zrangebyscore(queue.started_job_registry.key, now, "+inf")
        pipe.lrange(queue.intermediate_queue_key, 0, -1)  # a stock worker took these and has not started them yet
        for owner in owners:
            pipe.lrange(reserved_key(queue.name, as_text(owner)), 0, -1)
        for entry in entries:
            pipe.hget(Job.key_for(entry.job_id), "status")
            pipe.lpos(queue.key, entry.job_id)
        owners_then, started, taken, *found = pipe.execute()
    if not set(owners_then) <= set(owners):
        return []  # a new owner may have reserved them; the next check reads its list too
    reserved, answers = found[: len(owners)], found[len(owners) :]
    elsewhere = {as_text(job_id) for one in (taken, *reserved) for job_id in one}
    elsewhere |= {as_text(member).split(":")[0] for member in started}
    return [
        entry
        for entry, status, position in zip(entries, answers[::2], answers[1::2], strict=True)
        if position is None and entry.job_id not in elsewhere and status and as_text(status) in ACTIVE_STATUSES
    ]
