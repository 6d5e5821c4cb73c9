"""What each worker does every few seconds for all: find what the dead have left, rather than wait for RQ to fail it."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

from rq import Queue
from rq.utils import now, utcformat
from rq.worker import BaseWorker
from rq.worker_registration import REDIS_WORKER_KEYS as WORKERS_KEY
from rq.worker_registration import WORKERS_BY_QUEUE_KEY, clean_worker_registry

from consumers.ops.metrics import COUNTS
from consumers.worker.orphans import Stranded
from consumers.worker.quarantine import is_redis_trouble
from consumers.worker.reservations import recover_dead_holders
from consumers.worker.rq_completion import RqJobs
from consumers.worker.shared_state import Crew

logger = logging.getLogger(__name__)

_PAUSE_SECONDS = 5.0


class Upkeep:
    """Of `queue`, by `worker`, which stays registered by it. `due_at` is when to `look` next, in monotonic seconds."""

    def __init__(self, worker: BaseWorker, queue: Queue, crew: Crew) -> None:
        self.due_at = 0.0
        self._worker = worker
        self._redis = worker.connection
        self._queue = queue
        self._crew = crew
        self._stranded = Stranded(worker.connection, queue)
        self._jobs = RqJobs(worker.connection, queue)
        self._harmed_parts: set[int] = set()  # each is told of once

    def look(self) -> None:
        """Do each part. What somebody has put where one part looks ends neither the other parts nor the worker.

        Raises:
            RedisError: Redis itself is the trouble.
        """
        self.due_at = time.monotonic() + _PAUSE_SECONDS * random.uniform(0.8, 1.2)
        parts: list[Callable[[], object]] = [
            self._stay_registered,
            self._forget_dead_workers,
            lambda: self._tell_of_returned(recover_dead_holders(self._redis, self._queue)),
            lambda: self._tell_of_returned(self._stranded.requeue()),
            self._jobs.enqueue_ready,
            self._queue.finished_job_registry.cleanup,
        ]
        for number, part in enumerate(parts):
            try:
                part()
            except Exception as error:
                if is_redis_trouble(error):
                    raise
                if number not in self._harmed_parts:
                    self._harmed_parts.add(number)
                    what = f"{type(error).__name__}: {error}"[:200]
                    logger.error("worker %s passes over a part of its maintenance: %s", self._worker.name, what)
            else:
                self._harmed_parts.discard(number)

    def _stay_registered(self) -> None:
        # Redis lost everything, this registration included, or it expired.
        if not (self._redis.sismember(WORKERS_KEY, self._worker.key) and self._redis.exists(self._worker.key)):
            self.pretend_death()
            self._worker.register_birth()
            self._crew.show(again=True)
        self._worker.heartbeat()

    def _forget_dead_workers(self) -> None:
        key = WORKERS_BY_QUEUE_KEY % self._queue.name
        members: Any = self._redis.smembers(key)
        # RQ's worker keys are text; it could read none of them beside what is not.
        if strange := [member for member in members if "\ufffd" in member.decode(errors="replace")]:
            self._redis.srem(key, *strange)
            logger.error("removed %d entries of %s that are no workers", len(strange), key)
        clean_worker_registry(self._queue)

    def _tell_of_returned(self, job_ids: Sequence[str]) -> None:
        if job_ids:
            COUNTS.recovered(len(job_ids))
            logger.warning("returned %d jobs of dead workers to the queue", len(job_ids))

    def pretend_death(self) -> None:
        """So that the worker can be registered anew: RQ registers no name twice, unless its bearer has died."""
        # To delete the key would not do: a lane may write its heartbeat there in the same moment.
        self._redis.hset(self._worker.key, "death", utcformat(now()))
