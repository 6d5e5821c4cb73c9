"""Snapshots and archives from plain dicts with naive local times and dates as text, as the old code passes them."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date, datetime
from typing import Any

from producers.errors import InvalidEvent
from producers.events import PortfolioSnapshot, SignalArchive
from producers.fields import type_name
from producers.settings import ZoneSettings
from producers.times import localized


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


def moment_of(value: Any, field: str) -> datetime:
    """Return a datetime, or ISO 8601 text as one, with or without an offset. Raises InvalidEvent for anything else."""
    try:
        moment = datetime.fromisoformat(value.strip()) if isinstance(value, str) else value
    except ValueError:
        raise InvalidEvent.at(field, "must be an ISO 8601 time") from None
    if not isinstance(moment, datetime):
        raise InvalidEvent.at(field, f"must be a time, not {type_name(moment)}")
    return moment


def day_of(value: Any, field: str) -> date:
    """Return a date, or ISO 8601 text as one. Raises InvalidEvent for anything else."""
    try:
        day = date.fromisoformat(value.strip()) if isinstance(value, str) else value
    except ValueError:
        raise InvalidEvent.at(field, "must be an ISO 8601 date") from None
    if not isinstance(day, date):
        raise InvalidEvent.at(field, f"must be a date, not {type_name(day)}")
    return day


def _moment(field: str, values: Mapping[str, Any]) -> datetime:
    if field not in values:
        raise InvalidEvent.at(field, "is missing")
    return zoned(moment_of(values[field], field), field)
