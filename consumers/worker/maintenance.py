"""Maintenance: the pass that each worker makes every few seconds, for all workers of its queue."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Sequence

from rq import Queue
from rq.utils import now, utcformat
from rq.worker import BaseWorker
from rq.worker_registration import REDIS_WORKER_KEYS as WORKERS_KEY
from rq.worker_registration import clean_worker_registry

from consumers.errors import first_line
from consumers.ops.metrics import COUNTS
from consumers.ops.redis_errors import is_redis_outage
from consumers.worker.dependents import Dependents
from consumers.worker.orphans import Orphans
from consumers.worker.reservations import requeue_expired
from consumers.worker.shared_state import SharedState

logger = logging.getLogger(__name__)

_PAUSE_SECONDS = 5.0


class Maintenance:
    """The maintenance of `queue` by `worker`. `due_at` is the time of the next pass, in monotonic seconds."""

    def __init__(self, worker: BaseWorker, queue: Queue, shared: SharedState) -> None:
        self.due_at = 0.0
        self._worker = worker
        self._redis = worker.connection
        self._queue = queue
        self._shared = shared
        self._orphans = Orphans(worker.connection, queue)
        self._dependents = Dependents(worker.connection, queue)
        self._failures: set[str] = set()  # names of the steps whose failure is logged already

    def run(self) -> None:
        """Make one pass. If a step fails on other programs' data, or is forbidden, log that once and go on.

        Raises:
            RedisError: Redis fails.
        """
        self.due_at = time.monotonic() + _PAUSE_SECONDS * random.uniform(0.8, 1.2)
        steps: dict[str, Callable[[], object]] = {
            "registration": self._stay_registered,
            "dead workers": lambda: clean_worker_registry(self._queue),
            "expired leases": lambda: self._report(requeue_expired(self._redis, self._queue)),
            "orphans": lambda: self._report(self._orphans.requeue()),
            "ready jobs": self._dependents.enqueue_ready,
            "rate limits": self._dependents.free_slots,
            "finished jobs": self._queue.finished_job_registry.cleanup,
        }
        for name, step in steps.items():
            try:
                step()
            except Exception as error:
                if is_redis_outage(error):
                    raise
                if name not in self._failures:
                    self._failures.add(name)
                    reason = f"{type(error).__name__}: {first_line(error)}"[:300]
                    logger.error(
                        "maintenance of queue %s: step %s failed; it runs again in the next pass: %s",
                        self._queue.name, name, reason,
                    )  # fmt: skip
            else:
                self._failures.discard(name)

    def _stay_registered(self) -> None:
        # The registration is missing if it has expired or Redis has lost its data.
        key = self._worker.key
        if not (self._redis.sismember(WORKERS_KEY, key) and self._redis.hexists(key, "birth")):
            self.mark_name_reusable()
            self._worker.register_birth()
            self._shared.publish(always=True)
        self._worker.heartbeat()

    def _report(self, job_ids: Sequence[str]) -> None:
        if job_ids:
            COUNTS.recovered(len(job_ids))
            logger.warning("requeued %d jobs of dead workers", len(job_ids))

    def mark_name_reusable(self) -> None:
        """Let RQ register this worker's name again. RQ does so only if the worker's key says that the worker has ended.

        The key is not deleted, since a worker thread may write its heartbeat there at the same time.
        """
        self._redis.hset(self._worker.key, "death", utcformat(now()))
