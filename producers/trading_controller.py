"""The two calls that a controller makes in each trading cycle: record a portfolio snapshot, archive the signals.

Both validate their input, append an event to the outbox on local disk and return, without waiting for any server.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from datetime import UTC, datetime, tzinfo
from decimal import Decimal
from enum import Enum
from itertools import islice
from pathlib import Path
from typing import Any

from producers.current_signals import read_signals
from producers.errors import InvalidEvent
from producers.events import PortfolioSnapshot, SignalArchive
from producers.fields import as_money, is_datetime, money_sum, not_a_datetime, readable, type_name
from producers.history_producer import HistoryProducer, Receipt
from producers.redirection import Redirection, active_redirection
from producers.settings import ZoneSettings
from producers.times import localized

_SHOWN_KEYS = 10
_KEY_CHARACTERS = 40

_shared: dict[Redirection | None, HistoryProducer] = {}
_sharing = threading.Lock()


def _renew_lock_after_fork() -> None:
    # Another thread of the parent may have locked it, and that thread does not exist in the child.
    global _sharing
    _sharing = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock_after_fork)


def create_daily_portfolio_snapshot(
    portfolio_data: Mapping[str, Any],
    portfolio_id: int | None = None,
    *,
    timestamp: datetime | None = None,
    producer: HistoryProducer | None = None,
    traceparent: str | None = None,
) -> Receipt:
    """Record a snapshot of the portfolio. When the call returns, the snapshot is on disk.

    Args:
        portfolio_data: The controller's dict. The keys balance (or current_balance; balance takes precedence),
            total_invested, total_profit_loss, total_value, trade_count and positions are read, all others are ignored.
            One of the two balances is required. Other missing numbers are 0, and a missing total_value is balance +
            total_profit_loss, which leaves out invested money. An amount is any numbers.Real (NumPy's included), a
            Decimal, or text that is a number; trade_count is any numbers.Integral. A position is open if its status is
            "open", in upper or lower case.
        portfolio_id: An integer that distinguishes several portfolios.
        timestamp: The time of the trading cycle, by default now. If a repeated cycle passes the same time, it records
            the same snapshot, which is stored once. A naive time is in HISTORY_TIMEZONE.
        producer: By default, all calls in a process share one producer, made from the settings.
        traceparent: The W3C trace context that the worker's log lines about the event have, by default that of
            OpenTelemetry's current context, if the program uses OpenTelemetry.

    Raises:
        InvalidEvent: `portfolio_data` has no balance (the message lists its keys), or a value has the wrong type or
            is out of range (the message names the field).
        OutboxError: the outbox cannot be written; nothing was recorded.
        SettingsError: the shared producer cannot be made, because a setting is missing or wrong.
        ProducerClosed: `producer` is closed; nothing was recorded.
    """
    producer = producer or shared_producer()
    snapshot = snapshot_of(portfolio_data, portfolio_id, timestamp, producer.timezone)
    return producer.record(snapshot, traceparent=traceparent)


def archive_current_signals(
    signals: list[dict[str, Any]] | Mapping[str, Any] | None = None,
    *,
    signals_path: Path | str = "data/trades/current_signals.json",
    signals_url: str | None = None,
    portfolio_id: int | None = None,
    archived_at: datetime | None = None,
    producer: HistoryProducer | None = None,
    traceparent: str | None = None,
) -> Receipt | None:
    """Archive the signals of a trading cycle. When the call returns, they are on disk.

    Args:
        signals: A list of dicts, or a dict with such a list under "signals".
        signals_path: A JSON file with the same content, read if neither `signals` nor `signals_url` is given. It is
            never written. A missing or empty file means that there are no signals.
        signals_url: A URL that returns the same content as JSON, read if `signals` is not given. The call waits for
            it, for at most 5 s.
        portfolio_id: An integer that distinguishes several portfolios.
        archived_at: The time of the trading cycle, by default now. If a repeated cycle passes the same time, it
            records the same archive, which is stored once. A naive time is in HISTORY_TIMEZONE.
        producer: By default, all calls in a process share one producer, made from the settings.
        traceparent: The W3C trace context that the worker's log lines about the event have, by default that of
            OpenTelemetry's current context, if the program uses OpenTelemetry.

    Returns:
        The receipt, or None if there are no signals and nothing was recorded.

    Raises:
        InvalidEvent: a signal is not a JSON object, or has a value that JSON or PostgreSQL cannot represent; the
            message says where.
        SignalsUnreadable: the file or the URL's response is not valid JSON, or the response is late; the message
            names the source and the position.
        OutboxError: the outbox cannot be written; nothing was recorded.
        SettingsError: the shared producer cannot be made, because a setting is missing or wrong.
        ProducerClosed: `producer` is closed; nothing was recorded.
    """
    producer = producer or shared_producer()
    moment = cycle_time("archived_at", archived_at, producer.timezone)
    found = read_signals(signals, signals_url=signals_url, signals_path=Path(signals_path))
    if not found:
        return None
    archive = SignalArchive.checked(archived_at=moment, signals=found, portfolio_id=portfolio_id)
    return producer.record(archive, traceparent=traceparent)


def snapshot_of(
    portfolio_data: Mapping[str, Any], portfolio_id: int | None, timestamp: datetime | None, zone: tzinfo | None
) -> PortfolioSnapshot:
    """Return the snapshot that `create_daily_portfolio_snapshot` records. It keeps no object of the caller.

    Raises:
        InvalidEvent: as in `create_daily_portfolio_snapshot`.
    """
    if not isinstance(portfolio_data, Mapping):
        raise InvalidEvent.at("portfolio_data", f"must be a mapping, not {type_name(portfolio_data)}")
    moment = cycle_time("timestamp", timestamp, zone)
    amounts = _amounts(portfolio_data)
    return PortfolioSnapshot.checked(
        snapshot_date=moment.date(),
        timestamp=moment,
        open_positions=_open_positions(portfolio_data.get("positions", [])),
        trade_count=portfolio_data.get("trade_count", 0),
        portfolio_id=portfolio_id,
        **amounts,
    )


def cycle_time(field: str, given: datetime | None, zone: tzinfo | None) -> datetime:
    """Return the given time, or the current one, with an offset. A naive time is in `zone` (None: the machine's zone).

    Raises:
        InvalidEvent: it is not a time, or out of range; the message begins with `field`.
    """
    if given is None:
        return datetime.now(UTC).astimezone(zone)
    if not is_datetime(given):
        raise InvalidEvent.at(field, not_a_datetime(given))
    return localized(given, zone, field)


def _amounts(portfolio: Mapping[str, Any]) -> dict[str, Decimal]:
    """Return the four amounts under the event's field names. Errors use the caller's names."""
    balance_name = _balance_name(portfolio)
    balance = as_money(portfolio[balance_name], balance_name)
    profit_loss = as_money(portfolio.get("total_profit_loss", 0), "total_profit_loss")
    return {
        "balance": balance,
        "total_invested": as_money(portfolio.get("total_invested", 0), "total_invested"),
        "total_profit_loss": profit_loss,
        "total_value": as_money(portfolio.get("total_value", money_sum(balance, profit_loss)), "total_value"),
    }


def _balance_name(portfolio: Mapping[str, Any]) -> str:
    for name in ("balance", "current_balance"):
        if name in portfolio:
            return name
    # Without this check, an API's error response would become a row of zeros.
    raise InvalidEvent.at("portfolio_data", f"must have 'balance' or 'current_balance'; {_keys_found(portfolio)}")


def _keys_found(portfolio: Mapping[Any, Any]) -> str:
    """Return the first keys for a message, shortened and without values; for a key that is not text, its type."""
    shown = [
        f"'{readable(key, _KEY_CHARACTERS)}'" if isinstance(key, str) else f"({type_name(key)})"
        for key in islice(portfolio, _SHOWN_KEYS)
    ]
    more = len(portfolio) - len(shown)
    return f"its keys are {', '.join(shown) or '(none)'}" + (f" and {more} more" if more > 0 else "")


def _open_positions(positions: Any) -> int:
    if not isinstance(positions, list | tuple):
        raise InvalidEvent.at("positions", f"must be a list, not {type_name(positions)}")
    return sum(_is_open(index, position) for index, position in enumerate(positions))


def _is_open(index: int, position: Any) -> bool:
    if not isinstance(position, Mapping):
        raise InvalidEvent.at(f"positions.{index}", f"must be a mapping, not {type_name(position)}")
    status = position.get("status")
    if isinstance(status, str):
        return status.lower() == "open"
    if status is None:
        return False
    # Otherwise a position whose status is an enum member, for example, would never count as open.
    instead = ": pass its .value" if isinstance(status, Enum) else ""
    raise InvalidEvent.at(f"positions.{index}.status", f"must be text, not {type_name(status)}{instead}")


def shared_producer() -> HistoryProducer:
    """Return the producer that all calls without `producer` share. Each redirection has a separate one.

    If there is none yet, or it is closed, make one from the settings.

    Raises:
        SettingsError: a setting is missing or wrong.
        OutboxError: the outbox cannot be opened.
    """
    with _sharing:
        redirection = active_redirection()
        producer = _shared.get(redirection)
        if producer is None or producer.closed:
            producer = HistoryProducer()
            for key in [key for key, one in _shared.items() if one.closed]:
                del _shared[key]
            _shared[redirection] = producer
        return producer


def zone_of(producer: HistoryProducer | None) -> tzinfo | None:
    """Return the zone of naive times of `producer`, or of the shared one, which need not be open yet.

    Raises:
        SettingsError: the setting is wrong.
    """
    redirection = active_redirection()
    known = producer or _shared.get(redirection)
    return ZoneSettings.from_environment(dotenv=redirection is None).timezone if known is None else known.timezone
