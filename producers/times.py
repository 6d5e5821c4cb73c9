"""Naive times and the zone that they mean."""

from __future__ import annotations

from datetime import datetime, timedelta, tzinfo

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


class MachineZone(tzinfo):
    """The zone of this machine, with all its changes of offset, as the C library knows them."""

    def utcoffset(self, dt: datetime | None) -> timedelta | None:
        return None if dt is None else dt.replace(tzinfo=None).astimezone().utcoffset()

    def dst(self, dt: datetime | None) -> timedelta | None:  # noqa: ARG002  # tzinfo's signature
        return None

    def tzname(self, dt: datetime | None) -> str:  # noqa: ARG002  # tzinfo's signature
        return "this machine's time zone"

    def __str__(self) -> str:
        return self.tzname(None)
