"""The queue and its workers: how many jobs wait and for how long, which workers are alive, and which jobs need one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from redis import Redis
from redis.client import Pipeline
from rq import Queue
from rq.job import Job
from rq.serializers import JSONSerializer
from rq.suspension import WORKERS_SUSPENDED
from rq.utils import utcparse
from rq.worker import Worker
from rq.worker_registration import WORKERS_BY_QUEUE_KEY

from consumers.ops.facts import Fact, State, check, duration
from consumers.ops.redis_errors import is_wrong_type
from producers.redis_keys import crashes_key, lease_key, orphans_key, owners_key, quarantine_key, reserved_key
from producers.settings import TransportSettings

QUEUE_LATE_SECONDS = 300.0
_START = "trading-history worker"
_QUEUE_DISPLACED = "the queue's key has the wrong type: rename or delete it; workers wait until then"
_DISPLACED = "a Redis key has the wrong type; a worker renames it to <key>:quarantined and logs it"


@dataclass(frozen=True)
class Owner:
    """A worker thread that may have reservations: whether it has a lease, and its number of reserved jobs."""

    leased: bool
    jobs: int


@dataclass(frozen=True)
class QueueHealth:
    """The queue at one moment. A number is None if its key has the wrong type."""

    name: str
    queued: int | None = 0
    oldest_waiting_seconds: float | None = None  # of the job at the front; also None if it does not say
    failed: int | None = 0
    workers: int | None = 0  # registered with RQ, which lists a killed one for up to two minutes
    suspended: bool = False
    worker_states: Mapping[str, str] = field(default_factory=dict)  # of the registered ones that have not expired
    owners: Mapping[str, Owner] | None = field(default_factory=dict)  # by `<worker>:<8 hex digits of the thread>`
    crash_counts: Sequence[int] | None = ()  # of the poison candidates
    quarantined: int | None = 0
    orphans: int | None = 0

    @property
    def reserved(self) -> int:
        """Jobs that worker threads have taken."""
        return sum(owner.jobs for owner in (self.owners or {}).values())

    @property
    def state(self) -> State:
        """Whether the queue is worked on in time."""
        if self.queued is None:
            return "unknown"
        if self.suspended:
            return "fail"
        return "warn" if (self.oldest_waiting_seconds or 0.0) > QUEUE_LATE_SECONDS else "ok"

    def facts(self) -> Iterator[Fact]:
        yield self._queue()
        yield self._workers()
        yield self._reserved()
        yield self._crashes()
        advice = "trading-history failed list; then failed requeue or discard"
        yield _counted("failed jobs", self.failed, advice=advice)
        yield self._quarantine()
        if self.orphans:
            yield Fact("orphans", "ok", f"{self.orphans} jobs are queued but in no list; a worker requeues them")

    def _queue(self) -> Fact:
        waited = self.oldest_waiting_seconds
        found = f"{self.queued} jobs in {self.name}" + ("" if waited is None else f", the first for {duration(waited)}")
        advice = ""
        if self.state == "unknown":
            found, advice = "cannot be read", _QUEUE_DISPLACED
        elif self.state == "fail":
            found, advice = f"{self.queued} jobs, but RQ's workers are suspended", "rq resume"
        elif self.state == "warn":
            advice = f"look at the lines about workers and PostgreSQL; more of {_START} may help"
        return Fact("queue", self.state, found, advice)

    def _workers(self) -> Fact:
        if self.workers is None or self.owners is None:
            return Fact("workers", "unknown", "cannot be read", _DISPLACED)
        # A live HistoryWorker has a lease; stock workers and killed HistoryWorkers have none.
        ours = {name.rpartition(":")[0] for name, owner in self.owners.items() if owner.leased}
        stock = self.worker_states.keys() - {name.rpartition(":")[0] for name in self.owners}
        found = f"{len(ours)} of HistoryWorker, {len(stock)} of RQ's own"
        states = sorted(self.worker_states.items())
        waiting = [f"{name} is {state}" for name, state in states if state.startswith("waiting")]
        if not ours and not stock:
            return Fact("workers", "fail" if self.queued else "warn",
                        "none although jobs wait" if self.queued else "none", _START)  # fmt: skip
        if waiting:
            return Fact("workers", "fail", f"{found}; {'; '.join(waiting)}", "the worker's log says why it waits")
        if not ours:
            advice = (
                f"start {_START}: stock RQ workers process one job at a time and fail jobs during a database outage"
            )
            return Fact("workers", "warn", found, advice)
        return Fact("workers", "ok", found)

    def _reserved(self) -> Fact:
        if self.owners is None:
            return Fact("reserved jobs", "unknown", "cannot be read", _DISPLACED)
        if lost := sum(owner.jobs for owner in self.owners.values() if not owner.leased):
            alive = any(owner.leased for owner in self.owners.values())
            advice = "a live worker requeues them within 30 s" if alive else _START
            return Fact("reserved jobs", "warn" if alive else "fail", f"{lost} of crashed workers", advice)
        return Fact("reserved jobs", "ok", f"{self.reserved}, all under a lease")

    def _crashes(self) -> Fact:
        if self.crash_counts is None:
            return Fact("poison candidates", "unknown", "cannot be read", _DISPLACED)
        crashed = [count for count in self.crash_counts if count > 0]
        found = f"{len(self.crash_counts)} candidates, none has crashed a worker" if self.crash_counts else "none"
        problem = f"{len(crashed)} jobs, up to {max(crashed)} crashes each" if crashed else ""
        advice = "read the logs of the crashed workers; after 3 crashes the job is rejected"
        return check("poison candidates", found, problem, advice=advice, state="warn")

    def _quarantine(self) -> Fact:
        advice = f"find out which program put them there, then delete {quarantine_key(self.name)}"
        return _counted("quarantine", self.quarantined, " unusable entries of the queue", advice=advice)


def _counted(name: str, count: int | None, what: str = "", *, advice: str) -> Fact:
    """0 is ok, more is a warning."""
    if count is None:
        return Fact(name, "unknown", "cannot be read", _DISPLACED)
    return check(name, "none", f"{count}{what}" if count else "", advice=advice, state="warn")


def queue_of_settings() -> QueueHealth | None:
    """None without REDIS_URL.

    Raises:
        RedisError: Redis cannot be read now.
        SettingsError: a setting cannot be read.
    """
    settings = TransportSettings.from_environment()
    if settings.redis_url is None:
        return None
    with settings.redis() as redis:
        return read_queue(redis, settings.queue)


def read_queue(redis: Redis, name: str) -> QueueHealth:
    """Read it in two round trips; a key of the wrong type is no error.

    Raises:
        RedisError: Redis cannot be read now.
    """
    queue = Queue(name, connection=redis, serializer=JSONSerializer)
    with redis.pipeline(transaction=False) as pipe:
        pipe.llen(queue.key)
        pipe.lindex(queue.key, 0)
        pipe.zcard(queue.failed_job_registry.key)
        pipe.smembers(WORKERS_BY_QUEUE_KEY % name)
        pipe.hkeys(owners_key(name))
        pipe.exists(WORKERS_SUSPENDED)
        pipe.hvals(crashes_key(name))
        pipe.llen(quarantine_key(name))
        pipe.hlen(orphans_key(name))
        pipe.time()
        queued, front, failed, workers, owners, suspended, crashes, quarantined, orphans, (now, _) = _answers(pipe)
    worker_keys, owner_names = sorted(map(_text, workers or ())), sorted(map(_text, owners or ()))
    with redis.pipeline(transaction=False) as pipe:
        pipe.hget(Job.key_for(_text(front or b"-")), "enqueued_at")
        for key in worker_keys:
            pipe.hmget(key, "birth", "state")
        for owner in owner_names:
            pipe.exists(lease_key(name, owner))
            pipe.llen(reserved_key(name, owner))
        enqueued_at, *rest = _answers(pipe)
    states, leases = rest[: len(worker_keys)], iter(rest[len(worker_keys) :])
    return QueueHealth(
        name,
        queued,
        _seconds_since(enqueued_at, now),  # the relay notes it by Redis' clock, and this host's may be another
        failed,
        None if workers is None else len(workers),
        bool(suspended),
        {
            key.removeprefix(Worker.redis_worker_namespace_prefix): _text(fields[1] or b"starting")
            for key, fields in zip(worker_keys, states, strict=True)
            if fields and fields[0]
        },
        None if owners is None else {owner: Owner(bool(next(leases)), next(leases) or 0) for owner in owner_names},
        None if crashes is None else [int(count) for count in crashes if count.isdigit()],
        quarantined,
        orphans,
    )


def _answers(pipe: Pipeline) -> list[Any]:
    """None where a key has another type. Raises RedisError for every other error."""
    answers: list[Any] = pipe.execute(raise_on_error=False)
    for answer in answers:
        if isinstance(answer, Exception) and not is_wrong_type(answer):
            raise answer
    return [None if isinstance(answer, Exception) else answer for answer in answers]


def _text(value: bytes) -> str:
    return value.decode(errors="replace")


def _seconds_since(enqueued_at: bytes | None, now: float) -> float | None:
    try:
        return None if not enqueued_at else max(now - utcparse(enqueued_at.decode()).timestamp(), 0.0)
    except ValueError:
        return None
