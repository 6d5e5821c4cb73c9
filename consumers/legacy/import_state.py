"""Import state of a delivery: its row in the database, its recorded rejection, or neither."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC
from decimal import Decimal
from typing import NamedTuple

from sqlalchemy import Connection, TextClause, text

from consumers.db.inserts import Found, find_events
from consumers.legacy.old_history import Kind
from producers.events import Event, PortfolioSnapshot, SignalArchive

# True if this source has a row in a range of sequences, or one of the jobs an outcome; in a first import, that is rare.
# If it is false, a row that another source made of the same event is found only when the event is inserted.
_ANY_KNOWN = """
    SELECT EXISTS (SELECT FROM {table} WHERE source = :source AND sequence BETWEEN :first AND :last)
        OR EXISTS (SELECT FROM event_outcomes WHERE job_id = ANY (CAST(:job_ids AS text[])))
"""
_ANY: dict[Kind, TextClause] = {
    "snapshot": text(_ANY_KNOWN.format(table="portfolio_history")),
    "archive": text(_ANY_KNOWN.format(table="signal_archives")),
}
# Only deliveries that have a row or an outcome. The others need no comparison. The range of sequences follows from the
# join: without it, PostgreSQL may read all rows of the source.
_KNOWN = """
    SELECT given.number, history.id IS NOT NULL, other.id, outcomes.outcome, outcomes.reason
    FROM unnest(CAST(:event_ids AS uuid[]), CAST(:sequences AS bigint[]), CAST(:job_ids AS text[]),
        CAST(:instants AS timestamptz[]), CAST(:measures AS numeric[]))
        WITH ORDINALITY AS given (event_id, sequence, job_id, instant, measure, number)
    LEFT JOIN {table} AS history ON history.event_id = given.event_id
    LEFT JOIN {table} AS other
        ON other.source = :source AND other.sequence = given.sequence AND other.event_id <> given.event_id
        AND other.sequence BETWEEN :first AND :last
        AND other.{measure} = given.measure AND abs(extract(epoch FROM other.{instant} - given.instant)) <= 93600
        AND mod(extract(epoch FROM other.{instant} - given.instant), 900) = 0
    LEFT JOIN event_outcomes AS outcomes ON outcomes.job_id = given.job_id
    WHERE history.id IS NOT NULL OR other.id IS NOT NULL OR outcomes.job_id IS NOT NULL
"""
_STATES: dict[Kind, TextClause] = {
    "snapshot": text(_KNOWN.format(table="portfolio_history", instant='"timestamp"', measure="total_value")),
    "archive": text(_KNOWN.format(table="signal_archives", instant="archived_at", measure="signals_count")),
}
_ROWS_OF_NUMBERS = """
    SELECT sequence, id FROM {table} WHERE source = :source AND sequence = ANY (CAST(:sequences AS bigint[]))
"""
_ROWS: dict[Kind, TextClause] = {
    "snapshot": text(_ROWS_OF_NUMBERS.format(table="portfolio_history")),
    "archive": text(_ROWS_OF_NUMBERS.format(table="signal_archives")),
}
_POISON = text("""
    SELECT sequence, reason, event FROM event_outcomes
    WHERE source = :source AND outcome IN ('rejected', 'discarded') AND reason LIKE '%poison event: %'
""")


class PoisonRejection(NamedTuple):
    """Recorded rejection of an entry that crashed the process or met a defect each time. `event` is its text."""

    reason: str
    event: str


class ImportState(NamedTuple):
    """State of one delivery in the database: the row with its event id, and the recorded outcome of its job.

    `other_row` is a row that looks like an earlier import of the same entry with another zone or portfolio: it has the
    same source, sequence and content, and its time differs by a possible difference between two zones.
    """

    found: Found | None
    other_row: int | None
    outcome: str | None
    reason: str | None

    def is_own(self, source: str, sequence: int) -> bool:
        """Return whether this delivery made the row, and would make the same row now."""
        found = self.found
        return found is not None and found.same and (found.source, found.sequence) == (source, sequence)

    def is_accounted_for(self, source: str, sequence: int) -> bool:
        """Return whether the delivery has its own row, or a recorded duplicate of another row of the same event.

        Without that record, `audit` would report its sequence as missing.
        """
        duplicate = self.found is not None and self.found.same and self.outcome == "duplicate"
        return duplicate or self.is_own(source, sequence)

    def rejection_reason(self) -> str | None:
        """Return why the delivery must not be inserted, or None.

        It would be stored twice or be rejected again, or an operator has discarded it.
        """
        if self.found is None and self.other_row is not None:
            return f"was already imported as row {self.other_row} with another --timezone or --portfolio-id"
        conflict = self.found is not None and not self.found.same
        if self.outcome == "discarded" or (self.outcome == "rejected" and conflict):
            return self.reason
        return None


_NOTHING_KNOWN = ImportState(None, None, None, None)


def _measure(data: PortfolioSnapshot | SignalArchive) -> Decimal | int:
    return data.signals_count if isinstance(data, SignalArchive) else data.total_value


def _array(values: Iterable[object]) -> str:
    """Return an array literal, which the server parses in one step. None of these values needs quotes in it."""
    return "{" + ",".join(map(str, values)) + "}"


def rows_of_numbers(db: Connection, kind: Kind, source: str, numbers: Sequence[int]) -> dict[int, int]:
    """Return the row id of each of these sequence numbers that has a row."""
    rows = db.execute(_ROWS[kind], {"source": source, "sequences": list(numbers)}) if numbers else ()
    return {row.sequence: row.id for row in rows}


def poison_rejections(db: Connection, source: str) -> dict[int, PoisonRejection]:
    """Return the poison rejections of a source, by sequence. Such an entry is tried again only after it has changed."""
    rows = db.execute(_POISON, {"source": source})
    return {row.sequence: PoisonRejection(row.reason, row.event) for row in rows}


def import_states(db: Connection, deliveries: Sequence[tuple[str, Event]]) -> list[ImportState]:
    """Return the state of each (job id, event), in order. All must be of one kind and one source.

    If the source has nothing in their range of sequences, rows that other sources made are not found.
    """
    if not deliveries:
        return []
    known = [_NOTHING_KNOWN] * len(deliveries)
    kind: Kind = "archive" if isinstance(deliveries[0][1].data, SignalArchive) else "snapshot"
    numbers = [event.sequence for _, event in deliveries if event.sequence is not None]
    of_source = {
        "source": deliveries[0][1].source,
        "first": min(numbers),
        "last": max(numbers),
        "job_ids": _array(job_id for job_id, _ in deliveries),
    }
    if not db.scalar(_ANY[kind], of_source):
        return known
    arrays = of_source | {
        "event_ids": _array(event.id for _, event in deliveries),
        "sequences": _array(event.sequence for _, event in deliveries),
        "instants": _array(event.data.instant.astimezone(UTC) for _, event in deliveries),
        "measures": _array(_measure(event.data) for _, event in deliveries),  # type: ignore[arg-type]  # only these two kinds
    }
    stored = []
    rows = db.execute(_STATES[kind], arrays)
    for number, has_row, other_row, outcome, reason in rows:
        known[number - 1] = ImportState(None, other_row, outcome, reason)
        if has_row:
            stored.append(number - 1)
    for n, found in zip(stored, find_events(db, [deliveries[n][1] for n in stored]), strict=True):
        known[n] = known[n]._replace(found=found)
    return known
