"""Naive times and the zone that they mean; pauses between tries."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timezone, tzinfo
from zoneinfo import ZoneInfo

from producers.errors import InvalidEvent
from producers.fields import TIME_RANGE

_random = random.SystemRandom()  # not the module's own state, which belongs to the program that records


def backoff_seconds(failures: int, *, first: float, last: float) -> float:
    """The pause after so many failed tries in a row: `first`, doubled after each further one, `last` at the most.

    A random half to all of that, so that those that failed together do not try again together.
    """
    ceiling = min(first * 2.0 ** min(failures - 1, 20), last)
    return _random.uniform(ceiling / 2, ceiling)


def zone_named(name: str) -> ZoneInfo:
    """Raises ValueError, which says what such a name looks like."""
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        raise ValueError("is not a time zone of the IANA database, such as Europe/Berlin") from None


def localized(moment: datetime, zone: tzinfo | None, field: str) -> datetime:
    """`moment` with an offset: its own, else that of `zone`, else (None) that of this machine's zone.

    Raises:
        InvalidEvent: it is too near to the first or last year for an offset; the message begins with `field`.
    """
    try:
        if moment.utcoffset() is not None:
            return moment
        return moment.astimezone() if zone is None else moment.replace(tzinfo=zone)
    except (ValueError, OverflowError):
        raise InvalidEvent.at(field, TIME_RANGE) from None


def wall_clock(instant: datetime, zone: tzinfo | None) -> datetime:
    """The time that a clock in `zone` (None: this machine's zone) shows at `instant`, without offset.

    In an hour that is shown twice, as the clock is set back, this loses which of the two it is: see `read_back`.
    """
    return instant.astimezone(zone).replace(tzinfo=None, fold=0)


def read_back(shown: datetime, zone: tzinfo | None, after: datetime | None, field: str) -> datetime:
    """The instant of a naive time in `zone`, in a series whose previous entry was at `after`; with its offset alone.

    A time that occurs twice is the second one if only the first would lie before `after`, else the first. A time that
    does not occur is read with the offset that was valid before the gap.

    Raises:
        InvalidEvent: it is too near to the first or last year for an offset; the message begins with `field`.
    """
    first = with_fixed_offset(localized(shown, zone, field), field)
    if after is None or first >= after:
        return first
    second = with_fixed_offset(localized(shown.replace(fold=1), zone, field), field)
    return second if second >= after else first


def with_fixed_offset(moment: datetime, field: str) -> datetime:
    """With its offset alone: two times of one zone would compare by their clocks, not by their instants."""
    try:
        offset = moment.utcoffset()
    except (ValueError, OverflowError):
        raise InvalidEvent.at(field, TIME_RANGE) from None
    if offset is None:
        raise InvalidEvent.at(field, "has no UTC offset")
    return moment.replace(tzinfo=UTC if not offset else timezone(offset), fold=0)
