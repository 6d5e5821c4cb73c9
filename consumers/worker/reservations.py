"""What a lane of a HistoryWorker holds: jobs in a list of its own, for as long as its lease is renewed.

RQ's intermediate list and started registry end in failures after minutes. Here any worker returns the jobs of
a holder whose lease has run out to the front of the queue, at once and without a word to the retry counters.
A job that was held when its holder died is a suspect: it runs alone in its process, so that its deaths can be counted.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

from redis import Redis, RedisError
from rq import Queue

from consumers.worker.jobs import MAX_JOB_BYTES, ReservedJob
from consumers.worker.quarantine import Kind, is_wrong_type, put_aside
from consumers.worker.rq_completion import JOB_PREFIX, READ_JOBS
from producers.redis_keys import delays_key, held_key, holders_key, lease_key, strange_key, suspects_key

logger = logging.getLogger(__name__)

LEASE_SECONDS = 20
POISON_DEATHS = 3

_AS_USUAL = ("usual", b"")
_MAX_BATCH_BYTES = 4 * 1024 * 1024

# KEYS queue, held list, suspects, lease, holders, delays, strange; ARGV jobs and bytes at most, prefix of job keys,
# seconds of the lease, holder, bytes of one job at most. A list that is not empty holds what an answer that got lost
# had reserved: that goes back first. The lease is part of it, so that nothing can be held without one, even right after
# Redis has lost everything. Only the first job can have deaths or delays, since then it comes alone; what is no such
# number counts as none. What is no id for RQ (letters, digits, _ and -) could not be handled by RQ: it is put aside.
_RESERVE = (
    READ_JOBS
    + """
local function count(key, id, found)
    if not found or string.find(found, '^%d%d?%d?%d?$') then return found end
    redis.call('HSET', key, id, 0)
    return '0'
end
redis.call('SET', KEYS[4], '1', 'EX', ARGV[4])
redis.call('HSET', KEYS[5], ARGV[5], '')
while redis.call('LMOVE', KEYS[2], KEYS[1], 'RIGHT', 'LEFT') do end
local ids = redis.call('LRANGE', KEYS[1], 0, ARGV[1] - 1)
if #ids == 0 then return {} end
local strange = {}
for n = #ids, 1, -1 do
    local id = ids[n]
    if id == '' or #id > 200 or string.find(id, '[^A-Za-z0-9_-]') then strange[#strange + 1] = table.remove(ids, n) end
end
for _, id in ipairs(strange) do
    redis.call('LREM', KEYS[1], 1, id)
    redis.call('RPUSH', KEYS[7], id)
end
if #ids == 0 then return {ids, {}, {}, '-1', '0', #strange} end
local deaths, delays = {}, {}
if redis.call('EXISTS', KEYS[3]) == 1 then deaths = redis.call('HMGET', KEYS[3], unpack(ids)) end
if redis.call('EXISTS', KEYS[6]) == 1 then delays = redis.call('HMGET', KEYS[6], unpack(ids)) end
local last = (deaths[1] or delays[1]) and 1 or #ids
for n = 2, last do
    if deaths[n] or delays[n] then last = n - 1 break end
