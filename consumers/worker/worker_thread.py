"""One way through the queue: take what is there, store it, finish it; wait when that cannot be done now.

A worker has some of them as threads, so that one computes while another waits for an answer of PostgreSQL or Redis.
Each holds what it takes in a list of its own (see consumers.worker.reservations).
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

from redis.exceptions import RedisError
from rq import Queue
from rq.utils import now
from rq.worker import BaseWorker

from consumers.db.engine import drop_connections
from consumers.errors import PoisonEvent, StoreUnavailable, described
from consumers.worker.batch import (
    ISOLATED_SECONDS,
    Delivery,
    Settled,
    Unsettled,
    log_fields,
    settle,
    unsettled,
    without_defects,
)
from consumers.worker.completion import Finishing
from consumers.worker.jobs import ReservedJob, text_in
from consumers.worker.quarantine import is_caused_by_job, is_wrong_type
from consumers.worker.reservations import POISON_DEATHS, Reservations
from consumers.worker.rq_completion import RqJobs
from consumers.worker.shared_state import Crew, is_away
from producers.times import backoff_seconds

logger = logging.getLogger(__name__)

BATCH_JOBS = 500
_BATCH_CHARACTERS = 4 * 1024 * 1024
WAIT_SECONDS = 1  # also how long a stop request may go unnoticed by an idle lane
_FIRST_BACKOFF_SECONDS = 0.4
_LAST_BACKOFF_SECONDS = 15.0


def recovery_seconds(failures: int) -> float:
    """How long a worker waits for Redis or the database, after so many failed tries in a row."""
    return backoff_seconds(failures, first=_FIRST_BACKOFF_SECONDS, last=_LAST_BACKOFF_SECONDS)


@dataclass(frozen=True)
class Limits:
    """When a lane ends by itself; see HistoryWorker.work."""

    burst: bool
    max_jobs: int | None
    max_idle_seconds: float


class Lane(threading.Thread):
    """A thread of `worker` that works on `queue` until `stopping` is set or one of its limits is met."""

    def __init__(self, worker: BaseWorker, queue: Queue, crew: Crew, stopping: threading.Event, limits: Limits) -> None:
        super().__init__(name="history-lane", daemon=True)  # a second SIGTERM does not wait for it
        self.reservations = Reservations(worker.connection, queue, worker.name)
        self.done = 0  # jobs whose end it has recorded
        self.error: BaseException | None = None  # what has ended it, unless its work did
        self._worker = worker
        self._queue = queue
        self._redis = worker.connection
        self._jobs = RqJobs(worker.connection, queue)
        self._finishing = Finishing(worker, queue, self.reservations, self._jobs)
        self._crew = crew
        self._stopping = stopping
        self._limits = limits
        self._failures = 0
        self._progress_at: float | None = None

    def run(self) -> None:
        try:
            self._run()
        except BaseException as error:  # raised where the thread is joined; the others must end before
            logger.critical("worker %s ends: %r", self._worker.name, error)
            self.error = error
            self._stopping.set()

    def seconds_without_progress(self) -> float:
        """Since it last knew the end of an event that it works on; 0 while it works on none."""
        progress_at = self._progress_at
        return 0.0 if progress_at is None else time.monotonic() - progress_at

    def _run(self) -> None:
        max_jobs = sys.maxsize if self._limits.max_jobs is None else self._limits.max_jobs
        while self.done < max_jobs and not self._stopping.is_set():
            try:
                if self._crew.suspended():
                    if self._limits.burst:
                        return
                    self.reservations.hand_back()  # what the wait below has brought meanwhile
                    self._passed(worked=False)
                    self._stopping.wait(WAIT_SECONDS)
                    continue
                reserved = self.reservations.reserve(min(BATCH_JOBS, max_jobs - self.done))
                if reserved:
                    before = self.done
                    self._work_in_turn(reserved)
                    self._passed(worked=self.done > before)
                    if self.done == before and self._queue.count <= len(reserved):
                        self._stopping.wait(WAIT_SECONDS)  # nothing else is there that could be tried meanwhile
                elif self._limits.burst or self._crew.idle_seconds() > self._limits.max_idle_seconds:
                    return
                elif not self.reservations.wait(WAIT_SECONDS):
                    self._passed(worked=False)
            except (RedisError, StoreUnavailable) as error:
                self._wait_for_recovery(self._mended(error))

    def _work_in_turn(self, reserved: Sequence[ReservedJob]) -> None:
        """A suspect is worked on alone in the process: should that die, it was the suspect's doing.

        What is not settled then goes back to the front of the queue, or to the tail what must not hold up the rest.
        """
        suspect = reserved[0].deaths is not None
        with self._crew.working(alone=suspect):
            redis_is_away = False
            try:
                if self._stopping.is_set():  # meanwhile
                    return
                if suspect:
                    self.reservations.accuse()
                self._work_off(reserved)
            except RedisError as error:
                redis_is_away = is_away(error)
                raise
            finally:
                self._progress_at = None
                if not redis_is_away:  # else what is held there stays held, and comes first again
                    self.reservations.hand_back()

    def _passed(self, *, worked: bool) -> None:
        if self._crew.passed(worked=worked):
            self._failures = 0

    def _work_off(self, reserved: Sequence[ReservedJob]) -> None:
        """Settle and finish a batch, as far as that can be done now. Raises StoreUnavailable when nothing passes.

        No exception that an event causes is raised: it counts against the event, once that is alone.
        """
        self._progress_at = time.monotonic()
        started_at = now()
        try:
            self._process(reserved, started_at)
        except BaseException as error:
            if not is_caused_by_job(error):
                raise
            if len(reserved) == 1:
                self._count_defect(unsettled(self._unread(reserved[0]), error), reserved[0], started_at)
            else:
                self.reservations.suspect()
                what = (self._worker.name, described(error))
                without_defects(partial(logger.error, "worker %s failed on a batch: %s", *what, exc_info=error))

    def _process(self, reserved: Sequence[ReservedJob], started_at: datetime) -> None:
        jobs = {job.job_id: job for job in reserved}
        self._finishing.drop([job.job_id for job in reserved if job.state == "gone"])
        deliveries, broken = self._deliveries([job for job in reserved if job.state != "gone"])
        # One that has timed out before comes alone, and must not hold up the rest for as long again.
        patience = ISOLATED_SECONDS if reserved[0].delays else None
        settled: list[Settled] = []
        late: list[Unsettled] = []
        try:
            for ends in settle(deliveries, patience_seconds=patience) if deliveries else ():
                self._progress_at = time.monotonic()
                for end in ends:
                    if isinstance(end, Settled):
                        settled.append(end)
                    else:
                        (late if isinstance(end.error, StoreUnavailable) else broken).append(end)
                if self._stopping.is_set() or (len(late) > 1 and not settled):
                    break
        finally:
            # Also when the rest met trouble: what is committed is done.
            self._finishing.finish(settled, jobs, started_at)
            self.done += len(settled)
        # Nothing has passed: is it these jobs, or the store? Alone, as a suspect comes, nothing can pass beside it:
        # then whatever waits behind it counts.
        if late and not settled and (len(reserved) > 1 or not self._queue.count):
            raise late[0].error
        for end in late:
            self._postpone(end)
        for end in broken:
            self._count_defect(end, jobs[end.job_id], started_at)

    def _postpone(self, end: Unsettled) -> None:
        count = self.reservations.postpone(end.job_id)
        logger.warning(
            "job %s timed out alone (attempt %d) and was moved to the tail of the queue: %s",
            end.job_id, count, end.error, extra=log_fields(end),
        )  # fmt: skip

    def _delivery(self, job: ReservedJob) -> Delivery:
        deaths = job.deaths or 0
        if deaths > POISON_DEATHS:  # it was to be refused, and even so ended its worker: its text stays unread
            return Delivery(job.job_id, "", None, PoisonEvent(deaths))
        delivery = self._jobs.delivery(job)
        if delivery.refusal is None and deaths == POISON_DEATHS:
            return delivery._replace(refusal=PoisonEvent(deaths))
        return delivery

    def _deliveries(self, jobs: Sequence[ReservedJob]) -> tuple[list[Delivery], list[Unsettled]]:
        """As many as are worked on together: their texts may be a thousand times longer than what Redis has of them.

        Beside these, those of them that a defect keeps from being read.
        """
        deliveries: list[Delivery] = []
        broken: list[Unsettled] = []
        size = 0
        for job in jobs:
            try:
                deliveries.append(self._delivery(job))
            except BaseException as error:
                if not is_caused_by_job(error):
                    raise
                broken.append(unsettled(self._unread(job), error))
                continue
            size += len(deliveries[-1].text) if isinstance(deliveries[-1].text, str) else 0
            if size > _BATCH_CHARACTERS:
                break
        return deliveries, broken

    def _unread(self, job: ReservedJob) -> Delivery:
        return Delivery(job.job_id, text_in(job), None)

    def _count_defect(self, end: Unsettled, job: ReservedJob, started_at: datetime) -> None:
        """Count it like a death of the worker: the job comes again, alone, and is refused when it has failed so often.

        Between its tries everything else in the queue has its turn.
        """
        failures = (job.deaths or 0) + 1
        if failures < POISON_DEATHS:
            self.reservations.blame(end.job_id)
        else:
            self._refuse(end, job, PoisonEvent(failures, end.error), started_at)
        what = (self._worker.name, end.job_id, failures, POISON_DEATHS)
        told = partial(logger.error, "worker %s failed on job %s, try %d of %d", *what)
        without_defects(partial(told, exc_info=end.error, extra=log_fields(end)))

    def _refuse(self, failed: Unsettled, job: ReservedJob, refusal: PoisonEvent, started_at: datetime) -> None:
        """Record the rejection like any other; only when even that meets a defect is the job given up without."""
        try:
            delivery = self._jobs.delivery(job)
        except BaseException as error:
            if not is_caused_by_job(error):
                raise
            delivery = self._unread(job)
        for (end,) in settle([delivery._replace(refusal=refusal)]):
            if isinstance(end, Settled):
                self._finishing.finish([end], {job.job_id: job}, started_at)
                self.done += 1
            elif isinstance(end.error, StoreUnavailable):
                self._postpone(end)
            else:
                self._finishing.give_up(failed, job, started_at)
                self.done += 1

    def _mended(self, error: RedisError | StoreUnavailable) -> RedisError | StoreUnavailable | None:
        """The trouble that remains: what was in the way in Redis may be moved, unless it is the queue itself."""
        if not is_wrong_type(error):
            return error
        try:
            if self._finishing.put_aside():
                return None
            kind: Any = self._redis.type(self._queue.key)
        except RedisError as another:
            return another
        if kind in (b"list", b"none"):
            return error
        return RedisError(f"{self._queue.key} is a {kind.decode()} and no list: delete or rename it")

    def _wait_for_recovery(self, error: RedisError | StoreUnavailable | None) -> None:
        """Wait, longer each time; stopping ends the wait."""
        self._failures += 1
        if error is not None:
            if isinstance(error, StoreUnavailable):
                drop_connections()
            self._crew.failed(error)
        self._stopping.wait(recovery_seconds(self._failures))
