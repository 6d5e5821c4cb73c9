"""The chain of digests of one source, in segments of up to 1,000 events, at 8 bytes an event.

A segment has the numbers of its events, which of them were rejected, the first bytes of each digest, and the heads of
the chain before and after it. If the content of one event has changed, the head that is computed from all of them
differs, and the first bytes of its digest say which event it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import NamedTuple, Self

CHAIN_START = bytes(32)  # the head before the first event of a source
SEGMENT_EVENTS = 1000
PREFIX_BYTES = 8

Ranges = tuple[tuple[int, int], ...]


class SettledEvent(NamedTuple):
    """A settled event of a source: its number, whether it was rejected, and the digest of its content."""

    sequence: int
    rejected: bool
    digest: bytes


def next_head(head: bytes, sequence: int, rejected: bool, digest: bytes) -> bytes:
    """Return the head of a source's chain after an event, from the head before it."""
    return sha256(head + sequence.to_bytes(8) + bytes([rejected]) + digest).digest()


@dataclass(frozen=True)
class Segment:
    """Part of a source's chain.

    previous_head, head: heads of the chain before the segment's first event and after its last one, 32 bytes each.
    ranges: numbers of its events in the order of the chain, as inclusive ranges. A number may occur twice if copies of
        an outbox have used it.
    rejected: positions, in `sequences`, of the events that were rejected when they were added.
    prefixes: the first 8 bytes of each digest.
    """

    previous_head: bytes = CHAIN_START
    head: bytes = CHAIN_START
    ranges: Ranges = ()
    rejected: frozenset[int] = frozenset()
    prefixes: bytes = b""

    @property
    def sequences(self) -> list[int]:
        """The number of each event, in the order of the chain."""
        return [number for first, last in self.ranges for number in range(first, last + 1)]

    @property
    def free_places(self) -> int:
        """Number of events that may still be added."""
        return max(SEGMENT_EVENTS - len(self.prefixes) // PREFIX_BYTES, 0)

    def prefix(self, position: int) -> bytes:
        """Return the first bytes of the digest of the event at this position."""
        return self.prefixes[position * PREFIX_BYTES : (position + 1) * PREFIX_BYTES]

    def extended(self, events: Sequence[SettledEvent]) -> Self:
        """Return this segment with more events at its end."""
        head, sequences = self.head, self.sequences
        for event in events:
            head = next_head(head, *event)
        return type(self)(
            previous_head=self.previous_head,
            head=head,
            ranges=ranges_of([*sequences, *(event.sequence for event in events)]),
            rejected=self.rejected | {n for n, event in enumerate(events, len(sequences)) if event.rejected},
            prefixes=self.prefixes + b"".join(event.digest[:PREFIX_BYTES] for event in events),
        )

    def empty_successor(self) -> Self:
        """Return a segment without events that continues the chain after this one."""
        return type(self)(previous_head=self.head, head=self.head)


def continued(last: Segment | None, events: Sequence[SettledEvent]) -> list[Segment]:
    """Return the segments that have changed after these events: `last`, if it had free places, and the new ones."""
    segments: list[Segment] = []
    last, rest = last or Segment(), events
    while rest:
        if not last.free_places:
            last = last.empty_successor()
        last, rest = last.extended(rest[: last.free_places]), rest[last.free_places :]
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
