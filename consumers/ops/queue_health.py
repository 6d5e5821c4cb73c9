"""Health of the queue and its workers: waiting jobs, live workers, reservations, crashes and quarantined entries."""

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

from consumers.ops.checks import HealthCheck, State, check_result, duration, problems_of
from consumers.ops.redis_errors import is_wrong_type
from producers.redis_keys import crashes_key, lease_key, orphans_key, owners_key, quarantine_key, reserved_key
from producers.settings import TransportSettings

QUEUE_LATE_SECONDS = 300.0
_START = "trading-history worker"
_QUEUE_DISPLACED = "the queue's key has the wrong type: rename or delete it; workers wait until then"
_DISPLACED = "a Redis key has the wrong type; a worker renames it to <key>:quarantined and logs it"


@dataclass(frozen=True)
class Owner:
    """Lease and number of reserved jobs of one worker thread."""

    leased: bool
    jobs: int


@dataclass(frozen=True)
class QueueHealth:
    """State of the queue at one moment. A number is None if its Redis key has the wrong type."""

    name: str
    queued: int | None = 0
    oldest_age_seconds: float | None = None  # of the job at the front; None too if its enqueue time is unknown
    failed: int | None = 0
    workers: int | None = 0  # registered with RQ; a killed worker stays registered for up to 2 minutes
    suspended: bool = False
    worker_states: Mapping[str, str] = field(default_factory=dict)  # by worker; expired registrations are left out
    owners: Mapping[str, Owner] | None = field(default_factory=dict)  # by `<worker>:<thread as 8 hex digits>`
    crash_counts: Sequence[int] | None = ()  # one per poison candidate
    quarantined: int | None = 0
    orphans: int | None = 0

    @property
    def reserved(self) -> int:
        """Number of jobs that worker threads have reserved."""
        return sum(owner.jobs for owner in (self.owners or {}).values())

    @property
    def state(self) -> State:
        """`fail` if the workers are suspended, `warn` if jobs wait longer than QUEUE_LATE_SECONDS."""
        if self.queued is None:
            return "unknown"
        if self.suspended:
            return "fail"
        return "warn" if (self.oldest_age_seconds or 0.0) > QUEUE_LATE_SECONDS else "ok"

    def checks(self) -> Iterator[HealthCheck]:
        yield self._queue()
        yield self._workers()
        yield self._reserved()
        yield self._crashes()
        advice = "run trading-history failed list, then failed requeue or failed discard"
        yield _counted("failed jobs", self.failed, advice=advice)
        yield self._quarantine()
        if self.orphans:
            yield HealthCheck(
                "orphans", "ok", f"{self.orphans} jobs are queued but in no list; a live worker requeues them"
            )

    def problems(self) -> Iterator[str]:
        """Yield the problems of the queue and its workers. Rejected events are none: they hold up no other event."""
        yield from problems_of(self.checks(), strict="queue")
        if not self.workers and self._workers().state != "fail":
            yield "workers: none" if self.workers == 0 else "workers: cannot be read"

    def _queue(self) -> HealthCheck:
        waited = self.oldest_age_seconds
        found = f"{self.queued} jobs in {self.name}" + ("" if waited is None else f", the first {duration(waited)} old")
        advice = ""
        if self.state == "unknown":
            found, advice = "cannot be read", _QUEUE_DISPLACED
        elif self.state == "fail":
            found, advice = f"{self.queued} jobs, but RQ's workers are suspended", "run rq resume"
        elif self.state == "warn":
            advice = f"check the lines about workers and PostgreSQL; if both are ok, start another {_START}"
        return HealthCheck("queue", self.state, found, advice)

    def _workers(self) -> HealthCheck:
        if self.workers is None or self.owners is None:
            return HealthCheck("workers", "unknown", "cannot be read", _DISPLACED)
        # A live HistoryWorker has leases; a stock worker and a killed HistoryWorker have none.
        ours = {name.rpartition(":")[0] for name, owner in self.owners.items() if owner.leased}
        stock = self.worker_states.keys() - {name.rpartition(":")[0] for name in self.owners}
        found = f"HistoryWorkers: {len(ours)}, stock RQ workers: {len(stock)}"
        states = sorted(self.worker_states.items())
        waiting = [f"{name} is {state}" for name, state in states if state.startswith("waiting")]
        if not ours and not stock:
            if self.queued:
                return HealthCheck("workers", "fail", "none, but jobs wait", f"start {_START}")
            return HealthCheck("workers", "warn", "none", f"start {_START}")
        if waiting:
            return HealthCheck(
                "workers",
                "fail",
                f"{found}; {'; '.join(waiting)}",
                "read the worker's log: it says why the worker waits",
            )
        if not ours:
            advice = (
                f"start {_START}: stock RQ workers process one job at a time and fail jobs during a database outage"
            )
            return HealthCheck("workers", "warn", found, advice)
        return HealthCheck("workers", "ok", found)

    def _reserved(self) -> HealthCheck:
        if self.owners is None:
            return HealthCheck("reserved jobs", "unknown", "cannot be read", _DISPLACED)
        if lost := sum(owner.jobs for owner in self.owners.values() if not owner.leased):
            alive = any(owner.leased for owner in self.owners.values())
            advice = (
                "wait: a live worker requeues them within 30 s" if alive else f"start {_START}, which requeues them"
            )
            return HealthCheck("reserved jobs", "warn" if alive else "fail", f"{lost} of crashed workers", advice)
        return HealthCheck("reserved jobs", "ok", f"{self.reserved}, all with a valid lease")

    def _crashes(self) -> HealthCheck:
        if self.crash_counts is None:
            return HealthCheck("poison candidates", "unknown", "cannot be read", _DISPLACED)
        crashed = [count for count in self.crash_counts if count > 0]
        found = (
            f"{len(self.crash_counts)} candidates, none of which has crashed a worker" if self.crash_counts else "none"
        )
        problem = f"{len(crashed)} jobs, up to {max(crashed)} crashes each" if crashed else ""
        advice = "read the logs of the crashed workers; after 3 crashes the event is rejected"
        return check_result("poison candidates", found, problem, advice=advice, state="warn")

    def _quarantine(self) -> HealthCheck:
        advice = f"find out which program wrote them, then delete the key {quarantine_key(self.name)}"
        return _counted("quarantine", self.quarantined, " unusable entries of the queue", advice=advice)


def _counted(name: str, count: int | None, what: str = "", *, advice: str) -> HealthCheck:
    """Return a check that warns if the count is not 0."""
    if count is None:
        return HealthCheck(name, "unknown", "cannot be read", _DISPLACED)
    return check_result(name, "none", f"{count}{what}" if count else "", advice=advice, state="warn")


def queue_of_settings() -> QueueHealth | None:
    """Read the queue of the settings. Returns None without REDIS_URL.

    Raises:
        RedisError: Redis cannot be read now.
        SettingsError: a setting is invalid.
    """
    settings = TransportSettings.from_environment()
    if settings.redis_url is None:
        return None
    with settings.redis() as redis:
        return read_queue(redis, settings.queue)


def read_queue(redis: Redis, name: str) -> QueueHealth:
    """Read the queue in two round trips. A key of the wrong type is not an error.

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
        _seconds_since(enqueued_at, now),  # the relay takes enqueued_at from Redis' clock, which may differ from ours
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
    """Return the replies, None for a key of the wrong type. Raises RedisError for every other error."""
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
