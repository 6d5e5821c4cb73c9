"""Verdict on a run: each accepted event must be one row with its content, or a recorded outcome of its delivery."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from redis import Redis
from sqlalchemy import text

from consumers.db.engine import get_db
from consumers.ops.audit import audit
from producers.outbox import Outbox
from producers.redis_keys import job_id_of
from tests.faults.accepted import Accepted, Answer, Delivery, content_of

_SNAPSHOTS = "portfolio_history"
_ARCHIVES = "signal_archives"
_REJECTED = ("rejected", "discarded")  # an operator has discarded the rejection
_CALL_NOT_RETURNED = "call did not return"  # events in an outbox whose `record` call did not return


class Row(NamedTuple):
    event_id: str
    source: str
    sequence: int
    content: str


class Outcome(NamedTuple):
    source: str | None
    sequence: int | None
    event_id: str | None
    outcome: str
    reason: str | None
    content: str | None


class KeptEntry(NamedTuple):
    """An entry in an outbox file."""

    delivery: Delivery
    state: str
    row_id: int | None
    reason: str | None


@dataclass(frozen=True)
class Verdict:
    """Counts, and each breach of the promise as a sentence. `by_controller` counts row, duplicate and rejected."""

    accepted: int
    rows: int
    duplicate: int
    rejected: int
    breaches: list[str]
    by_controller: dict[str, Counter[str]] = field(default_factory=dict)


@dataclass
class _Database:
    rows: dict[tuple[str, int], Row]
    outcomes: dict[str, Outcome]

    def __post_init__(self) -> None:
        self.by_event = {row.event_id: row for row in self.rows.values()}

    def row_of(self, delivery: Delivery) -> Row | None:
        """Return the row with this event's id, if it has this content."""
        row = self.by_event.get(delivery.event_id)
        return row if row is not None and row.content == delivery.content else None


def verdict(
    outboxes: Sequence[Path],
    accepted: Mapping[str, Accepted],
    *,
    replaced: Iterable[KeptEntry] = (),
    redis: Redis | None = None,
) -> Verdict:
    """Compare the accepted events, by controller name, with the database, the outboxes and the audit.

    `replaced` are entries of outboxes that older copies have replaced.
    """
    database = _read_database()
    entries, unreadable = _read_outboxes(outboxes)
    deliveries = {name: one.deliveries for name, one in accepted.items()}
    deliveries[_CALL_NOT_RETURNED] = [entry.delivery for kept in (replaced, *entries.values()) for entry in kept]
    known, by_controller, breaches = _outcomes(deliveries, database)
    breaches += _wrong_rows(database, known)
    for name, one in accepted.items():
        answers = [_wrong_answer(answer, known, database) for answer in one.answers]
        breaches += [f"{name}: {breach}" for breach in answers if breach]
    for path, kept in entries.items():
        states = [_wrong_state(entry, database) for entry in kept]
        breaches += [f"{path}: {breach}" for breach in states if breach]
    breaches += unreadable + _wrong_audits(list(entries), redis)
    counts = sum(by_controller.values(), Counter[str]())
    if not breaches and len(known) != len(database.rows) + counts["duplicate"] + counts["rejected"]:
        breaches.append(f"{len(known)} accepted events, but {len(database.rows)} rows and {dict(counts)}")
    return Verdict(len(known), len(database.rows), counts["duplicate"], counts["rejected"], breaches, by_controller)


def _read_outboxes(outboxes: Sequence[Path]) -> tuple[dict[Path, list[KeptEntry]], list[str]]:
    entries: dict[Path, list[KeptEntry]] = {}
    unreadable = []
    for path in outboxes:
        try:
            entries[path] = kept_entries(path)
        except sqlite3.DatabaseError as error:
            unreadable.append(f"{path} is damaged, but no relay has quarantined it: {error}")
    return entries, unreadable


