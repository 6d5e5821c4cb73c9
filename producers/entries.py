"""Records that an outbox returns: entries, their state, sources.

Entries are not frozen, which would double the time of making one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple
from uuid import UUID

from producers.redis_keys import job_id_of

State = Literal["pending", "sent", "stored", "rejected"]


@dataclass(frozen=True, slots=True)
class Accepted:
    """Identifiers of one event that `append` has accepted."""

    event_id: UUID
    source: str
    source_id: str
    sequence: int
    nonce: str


@dataclass(slots=True)
class EntryHead:
    """Entry without its event. `source` is the event's source, which is also in the key of its acknowledgement."""

    position: int
    source_id: str
    sequence: int
    nonce: str
    source: str
    checks: int

    @property
    def job_id(self) -> str:
        return job_id_of(self.source_id, self.sequence, self.nonce)


@dataclass(slots=True)
class Entry(EntryHead):
    """Entry with its event. `event` is the exact text of every delivery."""

    type: str
    summary: str
    event: str


@dataclass(frozen=True)
class OutboxStatus:
    """Number of entries in each state, and the age of the oldest unsettled entry (pending or sent)."""

    pending: int
    sent: int
    stored: int
    rejected: int
    oldest_unsettled_seconds: float | None

    @property
    def depth(self) -> int:
        """Number of unsettled entries."""
        return self.pending + self.sent


class OutboxGrowth(NamedTuple):
    """Growth of the unsettled entries in the last `seconds`: recorded minus settled.

    `kept` counts all entries. `event_bytes` is the mean size of the newest events.
    """

    entries: int
    kept: int
    seconds: float
    event_bytes: float = 0.0


class OutboxSource(NamedTuple):
    """Source of an outbox. If it is not `current`, it gets no new events; `left_because` is `copied` or `damaged`."""

    id: str
    name: str
    last_sequence: int
    current: bool
    left_because: str | None

    @property
    def full_name(self) -> str:
        return full_source(self.name, self.id)


class EntryStatus(NamedTuple):
    """State of one entry. `row_id` is set if it is stored, `reason` if it is rejected."""

    state: State
    row_id: int | None
    reason: str | None


class AuditEntry(NamedTuple):
    """Entry as an audit compares it with the database."""

    sequence: int
    event_id: UUID
    state: State


class SettledKeys(NamedTuple):
    """Keys of acknowledgements: `changed` settled an entry now; `known` name an entry but changed nothing.

    The entry of a known key was settled before, or has another event id.
    """

    changed: list[Any]
    known: list[Any]


def full_source(name: str, source_id: str) -> str:
    """Return the source as it is written in events and in the keys of acknowledgements."""
    return f"{name}/{source_id}"
