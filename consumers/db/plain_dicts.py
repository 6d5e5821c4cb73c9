"""Snapshots and archives from plain dicts with naive local times and dates as text, as the old code passes them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, date, datetime, time, timedelta, tzinfo
from decimal import Decimal
from fractions import Fraction
from typing import Any

from producers.errors import InvalidEvent
from producers.events import PortfolioSnapshot, SignalArchive
from producers.fields import EPOCH, is_datetime, not_a_datetime, plain_number, type_name
from producers.settings import ZoneSettings
from producers.times import localized

# Epoch times of the years 2001 to 2286: their ranges in seconds, milliseconds, microseconds and nanoseconds do not
# overlap, so the unit is certain.
_FIRST_SECOND, _LAST_SECOND = 10**9, 10**10
_UNITS_PER_SECOND = (1, 10**3, 10**6, 10**9)
_EPOCH_TEXT = re.compile(r"[0-9]{9,}(\.[0-9]+)?")
# Neither a number nor ambiguous: most times are written so.
_PLAIN_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}[T ]([0-9]{2}:){2}[0-9]{2}(\.[0-9]{1,6})?([+-][0-9]{2}:[0-9]{2})?")
_ISO_EXAMPLE = "write it as in 2026-05-01T10:00:00+02:00"
_UTC_NAME = re.compile(r"(.*:[0-9]{2}(?:[.,][0-9]+)?) *(?:[+-]00:?00 +)?(?:UTC|GMT|Z)", re.IGNORECASE)
_BLANK_BEFORE_OFFSET = re.compile(r"(?<=[0-9]) +(?=[+-][0-9]{2}:?[0-9]{2}$)")
_AMBIGUOUS = (
    (re.compile(r"[0-9]{1,2}[/.-][0-9]{1,2}[/.-][0-9]{2,4}\b.*"), "has day and month in an order that is not certain"),
    (re.compile(r".*:[0-9]{2}([.,][0-9]+)? *(?!am|pm)[A-Z]{2,5}", re.IGNORECASE), "has a zone that is not certain"),
    # Python reads 2026-05-01+02:00 as two o'clock.
    (re.compile(r"[0-9]{4}-?[0-9]{2}-?[0-9]{2}[+-][0-9]{2}(:?[0-9]{2})?"), "has a date and an offset, but no time"),
)


def snapshot_of(plain: Mapping[str, Any]) -> PortfolioSnapshot:
    """Return the snapshot in a plain dict. Raises InvalidEvent, which names the key that is missing or wrong."""
    values = dict(plain)
    values["timestamp"] = _moment("timestamp", values)
    day = values.pop("date", values["timestamp"].date())
    values["snapshot_date"] = day_of(values.get("snapshot_date", day), "snapshot_date")
    return PortfolioSnapshot.checked(**values)


def archive_of(plain: Mapping[str, Any]) -> SignalArchive:
    """Return the archive in a plain dict. Raises InvalidEvent, which names the key that is missing or wrong."""
    values = dict(plain)
    values["archived_at"] = _moment("archived_at", values)
    if "signals_data" in values and "signals" not in values:
        values["signals"] = values.pop("signals_data")
    claimed = {name: values.pop(name) for name in ("archive_month", "signals_count") if name in values}
    checked = SignalArchive.checked(**values)
    for name, value in claimed.items():
        if value != getattr(checked, name):
            raise InvalidEvent.at(name, f"must be {getattr(checked, name)}, which follows from the other values")
    return checked


def zoned(moment: datetime, field: str) -> datetime:
    """Return `moment` with its own offset, else the local zone's. Raises InvalidEvent for an impossible time."""
    return localized(moment, ZoneSettings.from_environment().timezone, field)


def moment_of(value: Any, field: str, zone: tzinfo | None) -> datetime:
    """Return a datetime, ISO 8601 text or an epoch time as a datetime, with or without an offset.

    An epoch time is a number, or text with one, in seconds, milliseconds, microseconds or nanoseconds; the result has
    the offset of `zone` (None: this machine's zone). `UTC` and `GMT` in place of an offset are read too.

    Raises:
        InvalidEvent: `value` is none of these, or more than one time could be meant.
    """
    if is_datetime(value):
        return value
    if isinstance(value, str) and _PLAIN_TIME.fullmatch(value):
        try:
            return datetime.fromisoformat(value)
        except ValueError:  # such as month 13
            pass
    number = Decimal(value) if isinstance(value, str) and _EPOCH_TEXT.fullmatch(value.strip()) else _number(value)
    if number is not None:
        return _epoch_time(number, field).astimezone(zone)
    if not isinstance(value, str):
        raise InvalidEvent.at(field, not_a_datetime(value))
    return _time_in_text(value.strip(), field)


def _number(value: Any) -> int | Decimal | Fraction | None:
    return value if isinstance(value, Decimal) else None if isinstance(value, bool) else plain_number(value)


def _epoch_time(number: int | Decimal | Fraction, field: str) -> datetime:
    if isinstance(number, Decimal) and (not number.is_finite() or int(number.as_tuple().exponent) > 0):
        raise InvalidEvent.at(field, f"is a number that may have lost digits, such as 1.7E9; {_ISO_EXAMPLE}")
    for units in _UNITS_PER_SECOND:
        if _FIRST_SECOND * units <= number < _LAST_SECOND * units:
            return EPOCH + timedelta(microseconds=round(Fraction(number) * 10**6 / units))
    raise InvalidEvent.at(
        field, f"is a number, but not an epoch time in seconds or milliseconds from 2001 to 2286; {_ISO_EXAMPLE}"
    )


def _time_in_text(text: str, field: str) -> datetime:
    in_utc = _UTC_NAME.fullmatch(text)
    if in_utc is not None:
        text = f"{in_utc[1]}+00:00"
    text = _BLANK_BEFORE_OFFSET.sub("", text)
    for pattern, reason in _AMBIGUOUS:
        if pattern.fullmatch(text):
            raise InvalidEvent.at(field, f"{reason}; {_ISO_EXAMPLE}")
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        raise InvalidEvent.at(field, f"must be an ISO 8601 time; {_ISO_EXAMPLE}") from None


def day_of(value: Any, field: str) -> date:
    """Return a date; or as one, ISO 8601 text, and a time of `moment_of` that is midnight.

    Raises:
        InvalidEvent: `value` is none of these.
    """
    day = value if isinstance(value, date) else _date_in(value)
    if day is None:
        kind = "an ISO 8601 date" if isinstance(value, str) else f"a date, not {type_name(value)}"
        raise InvalidEvent.at(field, f"must be {kind}")
    return day


def _date_in(value: Any) -> date | None:
    if isinstance(value, str):
        try:
            return date.fromisoformat(value.strip())
        except ValueError:
            pass
    try:
        moment = moment_of(value, "date", UTC)
    except InvalidEvent:
        return None
    return moment.date() if moment.time() == time() else None


def _moment(field: str, values: Mapping[str, Any]) -> datetime:
    if field not in values:
        raise InvalidEvent.at(field, "is missing")
    zone = ZoneSettings.from_environment().timezone
    return localized(moment_of(values[field], field, zone), zone, field)
