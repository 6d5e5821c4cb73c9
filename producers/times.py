"""Naive times and their zone; deadlines, and pauses between retries."""

from __future__ import annotations

import difflib
import math
import random
import re
import time
from contextlib import suppress
from datetime import datetime, timezone, tzinfo
from zoneinfo import ZoneInfo, available_timezones

from producers.errors import InvalidEvent
from producers.fields import TIME_RANGE, plain_datetime

_SIMILAR = 0.85  # of difflib: one letter in ten differs
_FIXED_OFFSET = re.compile(r"(?:UTC|GMT)? *(?P<sign>[+-])(?P<hours>\d{1,2})(?::?(?P<minutes>\d{2}))?", re.IGNORECASE)
# Files of the system beside those of zones. What they contain differs from machine to machine, or counts leap seconds.
_NO_ZONES = re.compile(r"localtime|posixrules|Factory|(?:posix|right)/.*")
_random = random.SystemRandom()  # leaves the state of the module `random` to the program that records


def backoff_seconds(failures: int, *, first: float, last: float) -> float:
    """Return the pause after the given number of consecutive failures: `first`, doubled each time, at most `last`.

    The result is a random 50 to 100 % of that, so that processes that failed together do not retry together.
    """
    ceiling = min(first * 2.0 ** min(failures - 1, 20), last)
    return _random.uniform(ceiling / 2, ceiling)


def deadline_after(timeout: float | None) -> float | None:
    """Return the time of the monotonic clock at which a wait of `timeout` seconds ends; None if it has no limit.

    Raises:
        ValueError: the timeout is NaN; such a wait would never end.
    """
    if timeout is None:
        return None
    if math.isnan(timeout):
        raise ValueError("timeout: must be a number of seconds, not NaN")
    return time.monotonic() + timeout


def zone_named(name: str) -> ZoneInfo:
    """Return the time zone of this name.

    Raises:
        ValueError: there is no such zone; the message has the most similar name, or an example.
    """
    with suppress(KeyError, ValueError, OSError):
        if not _NO_ZONES.fullmatch(name):
            return ZoneInfo(name)
    raise ValueError(_unknown_zone(name))


def _unknown_zone(name: str) -> str:
    zones = {zone.casefold(): zone for zone in sorted(available_timezones()) if not _NO_ZONES.fullmatch(zone)}
    if not zones:
        return "no time zone can be read, because this Python has no time zone data: run pip install tzdata"
    if fixed := _FIXED_OFFSET.fullmatch(name.strip()):
        return _fixed_zone(fixed)
    # A sign may be meant either way, so none is suggested.
    zones = {folded: zone for folded, zone in zones.items() if "+" not in zone and "-" not in zone[-3:]}
    asked = name.strip().casefold().replace(" ", "_")
    cities = [zone for folded, zone in zones.items() if folded.rpartition("/")[2] == asked.rpartition("/")[2]]
    # Short names, such as EST5, are similar to names of other zones.
    similar = difflib.get_close_matches(asked, zones, 1, _SIMILAR) if len(asked) > 5 else []
    found = zones.get(asked) or next((zones[one] for one in similar), None) or next(iter(cities), None)
    if found is None:
        return "must be the name of an IANA time zone, such as Europe/Berlin"
    return f"must be the name of an IANA time zone: did you mean {found}?"


def _fixed_zone(offset: re.Match[str]) -> str:
    """Return the message for an offset such as UTC+2: zones of fixed offsets are named with the opposite sign."""
    hours, minutes = int(offset["hours"]), int(offset["minutes"] or 0)
    example = "must be the name of an IANA time zone, such as Europe/Berlin"
    if minutes or hours > (14 if offset["sign"] == "+" else 12):
        return example
    opposite = "-" if offset["sign"] == "+" else "+"
    zone = f"Etc/GMT{opposite}{hours}" if hours else "UTC"
    sign = " (the sign in these names is the opposite one)" if hours else ""
    return f"{example}; for the fixed offset {offset['sign']}{hours:02}:00, write {zone}{sign}"


def localized(moment: datetime, zone: tzinfo | None, field: str) -> datetime:
    """Return `moment` with a UTC offset: its own, or if it is naive, that of `zone` (None: this machine's zone).

    Raises:
        InvalidEvent: the time is too close to the year 1 or 9999 for an offset; the message begins with `field`.
    """
    moment = plain_datetime(moment)
    try:
        if moment.utcoffset() is not None:
            return moment
        return moment.astimezone() if zone is None else moment.replace(tzinfo=zone)
    except (ValueError, OverflowError):
        raise InvalidEvent.at(field, TIME_RANGE) from None


def wall_clock(instant: datetime, zone: tzinfo | None) -> datetime:
    """Return the naive time that a clock in `zone` (None: this machine's zone) shows at `instant`.

    If that hour occurs twice, because the clock was set back, the result does not say which one it is; see `read_back`.
    """
    return instant.astimezone(zone).replace(tzinfo=None, fold=0)


def read_back(shown: datetime, zone: tzinfo | None, after: datetime | None, field: str) -> datetime:
    """Return the instant of a naive time in `zone`, in a series whose previous entry was at `after`.

    If the time occurs twice, take the first occurrence unless it is before `after` and the second one is not. If the
    time does not occur, use the offset that was valid before the gap. The result has a fixed offset.

    Raises:
        InvalidEvent: the time is too close to the year 1 or 9999 for an offset; the message begins with `field`.
    """
    first = with_fixed_offset(localized(shown, zone, field))
    if after is None or first >= after:
        return first
    second = with_fixed_offset(localized(shown.replace(fold=1), zone, field))
    return second if second >= after else first


def with_fixed_offset(moment: datetime) -> datetime:
    """Return an aware time with a fixed offset instead of a zone: Python compares times in one zone without offsets."""
    offset = moment.utcoffset()
    assert offset is not None
    return moment.replace(tzinfo=timezone(offset))
