"""The old controller's JSON files: naive local times, the newest entry last; what they say as events, and back."""

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
ARCHIVE_KEYS = frozenset({
    "archived_at", "archive_month", "signals_count", "signals", "signals_data", "portfolio_id",
})  # fmt: skip


def history_files(directory: Path) -> list[Path]:
    """portfolio_history.json and every signals_archive_*.json of a folder, as far as they exist, in order."""
    # Whatever has such a name, be it a folder or a link that leads nowhere: to pass over it would hide a history.
    snapshots = directory / SNAPSHOTS_FILE
    return [*([snapshots] if os.path.lexists(snapshots) else []), *sorted(directory.glob(archives_file("*")))]


def archives_file(month: str) -> str:
    """The name of the file for `month`, which is YYYY-MM."""
    return f"signals_archive_{month}.json"


def snapshot_from(
    data: Any, *, zone: tzinfo | None, portfolio_id: int | None, after: datetime | None = None
) -> PortfolioSnapshot:
    """The event of one entry of portfolio_history.json. A naive time is in `zone` (None: this machine's).

    Its own `date` stands even when its time has another one; its own portfolio_id, if any, goes before the given one.
    `after` is the instant of the entry before it: of a local time that exists twice, the second is meant when only
    the first would lie before it. One that does not exist is read with the offset that was valid before the gap.

    Raises:
        InvalidEvent: a field is missing or wrong, or has NaN or Infinity in it, be its name known or not; the message
            names it.
    """
    entry = _object(data)
    _refuse_nan(entry)
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
    """The event of one entry of a signals_archive_*.json, in the same way; the array decides how many signals."""
    entry = _object(data)
    signals = _signals_key(entry)
    _refuse_nan({name: value for name, value in entry.items() if name != signals})
    return SignalArchive.checked(
        archived_at=_moment(entry, "archived_at", zone, after),
        signals=_given(entry, signals),
        portfolio_id=_portfolio(entry, portfolio_id),
    )


def null_for_nan(data: Any) -> tuple[Any, int]:
    """An archive's entry with null for each NaN and Infinity in its signals, and how many there were.

    The entry itself is left as it is, and so is everything of it that is no signal.
    """
    found: list[float] = []
    nulled = [_null_for_nan(signal, found) if isinstance(signal, dict) else signal for signal in signals_in(data)]
    return (data | {_signals_key(data): nulled}, len(found)) if found else (data, 0)


def signals_in(data: Any) -> list[Any]:
    """The array of signals of an entry, whatever its elements are; empty when it has none."""
    signals = data.get(_signals_key(data)) if isinstance(data, dict) else None
    return signals if isinstance(signals, list) else []


def _null_for_nan(value: Any, found: list[float], depth: int = 0) -> Any:
    if isinstance(value, float) and not isfinite(value):
        found.append(value)
        return None
    if isinstance(value, dict | list) and depth < json_values.MAX_NESTING:  # what is deeper is refused
        if isinstance(value, dict):
            return {key: _null_for_nan(item, found, depth + 1) for key, item in value.items()}
        return [_null_for_nan(item, found, depth + 1) for item in value]
    return value


def notes_on(data: Mapping[str, Any], event: PortfolioSnapshot | SignalArchive) -> Iterator[str]:
    """Notes on what an entry has that its event does not have, and that is no reason to refuse it."""
    known = SNAPSHOT_KEYS if isinstance(event, PortfolioSnapshot) else ARCHIVE_KEYS
    if not data.keys() <= known:
        yield from (f"unknown key {key[:60]!a} left out" for key in sorted(data.keys() - known))
    if isinstance(event, PortfolioSnapshot):
        if event.snapshot_date != event.timestamp.date():
            yield "date is not the date of timestamp, and was kept"
    elif data.get("signals_count", event.signals_count) != event.signals_count:
        yield "signals_count is not the number of signals, and was corrected"
    elif data.get("archive_month", event.archive_month) != event.archive_month:
        yield "archive_month is not the month of archived_at, and was corrected"


def _object(data: Any) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise InvalidEvent.at("entry", f"must be an object, not {type_name(data)}")
    return data


def _signals_key(entry: Mapping[str, Any]) -> str:
    return "signals_data" if "signals" not in entry and "signals_data" in entry else "signals"


def _refuse_nan(members: dict[str, Any]) -> None:
    """Raise for the first NaN or Infinity, at any depth; without recursion, and with paths that share their steps."""
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
        # A number far out of range must not become an int of a million digits first.
        whole = number.is_finite() and abs(number) < 2**63 and number == number.to_integral_value()
    except (ArithmeticError, TypeError, ValueError):
        whole = False
    if not whole:
        raise InvalidEvent.at(field, "must be a whole number in the range of a count")
    return int(number)


def _plain(text: str) -> str:
    """`text` without blanks. Raises ValueError if it is no plain number, such as 1_000, which Python accepts."""
    if not NUMBER.fullmatch(text.strip()):
        raise ValueError
    return text.strip()


def _portfolio(entry: Mapping[str, Any], portfolio_id: int | None) -> int | None:
    own = entry.get("portfolio_id")
    if own is None:
        return portfolio_id
    try:
        return int(_plain(own)) if isinstance(own, str) else own  # as numbers come as text elsewhere
    except ValueError:
        raise InvalidEvent.at("portfolio_id", "is text that is not an integer") from None


def _moment(entry: Mapping[str, Any], field: str, zone: tzinfo | None, after: datetime | None) -> datetime:
    moment = moment_of(_given(entry, field), field)
    return read_back(moment, zone, after, field) if moment.utcoffset() is None else with_fixed_offset(moment, field)


def _day(entry: Mapping[str, Any], moment: datetime) -> date:
    field = "snapshot_date" if "snapshot_date" in entry else "date"
    day = entry.get(field)
    return moment.date() if day is None else day_of(day, field)


def snapshot_entry(snapshot: PortfolioSnapshot, zone: tzinfo | None) -> dict[str, Any]:
    """`snapshot` as an entry of portfolio_history.json, without its portfolio, which the format does not have.

    Its time is what a clock in `zone` (None: this machine's zone) showed, without the offset. Amounts
    are exact and have at least one decimal, as floats have in JSON.
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
    """An entry of a signals_archive_YYYY-MM.json; the JSON text of `signals` is written as it stands."""
    return {
        "archived_at": wall_clock(archived_at, zone).isoformat(),
        "signals_count": signals_count,
        "signals": signals,
    }


def _float_like(value: Decimal) -> Decimal:
    text = money_text(value)
    return Decimal(text if "." in text else f"{text}.0")
