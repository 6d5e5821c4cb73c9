"""HistoryWorker: an RQ worker that loses nothing when it dies and waits when the database or Redis is away.

    rq worker --worker-class consumers.worker.HistoryWorker history

It runs in one process, without forking. What it takes from the queue it holds in a list of its own under a lease
(see consumers.reservations), so that any other worker can return it to the queue within a minute of its death.
Only the job functions of consumers.handlers run; any other job is refused.
"""

from __future__ import annotations

import logging
import os
import random
import signal
import threading
import time
from types import FrameType
from typing import Any

from redis import Redis
from redis.exceptions import RedisError
from rq import Queue
from rq.defaults import DEFAULT_LOGGING_DATE_FORMAT, DEFAULT_LOGGING_FORMAT
from rq.job import Job, JobStatus
from rq.registry import FinishedJobRegistry
from rq.serializers import JSONSerializer
from rq.utils import now
from rq.version import VERSION
from rq.worker import DequeueStrategy, SimpleWorker, WorkerStatus
from rq.worker_registration import REDIS_WORKER_KEYS as WORKERS_KEY

from consumers.connection import limit_statements
from consumers.errors import PoisonEvent, RefusedJob, StoreUnavailable
from consumers.handlers import Settled, acknowledge, record_portfolio_snapshot, record_signal_archive, reject, settle
from consumers.reservations import LEASE_SECONDS, POISON_DEATHS, STRANDED_SECONDS, Reservations, Reserved
from producers.errors import SettingsError
from producers.events import PortfolioSnapshotEvent, SignalArchiveEvent

logger = logging.getLogger(__name__)

TESTED_RQ = ("3.0",)
_MODELS: dict[str, type[PortfolioSnapshotEvent] | type[SignalArchiveEvent]] = {
    f"{function.__module__}.{function.__name__}": model
    for function, model in (
        (record_portfolio_snapshot, PortfolioSnapshotEvent),
        (record_signal_archive, SignalArchiveEvent),
    )
}

STATEMENT_SECONDS = 20.0
_STUCK_SECONDS = 3 * STATEMENT_SECONDS
_BATCH_JOBS = 100
_WAIT_SECONDS = 1  # also how long a stop request may go unnoticed by an idle worker
_RENEW_SECONDS = LEASE_SECONDS / 4
_MAINTENANCE_SECONDS = 5.0
_FIRST_BACKOFF_SECONDS = 0.2
_LAST_BACKOFF_SECONDS = 15.0


