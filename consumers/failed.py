"""What was refused for good: look at it, send it through again, or give it up."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from redis import Redis
from rq import Queue
from rq.exceptions import InvalidJobOperation
from rq.job import Job
from rq.serializers import JSONSerializer
from sqlalchemy import text

from consumers.connection import get_db
from consumers.queue.rq_jobs import RqJobs
from producers.errors import HistoryError
from producers.events import ARCHIVE_TYPE, SNAPSHOT_TYPE
from producers.rq_jobs import JOB_FUNCTIONS

KINDS = {"snapshot": SNAPSHOT_TYPE, "archive": ARCHIVE_TYPE}

_SELECT = text("""
    SELECT job_id, source, sequence, event_id, reason, event, created_at FROM event_outcomes
    WHERE outcome = 'rejected' AND (CAST(:name AS text) IS NULL OR job_id = :name OR CAST(event_id AS text) = :name)
    ORDER BY created_at, job_id
""")

_DISCARD = text("""
    UPDATE event_outcomes SET outcome = 'discarded', reason = :reason || '; it was rejected: ' || reason
    WHERE job_id = :job_id AND outcome = 'rejected'
""")


@dataclass(frozen=True)
class Rejection:
    """One delivery that was refused, its reason and its text as it came."""

    job_id: str
    source: str | None
    sequence: int | None
    event_id: UUID | None
    reason: str
    event: str
    created_at: datetime

    @property
    def kind(self) -> str | None:
        """`snapshot`, `archive`, or None when its text does not tell."""
        try:
            document = json.loads(self.event)
        except (ValueError, RecursionError):
            return None
        event_type = document.get("type") if isinstance(document, dict) else None
        return next((kind for kind, known in KINDS.items() if known == event_type), None)


def rejections(name: str | None = None, *, kind: str | None = None) -> list[Rejection]:
    """Rejections, oldest first: all, those of one job id or event id, or those of one kind.

    Raises:
        StoreUnavailable: the database cannot be read now.
    """
    with get_db() as db:
        found = [Rejection(*row) for row in db.execute(_SELECT, {"name": name})]
    return [one for one in found if kind is None or one.kind == kind]


def requeue(chosen: Sequence[Rejection], redis: Redis, queue_name: str) -> int:
    """Put each into the queue again, under its own job id; a success removes the rejection. Returns how many were put.

    Raises:
        HistoryError: one cannot be sent again, since Redis has lost its job and its text does not tell what it is.
    """
    queue = Queue(queue_name, connection=redis, serializer=JSONSerializer)
    jobs = RqJobs(redis, queue)
    return sum(_requeue_one(rejection, jobs.fetch(rejection.job_id), queue) for rejection in chosen)


def _requeue_one(rejection: Rejection, job: Job | None, queue: Queue) -> bool:
    if job is not None:
        try:
            queue.failed_job_registry.requeue(job)
        except InvalidJobOperation:
            # It is not in the registry: it is queued already, or somebody has taken it out.
            if not job.is_failed:
                return False
        else:
            return True
    _enqueue_anew(rejection, queue)
    return True


def _enqueue_anew(rejection: Rejection, queue: Queue) -> None:
    if rejection.kind is None:
        raise HistoryError(f"job {rejection.job_id} cannot be sent again: Redis has lost it, and its text is no event")
    queue.connection.delete(Job.key_for(rejection.job_id))  # whatever stands there cannot be read
    queue.enqueue(JOB_FUNCTIONS[KINDS[rejection.kind]], rejection.event, job_id=rejection.job_id, failure_ttl=-1)


def discard(chosen: Sequence[Rejection], redis: Redis, queue_name: str, reason: str) -> int:
    """Give each up for good, keeping its text and why; it leaves the failed registry. Returns how many."""
    queue = Queue(queue_name, connection=redis, serializer=JSONSerializer)
    with get_db() as db:
        for rejection in chosen:
            db.execute(_DISCARD, {"job_id": rejection.job_id, "reason": reason})
    jobs = RqJobs(redis, queue)
    for rejection in chosen:
        if job := jobs.fetch(rejection.job_id):
            job.delete()
        else:  # Redis has lost it, or it cannot be read
            redis.delete(Job.key_for(rejection.job_id))
        queue.failed_job_registry.remove(rejection.job_id)
    return len(chosen)


def as_facts(rejection: Rejection) -> dict[str, Any]:
    """For a listing, without the event's text."""
    return {
        "job_id": rejection.job_id,
        "kind": rejection.kind,
        "event_id": rejection.event_id and str(rejection.event_id),
        "source": rejection.source,
        "sequence": rejection.sequence,
        "reason": rejection.reason,
        "created_at": rejection.created_at,
    }
