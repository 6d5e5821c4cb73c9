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
from redis.client import Pipeline
from rq import get_current_job

from consumers import operations, outcomes
from consumers.connection import get_db
from consumers.errors import EventConflict
from producers.errors import HistoryError, InvalidEvent
from producers.events import (
    MAX_EVENT_BYTES,
    AnyEvent,
    PortfolioSnapshotEvent,
    SignalArchiveEvent,
    Source,
    decode,
)
from producers.fields import EventId, Sequence
from producers.outcomes import ACKNOWLEDGEMENT_TTL_SECONDS, Kind, Outcome
from producers.redis_keys import acknowledgement_key

# Below RQ's own, whose level and handlers a stock worker sets up: these lines are seen there too.
logger = logging.getLogger("rq.worker.history")

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


@dataclass(frozen=True)
class Settled:
    """What became of one delivery, decided and committed. `error` is set exactly when it was rejected."""

    outcome: Outcome
    source: str | None
    sequence: int | None
    error: HistoryError | None = None


def settle(job_id: str, text: Any, model: type[AnyEvent]) -> Settled:
    """Store the event of one delivery, or record why it is refused for good.

    Raises:
        StoreUnavailable: the database cannot take either now; nothing was decided.
    """
    try:
        event = decode(text, model)
        with get_db() as db:
            stored = operations.insert_event(db, event)
            # The delivery that made the row may come again; its own row accounts for it.
            if (stored.source, stored.sequence) == (event.source, event.sequence):
                outcomes.forget_outcome(db, job_id)
            else:
                outcomes.record_absorbed(db, job_id, event)
    except (InvalidEvent, EventConflict) as error:
        return reject(job_id, text, error)
    word = "stored" if stored.created else "had"
    logger.info("%s event %s: %s as row %d", word, event.id, event.data.summary, stored.row_id)
    kind: Kind = "stored" if stored.created else "duplicate"
    return Settled(Outcome(kind, stored.row_id), event.source, event.sequence)


def reject(job_id: str, text: Any, error: HistoryError) -> Settled:
    """Record that a delivery was refused for good, with what it was, as far as it can be read.

    Raises:
        StoreUnavailable: the database cannot take it now; nothing was decided.
    """
    claim, reason = _Claim.of(text), str(error)
    with get_db() as db:
        outcomes.record_rejected(
            db,
            job_id,
            reason,
            _storable(text),
            source=claim.source,
            sequence=claim.sequence,
            event_id=claim.event_id,
        )
    logger.error("rejected job %s: %s", job_id, reason)
    return Settled(Outcome("rejected", reason=reason), claim.source, claim.sequence, error)


def acknowledge(pipe: Pipeline, settled: Settled) -> None:
    """Tell the producer, which takes it from there; nothing to tell when it keeps no outbox."""
    if settled.source is not None and settled.sequence is not None:
        key = acknowledgement_key(settled.source)
        pipe.hset(key, str(settled.sequence), str(settled.outcome))
        pipe.expire(key, ACKNOWLEDGEMENT_TTL_SECONDS)


def _record(text: str, model: type[AnyEvent]) -> int:
    job = get_current_job()
    if job is None:  # called by hand: there is no delivery to account for
        with get_db() as db:
            return operations.insert_event(db, decode(text, model)).row_id
    settled = settle(job.id, text, model)
    try:
        with job.connection.pipeline(transaction=True) as pipe:
            acknowledge(pipe, settled)
            pipe.execute()
    except RedisError as error:
        # The work is done and committed. The producer sends again what it has no acknowledgement of.
        logger.warning("job %s is done but could not be acknowledged: %s", job.id, type(error).__name__)
    if settled.error is not None:
        raise settled.error
    assert settled.outcome.row_id is not None
    return settled.outcome.row_id


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
