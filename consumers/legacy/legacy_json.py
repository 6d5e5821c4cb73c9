"""Convert entries of the old controller's JSON files into events, and back.

The files have naive local times, and the newest entry is the last one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from datetime import date, datetime, tzinfo
from decimal import Decimal
from math import isfinite
from pathlib import Path
from typing import Any

import simplejson

from consumers.db.plain_dicts import day_of, moment_of
from producers import json_values
from producers.errors import InvalidEvent
from producers.events import PortfolioSnapshot, SignalArchive
from producers.fields import NUMBER, money_text, type_name
from producers.times import read_back, wall_clock, with_fixed_offset

SNAPSHOTS_FILE = "portfolio_history.json"
SNAPSHOT_KEYS = frozenset({
    "date", "snapshot_date", "timestamp", "balance", "total_invested", "total_profit_loss", "total_value",
    "open_positions", "trade_count", "portfolio_id",
})  # fmt: skip
# Of JSON values without inner values. A number is a float only if it is NaN or Infinity.
_FINITE_TYPES = frozenset({str, int, Decimal, bool, type(None)})
ARCHIVE_KEYS = frozenset({
    "archived_at", "archive_month", "signals_count", "signals", "signals_data", "portfolio_id",
})  # fmt: skip


def history_files(directory: Path) -> list[Path]:
    """Return the paths of portfolio_history.json and of every signals_archive_*.json in a folder, in this order."""
    # Include a folder or a dangling link with such a name: ignoring it would hide a history.
    snapshots = directory / SNAPSHOTS_FILE
    return [*([snapshots] if os.path.lexists(snapshots) else []), *sorted(directory.glob(archives_file("*")))]


def unread_files(directory: Path) -> list[Path]:
    """Return the paths in a folder whose names begin like those of history files, but which are not read as such."""
    beginnings = tuple(name.split(".")[0] for name in (SNAPSHOTS_FILE, archives_file("")))
    read = set(history_files(directory))
    return sorted(path for path in directory.iterdir() if path.name.startswith(beginnings) and path not in read)


def archives_file(month: str) -> str:
    """Return the name of the archives' file of a month, given as YYYY-MM."""
    return f"signals_archive_{month}.json"


def snapshot_from(
    data: Any, *, zone: tzinfo | None, portfolio_id: int | None, after: datetime | None = None
) -> PortfolioSnapshot:
    """Return the snapshot that one entry of portfolio_history.json describes.

    Times have one of the forms that `moment_of` reads; a naive time is local time in `zone` (None: this machine's
    zone). The entry's own `date` is kept, even if it is not the date of its time. The entry's own portfolio_id
    overrides the given one. `after` is the instant of the entry before this one. A local time that exists twice means
    the first instant, unless only the second one is not before `after`. A local time that does not exist is read with
    the offset from before the gap.

    Raises:
        InvalidEvent: a field is missing or invalid, or any field, also one with an unknown name, contains NaN or
            Infinity. The message names the field.
    """
    entry = _object(data)
    _require_finite(entry)
    moment = _moment(entry, "timestamp", zone, after)
    return PortfolioSnapshot.checked(
        snapshot_date=_day(entry, moment),
        timestamp=moment,
        balance=_amount(entry, "balance"),
        total_invested=_amount(entry, "total_invested"),
        total_profit_loss=_amount(entry, "total_profit_loss"),
        total_value=_amount(entry, "total_value"),
        open_positions=_count(entry, "open_positions"),
        trade_count=_count(entry, "trade_count"),
        portfolio_id=_portfolio(entry, portfolio_id),
    )


def archive_from(
    data: Any, *, zone: tzinfo | None, portfolio_id: int | None, after: datetime | None = None
) -> SignalArchive:
    """Return the archive that one entry of a signals_archive_*.json describes, by the rules of snapshot_from.

    The number of signals is the length of the array.
    """
    entry = _object(data)
    signals = _signals_key(entry)
    _require_finite({name: value for name, value in entry.items() if name != signals})
    return SignalArchive.checked(
        archived_at=_moment(entry, "archived_at", zone, after),
        signals=_given(entry, signals),
        portfolio_id=_portfolio(entry, portfolio_id),
    )


def null_for_nan(data: Any) -> tuple[Any, int]:
    """Return a copy of an archive's entry with null for each NaN and Infinity in its signals, and their number.

    The given entry is not changed. NaN outside the signals is kept.
    """
    found: list[float] = []
    nulled = [_null_for_nan(signal, found) if isinstance(signal, dict) else signal for signal in signals_in(data)]
    return (data | {_signals_key(data): nulled}, len(found)) if found else (data, 0)


def signals_in(data: Any) -> list[Any]:
    """Return the array of signals of an entry, with elements of any type. Without signals, return an empty array."""
    signals = data.get(_signals_key(data)) if isinstance(data, dict) else None
    return signals if isinstance(signals, list) else []


def _null_for_nan(value: Any, found: list[float], depth: int = 0) -> Any:
    if isinstance(value, float) and not isfinite(value):
        found.append(value)
        return None
    if isinstance(value, dict | list) and depth < json_values.MAX_NESTING:  # deeper values are rejected later
        if isinstance(value, dict):
            return {key: _null_for_nan(item, found, depth + 1) for key, item in value.items()}
        return [_null_for_nan(item, found, depth + 1) for item in value]
    return value


