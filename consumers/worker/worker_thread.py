"""One thread of a worker: reserve jobs, process them as a batch, complete them. While a server is away, wait.

A worker has two threads, so that one computes while the other waits for PostgreSQL or Redis; with max_jobs it has one.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from dataclasses import dataclass
from datetime import datetime
from functools import partial

from redis.exceptions import RedisError
from rq import Queue
from rq.utils import now
from rq.worker import BaseWorker

from consumers.db.engine import drop_connections
from consumers.db.schema import check_database_now
from consumers.errors import PoisonEvent, StoreUnavailable, described
from consumers.ops.redis_errors import is_caused_by_job, is_unreachable, is_wrong_type
from consumers.worker.batch import (
    ISOLATED_SECONDS,
    Deferred,
    EventLogger,
    Result,
    deferred,
    process_batch,
    report_safely,
)
from consumers.worker.completion import Completion
from consumers.worker.deliveries import POISON_CRASHES, Delivery, ReservedJob, parse_job, unreadable_delivery
from consumers.worker.reservations import Reservation, Reservations
from consumers.worker.shared_state import SharedState
from producers.times import backoff_seconds

logger = logging.getLogger(__name__)

BATCH_JOBS = 500
_BATCH_CHARACTERS = 4 * 1024 * 1024
WAIT_SECONDS = 1  # an idle thread notices a request to stop within this time
_FIRST_BACKOFF_SECONDS = 0.4
_LAST_BACKOFF_SECONDS = 15.0


def reconnect_seconds(failures_in_a_row: int) -> float:
    """Return the seconds to wait before the next attempt to reach Redis or the database."""
    return backoff_seconds(failures_in_a_row, first=_FIRST_BACKOFF_SECONDS, last=_LAST_BACKOFF_SECONDS)


@dataclass(frozen=True)
class Limits:
    """Conditions under which a thread ends by itself; see HistoryWorker.work."""

    burst: bool
    max_jobs: int | None
    max_idle_seconds: float


class WorkerThread(threading.Thread):
    """A thread of `worker` that works on `queue` until `stopping` is set or one of its limits is reached."""

    def __init__(
        self, worker: BaseWorker, queue: Queue, shared: SharedState, stopping: threading.Event, limits: Limits
    ) -> None:
        super().__init__(name="history-worker", daemon=True)  # a daemon, since a second SIGTERM does not wait for it
        self.reservations = Reservations(worker.connection, queue, worker.name)
        self.done = 0  # completed jobs
        self.error: BaseException | None = None  # the defect that ended this thread
        self._worker = worker
        self._queue = queue
        self._completion = Completion(worker, queue, self.reservations, shared.note_forbidden)
        self._shared = shared
        self._stopping = stopping
        self._limits = limits
        self._failures = 0
        self._progress_at: float | None = None
        # A worker that ends when it has nothing to do does not wait for a database that it does not need.
        self._checks_database = not limits.burst and limits.max_idle_seconds == sys.maxsize

    def run(self) -> None:
        try:
            self._loop()
        except BaseException as error:  # HistoryWorker raises it again after all threads have ended
            logger.critical("worker %s ends because one of its threads failed: %r", self._worker.name, error)
            self.error = error
            self._stopping.set()

    def seconds_without_progress(self) -> float:
        """Return the seconds since a delivery was last decided; 0 while there is no batch."""
        progress_at = self._progress_at
        return 0.0 if progress_at is None else time.monotonic() - progress_at

    def _loop(self) -> None:
        max_jobs = sys.maxsize if self._limits.max_jobs is None else self._limits.max_jobs
        while self.done < max_jobs and not self._stopping.is_set():
            try:
                if self._shared.suspended():
                    if self._limits.burst:
                        return
                    self.reservations.requeue()  # the wait below may have reserved a job
                    self._note_progress(worked=False)
                    self._stopping.wait(WAIT_SECONDS)
                    continue
                self._check_database_first()
                reservation = self.reservations.reserve(min(BATCH_JOBS, max_jobs - self.done))
                if reservation.jobs:
                    before = self.done
                    self._run_reservation(reservation)
                    self._note_progress(worked=self.done > before)
                    if self.done == before and self._queue.count <= len(reservation.jobs):
                        self._stopping.wait(WAIT_SECONDS)  # the queue has no other job to try meanwhile
                elif self._limits.burst or self._shared.idle_seconds() > self._limits.max_idle_seconds:
                    return
                elif not self.reservations.wait(WAIT_SECONDS):
                    self._note_progress(worked=False)
            except (RedisError, StoreUnavailable) as error:
                if not self._quarantined_keys(error):
                    self._wait_for_recovery(error)

    def _check_database_first(self) -> None:
        """Check once that events can be stored, so that a wrong DATABASE_URL is not noticed only at the first event.

        Raises:
            StoreUnavailable: they cannot be stored now.
        """
        if self._checks_database:
            check_database_now()
            self._checks_database = False

    def _run_reservation(self, reservation: Reservation) -> None:
        """Process a reservation, then requeue the jobs that were not completed.

        A poison candidate is processed while no other thread works, so that a crash can be counted against it.
        """
        is_candidate = reservation.crashes is not None
        with self._shared.working(alone=is_candidate):
            redis_is_unreachable = False
            try:
                if self._stopping.is_set():  # while this thread waited for the others
                    return
                if is_candidate:
                    self.reservations.run_alone()
                self._contain_defects(reservation)
            except RedisError as error:
                redis_is_unreachable = is_unreachable(error)
                raise
            finally:
                self._progress_at = None
                if not redis_is_unreachable:  # else the jobs stay reserved until Redis is back
                    self.reservations.requeue()

    def _note_progress(self, *, worked: bool) -> None:
        if self._shared.note_progress(worked=worked):
            self._failures = 0

    def _contain_defects(self, reservation: Reservation) -> None:
        """Process and complete a reservation; handle any exception that a job causes instead of raising it.

        If several jobs are reserved, each becomes a poison candidate. If one is reserved, the exception counts like a
        crash.

        Raises:
            RedisError: Redis fails.
            StoreUnavailable: the database stores none of the events now.
        """
        self._progress_at = time.monotonic()
        started_at = now()
        try:
            self._process_and_complete(reservation, started_at)
        except BaseException as error:
            if not is_caused_by_job(error):
                raise
            if len(reservation.jobs) == 1:
                self._handle_defect(deferred(unreadable_delivery(reservation.jobs[0]), error), reservation, started_at)
            else:
                self.reservations.mark_candidates()
                message = "worker %s failed on a batch and tries its jobs one by one: %s"
                report = partial(logger.error, message, self._worker.name, described(error))
                report_safely(partial(report, exc_info=error))

    def _process_and_complete(self, reservation: Reservation, started_at: datetime) -> None:
        """Decide the deliveries of a reservation, complete the decided ones, and move the others to the tail."""
        jobs = {job.job_id: job for job in reservation.jobs}
        self._completion.release([job.job_id for job in reservation.jobs if job.state == "deleted"])
        deliveries, defects = self._parse_reservation(reservation)
        # A job that has timed out before runs alone, with a shorter limit, so that other jobs wait less for it.
        statement_seconds = ISOLATED_SECONDS if reservation.timeouts else None
        results: list[Result] = []
        timeouts: list[Deferred] = []
        try:
            for decided in process_batch(deliveries, statement_seconds=statement_seconds):
                self._progress_at = time.monotonic()
                for one in decided:
                    if isinstance(one, Result):
                        results.append(one)
                    else:
                        (timeouts if isinstance(one.error, StoreUnavailable) else defects).append(one)
                if self._stopping.is_set() or (len(timeouts) > 1 and not results):
                    break
        finally:
            # Also after an exception: these results are committed.
            self._completion.complete(results, jobs, started_at)
            self.done += len(results)
        # If several jobs time out and none is stored, the database has failed, not these jobs. If a job times out
        # alone, the next jobs of the queue, if there are any, are tried first.
        if timeouts and not results and (len(jobs) > 1 or not self._queue.count):
            raise timeouts[0].error
        for one in timeouts:
            self._move_to_tail(one)
        for one in defects:
            self._handle_defect(one, reservation, started_at)

    def _parse_reservation(self, reservation: Reservation) -> tuple[list[Delivery], list[Deferred]]:
        """Return the deliveries to process together, and those whose parsing fails because of a defect.

        A decompressed text can be a thousand times longer than the job's data in Redis. If the batch becomes too large,
        the other jobs are left for the next batch.
        """
        deliveries: list[Delivery] = []
        defects: list[Deferred] = []
        characters = 0
        for job in reservation.jobs:
            if job.state == "deleted":
                continue
            try:
                deliveries.append(parse_job(job, reservation.crashes or 0))
            except BaseException as error:
                if not is_caused_by_job(error):
                    raise
                defects.append(deferred(unreadable_delivery(job), error))
                continue
            characters += len(deliveries[-1].text) if isinstance(deliveries[-1].text, str) else 0
            if characters > _BATCH_CHARACTERS:
                break
        return deliveries, defects

    def _move_to_tail(self, timeout: Deferred) -> None:
        count = self.reservations.move_to_tail(timeout.job_id, self.reservations.timeouts_key)
        message = "job %s timed out alone (attempt %d) and was moved to the tail of the queue: %s"
        EventLogger(logger, timeout).warning(message, timeout.job_id, count, timeout.error)

    def _handle_defect(self, defect: Deferred, reservation: Reservation, started_at: datetime) -> None:
        """Count a defect of this program like a crash: move the job to the tail, or reject it after POISON_CRASHES."""
        failures = (reservation.crashes or 0) + 1
        if failures < POISON_CRASHES:
            self.reservations.move_to_tail(defect.job_id, self.reservations.crashes_key)
        else:
            job = next(job for job in reservation.jobs if job.job_id == defect.job_id)
            self._reject_poison(defect, job, PoisonEvent(failures, defect.error), started_at)
        values = (self._worker.name, defect.job_id, failures, POISON_CRASHES)
        report = partial(EventLogger(logger, defect).error, "worker %s failed on job %s, attempt %d of %d", *values)
        report_safely(partial(report, exc_info=defect.error))

    def _reject_poison(self, defect: Deferred, job: ReservedJob, rejection: PoisonEvent, started_at: datetime) -> None:
        """Reject a poison event. If that fails because of a defect, dead-letter its job without a database record."""
        try:
            delivery = parse_job(job)
        except BaseException as error:
            if not is_caused_by_job(error):
                raise
            delivery = unreadable_delivery(job)
        for (one,) in process_batch([delivery._replace(error=rejection)]):
            if isinstance(one, Result):
                self._completion.complete([one], {job.job_id: job}, started_at)
                self.done += 1
            elif isinstance(one.error, StoreUnavailable):
                self._move_to_tail(one)
            else:
                self._completion.dead_letter(defect, job, started_at)
                self.done += 1

    def _quarantined_keys(self, error: RedisError | StoreUnavailable) -> bool:
        """Return whether a key of the wrong type caused the error and has been quarantined."""
        try:
            return is_wrong_type(error) and self.reservations.quarantine_keys()
        except RedisError:
            return False

    def _wait_for_recovery(self, error: RedisError | StoreUnavailable) -> None:
        """Wait before the next attempt, longer after each failure. A request to stop ends the wait."""
        self._failures += 1
        if isinstance(error, StoreUnavailable):
            drop_connections()
        self._shared.note_outage(error)
        self._stopping.wait(reconnect_seconds(self._failures))
