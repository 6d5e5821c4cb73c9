"""Rejected events: list, show, requeue and discard them."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from typing import Any
from uuid import UUID

from redis import Redis, RedisError
from rq import Queue
from rq.exceptions import InvalidJobOperation
from rq.job import Job
from rq.serializers import JSONSerializer
from sqlalchemy import text

from consumers.db.engine import get_db
from producers.errors import HistoryError
from producers.event_kinds import EventKind
from producers.events import KINDS

logger = logging.getLogger(__name__)

# In our events the type is before the data. In those of other programs it may come later, and the kind is unknown then.
_BEGINNING = 4096
_AT_ONCE = 500

_SELECT = text("""
    SELECT job_id, source, sequence, event_id, reason, left(event, :beginning) AS beginning, created_at
    FROM event_outcomes
    WHERE outcome = 'rejected' AND (CAST(:name AS text) IS NULL OR job_id = :name OR CAST(event_id AS text) = :name)
    ORDER BY created_at, job_id
""")
_EVENT = text("SELECT event FROM event_outcomes WHERE job_id = :job_id AND outcome = 'rejected'")

# Rows are locked in the order in which workers insert outcomes: another order could cause deadlocks.
_DISCARD = text("""
    UPDATE event_outcomes SET outcome = 'discarded', reason = :reason || '; it was rejected: ' || reason, actor = :actor
    WHERE job_id IN (
        SELECT job_id FROM event_outcomes WHERE job_id = ANY (:job_ids) AND outcome = 'rejected'
        ORDER BY job_id FOR UPDATE)
    RETURNING job_id
