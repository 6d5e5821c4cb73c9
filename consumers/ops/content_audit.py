"""The audit of content: compare the digests of an outbox, or of a seal, with the events that the database has.

For an event that was stored, compare with its row, or with a withdrawal of its row. For a duplicate, compare with the
row of the same event id, whichever delivery inserted it. For a rejected event, compare also with the text that the
database keeps of it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from uuid import UUID

from sqlalchemy import Connection

from consumers.db.engine import long_read
from consumers.db.stored_content import (
    StoredContent,
    StoredOutcome,
    contents_by_event,
    contents_by_number,
    outcomes_by_number,
)
from producers.segments import Segment, next_head

MOST_DIFFERENCES = 100


@dataclass(frozen=True)
class Difference:
    """Event whose content in the database is not what was recorded; or, from `first` to `last`, one of a segment."""

    first: int
    last: int
    problem: str


@dataclass
class ContentAudit:
    """Result for one source.

    checked: number of events that were compared.
    differing: number of events whose content differs.
    differences: the first 100 of them, in the order of recording.
    """

    checked: int = 0
    differing: int = 0
    differences: list[Difference] = field(default_factory=list)

    def add(self, first: int, last: int, problem: str) -> None:
        self.differing += 1
        if len(self.differences) < MOST_DIFFERENCES:
            self.differences.append(Difference(first, last, problem))


def audit_content(chains: Mapping[str, Sequence[Segment]], first_numbers: Mapping[str, int]) -> dict[str, ContentAudit]:
    """Compare the segments of each source with one state of the database.

    Events with lower numbers than that of their source in `first_numbers` are left out: their rows may have been moved
    to another table.

    Raises:
        StoreUnavailable: the database cannot be read now.
    """
    audits = {source: ContentAudit() for source in chains}
    if not chains:
        return audits
    with long_read() as db:
        for source, segments in chains.items():
            for segment in segments:
                _check(db, source, segment, first_numbers.get(source, 0), audits[source])
    return audits


def _check(db: Connection, source: str, segment: Segment, first_number: int, audit: ContentAudit) -> None:
    numbers = segment.sequences
    stored = _StoredEvents(db, source, {number for number in numbers if number >= first_number})
    head: bytes | None = segment.previous_head  # None if the digest of an event is not known
    for position, number in enumerate(numbers):
        if number < first_number:
            head = None
            continue
        audit.checked += 1
        is_rejected = position in segment.rejected
        digest = stored.digest(number, is_rejected, segment.prefix(position))
        problem = stored.problem(number, is_rejected) if digest is None else None
        # A rejected event may be a conflict with the row that a copy of the outbox made under the same number.
        if digest is not None and not is_rejected:
            problem = stored.changed_row(number, digest)
        if problem is not None:
            audit.add(number, number, problem)
        head = None if head is None or digest is None else next_head(head, number, is_rejected, digest)
    if head not in (None, segment.head):
        audit.add(min(numbers), max(numbers), "one of these events has other content than was recorded")


class _StoredEvents:
    """Events that the database has under some numbers of one source."""

    def __init__(self, db: Connection, source: str, numbers: set[int]) -> None:
        self._source = source
        self._own: defaultdict[int, list[StoredContent]] = defaultdict(list)
        self._outcomes: defaultdict[int, list[StoredOutcome]] = defaultdict(list)
        self._of_event: defaultdict[UUID, list[StoredContent]] = defaultdict(list)
        for own in contents_by_number(db, source, numbers):
            assert own.sequence is not None
            self._own[own.sequence].append(own)
        for outcome in outcomes_by_number(db, source, numbers):
            self._outcomes[outcome.sequence].append(outcome)
        # A duplicate's row has the number of another delivery.
        others = {one.event_id for many in self._outcomes.values() for one in many if one.event_id is not None}
        for content in contents_by_event(db, others):
            self._of_event[content.event_id].append(content)

    def digest(self, number: int, is_rejected: bool, prefix: bytes) -> bytes | None:
        """Return the digest of the event with this number that begins with `prefix`, or None if there is none."""
        for digest in self._digests(number, is_rejected):
            if digest is not None and digest.startswith(prefix):
                return digest
        return None

    def _digests(self, number: int, is_rejected: bool) -> Iterable[bytes | None]:
        contents = self._contents(number)
        for content in contents:
            yield content.digest
        if is_rejected:
            for outcome in self._outcomes[number]:
                yield outcome.digest
        for content in contents:
            if not self._is_own(content, number):
                yield from content.digests_of_duplicates

    def _contents(self, number: int) -> list[StoredContent]:
        """Return the rows and withdrawals of this number, then those of its events that other deliveries made."""
        own = self._own[number]
        events: list[StoredContent | StoredOutcome] = [*own, *self._outcomes[number]]
        event_ids = {one.event_id for one in events if one.event_id is not None}
        others = [one for event_id in event_ids for one in self._of_event[event_id]]
        return own + [one for one in others if not self._is_own(one, number)]

    def _is_own(self, content: StoredContent, number: int) -> bool:
        return (content.source, content.sequence) == (self._source, number)

    def problem(self, number: int, is_rejected: bool) -> str:
        """Say how the database differs from what was recorded under this number."""
        if is_rejected and self._outcomes[number]:
            return "the text of the rejected event is not the one that was recorded"
        contents = self._contents(number)
        if contents:
            return f"{contents[0]} has other content than was recorded"
        if self._outcomes[number]:
            return "its row is missing: the database has only an outcome"
        return "the database has neither a row nor an outcome"

    def changed_row(self, number: int, digest: bytes) -> str | None:
        """Return the problem of a row that has this number and the event's id, but other content, or None.

        A row of another event belongs to a copy of the outbox that used the same number.
        """
        events: list[StoredContent | StoredOutcome] = [*self._own[number], *self._outcomes[number]]
        event_ids = {one.event_id for one in events if one.digest == digest}
        for row in self._own[number]:
            if row.place == "row" and row.digest != digest and row.event_id in event_ids:
                return f"{row} has other content than was recorded"
        return None
