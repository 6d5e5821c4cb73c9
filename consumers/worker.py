"""HistoryWorker: an RQ worker that loses nothing when it dies and waits when the database or Redis is away.

    rq worker --worker-class consumers.worker.HistoryWorker history

It runs in one process, without forking. What it takes from the queue it holds in a list of its own under a lease
(see consumers.reservations), so that any other worker can return it to the queue within half a minute of its death.
Only the job functions of consumers.handlers run; any other job is refused.
"""

from __future__ import annotations

import gc
import logging
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Sequence
from datetime import datetime
from types import FrameType
from typing import Any

from redis import Redis
from redis.exceptions import RedisError
from rq import Queue
from rq.defaults import DEFAULT_LOGGING_DATE_FORMAT, DEFAULT_LOGGING_FORMAT
from rq.exceptions import StopRequested
from rq.serializers import JSONSerializer
from rq.utils import now
from rq.version import VERSION
from rq.worker import DequeueStrategy, SimpleWorker, WorkerStatus
from rq.worker_registration import REDIS_WORKER_KEYS as WORKERS_KEY
from rq.worker_registration import clean_worker_registry

from consumers.connection import drop_connections, limit_statements
from consumers.errors import PoisonEvent, StoreUnavailable
from consumers.reservations import POISON_DEATHS, Reservations
from consumers.rq_jobs import ReservedJob, RqJobs, Run
from consumers.settling import ISOLATED_SECONDS, Delivery, Settled, Unsettled, acknowledge, settle
from consumers.stranded import Stranded
from consumers.waits import DatabaseWaits
from producers.errors import SettingsError

logger = logging.getLogger(__name__)

TESTED_RQ = ("3.0",)

