"""Orphans: jobs that stock workers left behind when they died, requeued at the front of the queue.

RQ's own clean-up comes after ten minutes or more, and ends in failures or not at all: a stock worker that dies between
popping a job from one of several queues and registering it leaves the job in no list (RQ's issues 381 and 1716).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from redis import Redis, RedisError
from rq import Queue

from consumers.errors import is_wrong_type
from consumers.worker import scripts
from consumers.worker.reservations import JOB_PREFIX
from producers.redis_keys import orphans_key, owners_key, reserved_key

ORPHAN_SECONDS = 30.0
_SCAN_SECONDS = 60
# Reading the state of every job takes a while: only when the queue is short, and Redis not full of other things.
_SHORT_QUEUE_JOBS = 1000
_FEW_KEYS = 200_000
_PAGE_KEYS = 1000
_MOST_ORPHANS = 1000  # of one scan: each costs a round trip


class Orphans:
    """The orphans of one queue."""

    def __init__(self, redis: Redis, queue: Queue) -> None:
        self._redis = redis
        self._queue = queue
        self._seen: dict[str, float] = {}  # in the intermediate list, by id
        self._take_from_intermediate = scripts.load(redis, "take_from_intermediate")
        self._take_from_started = scripts.load(redis, "take_from_started")
        self._take_orphan = scripts.load(redis, "take_orphan")

    def requeue(self) -> list[str]:
        """Requeue all orphans, and spend no retry of theirs. Returns their ids."""
        return [*self._from_intermediate(), *self._from_started(), *self._from_nowhere()]

    def _from_intermediate(self) -> Iterator[str]:
        """A live stock worker takes a job out of there in moments; one that stays is of a dead worker."""
        at = time.monotonic()
        intermediate = self._queue.intermediate_queue_key
        self._seen = {job_id: self._seen.get(job_id, at) for job_id in self._ids_in(intermediate)}
        for job_id, seen in self._seen.items():
            if at - seen > ORPHAN_SECONDS and self._take_from_intermediate(
                keys=[intermediate, self._queue.key], args=[job_id]
            ):
                yield job_id

    def _from_started(self) -> Iterator[str]:
        """Jobs that expired in the started registry; their expiry is by the stock worker's own clock."""
        registry = self._queue.started_job_registry.key
        now, _ = self._redis.time()
        if self._redis.type(registry) != b"zset":
            return
        for member in self._redis.zrangebyscore(registry, 0, now):
            text = _text(member)  # type: ignore[arg-type]  # without scores it is bytes or text
            job_id = text.split(":")[0]
            if self._take_from_started(keys=[registry, self._queue.key, JOB_PREFIX + job_id], args=[text, job_id]):
                yield job_id

    def _from_nowhere(self) -> Iterator[str]:
        """Jobs with status queued that are in no list, in two scans by any worker."""
        orphans = orphans_key(self._queue.name)
        scanned = f"{orphans}:scanned"
        if not self._redis.set(scanned, "1", nx=True, ex=_SCAN_SECONDS):
            if self._redis.ttl(scanned) > _SCAN_SECONDS:  # from before Redis' clock was set back
                self._redis.expire(scanned, _SCAN_SECONDS)
            return
        if self._queue.count > _SHORT_QUEUE_JOBS or self._redis.dbsize() > _FEW_KEYS:
            return
        lists = [self._queue.key, self._queue.intermediate_queue_key]
        names = self._redis.hkeys(owners_key(self._queue.name))
        lists += [reserved_key(self._queue.name, _text(name)) for name in names]
        # The jobs first: one that moves from list to list meanwhile is found in one of them.
        queued = list(self._queued())
        listed = {job_id for one in lists for job_id in self._ids_in(one)}
        for job_id in [job_id for job_id in queued if job_id not in listed][:_MOST_ORPHANS]:
            keys = [self._queue.key, JOB_PREFIX + job_id, orphans]
            if self._take_orphan(keys=keys, args=[job_id, ORPHAN_SECONDS]):
                yield job_id

    def _queued(self) -> Iterator[str]:
        page: list[str] = []
        for key in self._redis.scan_iter(match=f"{JOB_PREFIX}*", count=_PAGE_KEYS, _type="HASH"):
            page.append(_text(key))
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
            return [_text(job_id) for job_id in self._redis.lrange(key, 0, -1)]
        except RedisError as error:
            if is_wrong_type(error):  # another program's key
                return []
            raise


def _text(value: bytes | str) -> str:
    """As text. Bytes that are not text become an id that no job has, which is left where it is."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value