def _outcomes(
    by_name: Mapping[str, Iterable[Delivery]], database: _Database
) -> tuple[dict[str, Delivery], dict[str, Counter[str]], list[str]]:
    """Return all deliveries by job id, the counts of their outcomes by controller, and the breaches."""
    known: dict[str, Delivery] = {}
    with_row: set[tuple[str, int, str]] = set()
    by_controller: dict[str, Counter[str]] = {}
    breaches = []
    for name, deliveries in by_name.items():
        by_controller[name] = Counter()
        for delivery in deliveries:
            if (other := known.get(delivery.job_id)) is not None:
                if other != delivery:
                    breaches.append(f"{name}: two events have the same job id: {delivery} {other}")
                continue
            known[delivery.job_id] = delivery
            outcome, breach = _outcome(delivery, database)
            if breach:
                breaches.append(f"{name}: {breach}")
            elif outcome == "row":
                # Two copies of an outbox may record the same event with the same sequence: that is one row.
                identity = (delivery.source, delivery.sequence, delivery.event_id)
                outcome = "duplicate" if identity in with_row else outcome
                with_row.add(identity)
            by_controller[name][outcome] += 1
    return known, by_controller, breaches


def kept_entries(path: Path) -> list[KeptEntry]:
    """Return all entries of an outbox file.

    Raises:
        sqlite3.DatabaseError: the file is damaged.
    """
    query = """
        SELECT source_id, sequence, nonce, name || '/' || source_id, event_id, event, state, row_id, reason
        FROM entry_states JOIN sources ON sources.id = source_id ORDER BY position
    """
    entries = []
    with closing(sqlite3.connect(path, timeout=10)) as db:
        for source_id, sequence, nonce, source, event_id, event, *state in db.execute(query):
            job_id = job_id_of(source_id, sequence, nonce)
            delivery = Delivery(job_id, source, sequence, event_id, _content_of_event(event))
            entries.append(KeptEntry(delivery, *state))
    return entries


@lru_cache(maxsize=1024)  # the state machine reads the same entries after each step
def _content_of_event(event: str) -> str:
    return content_of(_data_of(event))


def _data_of(event: str) -> Any:
    return json.loads(event, parse_float=Decimal)["data"]


def _read_database() -> _Database:
    rows: dict[tuple[str, int], Row] = {}
    with get_db() as db:
        for row in db.execute(text(f"SELECT * FROM {_SNAPSHOTS}")):
            rows[_SNAPSHOTS, row.id] = _row(row, row._asdict())
        for row in db.execute(text(f"SELECT *, CAST(signals_data AS text) AS signals FROM {_ARCHIVES}")):
            signals = json.loads(row.signals, parse_float=Decimal)
            rows[_ARCHIVES, row.id] = _row(row, row._asdict() | {"signals": signals})
        query = "SELECT job_id, source, sequence, event_id, outcome, reason, event FROM event_outcomes"
        outcomes = {
            row.job_id: Outcome(
                row.source, row.sequence, str(row.event_id), row.outcome, row.reason, _content_of_text(row.event)
            )
            for row in db.execute(text(query))
        }
    return _Database(rows, outcomes)


def _row(row: Any, data: Mapping[str, Any]) -> Row:
    return Row(str(row.event_id), row.source, row.sequence, content_of(data))


def _content_of_text(event: str | None) -> str | None:
    return None if event is None else _content_of_event(event)