class HistoryWorker(SimpleWorker):
    """Works on exactly one queue, with JSON as serializer whatever it is told.

    Raises:
        SettingsError: there is more than one queue, or RQ is of a version that this was not tested with.
    """

    def __init__(self, queues: Any, *args: Any, **kwargs: Any) -> None:
        if not VERSION.startswith(TESTED_RQ):
            raise SettingsError(
                f"HistoryWorker was tested with RQ {', '.join(TESTED_RQ)}, this is {VERSION}:"
                " use RQ's own worker (rq worker --serializer json history)"
            )
        kwargs["serializer"] = JSONSerializer
        super().__init__(_json_queues(queues), *args, **kwargs)
        if len(self.queues) != 1:
            raise SettingsError("HistoryWorker works on exactly one queue; start another worker for another queue")
        self._queue = self.queues[0]
        self._reservations = Reservations(self.connection, self._queue, self.name)
        self._ending = threading.Event()
        self._retired = threading.Event()
        self._progress_at = time.monotonic()
        self._maintain_at = 0.0
        self._intermediate_seen: dict[str, float] = {}

    def work(
        self,
        burst: bool = False,
        logging_level: str | None = None,
        date_format: str = DEFAULT_LOGGING_DATE_FORMAT,
        log_format: str = DEFAULT_LOGGING_FORMAT,
        max_jobs: int | None = None,
        max_idle_time: int | None = None,
        with_scheduler: bool = False,
        dequeue_strategy: DequeueStrategy = DequeueStrategy.DEFAULT,
    ) -> bool:
        """Store events until told to stop, or with `burst` until the queue is empty. True if any job was done.

        SIGINT and SIGTERM end it after what it holds. An outage of Redis or PostgreSQL, of any length, does not.
        """
        limit_statements(STATEMENT_SECONDS)
        self.bootstrap(logging_level, date_format, log_format)
        self._install_signal_handlers()
        self._reservations.renew_lease()
        renewing = threading.Thread(target=self._renew_lease, name="history-lease", daemon=True)
        renewing.start()
        self.set_state(WorkerStatus.IDLE)
        done, failures, idle_since = 0, 0, time.monotonic()
        try:
            while not self._ending.is_set() and (max_jobs is None or done < max_jobs):
                self._progress_at = time.monotonic()
                try:
                    self.check_for_suspension(burst)
                    self._maintain()
                    reserved = self._take(burst, _BATCH_JOBS if max_jobs is None else max_jobs - done)
                    if reserved:
                        done += self._work_off(reserved)
                        idle_since = time.monotonic()
                    elif burst or (max_idle_time is not None and time.monotonic() - idle_since > max_idle_time):
                        break
                    if failures:
                        logger.warning("worker %s goes on after %d failed tries", self.name, failures)
                        failures = 0
                except (RedisError, StoreUnavailable) as error:
                    failures += 1
                    self._wait_for_recovery(error, failures)
        finally:
            self._retire()
            self._retired.set()
        return bool(done)

    @property
    def connection_timeout(self) -> int:
        """Seconds without an answer after which Redis counts as away; RQ waits for several minutes."""
        return _WAIT_SECONDS + 9

    def request_stop(self, signum: int, frame: FrameType | None) -> None:
        """Only a note: the loop looks at it, so that no exception lands in the middle of something."""
        self._shutdown_requested_date = now()
        signal.signal(signal.SIGINT, self.request_force_stop)
        signal.signal(signal.SIGTERM, self.request_force_stop)
        self._stop_requested = True
        self._ending.set()

    def _take(self, burst: bool, limit: int) -> list[Reserved]:
        reserved = self._reservations.reserve(limit)
        if not reserved and not burst and self._reservations.wait(_WAIT_SECONDS):
            reserved = self._reservations.reserve(limit)
        return reserved

    def _work_off(self, reserved: list[Reserved]) -> int:
        """Settle and finish each job; what could not be settled goes back to the front of the queue.

        One that times out while others pass goes to the tail: it must not hold up the rest. Raises StoreUnavailable
        when nothing passes.
        """
        self.set_state(WorkerStatus.BUSY)
        found = self._fetch([one.job_id for one in reserved])
        done, late, trouble = 0, [], None
        try:
            for one, job in zip(reserved, found, strict=True):
                if isinstance(job, Exception):
                    self._refuse_unreadable(one.job_id, job)
                    done += 1
                    continue
                if job is None:
                    self._drop(one.job_id)
                    continue
                job.started_at = now()
                self._progress_at = time.monotonic()
                try:
                    settled = self._settled(job, one.deaths)
                except StoreUnavailable as error:
                    if not error.one_statement:
                        raise
                    late.append(job.id)
                    trouble = error
                    continue
                if settled is not None:
                    self._finish(job, settled)
                    done += 1
            # Alone, as a suspect comes, nothing can pass beside it: then whatever waits behind it counts.
            if trouble is not None and not done and (len(reserved) > 1 or not self._queue.count):
                raise trouble
            for job_id in late:
                count = self._reservations.postpone(job_id)
                logger.warning("job %s timed out alone and goes to the tail, for the %d. time", job_id, count)
        finally:
            self._reservations.hand_back()
            self.set_state(WorkerStatus.IDLE)
        return done

    def _settled(self, job: Job, deaths: int | None) -> Settled | None:
        """Settle one job; None when a defect of ours was in the way. Raises StoreUnavailable."""
        try:
            text, model = _delivery(job)
        except RefusedJob as refusal:
            return reject(job.id, job.description, refusal)
        if deaths is not None and deaths >= POISON_DEATHS:
            return reject(job.id, text, PoisonEvent(deaths))
        try:
            return settle(job.id, text, model)
        except StoreUnavailable:
            raise
        except Exception:
            # Counted like a death of the worker: it is tried again, alone, and given up in the end.
            logger.exception("worker %s failed on job %s", self.name, job.id)
            self._reservations.blame(job.id)
            return None

    def _fetch(self, job_ids: list[str]) -> list[Job | Exception | None]:
        """Each job, None for one that is gone, or why its hash cannot be read."""
        with self.connection.pipeline(transaction=False) as pipe:
            for job_id in job_ids:
                pipe.hgetall(Job.key_for(job_id))
            hashes = pipe.execute(raise_on_error=False)
        for found in hashes:
            # Only this one is the job's fault; any other error is Redis's trouble, and no reason to refuse an event.
            if isinstance(found, Exception) and not str(found).startswith("WRONGTYPE"):
                raise found
        return [_restored(job_id, found, self.connection) for job_id, found in zip(job_ids, hashes, strict=True)]

    def _refuse_unreadable(self, job_id: str, cause: Exception) -> None:
        """RQ could not even write a failure into it: it is noted, and failed by its id alone."""
        reject(job_id, "", RefusedJob(f"its job cannot be read: {type(cause).__name__}"))
        with self.connection.pipeline(transaction=True) as pipe:
            self._reservations.release(pipe, job_id)
            pipe.zadd(self._queue.failed_job_registry.key, {job_id: -1})
            self.increment_failed_job_count(pipe)
            pipe.execute()

    def _drop(self, job_id: str) -> None:
        # Deleted by somebody while it was queued: RQ's own worker skips it too.
        with self.connection.pipeline(transaction=True) as pipe:
            self._reservations.release(pipe, job_id)
            pipe.execute()

    def _finish(self, job: Job, settled: Settled) -> None:
        """Acknowledge and write what RQ writes for a finished or failed job, in one transaction."""
        ended_at = job.ended_at = job.last_heartbeat = now()
        started_at = job.started_at or ended_at
        job.worker_name = self.name
        with self.connection.pipeline(transaction=True) as pipe:
            acknowledge(pipe, settled)
            self._reservations.release(pipe, job.id)
            self._queue.failed_job_registry.remove(job, pipeline=pipe)
            if settled.error is None:
                job._result = settled.outcome.row_id
                ttl = job.get_result_ttl(self.default_result_ttl)
                if ttl:
                    job._handle_success(
                        ttl, pipe, self.name, execution_started_at=started_at, execution_ended_at=ended_at
                    )
                job.cleanup(ttl, pipeline=pipe, remove_from_queue=False)
                self.increment_successful_job_count(pipe)
            else:
                job.set_status(JobStatus.FAILED, pipeline=pipe)
                reason = f"{type(settled.error).__name__}: {settled.error}"
                job._handle_failure(
                    reason, pipe, self.name, execution_started_at=started_at, execution_ended_at=ended_at
                )
                self.increment_failed_job_count(pipe)
            self.increment_total_working_time(ended_at - started_at, pipe)
            self.heartbeat(pipeline=pipe)
            pipe.execute()

    def _wait_for_recovery(self, error: Exception, failures: int) -> None:
        """Say it once and wherever operators look, then wait, longer each time; stopping ends the wait."""
        what = "the database" if isinstance(error, StoreUnavailable) else "Redis"
        if failures == 1:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            logger.error("worker %s waits for %s and tries again: %s", self.name, what, reason)
        try:
            self._reservations.hand_back()
            self.set_state(f"waiting for {what}")
        except RedisError:
            pass  # it is Redis that is away: what is held there stays held, and comes first when it is back
        ceiling = min(_FIRST_BACKOFF_SECONDS * 2.0 ** min(failures, 10), _LAST_BACKOFF_SECONDS)
        self._ending.wait(random.uniform(ceiling / 2, ceiling))

    def _renew_lease(self) -> None:
        """In a thread, also while a long statement keeps the worker busy, but not for one that is stuck for good."""
        while not self._retired.wait(_RENEW_SECONDS):
            try:
                if time.monotonic() - self._progress_at < _STUCK_SECONDS:
                    self._reservations.renew_lease()
            except Exception as error:
                # The loop meets the same trouble and waits for its end; without a lease others take over.
                logger.debug("worker %s could not renew its lease: %s", self.name, type(error).__name__)

    def _maintain(self) -> None:
        """Find what the dead have left, rather than wait for RQ to fail it."""
        if time.monotonic() < self._maintain_at:
            return
        self._maintain_at = time.monotonic() + _MAINTENANCE_SECONDS * random.uniform(0.8, 1.2)
        if not self.connection.sismember(WORKERS_KEY, self.key):  # Redis lost everything, this registration included
            self.connection.delete(self.key)
            self.register_birth()
            self._reservations.renew_lease()
        self.heartbeat()
        found = self._reservations.recover_dead_holders()
        found += self._reservations.requeue_abandoned(time.time())
        found += self._stranded_in_intermediate()
        if found:
            logger.warning("returned %d jobs of dead workers to the queue", len(found))
        FinishedJobRegistry(queue=self._queue).cleanup()

    def _stranded_in_intermediate(self) -> list[str]:
        """A living stock worker takes a job out of there in moments; what stays, a dead one has left."""
        at = time.monotonic()
        self._intermediate_seen = {
            job_id: self._intermediate_seen.get(job_id, at) for job_id in self._reservations.intermediate_ids()
        }
        stranded = [job_id for job_id, seen in self._intermediate_seen.items() if at - seen > STRANDED_SECONDS]
        return [job_id for job_id in stranded if self._reservations.requeue_from_intermediate(job_id)]

    def _retire(self) -> None:
        try:
            self._reservations.give_up()
            self.teardown()
        except RedisError as error:
            # Nothing is lost: the lease runs out, and another worker returns what was held.
            logger.warning("worker %s could not sign off: %s", self.name, type(error).__name__)