""")

_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*")


@dataclass(frozen=True)
class Rejection:
    """One rejected delivery and its reason, without the event's text, which may be large: see `rejected_text`.

    `kind` is the name of the event's kind, such as `snapshot`, or None if the beginning of the text does not name it.
    """

    job_id: str
    source: str | None
    sequence: int | None
    event_id: UUID | None
    reason: str
    kind: str | None
    created_at: datetime


def rejections(name: str | None = None, *, kind: str | None = None) -> Iterator[Rejection]:
    """Yield the rejections of one moment, oldest first: all, those of a job id or event id (`name`), or of one kind.

    They are read in batches of 500, so that memory does not grow with their number.

    Raises:
        StoreUnavailable: the database cannot be read, at the start or while the caller iterates.
    """
    given = {"name": name, "beginning": _BEGINNING}
    with get_db() as db:
        for row in db.execute(_SELECT, given, execution_options={"yield_per": _AT_ONCE}):
            found = kind_of(row.beginning or "")
            found_name = None if found is None else found.name
            if kind is None or found_name == kind:
                identity = (row.job_id, row.source, row.sequence, row.event_id)
                yield Rejection(*identity, row.reason, found_name, row.created_at)


def rejected_text(job_id: str) -> str | None:
    """Return the event's text as it was received, or None if the job is no longer rejected.

    Raises:
        StoreUnavailable: the database cannot be read now.
    """
    with get_db() as db:
        row = db.execute(_EVENT, {"job_id": job_id}).one_or_none()
    return None if row is None else row.event or ""


def kind_of(beginning: str) -> EventKind | None:
    """Return the kind of an event from the beginning of its text, or None if this part does not name it."""
    try:
        event_type = _type_of(beginning)
    except (ValueError, RecursionError):
        return None
    return KINDS.get(event_type) if isinstance(event_type, str) else None


def _type_of(beginning: str) -> Any:
    """Return the member `type` of the JSON object with this beginning. Raises ValueError if it is not in this part."""
    place = _behind("{", beginning, 0)
    while True:
        name, place = _DECODER.raw_decode(beginning, place)
        value, place = _DECODER.raw_decode(beginning, _behind(":", beginning, place))
        if name == "type":
            return value
        place = _behind(",", beginning, place)


def _behind(sign: str, beginning: str, place: int) -> int:
    """Skip `sign` and the spaces around it, and return the place behind them. Raises ValueError if it is not there."""
    place = _after_space(beginning, place)
    if not beginning.startswith(sign, place):
        raise ValueError(f"no {sign} at {place}")
    return _after_space(beginning, place + 1)


def _after_space(beginning: str, place: int) -> int:
    space = _SPACE.match(beginning, place)
    assert space is not None
    return space.end()


def requeue(chosen: Iterable[Rejection], redis: Redis, queue_name: str) -> int:
    """Requeue the chosen rejections under their job ids. If an event is then stored, its rejection is removed.

    Returns:
        The number of requeued jobs. An event that was stored or discarded since it was chosen is not requeued.

    Raises:
        HistoryError: Redis no longer has the job, and the recorded text is not an event.
    """
    queue = Queue(queue_name, connection=redis, serializer=JSONSerializer)
    return sum(_requeue_one(rejection.job_id, queue) for rejection in chosen)


class _UnopenedJob(Job):
    """Job whose call and error stay unread in Redis. RQ would decompress both, without a limit."""

    def restore(self, raw_data: Any) -> Any:
        unopened = {name: value for name, value in raw_data.items() if name != b"exc_info"}
        return super().restore(unopened | {b"data": b""} if b"data" in raw_data else unopened)

    def to_dict(self, include_meta: bool = True, include_result: bool = True) -> dict[str, Any]:
        fields: dict[str, Any] = super().to_dict(include_meta, include_result)
        del fields["data"]
        return fields


def _fetch(job_id: str, redis: Redis) -> Job | None:
    """Return the job, or None if Redis has lost it or RQ cannot read it."""
    try:
        return _UnopenedJob.fetch(job_id, connection=redis, serializer=JSONSerializer)
    except RedisError as error:
        if "WRONGTYPE" not in str(error):
            raise
    except Exception as error:
        # RQ raises a different type of error for each field.
        logger.debug("job %s cannot be read: %s", job_id, type(error).__name__)
    return None


def _requeue_one(job_id: str, queue: Queue) -> bool:
    job = _fetch(job_id, queue.connection)
    if job is not None:
        try:
            queue.failed_job_registry.requeue(job)
        except InvalidJobOperation:
            # The job is not in the registry: it is queued already, or another program has removed it.
            if not job.is_failed:
                return False
        else:
            return True
    return _enqueue_anew(job_id, queue)


def _enqueue_anew(job_id: str, queue: Queue) -> bool:
    event = rejected_text(job_id)
    if event is None:  # stored or discarded in the meantime
        return False
    kind = kind_of(event)
    if kind is None:
        raise HistoryError(
            f"job {job_id} cannot be requeued: Redis no longer has it, and the recorded text is not an event;"
            " discard it with trading-history failed discard"
        )
    queue.connection.delete(Job.key_for(job_id))  # a job that cannot be read, or a key of the wrong type
    queue.enqueue(kind.job_function, event, job_id=job_id, failure_ttl=-1)
    return True


def discard(chosen: Iterable[Rejection], redis: Redis, queue_name: str, reason: str, actor: str | None = None) -> int:
    """Discard the chosen rejections and delete their jobs. Text, `reason` and `actor` stay in event_outcomes.

    Returns:
        The number of discarded rejections. A job that is no longer rejected is left unchanged.
    """
    queue = Queue(queue_name, connection=redis, serializer=JSONSerializer)
    discarded, left = 0, iter(chosen)
    while some := [rejection.job_id for rejection in islice(left, _AT_ONCE)]:
        with get_db() as db:
            changed = db.execute(_DISCARD, {"job_ids": some, "reason": reason, "actor": actor}).scalars().all()
        for job_id in changed:
            _remove_job(job_id, queue)
        discarded += len(changed)
    return discarded


def _remove_job(job_id: str, queue: Queue) -> None:
    if job := _fetch(job_id, queue.connection):
        job.delete()
    else:  # Redis has lost the job, or RQ cannot read it
        queue.connection.delete(Job.key_for(job_id))
    queue.failed_job_registry.remove(job_id)


def as_dict(rejection: Rejection) -> dict[str, Any]:
    """Return the rejection as a dict for JSON and tables."""
    return {
        "job_id": rejection.job_id,
        "kind": rejection.kind,
        "event_id": rejection.event_id and str(rejection.event_id),
        "source": rejection.source,
        "sequence": rejection.sequence,
        "reason": rejection.reason,
        "created_at": rejection.created_at,
    }