def _outcome(delivery: Delivery, database: _Database) -> tuple[str, str | None]:
    """Return the outcome of one delivery, and the breach if it breaks the promise."""
    row, outcome = database.row_of(delivery), database.outcomes.get(delivery.job_id)
    is_own = row is not None and (row.source, row.sequence) == (delivery.source, delivery.sequence)
    if outcome is None:
        if is_own:
            return "row", None
        other = database.by_event.get(delivery.event_id)
        return "lost", f"has neither its own row nor an outcome: {delivery}; row of its event: {other}"
    identity = (outcome.source, outcome.sequence, outcome.event_id)
    if identity != (delivery.source, delivery.sequence, delivery.event_id):
        return "lost", f"its outcome names another event: {delivery} {outcome}"
    if outcome.outcome == "duplicate":
        if row is None or is_own:
            return "duplicate", f"counts as a duplicate, but the other row is missing or is its own: {delivery} {row}"
    elif outcome.outcome not in _REJECTED or outcome.content != delivery.content or is_own:
        return outcome.outcome, f"its rejection has other content, or it has a row too: {delivery} {outcome} {row}"
    return "duplicate" if outcome.outcome == "duplicate" else "rejected", None


def _wrong_rows(database: _Database, known: Mapping[str, Delivery]) -> list[str]:
    accepted = {Row(one.event_id, one.source, one.sequence, one.content) for one in known.values()}
    wrong = [f"a row of no accepted event: {row}" for row in database.rows.values() if row not in accepted]
    outcomes = [job_id for job_id in database.outcomes if job_id not in known]
    wrong += [f"an outcome of no accepted event: {job_id} {database.outcomes[job_id]}" for job_id in outcomes]
    counts = Counter(row.event_id for row in database.rows.values())
    return wrong + [f"stored {count} times: event {event_id}" for event_id, count in counts.items() if count > 1]


def _wrong_answer(answer: Answer, known: Mapping[str, Delivery], database: _Database) -> str | None:
    """Return the breach if a receipt's answer does not agree with the database."""
    delivery = known[answer.job_id]
    if answer.row_id is None:
        outcome = database.outcomes.get(answer.job_id)
        if not _is_rejected(outcome, answer.reason):
            return f"reported rejected ({answer.reason}), but the database has {outcome}: {delivery}"
        return None
    return _wrong_row_id(delivery, answer.row_id, database)


def _is_rejected(outcome: Outcome | None, reason: str | None) -> bool:
    """Return whether an outcome is a rejection with this reason, which an operator may have discarded later."""
    if outcome is None or outcome.reason is None or reason is None:
        return False
    discarded = outcome.outcome == "discarded" and outcome.reason.endswith(f"; it was rejected: {reason}")
    return discarded or (outcome.outcome, outcome.reason) == ("rejected", reason)


def _wrong_row_id(delivery: Delivery, row_id: int | None, database: _Database) -> str | None:
    row = database.rows.get((_table_of(delivery), row_id)) if row_id is not None else None
    if row is None or (row.event_id, row.content) != (delivery.event_id, delivery.content):
        return f"reported stored as row {row_id}, which is {row}: {delivery}"
    return None


def _table_of(delivery: Delivery) -> str:
    return _SNAPSHOTS if "balance" in json.loads(delivery.content) else _ARCHIVES


def _wrong_state(entry: KeptEntry, database: _Database) -> str | None:
    """Return the breach if an entry's state does not agree with the database."""
    if entry.state == "stored":
        return _wrong_row_id(entry.delivery, entry.row_id, database)
    outcome = database.outcomes.get(entry.delivery.job_id)
    if entry.state != "rejected":
        return f"never settled, state {entry.state}: {entry.delivery}; outcome in the database: {outcome}"
    if not _is_rejected(outcome, entry.reason):
        return f"is rejected ({entry.reason}), but the database has {outcome}: {entry.delivery}"
    return None


def _wrong_audits(outboxes: Sequence[Path], redis: Redis | None) -> list[str]:
    """Return the breaches that the audit finds, with each outbox and without one."""
    wrong = []
    for path in outboxes:
        with Outbox(path) as outbox:
            wrong += [f"with outbox {path}: {one}" for one in audit(redis, outbox) if not one.complete]
    wrong += [f"without an outbox: {one}" for one in audit(redis) if not one.complete]
    return [f"the audit is incomplete, {one}" for one in wrong]
