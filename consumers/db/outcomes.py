"""Deliveries that made no row: the table event_outcomes."""

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

_DISCARDED = text("SELECT job_id FROM event_outcomes WHERE job_id = ANY (:job_ids) AND outcome = 'discarded'")

_FORGET_OUTCOMES = text("DELETE FROM event_outcomes WHERE job_id = ANY (:job_ids)")


@dataclass(frozen=True)
class OutcomeRow:
    """Delivery that made no row: a duplicate of a stored event, or a rejection.

    `event` is the text of a rejected event. Source, sequence and event id are None if they could not be read.
    """

    job_id: str
    outcome: Literal["duplicate", "rejected"]
    source: str | None
    sequence: int | None
    event_id: UUID | None
    reason: str | None = None
    event: str | None = None


def record_outcomes(db: Connection, outcomes: Iterable[OutcomeRow]) -> None:
    """Insert or update these outcomes, in the order of their job ids, since another order could deadlock.

    A discarded outcome is not changed.
    """
    by_job = {one.job_id: asdict(one) for one in outcomes}
    if by_job:
        db.execute(_RECORD_OUTCOME, [by_job[job_id] for job_id in sorted(by_job)])


def discarded(db: Connection, job_ids: Iterable[str]) -> set[str]:
    """Return those of these deliveries that an operator has discarded."""
    return set(db.execute(_DISCARDED, {"job_ids": list(job_ids)}).scalars())


def forget_outcomes(db: Connection, job_ids: Iterable[str]) -> None:
    """Delete the outcomes of deliveries that made a row later, as after a requeue."""
    if given := list(job_ids):
        db.execute(_FORGET_OUTCOMES, {"job_ids": given})
