"""event_outcomes: the deliveries that did not become a row of their own."""

from __future__ import annotations

from uuid import UUID

from sqlalchemy import Connection, text

from producers.events import Event

_RECORD_OUTCOME = text("""
    INSERT INTO event_outcomes (job_id, source, sequence, event_id, outcome, reason, event)
    VALUES (:job_id, :source, :sequence, CAST(:event_id AS uuid), :outcome, :reason, :event)
    ON CONFLICT (job_id) DO UPDATE SET source = excluded.source, sequence = excluded.sequence,
        event_id = excluded.event_id, outcome = excluded.outcome, reason = excluded.reason,
        event = excluded.event, created_at = now()
    WHERE event_outcomes.outcome <> 'discarded'
""")

_FORGET_OUTCOME = text("DELETE FROM event_outcomes WHERE job_id = :job_id")


def record_absorbed(db: Connection, job_id: str, event: Event) -> None:
    """Note that this delivery brought a fact that another delivery had stored."""
    values = {"source": event.source, "sequence": event.sequence, "event_id": str(event.id)}
    db.execute(_RECORD_OUTCOME, {"job_id": job_id, "outcome": "absorbed", "reason": None, "event": None} | values)


def record_rejected(
    db: Connection,
    job_id: str,
    reason: str,
    event: str,
    *,
    source: str | None,
    sequence: int | None,
    event_id: UUID | None,
) -> None:
    """Note that this delivery was refused for good, why, and what it was."""
    values = {"source": source, "sequence": sequence, "event_id": event_id and str(event_id)}
    db.execute(_RECORD_OUTCOME, {"job_id": job_id, "outcome": "rejected", "reason": reason, "event": event} | values)


def forget_outcome(db: Connection, job_id: str) -> None:
    """The delivery became a row after all: an earlier refusal of it no longer stands."""
    db.execute(_FORGET_OUTCOME, {"job_id": job_id})
