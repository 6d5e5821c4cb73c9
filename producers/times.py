"""Naive times and the zone that they mean."""

from __future__ import annotations

from datetime import datetime, tzinfo

from producers.errors import InvalidEvent
from producers.fields import TIME_RANGE


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
