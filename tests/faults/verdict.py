"""The one question after every fault: is accepted = stored + rejected, each once?"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import text

from consumers.audit import audit
from consumers.connection import get_db
from producers.outbox import Outbox

_ROWS = """
    SELECT event_id, source, sequence, id FROM portfolio_history
    UNION ALL SELECT event_id, source, sequence, id FROM signal_archives
"""


@dataclass(frozen=True)
class Verdict:
    """Counts, and every breach of the promise as a sentence; none is what all this is for."""

    accepted: int
    rows: int
    duplicate: int
    rejected: int
    breaches: list[str]


def verdict(outboxes: Sequence[Path], told: Iterable[tuple[str, int, str]]) -> Verdict:
    """Compare what the outboxes accepted, what callers were told, and what the database has.

    `told` are (source, sequence, event id) of record calls that returned.
    """
    entries: dict[tuple[str, int], tuple[str, str, str | None]] = {}
    for path in outboxes:
        with sqlite3.connect(path) as db:
            rows = db.execute(
                "SELECT name || '/' || source_id, sequence, event_id, state, reason"
                " FROM entries JOIN sources ON sources.id = source_id"
            )
            entries |= {
                (source, sequence): (event_id, state, reason) for source, sequence, event_id, state, reason in rows
            }
    with get_db() as db:
        stored = [(str(row.event_id), row.source, row.sequence) for row in db.execute(text(_ROWS))]
        outcomes = {
            (row.source, row.sequence): (str(row.event_id), row.outcome, row.reason)
            for row in db.execute(text("SELECT source, sequence, event_id, outcome, reason FROM event_outcomes"))
        }
    breaches = [f"accepted but not in an outbox: {one}" for one in told if (one[0], one[1]) not in entries]
    breaches += _doubles(stored)
    stored_ids = {event_id for event_id, _, _ in stored}
    row_of = {(source, sequence): event_id for event_id, source, sequence in stored}
    for key, (event_id, state, _) in entries.items():
        breaches += _fate(
            key, state, event_id in stored_ids, row_of.get(key) == event_id, outcomes.get(key, ("", "", ""))[1]
        )
    breaches += [f"a row that nobody accepted: {row}" for row in stored if (row[1], row[2]) not in entries]
    for path in outboxes:
        for one in audit(outbox=Outbox(path)):
            if one.missing or one.mismatched:
                breaches.append(f"the audit misses {one.missing} {one.mismatched} of {one.source}")
    kinds = [outcome for _, outcome, _ in outcomes.values()]
    return Verdict(len(entries), len(stored), kinds.count("duplicate"), kinds.count("rejected"), breaches)


def _fate(key: tuple[str, int], state: str, fact_has_row: bool, has_row: bool, outcome: str) -> list[str]:
    """What is wrong with the end of one entry: `has_row` tells of a row of its own, `fact_has_row` of anybody's."""
    breaches = []
    if state in ("pending", "sent"):
        breaches.append(f"never settled: {key} is {state}")
    if state == "confirmed" and not fact_has_row:
        breaches.append(f"confirmed, but without a row: {key}")
    if state == "rejected" and (outcome != "rejected" or has_row):
        breaches.append(f"rejected, but the database has outcome {outcome!r} and a row: {has_row}: {key}")
    if has_row + (outcome != "") != 1:
        breaches.append(f"not accounted for exactly once: {key} has a row: {has_row}, outcome {outcome!r}")
    return breaches


def _doubles(stored: Sequence[tuple[str, str, int]]) -> list[str]:
    seen: set[str] = set()
    doubles = []
    for event_id, source, sequence in stored:
        if event_id in seen:
            doubles.append(f"stored twice: {event_id}, again by {source} {sequence}")
        seen.add(event_id)
    return doubles
