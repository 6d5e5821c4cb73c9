"""Jobs that stock workers left somewhere when they died, returned to the front of the queue.

RQ's own clean-up comes after ten minutes or more, and ends in failures or not at all: a worker that dies between
taking a job from one of several queues and noting it leaves the job in no list (RQ's issues 381 and 1716).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from redis import Redis, RedisError
from rq import Queue

from consumers.worker.quarantine import is_wrong_type, put_aside
from consumers.worker.rq_completion import JOB_PREFIX
from producers.redis_keys import held_key, holders_key, strays_key

STRANDED_SECONDS = 30.0
_LOOK_SECONDS = 60
# Reading the state of every job takes a while: only when the queue is short, and Redis not full of other things.
_SHORT_QUEUE_JOBS = 1000
_FEW_KEYS = 200_000
_PAGE_KEYS = 1000
_MOST_STRAYS = 1000  # at one look: each costs a round trip, during which no event is stored

# KEYS intermediate list, queue; ARGV the job's id.
_TAKE_FROM_LIST = """
if redis.call('LREM', KEYS[1], 1, ARGV[1]) == 0 then return 0 end
redis.call('LPUSH', KEYS[2], ARGV[1])
return 1
"""

# KEYS started registry, queue, job; ARGV the registry's member, the job's id.
_TAKE_FROM_STARTED = """
if redis.call('ZREM', KEYS[1], ARGV[1]) == 0 then return 0 end
if redis.call('TYPE', KEYS[3]).ok ~= 'hash' then return 0 end
redis.call('HSET', KEYS[3], 'status', 'queued')
redis.call('LPUSH', KEYS[2], ARGV[2])
return 1
"""

# KEYS queue, job, strays; ARGV the job's id, seconds after which it is one. By Redis' clock: another host may have
# seen it first.
_TAKE_STRAY = """
local now = redis.call('TIME')[1]
local seen = redis.call('HGET', KEYS[3], ARGV[1])
if not seen or (tonumber(seen) or 0) > tonumber(now) then  -- never, or before the clock was set back
    redis.call('HSET', KEYS[3], ARGV[1], now)
    redis.call('EXPIRE', KEYS[3], 600)
    return 0
end
if tonumber(now) - (tonumber(seen) or 0) < tonumber(ARGV[2]) then return 0 end
redis.call('HDEL', KEYS[3], ARGV[1])
if redis.call('HGET', KEYS[2], 'status') ~= 'queued' or redis.call('LPOS', KEYS[1], ARGV[1]) then return 0 end
redis.call('LPUSH', KEYS[1], ARGV[1])
return 1
"""


class Stranded:
    """Looks after the leftovers of one queue."""

    def __init__(self, redis: Redis, queue: Queue) -> None:
        self._redis = redis
        self._queue = queue
        self._seen: dict[str, float] = {}  # in the intermediate list, by id
        self._take_from_list = redis.register_script(_TAKE_FROM_LIST)
        self._take_from_started = redis.register_script(_TAKE_FROM_STARTED)
        self._take_stray = redis.register_script(_TAKE_STRAY)

    def requeue(self) -> list[str]:
        """Return what is stranded to the front of the queue, no attempt spent; the ids of the jobs."""
        put_aside(self._redis, {strays_key(self._queue.name): "hash"})
        return [*self._from_intermediate(), *self._from_started(), *self._from_nowhere()]

    def _from_intermediate(self) -> Iterator[str]:
        """A living stock worker takes a job out of there in moments; what stays, a dead one has left."""
        at = time.monotonic()
        intermediate = self._queue.intermediate_queue_key
        self._seen = {job_id: self._seen.get(job_id, at) for job_id in self._ids_in(intermediate)}
        for job_id, seen in self._seen.items():
            if at - seen > STRANDED_SECONDS and self._take_from_list(
                keys=[intermediate, self._queue.key], args=[job_id]
            ):
                yield job_id

    def _from_started(self) -> Iterator[str]:
        """What a stock worker let expire in the started registry; that is by its own host's clock."""
        registry = self._queue.started_job_registry.key
        now, _ = self._redis.time()
        if self._redis.type(registry) != b"zset":
            return
        for member in self._redis.zrangebyscore(registry, 0, now):
            text = _shown(member)  # type: ignore[arg-type]  # without scores it is bytes or text
            job_id = text.split(":")[0]
            if self._take_from_started(keys=[registry, self._queue.key, JOB_PREFIX + job_id], args=[text, job_id]):
                yield job_id

    def _from_nowhere(self) -> Iterator[str]:
        """What calls itself queued and is in no list, at two looks of whichever worker."""
        strays = strays_key(self._queue.name)
        looked = f"{strays}:looked"
        if not self._redis.set(looked, "1", nx=True, ex=_LOOK_SECONDS):
            if self._redis.ttl(looked) > _LOOK_SECONDS:  # from before Redis' clock was set back
                self._redis.expire(looked, _LOOK_SECONDS)
            return
        if self._queue.count > _SHORT_QUEUE_JOBS or self._redis.dbsize() > _FEW_KEYS:
            return
        lists = [self._queue.key, self._queue.intermediate_queue_key]
        names = self._redis.hkeys(holders_key(self._queue.name))
        lists += [held_key(self._queue.name, _shown(name)) for name in names]
        # The jobs first: one that moves from list to list meanwhile is found in one of them.
        queued = list(self._queued())
        listed = {job_id for one in lists for job_id in self._ids_in(one)}
        for job_id in [job_id for job_id in queued if job_id not in listed][:_MOST_STRAYS]:
            keys = [self._queue.key, JOB_PREFIX + job_id, strays]
            if self._take_stray(keys=keys, args=[job_id, STRANDED_SECONDS]):
                yield job_id

    def _queued(self) -> Iterator[str]:
        page: list[str] = []
        for key in self._redis.scan_iter(match=f"{JOB_PREFIX}*", count=_PAGE_KEYS, _type="HASH"):
            page.append(_shown(key))
            if len(page) == _PAGE_KEYS:
                yield from self._queued_among(page)
                page.clear()
        yield from self._queued_among(page)

    def _queued_among(self, keys: Iterable[str]) -> Iterator[str]:
        with self._redis.pipeline(transaction=False) as pipe:
            for key in (keys := list(keys)):
                pipe.hmget(key, "status", "origin")
            states = pipe.execute()
        for key, (status, origin) in zip(keys, states, strict=True):
            if status == b"queued" and origin == self._queue.name.encode():
                yield key.removeprefix(JOB_PREFIX)

    def _ids_in(self, key: str) -> list[str]:
        try:
            return [_shown(job_id) for job_id in self._redis.lrange(key, 0, -1)]
        except RedisError as error:
            if is_wrong_type(error):  # somebody's, and no list
                return []
            raise


def _shown(value: bytes | str) -> str:
    """As text; what is none becomes an id that no job has, and is left where it is."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value
