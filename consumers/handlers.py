"""The RQ job functions. A job carries one event as one JSON string and ends as one row or one recorded rejection.

Correct under any RQ worker that uses the JSON serializer: the row is committed before it is acknowledged, and
both may be repeated. A stock worker imports this module in each fork, so it imports little.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from pydantic import TypeAdapter, ValidationError
from redis import RedisError
from rq import get_current_job
from rq.job import Job

from consumers import operations
from consumers.connection import get_db
from consumers.errors import EventConflict
from producers.errors import InvalidEvent
from producers.events import (
    MAX_EVENT_BYTES,
    AnyEvent,
    PortfolioSnapshotEvent,
    SignalArchiveEvent,
    Source,
    decode,
)
from producers.fields import EventId, Sequence
from producers.outcomes import ACKNOWLEDGEMENT_TTL_SECONDS, Outcome, acknowledgement_key

logger = logging.getLogger(__name__)

_SOURCE: TypeAdapter[str] = TypeAdapter(Source)
_SEQUENCE: TypeAdapter[int] = TypeAdapter(Sequence)
_EVENT_ID: TypeAdapter[UUID] = TypeAdapter(EventId)


def record_portfolio_snapshot(event: str) -> int:
    """Store one portfolio snapshot and return its row's id. `event` is its JSON text.

    Raises:
        InvalidEvent: it breaks the contract; the rejection is recorded when this runs as a job.
        EventConflict: its id is stored with other content; likewise.
        StoreUnavailable: the database cannot take it now; the producer will send it again.
    """
    return _record(event, PortfolioSnapshotEvent)


def record_signal_archive(event: str) -> int:
    """Store one signal archive and return its row's id; raises what `record_portfolio_snapshot` raises."""
    return _record(event, SignalArchiveEvent)


def _record(text: str, model: type[AnyEvent]) -> int:
    job = get_current_job()
    try:
        event = decode(text, model)
        stored = _store(event, job)
    except (InvalidEvent, EventConflict) as error:
        if job is not None:
            _reject(job, text, str(error))
        raise
    logger.info(
        "%s event %s: %s as row %d",
        "stored" if stored.created else "had",
        event.id,
        event.data.summary,
        stored.row_id,
    )
    if job is not None:
        _acknowledge(
            job,
            event.source,
            event.sequence,
            Outcome("stored" if stored.created else "duplicate", stored.row_id),
        )
    return stored.row_id


def _store(event: PortfolioSnapshotEvent | SignalArchiveEvent, job: Job | None) -> operations.Stored:
    with get_db() as db:
        stored = operations.insert_event(db, event)
        if job is not None:
            # The delivery that made the row may come again; its own row accounts for it.
            if (stored.source, stored.sequence) == (event.source, event.sequence):
                operations.forget_outcome(db, job.id)
            else:
                operations.record_absorbed(db, job.id, event)
    return stored


def _reject(job: Job, text: Any, reason: str) -> None:
    claim = _Claim.of(text)
    with get_db() as db:
        operations.record_rejected(
            db,
            job.id,
            reason,
            _storable(text),
            source=claim.source,
            sequence=claim.sequence,
            event_id=claim.event_id,
        )
    logger.error("rejected job %s: %s", job.id, reason)
    if claim.source is not None:
        _acknowledge(job, claim.source, claim.sequence, Outcome("rejected", reason=reason))


def _acknowledge(job: Job, source: str, sequence: int | None, outcome: Outcome) -> None:
    if sequence is None:
        return  # the producer keeps no outbox
    key = acknowledgement_key(source)
    try:
        with job.connection.pipeline(transaction=True) as pipe:
            pipe.hset(key, str(sequence), str(outcome))
            pipe.expire(key, ACKNOWLEDGEMENT_TTL_SECONDS)
            pipe.execute()
    except RedisError as error:
        # The work is done and committed. The producer sends again what it has no acknowledgement of.
        logger.warning("job %s is done but could not be acknowledged: %s", job.id, type(error).__name__)


@dataclass(frozen=True)
class _Claim:
    """What a refused text says of itself, as far as it can be read."""

    source: str | None = None
    sequence: int | None = None
    event_id: UUID | None = None

    @classmethod
    def of(cls, text: Any) -> _Claim:
        try:
            document = json.loads(text[:MAX_EVENT_BYTES])
            attributes = document if isinstance(document, dict) else {}
        except (TypeError, ValueError, RecursionError):
            attributes = {}
        source, sequence, event_id = (attributes.get(name) for name in ("source", "sequence", "id"))
        return cls(_checked(_SOURCE, source), _checked(_SEQUENCE, sequence), _checked(_EVENT_ID, event_id))


def _checked(adapter: TypeAdapter[Any], value: Any) -> Any:
    try:
        return adapter.validate_json(json.dumps(value))
    except ValidationError:
        return None


def _storable(text: Any) -> str:
    """The refused text as PostgreSQL can keep it: what it cannot hold is shown as an escape."""
    shown = text if isinstance(text, str) else repr(text)
    return shown[:MAX_EVENT_BYTES].encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")
