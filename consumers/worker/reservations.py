"""Reservations of one worker thread: a Redis list per thread, guarded by a lease.

RQ's own intermediate list and started registry let an interrupted job fail after minutes. Here any worker requeues the
jobs of a thread as soon as its lease has expired, without using a retry. Each queue has these keys:

    reserved list    ids of the jobs that a thread has taken
    lease            exists while the thread renews it
    owners           hash of the threads that may have reservations; the value is `alone` while a thread runs a poison
                     candidate and nothing else
    crash counts     hash: poison candidate to the number of workers that crashed while they ran it alone
    timeout counts   hash: job that timed out alone to the number of its timeouts

A job that was reserved when its worker died is a poison candidate: it runs alone from then on, so that its crashes can
be counted. If a command fails because one of these keys has another type, the key is renamed to <key>:quarantined.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, NamedTuple
from uuid import uuid4

from redis import Redis
from rq import Queue
from rq.job import Job
from rq.worker import BaseWorker

from consumers.worker import scripts
from consumers.worker.deliveries import MAX_JOB_BYTES, ReservedJob
from producers.redis_keys import crashes_key, lease_key, owners_key, quarantine_key, reserved_key, timeouts_key

logger = logging.getLogger(__name__)

LEASE_SECONDS = 20
JOB_PREFIX = Job.redis_job_namespace_prefix

_MAX_BATCH_BYTES = 4 * 1024 * 1024


class Reservation(NamedTuple):
    """Jobs that were reserved together. A poison candidate, or a job that timed out alone, is reserved alone.

    `crashes` is None unless the job is a poison candidate.
    """

    jobs: list[ReservedJob]
    crashes: int | None
    timeouts: int


class Reservations:
    """The reservations of one thread of the worker `worker_name` on one queue.

    Raises:
        RedisError: from every method, if Redis cannot be reached or rejects the command.
    """

    def __init__(self, redis: Redis, queue: Queue, worker_name: str) -> None:
        self._redis = redis
        worker_key = BaseWorker.redis_worker_namespace_prefix + worker_name
        # The suffix is new at each start: a worker that is restarted under the same name must not take over jobs that
        # may have crashed it.
        self._owner = owner = f"{worker_name}:{uuid4().hex[:8]}"
        self._alone = False
        self._queue_key = queue.key
        self.list_key = reserved_key(queue.name, owner)
        self.crashes_key = crashes_key(queue.name)
        self.timeouts_key = timeouts_key(queue.name)
        self._lease = lease_key(queue.name, owner)
        self._owners = owners_key(queue.name)
        self._quarantine = quarantine_key(queue.name)
        self._types = dict.fromkeys([self.crashes_key, self.timeouts_key, self._owners, worker_key], "hash")
        self._types |= {self.list_key: "list", self._quarantine: "list"}
        self._reserve = scripts.load(redis, "reserve")
        self._requeue = scripts.load(redis, "requeue")
        self._move_to_tail = scripts.load(redis, "move_to_tail")
        self._mark_candidates = scripts.load(redis, "mark_candidates")
        self._quarantine_keys = scripts.load(redis, "quarantine")

    def reserve(self, limit: int) -> Reservation:
        """Take up to `limit` jobs from the front of the queue, and renew the lease."""
        keys = [self._queue_key, self.list_key, self.crashes_key, self._lease, self._owners, self.timeouts_key]
        arguments: list[Any] = [limit, _MAX_BATCH_BYTES, JOB_PREFIX, LEASE_SECONDS, self._owner, MAX_JOB_BYTES]
        self._alone = False
        unusable, ids = 1, list[bytes]()
        while unusable and not ids:  # there may be usable ids behind unusable ones
            found: Any = self._reserve(keys=[*keys, self._quarantine], args=arguments)
            unusable, ids, data, notes, crashes, timeouts = found
            if unusable:
                logger.error(
                    "moved %d entries that cannot be job ids from the queue to list %s", unusable, self._quarantine
                )
        noted = {index - 1: (state.decode(), _seconds(ttl)) for index, state, ttl in notes}
        jobs = [
            ReservedJob(job_id.decode(), state, call, ttl)
            for n, (job_id, call) in enumerate(zip(ids, data, strict=True))
            for state, ttl in [noted.get(n, ("usual", None))]
        ]
        return Reservation(jobs, None if int(crashes) < 0 else int(crashes), int(timeouts))

    def wait(self, seconds: int) -> bool:
        """Wait for a job in the queue and reserve it. Returns whether there was one; the next `reserve` returns it."""
        return self._redis.blmove(self._queue_key, self.list_key, seconds, "LEFT", "RIGHT") is not None

    def renew_lease(self, *, database_stalled: bool = False) -> None:
        """Keep the reservations for LEASE_SECONDS more.

        While the database is stalled, a crash is not counted against a poison candidate.
        """
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.set(self._lease, "1", ex=LEASE_SECONDS)
            pipe.hset(self._owners, self._owner, "alone" if self._alone and not database_stalled else "")
            pipe.execute()

    def run_alone(self) -> None:
        """Count a crash of this process against the one reserved job, until the next reservation."""
        self._alone = True
        self._redis.hset(self._owners, self._owner, "alone")

    def mark_candidates(self) -> None:
        """Make each reserved job a poison candidate, after one of them has caused an error in a batch."""
        self._mark_candidates(keys=[self.list_key, self.crashes_key])

    def move_to_tail(self, job_id: str, counts_key: str) -> int:
        """Requeue one job at the tail of the queue and increment its count in the hash `counts_key`. Returns the count.

        `counts_key` is `crashes_key` or `timeouts_key`.
        """
        return int(self._move_to_tail(keys=[self.list_key, self._queue_key, counts_key], args=[job_id]))

    def quarantine_keys(self) -> bool:
        """Rename each key that has another type than this thread needs. Returns whether there was one."""
        found: Any = self._quarantine_keys(keys=list(self._types), args=list(self._types.values()))
        log_quarantined(found)
        return bool(found)

    def requeue(self) -> int:
        """Requeue all reserved jobs at the front of the queue; counts stay. Returns their number."""
        return int(self._requeue(keys=[self.list_key, self._queue_key]))

    def close(self) -> None:
        """Requeue the reserved jobs and end the lease."""
        self.requeue()
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.delete(self._lease)
            pipe.hdel(self._owners, self._owner)
            pipe.execute()


def requeue_expired(redis: Redis, queue: Queue) -> list[str]:
    """Requeue the jobs of each owner whose lease has expired, at the front. Returns their ids."""
    requeue = scripts.load(redis, "requeue_expired")
    owners = owners_key(queue.name)
    requeued: list[str] = []
    members: Any = redis.hkeys(owners)
    for member in members:
        owner = member.decode(errors="replace")  # an owner that is not UTF-8 is not ours, and has no list
        keys = [
            lease_key(queue.name, owner),
            reserved_key(queue.name, owner),
            queue.key,
            crashes_key(queue.name),
            owners,
        ]
        found: Any = requeue(keys=keys, args=[owner, LEASE_SECONDS])
        quarantined, ids = found
        log_quarantined(quarantined)
        requeued += [job_id.decode(errors="replace") for job_id in ids]
    return requeued


def log_quarantined(keys: Iterable[bytes]) -> None:
    """Log an error for each key that a script has quarantined."""
    for key in keys:
        name = key.decode(errors="replace")
        logger.error("Redis key %s has the wrong type and was renamed to %s:quarantined", name, name)


def _seconds(ttl: bytes) -> int | None:
    """Return a job's result_ttl in seconds; None if it is not a number, or one that Redis would not accept."""
    return int(ttl) if ttl.removeprefix(b"-").isdigit() and len(ttl) < 10 else None
