"""event_outcomes: the deliveries that did not become a row of their own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal
from uuid import UUID

from sqlalchemy import Connection, text

_RECORD_OUTCOME = text("""
    INSERT INTO event_outcomes (job_id, source, sequence, event_id, outcome, reason, event)
    VALUES (:job_id, :source, :sequence, CAST(:event_id AS uuid), :outcome, :reason, :event)
    ON CONFLICT (job_id) DO UPDATE SET source = excluded.source, sequence = excluded.sequence,
        event_id = excluded.event_id, outcome = excluded.outcome, reason = excluded.reason,
        event = excluded.event, created_at = now()
    WHERE event_outcomes.outcome <> 'discarded'
""")

_FORGET_OUTCOMES = text("DELETE FROM event_outcomes WHERE job_id = ANY (:job_ids)")


@dataclass(frozen=True)
class OutcomeRow:
    """A delivery without a row of its own: a duplicate of a stored event, or a rejection.

    `event` is the text of a rejected event; its source, sequence and id are set as far as they could be read.
    """

    job_id: str
    outcome: Literal["duplicate", "rejected"]
    source: str | None
    sequence: int | None
    event_id: UUID | None
    reason: str | None = None
    event: str | None = None


def record_outcomes(db: Connection, outcomes: Iterable[OutcomeRow]) -> None:
    """Record these in the order of their job ids: transactions in opposite order would deadlock."""
    by_job = {one.job_id: asdict(one) | {"event_id": one.event_id and str(one.event_id)} for one in outcomes}
    if by_job:
        db.execute(_RECORD_OUTCOME, [by_job[job_id] for job_id in sorted(by_job)])


def forget_outcomes(db: Connection, job_ids: Iterable[str]) -> None:
    """Delete the outcomes of deliveries that became rows after all."""
    db.execute(_FORGET_OUTCOMES, {"job_ids": list(job_ids)})