STATEMENT_SECONDS = 20.0
_ANSWER_SECONDS = STATEMENT_SECONDS + 5  # for a server that does not even keep its own limit
_STUCK_SECONDS = 3 * STATEMENT_SECONDS
BATCH_JOBS = 500
_BATCH_CHARACTERS = 4 * 1024 * 1024
_WAIT_SECONDS = 1  # also how long a stop request may go unnoticed by an idle worker
_RENEW_SECONDS = 2.0
_STALL_SECONDS = 1.0  # waiting longer than this for an answer is the database's doing, not the job's
_MAINTENANCE_SECONDS = 5.0
_REGISTERED_SECONDS = 60  # RQ adds as much: a dead worker is in RQ's list for two minutes at most, not for eight
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
        if not self.queues and not kwargs.get("prepare_for_work", True):
            return  # RQ's commands make such objects to read of other workers
        if len(self.queues) != 1:
            raise SettingsError("HistoryWorker works on exactly one queue; start another worker for another queue")
        self._queue = self.queues[0]
        self.worker_ttl = min(self.worker_ttl, _REGISTERED_SECONDS)
        self._reservations = Reservations(self.connection, self._queue, self.name)
        self._jobs = RqJobs(self.connection, self._queue)
        self._stranded = Stranded(self.connection, self._queue)
        self._ending = threading.Event()
        self._retired = threading.Event()
        self._waits = DatabaseWaits(_ANSWER_SECONDS, self._ending)
        self._progress_at = time.monotonic()
        self._maintain_at = 0.0
        self._failures = 0

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
        gc.freeze()  # what the program consists of stays: no need to look through it again and again
        self._install_signal_handlers()
        if not self._arrive(logging_level, date_format, log_format):
            return False
        renewing = threading.Thread(target=self._renew_lease, name="history-lease", daemon=True)
        renewing.start()
        done, idle_since = 0, time.monotonic()
        try:
            with self._waits.limited():
                while not self._ending.is_set() and (max_jobs is None or done < max_jobs):
                    self._progress_at = time.monotonic()
                    try:
                        self.check_for_suspension(burst)
                        if self._ending.is_set():
                            break
                        self._maintain()
                        reserved = self._take(
                            burst, min(BATCH_JOBS, sys.maxsize if max_jobs is None else max_jobs - done)
                        )
                        if reserved:
                            done += self._work_off(reserved)
                            idle_since = time.monotonic()
                        elif burst or (max_idle_time is not None and time.monotonic() - idle_since > max_idle_time):
                            break
                        self._recovered()
                    except StopRequested:  # suspended, and in a burst
                        break
                    except (RedisError, StoreUnavailable) as error:
                        self._wait_for_recovery(error)
        finally:
            self._retired.set()
            renewing.join(self.connection_timeout)  # what is let go must not be leased once more
            self._retire()
        return bool(done)

    def _arrive(self, *logging_options: Any) -> bool:
        """Sign on; while Redis is away, try again. False when told to stop before it came."""
        while not self._ending.is_set():
            try:
                self._set_ip_address(self.connection)
                if self.birth_date is not None:  # an earlier try got half way
                    self.connection.delete(self.key)
                self.bootstrap(*logging_options)
                self._reservations.renew_lease()
                self.set_state(WorkerStatus.IDLE)
                self._recovered()
                return True
            except RedisError as error:
                self._wait_for_recovery(error)
        return False

    def _set_ip_address(self, connection: Redis) -> None:
        """RQ asks Redis for it when the worker is made; while Redis is away that must wait like everything else."""
        try:
            super()._set_ip_address(connection)
        except RedisError:
            self.ip_address = "unknown"

    @property
    def connection_timeout(self) -> int:
        """Seconds without an answer after which Redis counts as away; RQ waits for several minutes."""
        return _WAIT_SECONDS + 9

    def _install_signal_handlers(self) -> None:
        super()._install_signal_handlers()
        signal.signal(signal.SIGHUP, self.request_stop)

    def request_stop(self, signum: int, frame: FrameType | None) -> None:
        """Only a note: the loop looks at it, so that no exception lands in the middle of something."""
        self._shutdown_requested_date = now()
        signal.signal(signal.SIGINT, self.request_force_stop)
        signal.signal(signal.SIGTERM, self.request_force_stop)
        self._stop_requested = True
        self._ending.set()

    def _take(self, burst: bool, limit: int) -> list[ReservedJob]:
        reserved = self._reservations.reserve(limit)
        if not reserved and not burst and self._reservations.wait(_WAIT_SECONDS):
            reserved = self._reservations.reserve(limit)
        return reserved

    def _work_off(self, reserved: Sequence[ReservedJob]) -> int:
        """Settle and finish a batch; what could not be settled goes back to the front of the queue.

        One that times out while others pass goes to the tail: it must not hold up the rest. One that fails on a
        defect of ours while others pass is blamed. Raises StoreUnavailable when nothing passes.
        """
        self.set_state(WorkerStatus.BUSY)
        started_at = now()
        jobs = {job.job_id: job for job in reserved}
        self._drop([job.job_id for job in reserved if job.state == "gone"])
        deliveries = self._deliveries([job for job in reserved if job.state != "gone"])
        settled: list[Settled] = []
        late: list[Unsettled] = []
        broken: list[Unsettled] = []
        try:
            try:
                # One that has timed out before comes alone, and must not hold up the rest for as long again.
                patience = ISOLATED_SECONDS if reserved[0].delays else None
                for end in settle(deliveries, patience_seconds=patience) if deliveries else ():
                    self._progress_at = time.monotonic()
                    if isinstance(end, Settled):
                        settled.append(end)
                        continue
                    (late if isinstance(end.error, StoreUnavailable) else broken).append(end)
                    if len(late) > 1 and not settled:
                        raise late[0].error
                    if self._ending.is_set():
                        break
            finally:
                # Also when the rest met trouble: what is committed is done.
                self._finish(settled, jobs, started_at)
            # Alone, as a suspect comes, nothing can pass beside it: then whatever waits behind it counts.
            if late and not settled and (len(reserved) > 1 or not self._queue.count):
                raise late[0].error
            if len(broken) > 1 and not settled:
                raise StoreUnavailable(f"no event of a batch could be stored: {broken[0].error!r}") from broken[0].error
            for end in late:
                count = self._reservations.postpone(end.job_id)
                logger.warning(
                    "job %s cannot be stored now, alone, and goes to the tail, for the %d. time: %s",
                    end.job_id, count, end.error,
                )  # fmt: skip
            for end in broken:
                self._blame(end, jobs[end.job_id].deaths or 0, started_at)
        finally:
            self._reservations.hand_back()
            self.set_state(WorkerStatus.IDLE)
        return len(settled)

    def _delivery(self, job: ReservedJob) -> Delivery:
        delivery = self._jobs.delivery(job)
        if delivery.refusal is None and job.deaths is not None and job.deaths >= POISON_DEATHS:
            return delivery._replace(refusal=PoisonEvent(job.deaths))
        return delivery

    def _deliveries(self, jobs: Sequence[ReservedJob]) -> list[Delivery]:
        """As many as are worked on together: their texts may be a thousand times longer than what Redis has of them."""
        deliveries, size = [], 0
        for job in jobs:
            deliveries.append(self._delivery(job))
            size += len(deliveries[-1].text) if isinstance(deliveries[-1].text, str) else 0
            if size > _BATCH_CHARACTERS:
                break
        return deliveries

    def _blame(self, end: Unsettled, deaths: int, started_at: datetime) -> None:
        """Count a defect like a death of the worker: the job is tried again, alone, and given up in the end."""
        logger.error("worker %s failed on job %s", self.name, end.job_id, exc_info=end.error)
        if deaths < POISON_DEATHS:
            self._reservations.blame(end.job_id)
            return
        # Not even its rejection can be recorded: it leaves the queue for RQ's failed registry.
        with self.connection.pipeline(transaction=True) as pipe:
            self._reservations.release(pipe, [end.job_id])
            self._jobs.fail(pipe, end.job_id, end.error, Run(self.name, started_at, now(), self.default_result_ttl))
            self.increment_failed_job_count(pipe)
            pipe.execute()

    def _drop(self, job_ids: Sequence[str]) -> None:
        # Deleted by somebody while it was queued: RQ's own worker skips it too.
        if job_ids:
            with self.connection.pipeline(transaction=True) as pipe:
                self._reservations.release(pipe, job_ids)
                pipe.execute()

    def _finish(self, settled: Sequence[Settled], jobs: dict[str, ReservedJob], started_at: datetime) -> None:
        """Acknowledge and write what RQ writes for finished and failed jobs, in one transaction."""
        if not settled:
            return
        run = Run(self.name, started_at, now(), self.default_result_ttl)
        done = [(jobs[end.job_id], end.outcome.row_id) for end in settled if end.error is None]
        with self.connection.pipeline(transaction=True) as pipe:
            acknowledge(pipe, settled)
            self._reservations.release(pipe, [end.job_id for end in settled])
            if done:
                self._jobs.finish(pipe, done, run)
            for end in settled:
                if end.error is not None:
                    self._jobs.fail(pipe, end.job_id, end.error, run)
            pipe.hincrby(self.key, "successful_job_count", len(done))
            pipe.hincrby(self.key, "failed_job_count", len(settled) - len(done))
            self.increment_total_working_time(run.ended_at - started_at, pipe)
            self.heartbeat(pipeline=pipe)
            pipe.execute()
        for end in settled:
            if jobs[end.job_id].state == "unusual":
                self._jobs.let_go(end.job_id)

    def _wait_for_recovery(self, error: Exception) -> None:
        """Say it once and wherever operators look, then wait, longer each time; stopping ends the wait."""
        self._failures += 1
        what = "the database" if isinstance(error, StoreUnavailable) else "Redis"
        if self._failures == 1:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            logger.error("worker %s waits for %s and tries again: %s", self.name, what, reason)
        try:
            self._reservations.hand_back()
            self.set_state(f"waiting for {what}")
        except RedisError:
            pass  # it is Redis that is away: what is held there stays held, and comes first when it is back
        if isinstance(error, StoreUnavailable):
            drop_connections()
        ceiling = min(_FIRST_BACKOFF_SECONDS * 2.0 ** min(self._failures, 10), _LAST_BACKOFF_SECONDS)
        self._ending.wait(random.uniform(ceiling / 2, ceiling))

    def _recovered(self) -> None:
        if self._failures:
            logger.warning("worker %s goes on after %d failed tries", self.name, self._failures)
            self._failures = 0

    def _renew_lease(self) -> None:
        """In a thread, also while a long statement keeps the worker busy, but not for one that is stuck for good."""
        while not self._retired.wait(_RENEW_SECONDS):
            try:
                if time.monotonic() - self._progress_at < _STUCK_SECONDS:
                    self._reservations.renew_lease(waiting=self._waits.seconds > _STALL_SECONDS)
            except Exception as error:
                # The loop meets the same trouble and waits for its end; without a lease others take over.
                logger.debug("worker %s could not renew its lease: %s", self.name, type(error).__name__)

    def _maintain(self) -> None:
        """Find what the dead have left, rather than wait for RQ to fail it."""
        if time.monotonic() < self._maintain_at:
            return
        self._maintain_at = time.monotonic() + _MAINTENANCE_SECONDS * random.uniform(0.8, 1.2)
        # Redis lost everything, this registration included, or it expired.
        if not (self.connection.sismember(WORKERS_KEY, self.key) and self.connection.exists(self.key)):
            self.connection.delete(self.key)
            self.register_birth()
            self._reservations.renew_lease()
        self.heartbeat()
        clean_worker_registry(self._queue)
        found = self._reservations.recover_dead_holders()
        found += self._stranded.requeue()
        if found:
            logger.warning("returned %d jobs of dead workers to the queue", len(found))
        self._queue.finished_job_registry.cleanup()

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


def run_worker(redis: Redis, queue: str, *, burst: bool = False) -> None:
    """Run a HistoryWorker on `queue`; returns when it was told to stop, or with `burst` when the queue is empty."""
    worker = HistoryWorker([Queue(queue, connection=redis, serializer=JSONSerializer)], connection=redis)
    logger.info("worker %s on queue %s, process %d", worker.name, queue, os.getpid())
    worker.work(burst=burst)
