"""Workers, one step at a time: reserve, process, complete; the real thread of a worker; and RQ's own worker.

The steps are a short form of the loop in `consumers/worker/worker_thread.py`: deliveries that time out are requeued,
not moved to the tail. `SteppedWorker.run` runs the real loop.
"""

from __future__ import annotations

import signal
import threading
from datetime import datetime

from redis import Redis
from rq import Queue, SimpleWorker
from rq.serializers import JSONSerializer
from rq.utils import now

from consumers.db.engine import drop_connections
from consumers.errors import StoreUnavailable
from consumers.worker.batch import Deferred, Result, process_batch
from consumers.worker.completion import Completion
from consumers.worker.deliveries import parse_job
from consumers.worker.history_worker import HistoryWorker
from consumers.worker.orphans import Orphans
from consumers.worker.reservations import LEASE_SECONDS, Reservation, Reservations, requeue_expired
from consumers.worker.shared_state import SharedState
from consumers.worker.worker_thread import Limits, WorkerThread
from tests.property.delivery.faults import Fault, Process
from tests.property.delivery.servers import QUEUE


def _history_queue(redis: Redis) -> Queue:
    return Queue(QUEUE, connection=redis, serializer=JSONSerializer)


class SteppedWorker:
    """A worker of one thread, whose thread pauses between its steps, for as long as the test wants."""

    def __init__(self, redis: Redis, name: str) -> None:
        self._redis = redis
        self._queue = _history_queue(redis)
        self._worker = HistoryWorker([self._queue], connection=redis, name=name)
        self._orphans = Orphans(redis, self._queue)
        self.kills = 0
        self._begin()

    def _begin(self) -> None:
        self._process = Process()
        self.reservation = Reservation([], None, 0)
        self.results: list[Result] | None = None  # None: not processed yet
        self.has_lease, self._lease_seconds = False, 0
        self._started_at: datetime = now()
        self.reservations = Reservations(self._redis, self._queue, self._worker.name)
        self._completion = Completion(self._worker, self._queue, self.reservations, note_forbidden=lambda _: None)

    @property
    def reserved(self) -> list[str]:
        """Ids of the jobs that this worker believes to have."""
        return [job.job_id for job in self.reservation.jobs]

    def reserve(self, limit: int, fault: Fault | None = None) -> None:
        with self._process.acting(fault):
            self._begin_batch(self.reservations.reserve(limit))
        self._after_fault()

    def _begin_batch(self, reservation: Reservation) -> None:
        self.reservation, self.results, self._started_at = reservation, None, now()
        self.has_lease, self._lease_seconds = True, LEASE_SECONDS
        if reservation.crashes is not None:
            self.reservations.run_alone()

    def process(self, fault: Fault | None = None) -> None:
        """Decide the reserved deliveries, and keep the results for `complete`."""
        with self._process.acting(fault):
            self._completion.release([job.job_id for job in self.reservation.jobs if job.state == "deleted"])
            jobs = [job for job in self.reservation.jobs if job.state != "deleted"]
            decided: list[Result | Deferred] = []
            try:
                for some in process_batch([parse_job(job, self.reservation.crashes or 0) for job in jobs]):
                    decided += some
            except StoreUnavailable:  # those that are undecided are requeued by `complete`
                drop_connections()
            self.results = [one for one in decided if isinstance(one, Result)]
            self.reservation = self.reservation._replace(jobs=jobs)
        self._after_fault()

    def complete(self, fault: Fault | None = None) -> None:
        """Complete the decided deliveries, and requeue the others."""
        with self._process.acting(fault):
            jobs = {job.job_id: job for job in self.reservation.jobs}
            self._completion.complete(self.results or [], jobs, self._started_at)
            self.reservations.requeue()
            self.reservation, self.results = Reservation([], None, 0), None
        self._after_fault()

    def stop(self, fault: Fault | None = None) -> None:
        """Handle a stop signal between two steps: a worker requeues its jobs and ends."""
        with self._process.acting(fault):
            self.reservations.close()
        self._begin()

    def renew(self, fault: Fault | None = None) -> None:
        """Renew the lease, as a worker's second thread does."""
        with self._process.acting(fault):
            self.reservations.renew_lease()
            self._lease_seconds = LEASE_SECONDS
        self._after_fault()

    def maintain(self, fault: Fault | None = None) -> None:
        """Requeue the jobs of dead workers, of ours and of RQ's."""
        with self._process.acting(fault):
            requeue_expired(self._redis, self._queue)
            self._orphans.requeue()
        self._after_fault()

    def run(self, max_jobs: int, fault: Fault | None = None) -> None:
        """Run a real worker thread until the queue is empty, it has done `max_jobs`, or it is stopped."""
        stopping = threading.Event()
        thread = WorkerThread(
            self._worker, self._queue, SharedState(self._worker), stopping, Limits(True, max_jobs, 0.0)
        )
        with self._process.acting(fault, on_stop=stopping.set):
            thread.run()
            thread.reservations.close()
        self._after_fault()
        error, thread.error = thread.error, None
        if error is not None and not isinstance(error, KeyboardInterrupt):
            raise error

    def pass_time(self, seconds: int) -> None:
        """Note that time has passed: the lease may have ended."""
        self._lease_seconds -= seconds
        self.has_lease = self.has_lease and self._lease_seconds > 0

    def _after_fault(self) -> None:
        if self._process.dead:  # its reservations stay in Redis; a new worker has others
            self.kills += 1
            self._begin()


class _StockWorker(SimpleWorker):
    """RQ's worker without its channel for commands: the thread that waits for them costs 0.1 s."""

    def subscribe(self) -> None:
        pass


def run_stock_worker(redis: Redis, fault: Fault | None) -> None:
    """Run RQ's SimpleWorker for one job."""
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(one) for one in signals]
    try:
        with Process().acting(fault):
            worker = _StockWorker([_history_queue(redis)], connection=redis, serializer=JSONSerializer)
            worker.work(burst=True, max_jobs=1, logging_level="CRITICAL")
    finally:
        for one, handler in zip(signals, before, strict=True):
            signal.signal(one, handler)