def notes_on(data: Mapping[str, Any], event: PortfolioSnapshot | SignalArchive) -> Iterator[str]:
    """Yield notes about differences between an entry and its event that do not make the entry invalid."""
    known = SNAPSHOT_KEYS if isinstance(event, PortfolioSnapshot) else ARCHIVE_KEYS
    if not data.keys() <= known:
        yield from (f"unknown key {key[:60]!a} was left out" for key in sorted(data.keys() - known))
    if isinstance(event, PortfolioSnapshot):
        if event.snapshot_date != event.timestamp.date():
            yield "date is not the date of timestamp and was kept"
    elif data.get("signals_count", event.signals_count) != event.signals_count:
        yield "signals_count was not the number of signals and was corrected"
    elif data.get("archive_month", event.archive_month) != event.archive_month:
        yield "archive_month was not the month of archived_at and was corrected"


def _object(data: Any) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise InvalidEvent.at("entry", f"must be an object, not {type_name(data)}")
    return data


def _signals_key(entry: Mapping[str, Any]) -> str:
    return "signals_data" if "signals" not in entry and "signals_data" in entry else "signals"


def _require_finite(members: dict[str, Any]) -> None:
    """Raise InvalidEvent for the first NaN or Infinity, at any depth.

    Without recursion, and with paths that share their steps, because an entry may be wide and deep.
    """
    if _FINITE_TYPES.issuperset(map(type, members.values())):
        return
    left: list[tuple[Any, json_values.Path]] = [(members, ())]
    while left:
        value, path = left.pop()
        if isinstance(value, float) and not isfinite(value):
            raise InvalidEvent.at(json_values.path_text(path), "must be finite, not NaN or Infinity")
        if isinstance(value, dict):
            left += [(item, (key, path)) for key, item in reversed(value.items())]
        elif isinstance(value, list):
            left += [(item, (index, path)) for index, item in reversed(list(enumerate(value)))]


def _given(entry: Mapping[str, Any], field: str) -> Any:
    value = entry.get(field)
    if value is None:
        raise InvalidEvent.at(field, "is missing")
    return value


def _amount(entry: Mapping[str, Any], field: str) -> Any:
    value = _given(entry, field)
    return value.strip() if isinstance(value, str) else value


def _count(entry: Mapping[str, Any], field: str) -> Any:
    value = _given(entry, field)
    if isinstance(value, int):
        return value
    try:
        number = Decimal(_plain(value) if isinstance(value, str) else value)
        # Check the range first: a huge exponent would become an int of a million digits.
        whole = number.is_finite() and abs(number) < 2**63 and number == number.to_integral_value()
    except (ArithmeticError, TypeError, ValueError):
        whole = False
    if not whole:
        raise InvalidEvent.at(field, "must be a whole number in the range of a count")
    return int(number)


def _plain(text: str) -> str:
    """Return `text` without surrounding blanks. Raise ValueError for forms that only Python accepts, such as 1_000."""
    if not NUMBER.fullmatch(text.strip()):
        raise ValueError
    return text.strip()


def _portfolio(entry: Mapping[str, Any], portfolio_id: int | None) -> int | None:
    own = entry.get("portfolio_id")
    if own is None:
        return portfolio_id
    try:
        return int(_plain(own)) if isinstance(own, str) else own  # old files also have numbers as text
    except ValueError:
        raise InvalidEvent.at("portfolio_id", "is text that is not an integer") from None


def _moment(entry: Mapping[str, Any], field: str, zone: tzinfo | None, after: datetime | None) -> datetime:
    moment = moment_of(_given(entry, field), field, zone)
    return read_back(moment, zone, after, field) if moment.utcoffset() is None else with_fixed_offset(moment)


def _day(entry: Mapping[str, Any], moment: datetime) -> date:
    field = "snapshot_date" if "snapshot_date" in entry else "date"
    day = entry.get(field)
    return moment.date() if day is None else day_of(day, field)


def snapshot_entry(snapshot: PortfolioSnapshot, zone: tzinfo | None) -> dict[str, Any]:
    """Return `snapshot` as an entry of portfolio_history.json, without its portfolio, which the format does not have.

    Its time is local time in `zone` (None: this machine's zone), without offset. Amounts are exact and have at least
    one decimal, like floats in JSON.
    """
    return {
        "date": snapshot.snapshot_date.isoformat(),
        "timestamp": wall_clock(snapshot.timestamp, zone).isoformat(),
        "balance": _float_like(snapshot.balance),
        "total_invested": _float_like(snapshot.total_invested),
        "total_profit_loss": _float_like(snapshot.total_profit_loss),
        "total_value": _float_like(snapshot.total_value),
        "open_positions": snapshot.open_positions,
        "trade_count": snapshot.trade_count,
    }


def archive_entry(
    archived_at: datetime, signals: simplejson.RawJSON, signals_count: int, zone: tzinfo | None
) -> dict[str, Any]:
    """Return an entry of a signals_archive_YYYY-MM.json. The JSON text of `signals` is written unchanged."""
    return {
        "archived_at": wall_clock(archived_at, zone).isoformat(),
        "signals_count": signals_count,
        "signals": signals,
    }


def _float_like(value: Decimal) -> Decimal:
    text = money_text(value)
    return Decimal(text if "." in text else f"{text}.0")
