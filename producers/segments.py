"""Segments of a source's chain of digests: up to 1,000 events each, at 4 bytes an event.

A segment has the numbers of its events, which of them were rejected, and the heads of the chain before and after it.
With the events themselves, the last head can be computed again: if one value has changed, it differs. The first four
bytes of each digest then say which event has changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

from producers.digests import CHAIN_START, chained

SEGMENT_EVENTS = 1000
PREFIX_BYTES = 4

Ranges = tuple[tuple[int, int], ...]


class Recorded(NamedTuple):
    """A settled event of a source: its number, whether it was rejected, and the digest of its content."""

    sequence: int
    rejected: bool
    digest: bytes


@dataclass(frozen=True)
class Segment:
    """Part of a source's chain.

    previous, head: heads of the chain before the segment's first event and after its last one, 32 bytes each.
    ranges: numbers of its events in the order of the chain, as inclusive ranges. A number may occur twice if copies of an
        outbox have used it.
    rejected: positions, in `sequences`, of the events that were rejected when they were added.
    prefixes: the first four bytes of each digest; empty if the outbox has deleted them to limit its size.
    """

    previous: bytes = CHAIN_START
    head: bytes = CHAIN_START
    ranges: Ranges = ()
    rejected: frozenset[int] = frozenset()
    prefixes: bytes = b""

    def extended(self, events: Sequence[Recorded]) -> Self:
        """Return this segment with more events at its end."""
        head, sequences = self.head, self.sequences
        for event in events:
            head = chained(head, *event)
        return type(self)(
            previous=self.previous,
            head=head,
            ranges=ranges_of([*sequences, *(event.sequence for event in events)]),
            rejected=self.rejected | {n for n, event in enumerate(events, len(sequences)) if event.rejected},
            prefixes=self.prefixes + b"".join(event.digest[:PREFIX_BYTES] for event in events),
        )

    def next(self) -> Self:
        """Return an empty segment that continues the chain after this one."""
        return type(self)(previous=self.head, head=self.head)

    def prefix(self, position: int) -> bytes | None:
        """Return the first bytes of the digest of the event at this position, or None if they were deleted."""
        start = position * PREFIX_BYTES
        return self.prefixes[start : start + PREFIX_BYTES] or None

    @property
    def sequences(self) -> list[int]:
        """The number of each event, in the order of the chain."""
        return [number for first, last in self.ranges for number in range(first, last + 1)]

    @property
    def room(self) -> int:
        """Number of events that may still be added; 0 if its prefixes were deleted."""
        is_whole = len(self.prefixes) == PREFIX_BYTES * len(self.sequences)
        return max(SEGMENT_EVENTS - len(self.sequences), 0) if is_whole else 0


def chain_of(events: Sequence[Recorded], last: Segment | None) -> list[Segment]:
    """Return the chain that continues a source's `last` segment with these events: `last` extended, then new segments.

    Without events, the list is empty.
    """
    segments: list[Segment] = []
    last, rest = last or Segment(), events
    while rest:
        if not last.room:
            last = last.next()
        last, rest = last.extended(rest[: last.room]), rest[last.room :]
        segments.append(last)
    return segments


def ranges_of(numbers: Iterable[int]) -> Ranges:
    """Return numbers as inclusive ranges, in their order: 4, 5, 6, 2 gives (4, 6), (2, 2)."""
    ranges: list[tuple[int, int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1] = (ranges[-1][0], number)
        else:
            ranges.append((number, number))
    return tuple(ranges)
