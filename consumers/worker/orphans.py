"""Orphans: jobs that stock workers left behind when they died, requeued at the front of the queue.

RQ's own clean-up runs ten minutes later or more, and fails such a job instead of requeueing it. It misses some jobs: if
a stock worker of several queues dies after it has popped a job and before it has registered the job, then the job is in
no list (RQ's issues 381 and 1716).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from redis import Redis, RedisError
from rq import Queue

from consumers.ops.redis_errors import is_wrong_type
from consumers.worker import scripts
from consumers.worker.reservations import JOB_PREFIX
from producers.redis_keys import orphans_key, owners_key, reserved_key

ORPHAN_SECONDS = 30.0
_SCAN_SECONDS = 60
# A scan reads the status of every job, so it is made only if the queue is short and Redis has few keys.
_SHORT_QUEUE_JOBS = 1000
_FEW_KEYS = 200_000
_PAGE_KEYS = 1000
_MOST_ORPHANS = 1000  # per scan, since each costs a round trip


class Orphans:
    """The orphans of one queue."""

    def __init__(self, redis: Redis, queue: Queue) -> None:
        self._redis = redis
        self._queue = queue
        # By job id: when the job was first seen in the intermediate list, in monotonic seconds.
        self._seen: dict[str, float] = {}
        self._requeue_intermediate = scripts.load(redis, "requeue_intermediate")
        self._requeue_started = scripts.load(redis, "requeue_started")
        self._requeue_unlisted = scripts.load(redis, "requeue_unlisted")

    def requeue(self) -> list[str]:
        """Requeue all orphans, without using a retry of any job. Returns their ids."""
        return [*self._from_intermediate(), *self._from_started(), *self._from_no_list()]

    def _from_intermediate(self) -> Iterator[str]:
        """Requeue jobs that stay in RQ's intermediate list: a live worker removes its job within milliseconds."""
        at = time.monotonic()
        intermediate = self._queue.intermediate_queue_key
        self._seen = {job_id: self._seen.get(job_id, at) for job_id in self._ids_in(intermediate)}
        for job_id, seen in self._seen.items():
            if at - seen > ORPHAN_SECONDS and self._requeue_intermediate(
                keys=[intermediate, self._queue.key], args=[job_id]
            ):
                yield job_id

    def _from_started(self) -> Iterator[str]:
        """Requeue jobs that have expired in the started registry. The stock worker's clock set their expiry."""
        registry = self._queue.started_job_registry.key
        now, _ = self._redis.time()
        if self._redis.type(registry) != b"zset":
            return
        for member in self._redis.zrangebyscore(registry, 0, now):
            text = _text(member)  # type: ignore[arg-type]  # without scores it is bytes or text
            job_id = text.split(":")[0]
            if self._requeue_started(keys=[registry, self._queue.key, JOB_PREFIX + job_id], args=[text, job_id]):
                yield job_id

    def _from_no_list(self) -> Iterator[str]:
        """Requeue jobs with status queued that two scans, by any workers, found in no list."""
        orphans = orphans_key(self._queue.name)
        scanned = f"{orphans}:scanned"
        if not self._redis.set(scanned, "1", nx=True, ex=_SCAN_SECONDS):
            # The key is another program's, without an expiry, or was set before Redis' clock was set back.
            if not 0 <= self._redis.ttl(scanned) <= _SCAN_SECONDS:
                self._redis.expire(scanned, _SCAN_SECONDS)
            return
        if self._queue.count > _SHORT_QUEUE_JOBS or self._redis.dbsize() > _FEW_KEYS:
            return
        lists = [self._queue.key, self._queue.intermediate_queue_key]
        names = self._redis.hkeys(owners_key(self._queue.name))
        lists += [reserved_key(self._queue.name, _text(name)) for name in names]
        # Read the jobs before the lists: then a job that moves between the lists is found in one of them.
        queued = list(self._queued())
        listed = {job_id for one in lists for job_id in self._ids_in(one)}
        for job_id in [job_id for job_id in queued if job_id not in listed][:_MOST_ORPHANS]:
            keys = [self._queue.key, JOB_PREFIX + job_id, orphans]
            if self._requeue_unlisted(keys=keys, args=[job_id, ORPHAN_SECONDS]):
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
    """Return a value as text. Bytes that are not UTF-8 become an id that no job has; it is ignored later."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value
