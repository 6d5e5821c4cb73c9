"""A worker without PostgreSQL, for tests: it validates and acknowledges jobs as a real worker does."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple
from uuid import UUID

from redis import Redis
from rq import Queue
from rq.job import Job
from rq.serializers import JSONSerializer
from rq.utils import as_text

from producers.acknowledgements import ACKNOWLEDGEMENT_TTL_SECONDS, Outcome, acknowledgement_text
from producers.errors import HistoryError
from producers.events import KINDS, Event, decode
from producers.redis_keys import acknowledgement_key

# A reason with which all events are rejected, or a function that returns an event's reason, or None to store it.
Rejection = str | Callable[[Event], str | None]


class Answer(NamedTuple):
    """The acknowledgement of one delivery."""

    job_id: str
    event: Event
    outcome: Outcome


class _Row(NamedTuple):
    row_id: int
    event: Event


class FakeWorker:
    """A worker that keeps the rows in memory. Each table numbers its rows from 1."""

    def __init__(self, redis: Redis, queue: str) -> None:
        self._redis = redis
        self._queue = Queue(queue, connection=redis, serializer=JSONSerializer)
        self._rows: dict[UUID, _Row] = {}
        self._counts: Counter[str] = Counter()
        self._one_at_a_time = threading.Lock()

    def work(self, reject: Rejection | None = None) -> list[Answer]:
        """Process and acknowledge all jobs in the queue, in order.

        Raises:
            RedisError: Redis is down.
            HistoryError: a job calls another function, or its argument is not a valid event.
        """
        answers = []
        with self._one_at_a_time:
            while (job_id := self._redis.lindex(self._queue.key, 0)) is not None:
                job = Job.fetch(as_text(job_id), connection=self._redis, serializer=JSONSerializer)
                event = _event_of(job)
                answer = Answer(job.id, event, self._outcome(event, reject))
                self._acknowledge(job, answer)
                answers.append(answer)
        return answers

    def _outcome(self, event: Event, reject: Rejection | None) -> Outcome:
        reason = reject(event) if callable(reject) else reject
        if reason is not None:
            return Outcome("rejected", reason=reason)
        row = self._rows.get(event.id)
        if row is None:
            self._counts[event.type] += 1
            row = self._rows[event.id] = _Row(self._counts[event.type], event)
            return Outcome("stored", row_id=row.row_id)
        if row.event.data != event.data:
            place = f"row {row.row_id} of {KINDS[event.type].table}"
            return Outcome("rejected", reason=f"event {event.id} is stored already as {place}, with other content")
        return Outcome("duplicate", row_id=row.row_id)

    def _acknowledge(self, job: Job, answer: Answer) -> None:
        """Acknowledge and remove the job in one transaction: if it fails, the job stays in the queue."""
        key = acknowledgement_key(answer.event.source)
        now, _ = self._redis.time()
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.hset(key, answer.job_id, acknowledgement_text(now, answer.event.id, answer.outcome))
            pipe.expire(key, ACKNOWLEDGEMENT_TTL_SECONDS)
            pipe.lrem(self._queue.key, 1, job.id)
            pipe.delete(job.key)
            pipe.execute()


def _event_of(job: Job) -> Event:
    kind = KINDS.of_job(str(job.func_name))
    if kind is None:
        raise HistoryError(f"job {job.id}: {job.func_name} is not a job function of this project")
    return decode(job.args[0], kind.model)