def _json_queues(queues: Any) -> Any:
    """The queues as given, but reading JSON; the command line makes them before it makes the worker."""
    for queue in queues if isinstance(queues, list | tuple) else [queues]:
        if isinstance(queue, Queue):
            queue.serializer = JSONSerializer
    return queues


def _restored(job_id: str, found: Any, connection: Redis) -> Job | Exception | None:
    if isinstance(found, Exception) or not found:
        return found if isinstance(found, Exception) else None
    job = Job(job_id, connection=connection, serializer=JSONSerializer)
    try:
        job.restore(found)
    except Exception as error:
        return error
    return job


def _delivery(job: Job) -> tuple[Any, type[PortfolioSnapshotEvent] | type[SignalArchiveEvent]]:
    try:
        function, arguments, keywords = job.func_name, job.args, job.kwargs
    except Exception as error:
        raise RefusedJob(f"its data cannot be read as JSON: {type(error).__name__}") from None
    if function not in _MODELS:
        raise RefusedJob("it names a function that is not one of ours")
    if len(arguments) != 1 or keywords:
        raise RefusedJob("it must have one argument, the event's text")
    if job._success_callback_name or job._failure_callback_name or job._stopped_callback_name or job.webhooks:
        raise RefusedJob("it has a callback or a webhook")
    return arguments[0], _MODELS[function]


def run_worker(redis: Redis, queue: str, *, burst: bool = False) -> None:
    """Run a HistoryWorker on `queue`; returns when it was told to stop, or with `burst` when the queue is empty."""
    worker = HistoryWorker([Queue(queue, connection=redis, serializer=JSONSerializer)], connection=redis)
    logger.info("worker %s on queue %s, process %d", worker.name, queue, os.getpid())
    worker.work(burst=burst)
