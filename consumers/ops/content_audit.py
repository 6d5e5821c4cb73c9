"""The audit of content: compare the digests that an outbox keeps with the events that the database has.

The digest of an event that was stored must be that of its row, or of a withdrawal of its row. If it was a duplicate,
that is the row of its event, whichever delivery made it. The digest of an event that was rejected may also be that of
the text which the database keeps with the rejection.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from uuid import UUID

from sqlalchemy import Connection

from consumers.db.engine import long_read
from consumers.db.recorded_content import (
    Content,
    Outcome,
    contents_by_event,
    contents_by_number,
    outcomes_by_number,
)
from producers.digests import chained
from producers.segments import Segment

_SHOWN_DIFFERENCES = 100


@dataclass(frozen=True)
class Difference:
    """Event, or range of numbers, whose content in the database is not what was recorded."""

    first: int
    last: int
    problem: str


@dataclass
class ContentAudit:
    """Result for one source.

    checked: number of events whose digests were compared.
    differing: number of events whose content differs; of a segment without prefixes, all events if one differs.
    differences: the first 100 of them, in the order of recording.
    head: the head of the source's chain, as hexadecimal digits.
    """

    checked: int = 0
    differing: int = 0
    differences: list[Difference] = field(default_factory=list)
    head: str = ""

    def add(self, difference: Difference, events: int = 1) -> None:
        self.differing += events
        if len(self.differences) < _SHOWN_DIFFERENCES:
            self.differences.append(difference)


def audit_content(chains: Mapping[str, Sequence[Segment]], first: Mapping[str, int]) -> dict[str, ContentAudit]:
    """Compare the chains of digests, by source, with one state of the database.

    Numbers below that of the source in `first` are left out: their rows may have been moved to another table.

    Raises:
        StoreUnavailable: the database cannot be read now.
    """
    audits = {source: ContentAudit() for source in chains}
    with long_read() as db:
        for source, segments in chains.items():
            for segment in segments:
                _check(db, source, segment, first.get(source, 0), audits[source])
                audits[source].head = segment.head.hex()
    return audits


def _check(db: Connection, source: str, segment: Segment, first: int, audit: ContentAudit) -> None:
    numbers = segment.sequences
    evidence = _Evidence(db, source, {number for number in numbers if number >= first})
    head, is_proven = segment.previous, True
    for position, number in enumerate(numbers):
        if number < first:
            is_proven = False
            continue
        audit.checked += 1
        is_rejected = position in segment.rejected
        digest = evidence.digest(number, is_rejected, segment.prefix(position))
        problem = evidence.problem(number, is_rejected) if digest is None else evidence.altered_row(number, digest)
        if problem is not None:
            audit.add(Difference(number, number, problem))
        if digest is None:
            is_proven = False
        else:
            head = chained(head, number, is_rejected, digest)
    if is_proven and head != segment.head:
        problem = "at least one of these events has other content than was recorded"
        audit.add(Difference(min(numbers), max(numbers), problem), len(numbers))


class _Evidence:
    """Everything that the database has about some numbers of one source."""

    def __init__(self, db: Connection, source: str, numbers: set[int]) -> None:
        self._source = source
        self._own: defaultdict[int, list[Content]] = defaultdict(list)
        self._outcomes: defaultdict[int, list[Outcome]] = defaultdict(list)
        self._of_event: defaultdict[UUID, list[Content]] = defaultdict(list)
        for own in contents_by_number(db, source, numbers):
            assert own.sequence is not None
            self._own[own.sequence].append(own)
        for outcome in outcomes_by_number(db, source, numbers):
            self._outcomes[outcome.sequence].append(outcome)
        # The row of a duplicate is of another delivery, and the corrected row of a withdrawn event too.
        others = {one.event_id for many in self._outcomes.values() for one in many if one.event_id is not None}
        others |= {one.event_id for many in self._own.values() for one in many if one.place == "withdrawal"}
        for content in contents_by_event(db, others):
            self._of_event[content.event_id].append(content)

    def digest(self, number: int, is_rejected: bool, prefix: bytes | None) -> bytes | None:
        """Return the digest of the event with this number that begins with `prefix`, or None if there is none."""
        for digest in self._digests(number, is_rejected):
            if digest is not None and (prefix is None or digest.startswith(prefix)):
                return digest
        return None

    def _digests(self, number: int, is_rejected: bool) -> Iterable[bytes | None]:
        if is_rejected:
            for outcome in self._outcomes[number]:
                yield outcome.digest
        contents = self._contents(number)
        for content in contents:
            yield content.digest
        for content in contents:
            if not self._is_own(content, number):
                yield from content.digests_in_other_zones()

    def _contents(self, number: int) -> list[Content]:
        """Return the rows and withdrawals of this number, then those of its events that other deliveries made."""
        own = self._own[number]
        events: list[Content | Outcome] = [*own, *self._outcomes[number]]
        event_ids = {one.event_id for one in events if one.event_id is not None}
        others = [one for event_id in event_ids for one in self._of_event[event_id]]
        return own + [one for one in others if not self._is_own(one, number)]

    def _is_own(self, content: Content, number: int) -> bool:
        return (content.source, content.sequence) == (self._source, number)

    def problem(self, number: int, is_rejected: bool) -> str:
        """Say how the database differs from what was recorded under this number."""
        if is_rejected and self._outcomes[number]:
            return "the text of the rejected event is not the one that was recorded"
        contents = self._contents(number)
        if contents:
            return f"{contents[0]} has other content than was recorded"
        if self._outcomes[number]:
            return "it was stored, but the database has no row of it, only an outcome"
        return "the database has neither a row nor an outcome"

    def altered_row(self, number: int, digest: bytes) -> str | None:
        """Return the problem of a row that has this number and the event's id, but other content; None if all agree.

        A row of another event belongs to a copy of the outbox that used the same number.
        """
        events: list[Content | Outcome] = [*self._own[number], *self._outcomes[number]]
        event_ids = {one.event_id for one in events if one.digest == digest}
        for row in self._own[number]:
            if row.place == "row" and row.digest != digest and row.event_id in event_ids:
                return f"{row} has other content than was recorded"
        return None
