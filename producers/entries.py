"""The entries of an outbox, as the outbox gives them to its users."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple
from uuid import UUID

from producers.redis_keys import job_id_of

State = Literal["pending", "sent", "stored", "rejected"]


@dataclass(frozen=True)
class Accepted:
    """The identifiers that `append` has given to one event."""

    event_id: UUID
    source: str
    source_id: str
    sequence: int
    nonce: str


@dataclass(frozen=True)
class EntryHead:
    """One entry without its event. `source` is the event's, which also names its acknowledgements."""

    position: int
    source_id: str
    sequence: int
    nonce: str
    source: str
    checks: int

    @property
    def job_id(self) -> str:
        return job_id_of(self.source_id, self.sequence, self.nonce)


@dataclass(frozen=True)
class Entry(EntryHead):
    """One entry with its event, as the exact text of every delivery."""

    type: str
    summary: str
    event: str


@dataclass(frozen=True)
class OutboxStatus:
    """Entries by state, and the age of the oldest one that is neither stored nor rejected."""

    pending: int
    sent: int
    stored: int
    rejected: int
    oldest_unsettled_seconds: float | None

    @property
    def depth(self) -> int:
        """Entries that are neither stored nor rejected."""
        return self.pending + self.sent


class OutboxSource(NamedTuple):
    """One source of an outbox. One that is not current gets no more numbers, since it was `copied` or `damaged`."""

    id: str
    name: str
    last_sequence: int
    current: bool
    left_because: str | None

    @property
    def full_name(self) -> str:
        return full_source(self.name, self.id)


class EntryStatus(NamedTuple):
    """The state of one entry. `row_id` is set once it is stored, `reason` when it was rejected."""

    state: State
    row_id: int | None
    reason: str | None


class AuditEntry(NamedTuple):
    """One entry, as an audit compares it with the database."""

    sequence: int
    event_id: UUID
    state: State


class SettledKeys(NamedTuple):
    """Keys of acknowledgements: `changed` have settled an entry now, `known` are of one that was settled before."""

    changed: list[Any]
    known: list[Any]


def full_source(name: str, source_id: str) -> str:
    """The source as events and acknowledgements name it."""
    return f"{name}/{source_id}"
