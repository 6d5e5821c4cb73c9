"""What a HistoryWorker holds: jobs in a list of its own, for as long as it renews its lease.

RQ's intermediate list and started registry end in failures after minutes. Here any worker returns the jobs of
a holder whose lease has run out to the front of the queue, at once and without a word to the retry counters.
A job that was held when its holder died is a suspect: it runs alone, so that its deaths can be counted.

Everything that knows RQ's key layout on the reserving side is in this module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from redis import Redis
from rq import Queue
from rq.job import Job
from rq.utils import as_text

from producers.redis_keys import delays_key, held_key, holders_key, lease_key, suspects_key

LEASE_SECONDS = 20
POISON_DEATHS = 3
STRANDED_SECONDS = 30.0

_MAX_BATCH_BYTES = 4 * 1024 * 1024

# KEYS queue, held list, suspects, lease, holders; ARGV jobs and bytes at most, prefix of job keys, lease, holder.
# A list that is not empty holds what an answer that got lost had reserved: that goes back first. The lease is part
# of it, so that nothing can be held without one, even right after Redis has lost everything.
_RESERVE = """
redis.call('SET', KEYS[4], '1', 'EX', ARGV[4])
redis.call('SADD', KEYS[5], ARGV[5])
while redis.call('LMOVE', KEYS[2], KEYS[1], 'RIGHT', 'LEFT') do end
local jobs, bytes = {}, 0
while #jobs < tonumber(ARGV[1]) and bytes < tonumber(ARGV[2]) do
    local id = redis.call('LINDEX', KEYS[1], 0)
    if not id then break end
    local deaths = redis.call('HGET', KEYS[3], id)
    if deaths and #jobs > 0 then break end
    redis.call('LMOVE', KEYS[1], KEYS[2], 'LEFT', 'RIGHT')
    local size = redis.pcall('HSTRLEN', ARGV[3] .. id, 'data')
    bytes = bytes + (tonumber(size) or 0)
    jobs[#jobs + 1] = {id, deaths or '-1'}
    if deaths then break end
end
return jobs
"""

# KEYS held list, queue. In the order in which they were taken.
_HAND_BACK = "local n = 0 while redis.call('LMOVE', KEYS[1], KEYS[2], 'RIGHT', 'LEFT') do n = n + 1 end return n"

# KEYS lease, held list, queue, suspects, holders; ARGV the holder's name.
_RECOVER = """
if redis.call('EXISTS', KEYS[1]) == 1 then return false end
local ids = redis.call('LRANGE', KEYS[2], 0, -1)
for _, id in ipairs(ids) do
    if #ids == 1 then redis.call('HINCRBY', KEYS[4], id, 1) else redis.call('HSETNX', KEYS[4], id, 0) end
end
while redis.call('LMOVE', KEYS[2], KEYS[3], 'RIGHT', 'LEFT') do end
redis.call('SREM', KEYS[5], ARGV[1])
return ids
"""

# KEYS intermediate list, queue; ARGV the job's id.
_TAKE_FROM_LIST = """
if redis.call('LREM', KEYS[1], 1, ARGV[1]) == 0 then return 0 end
redis.call('LPUSH', KEYS[2], ARGV[1])
return 1
"""

# KEYS started registry, queue, job; ARGV the registry's member, the job's id.
_TAKE_FROM_STARTED = """
if redis.call('ZREM', KEYS[1], ARGV[1]) == 0 then return 0 end
if redis.call('EXISTS', KEYS[3]) == 0 then return 0 end
redis.call('HSET', KEYS[3], 'status', 'queued')
redis.call('LPUSH', KEYS[2], ARGV[2])
return 1
"""


@dataclass(frozen=True)
class Reserved:
    """A job that is held now. `deaths` counts the holders that died with it alone; None for no suspect."""

    job_id: str
    deaths: int | None


class Reservations:
    """The held list and the lease of the worker `name` on one queue."""

    def __init__(self, redis: Redis, queue: Queue, name: str) -> None:
        self._redis = redis
        self._queue = queue
        # A worker started again under its name must not take up, uncounted, what killed its namesake.
        self._name = name = f"{name}:{uuid4().hex[:8]}"
        self._held = held_key(queue.name, name)
        self._lease = lease_key(queue.name, name)
        self._holders = holders_key(queue.name)
        self._suspects = suspects_key(queue.name)
        self._delays = delays_key(queue.name)
        self._reserve = redis.register_script(_RESERVE)
        self._hand_back = redis.register_script(_HAND_BACK)
        self._recover = redis.register_script(_RECOVER)
        self._take_from_list = redis.register_script(_TAKE_FROM_LIST)
        self._take_from_started = redis.register_script(_TAKE_FROM_STARTED)

    def renew_lease(self) -> None:
        """Must be called more often than every LEASE_SECONDS, and before the first reservation."""
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.set(self._lease, "1", ex=LEASE_SECONDS)
            pipe.sadd(self._holders, self._name)
            pipe.execute()

    def wait(self, seconds: int) -> bool:
        """Wait until the queue has a job; it is held then, and `reserve` returns it."""
        return self._redis.blmove(self._queue.key, self._held, seconds, "LEFT", "RIGHT") is not None

    def reserve(self, limit: int) -> list[Reserved]:
        """Take up to `limit` jobs from the front; a suspect comes alone."""
        keys = [self._queue.key, self._held, self._suspects, self._lease, self._holders]
        limits: list[Any] = [limit, _MAX_BATCH_BYTES, Job.redis_job_namespace_prefix, LEASE_SECONDS, self._name]
        found: Any = self._reserve(keys=keys, args=limits)
        return [
            Reserved(job_id.decode(errors="replace"), None if int(deaths) < 0 else int(deaths))
            for job_id, deaths in found
        ]

    def release(self, pipe: Any, job_id: str) -> None:
        """In the transaction that finishes the job: it is not held any more, and no suspect."""
        pipe.lrem(self._held, 1, job_id)
        pipe.hdel(self._suspects, job_id)
        pipe.hdel(self._delays, job_id)

    def postpone(self, job_id: str) -> int:
        """Move one held job to the tail of the queue; returns how often that was done with it."""
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.lrem(self._held, 1, job_id)
            pipe.rpush(self._queue.key, job_id)
            pipe.hincrby(self._delays, job_id, 1)
            return int(pipe.execute()[-1])

    def blame(self, job_id: str) -> None:
        """Count one death against a job whose holder has survived it."""
        self._redis.hincrby(self._suspects, job_id, 1)

    def hand_back(self) -> int:
        """Return everything held to the front of the queue; no attempt is counted."""
        return int(self._hand_back(keys=[self._held, self._queue.key]))

    def give_up(self) -> None:
        """At an orderly end: nothing held, no lease, no holder."""
        self.hand_back()
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.delete(self._lease)
            pipe.srem(self._holders, self._name)
            pipe.execute()

    def recover_dead_holders(self) -> list[str]:
        """Return the jobs of every holder without a lease to the front of the queue; the ids of the jobs."""
        recovered: list[str] = []
        for member in self._redis.smembers(self._holders):
            name = as_text(member)
            lease, held = lease_key(self._queue.name, name), held_key(self._queue.name, name)
            keys = [lease, held, self._queue.key, self._suspects, self._holders]
            ids: Any = self._recover(keys=keys, args=[name])
            recovered += [job_id.decode() for job_id in ids or []]
        return recovered

    def intermediate_ids(self) -> list[str]:
        """Jobs that a stock worker has popped and not yet begun, or dropped when it died."""
        return [as_text(job_id) for job_id in self._redis.lrange(self._queue.intermediate_queue_key, 0, -1)]

    def requeue_from_intermediate(self, job_id: str) -> bool:
        return bool(self._take_from_list(keys=[self._queue.intermediate_queue_key, self._queue.key], args=[job_id]))

    def requeue_abandoned(self, now: float) -> list[str]:
        """Return jobs whose stock worker let them expire in the started registry; the ids of the jobs."""
        registry = self._queue.started_job_registry.key
        requeued = []
        for member in self._redis.zrangebyscore(registry, 0, now):
            text = as_text(member)  # type: ignore[arg-type]  # without scores it is bytes or text
            job_id = text.split(":")[0]
            keys = [registry, self._queue.key, Job.key_for(job_id)]
            if self._take_from_started(keys=keys, args=[text, job_id]):
                requeued.append(job_id)
        return requeued