end
for n = #ids, last + 1, -1 do ids[n] = nil end
local data, odd = read_jobs(ARGV[3], ids, tonumber(ARGV[2]), tonumber(ARGV[6]))
local taken = #data
for n = #ids, taken + 1, -1 do ids[n] = nil end
redis.call('LTRIM', KEYS[1], taken, -1)
redis.call('RPUSH', KEYS[2], unpack(ids))
local died, delayed = count(KEYS[3], ids[1], deaths[1]), count(KEYS[6], ids[1], delays[1])
return {ids, data, odd, died or '-1', delayed or '0', #strange}
"""
)

# KEYS held list, suspects, delays; ARGV the jobs' ids.
_RELEASE = """
local held = redis.call('LRANGE', KEYS[1], 0, -1)
if table.concat(held, ' ') == table.concat(ARGV, ' ') then
    redis.call('DEL', KEYS[1])
else
    for _, id in ipairs(ARGV) do redis.call('LREM', KEYS[1], 1, id) end
end
for key = 2, 3 do
    if redis.call('EXISTS', KEYS[key]) == 1 then
        for _, id in ipairs(ARGV) do redis.call('HDEL', KEYS[key], id) end
    end
end
"""

# KEYS held list, queue, counts; ARGV the job's id. To the tail, unless it is held no more; the count, or 0.
_TO_TAIL = """
if redis.call('LREM', KEYS[1], 1, ARGV[1]) == 0 then return 0 end
redis.call('RPUSH', KEYS[2], ARGV[1])
return redis.call('HINCRBY', KEYS[3], ARGV[1], 1)
"""

# KEYS held list, suspects. What is held comes alone next time; what was counted stays counted.
_SUSPECT = """
for _, id in ipairs(redis.call('LRANGE', KEYS[1], 0, -1)) do redis.call('HSETNX', KEYS[2], id, 0) end
redis.call('EXPIRE', KEYS[2], 604800)  -- other workers than ours do not remove what they finish
"""

# KEYS held list, queue. In the order in which they were taken.
_HAND_BACK = "local n = 0 while redis.call('LMOVE', KEYS[1], KEYS[2], 'RIGHT', 'LEFT') do n = n + 1 end return n"

# KEYS lease, held list, queue, suspects, holders; ARGV the holder's name, seconds of a lease. A lease with more than
# that is left from before Redis' clock was set back: its owner renews it, or it ends in time.
# Only a suspect is guilty, which had its holder's process for itself; unless the holder waited for the database then.
_RECOVER = """
local left = redis.call('TTL', KEYS[1])
if left > tonumber(ARGV[2]) or left == -1 then redis.call('EXPIRE', KEYS[1], ARGV[2]) end
if left ~= -2 then return false end
local ids = redis.call('LRANGE', KEYS[2], 0, -1)
local guilty = #ids == 1 and redis.call('HGET', KEYS[5], ARGV[1]) == 'accused'
for _, id in ipairs(ids) do
    if not guilty then
        redis.call('HSETNX', KEYS[4], id, 0)
    elseif type(redis.pcall('HINCRBY', KEYS[4], id, 1)) == 'table' then  -- an error: it is no number
        redis.call('HSET', KEYS[4], id, 1)
    end
end
redis.call('EXPIRE', KEYS[4], 604800)  -- other workers than ours do not remove what they finish
while redis.call('LMOVE', KEYS[2], KEYS[3], 'RIGHT', 'LEFT') do end
redis.call('HDEL', KEYS[5], ARGV[1])
return ids
"""


class Reservations:
    """The held list and the lease of one lane of the worker `name` on one queue."""

    def __init__(self, redis: Redis, queue: Queue, name: str) -> None:
        self._redis = redis
        self._queue = queue
        # One for each lane; and a worker started again under its name must not take up what killed its namesake.
        self._name = name = f"{name}:{uuid4().hex[:8]}"
        self._accused = False
        self.held_key = held_key(queue.name, name)  # the list's
        self._lease = lease_key(queue.name, name)
        self._holders = holders_key(queue.name)
        self._suspects = suspects_key(queue.name)
        self._delays = delays_key(queue.name)
        self._strange = strange_key(queue.name)
        self._reserve = redis.register_script(_RESERVE)
        self._release = redis.register_script(_RELEASE)
        self._hand_back = redis.register_script(_HAND_BACK)
        self._to_tail = redis.register_script(_TO_TAIL)
        self._suspect = redis.register_script(_SUSPECT)

    def renew_lease(self, *, waiting: bool = False) -> None:
        """Must be called more often than every LEASE_SECONDS; `reserve` does it too.

        With `waiting` for the database, a death is not held against the suspect that is held.
        """
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.set(self._lease, "1", ex=LEASE_SECONDS)
            pipe.hset(self._holders, self._name, "accused" if self._accused and not waiting else "")
            pipe.execute()

    def accuse(self) -> None:
        """Until the next reservation, the death of this process is the doing of the one job that is held."""
        self._accused = True
        self._redis.hset(self._holders, self._name, "accused")

    def wait(self, seconds: int) -> bool:
        """Wait until the queue has a job; it is held then, and `reserve` returns it."""
        return self._redis.blmove(self._queue.key, self.held_key, seconds, "LEFT", "RIGHT") is not None

    def reserve(self, limit: int) -> list[ReservedJob]:
        """Take up to `limit` jobs from the front; a suspect comes alone, and so does one that was delayed."""
        keys = [self._queue.key, self.held_key, self._suspects, self._lease, self._holders, self._delays, self._strange]
        limits: list[Any] = [limit, _MAX_BATCH_BYTES, JOB_PREFIX, LEASE_SECONDS, self._name, MAX_JOB_BYTES]
        self._accused = False
        job_ids: list[bytes] = []
        while not job_ids:
            found: Any = self._reserve(keys=keys, args=limits)
            if not found:
                return []
            job_ids, datas, odd, deaths, delays, strange = found
            if strange:
                logger.error("moved %d entries of the queue that are no job ids to %s", strange, self._strange)
        notes = {n - 1: (state.decode(), ttl) for n, state, ttl in odd}
        return [
            ReservedJob(
                job_id.decode(),
                None if int(deaths) < 0 else int(deaths),
                int(delays),
                state,
                data,
                _seconds(ttl),
            )
            for n, (job_id, data) in enumerate(zip(job_ids, datas, strict=True))
            for state, ttl in [notes.get(n, _AS_USUAL)]
        ]

    def release(self, pipe: Any, job_ids: Sequence[str]) -> None:
        """In the transaction that finishes these jobs: they are not held any more, and no suspects."""
        self._release(keys=[self.held_key, self._suspects, self._delays], args=job_ids, client=pipe)

    def postpone(self, job_id: str) -> int:
        """Move one held job to the tail of the queue; returns how often that was done with it."""
        return int(self._to_tail(keys=[self.held_key, self._queue.key, self._delays], args=[job_id]))

    def blame(self, job_id: str) -> None:
        """Count one death against a job whose holder has survived it, and move it to the tail of the queue."""
        self._to_tail(keys=[self.held_key, self._queue.key, self._suspects], args=[job_id])

    def suspect(self) -> None:
        """Process each reserved job alone next time: one of them caused an error."""
        self._suspect(keys=[self.held_key, self._suspects])

    def hand_back(self) -> int:
        """Return everything held to the front of the queue; no attempt is counted."""
        return int(self._hand_back(keys=[self.held_key, self._queue.key]))

    def put_aside(self) -> list[str]:
        """Move away what somebody has put in the place of the keys of this bookkeeping; those keys."""
        hashes: list[str] = [self._holders, self._suspects, self._delays]
        kinds: dict[str, Kind] = {self.held_key: "list", self._strange: "list"}
        return put_aside(self._redis, kinds | dict.fromkeys(hashes, "hash"))

    def give_up(self) -> None:
        """At an orderly end: nothing held, no lease, no holder."""
        self.hand_back()
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.delete(self._lease)
            pipe.hdel(self._holders, self._name)
            pipe.execute()


def _seconds(ttl: bytes) -> int | None:
    """A job's own wish for its result; None for what is no number, or one that Redis would not take."""
    return int(ttl) if ttl.removeprefix(b"-").isdigit() and len(ttl) < 10 else None


def recover_dead_holders(redis: Redis, queue: Queue) -> list[str]:
    """Return the jobs of every holder without a lease to the front of the queue; the ids of the jobs.

    What stands in the place of a holder's list, or of one of the workers' own keys, is moved away.
    """
    recover = redis.register_script(_RECOVER)
    holders, suspects = holders_key(queue.name), suspects_key(queue.name)
    put_aside(redis, {holders: "hash", suspects: "hash"})
    recovered: list[str] = []
    members: Any = redis.hkeys(holders)
    for member in members:
        name = member.decode(errors="replace")  # a strange one is nobody's, and has no list
        lease, held = lease_key(queue.name, name), held_key(queue.name, name)
        try:
            ids: Any = recover(keys=[lease, held, queue.key, suspects, holders], args=[name, LEASE_SECONDS])
        except RedisError as error:
            if not is_wrong_type(error) or not put_aside(redis, {held: "list"}):
                raise
            continue  # nothing is in it; the next look ends the holder
        recovered += [job_id.decode(errors="replace") for job_id in ids or []]
    return recovered
