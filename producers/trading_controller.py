"""The two calls of a trading cycle: record the portfolio's snapshot, archive the current signals.

Both validate, append to the outbox on local disk and return; neither waits for Redis or PostgreSQL.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from datetime import datetime
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any

from producers.current_signals import read_signals
from producers.errors import InvalidEvent
from producers.events import PortfolioSnapshot, SignalArchive
from producers.fields import as_money, money_sum, readable, type_name
from producers.history_producer import HistoryProducer, Receipt
from producers.redirection import Redirection, active_redirection

_SHOWN_KEYS = 10
_KEY_CHARACTERS = 40

_shared: dict[Redirection | None, HistoryProducer] = {}
_sharing = threading.Lock()


def _share_after_fork() -> None:
    # Another thread may have held it, and that thread does not exist in the child.
    global _sharing
    _sharing = threading.Lock()


os.register_at_fork(after_in_child=_share_after_fork)


def create_daily_portfolio_snapshot(
    portfolio_data: Mapping[str, Any],
    portfolio_id: int | None = None,
    *,
    timestamp: datetime | None = None,
    producer: HistoryProducer | None = None,
) -> Receipt:
    """Record what the portfolio is worth now; when this returns, the snapshot is durable.

    `portfolio_data` has balance (or current_balance), total_invested, total_profit_loss, trade_count and
    positions, and may have total_value; other keys are ignored. balance wins over current_balance, and one of
    them must be there; other numbers that are missing count as 0. total_value is then balance +
    total_profit_loss. Numbers are of any type of numbers.Real, or Decimals: NumPy's too, and text that is a number.
    A position is open if its status is "open" in upper or lower case.
    Pass the cycle's own time as `timestamp` and a repeated cycle records the same snapshot, not another one.
    Without `producer`, all calls of a process share one.

    Raises:
        InvalidEvent: neither balance nor current_balance is there, and the message lists the keys that are; or a
            value is of the wrong type or out of range, and the message names it.
        OutboxError: the outbox cannot be written; nothing was recorded.
        SettingsError: there is no producer and the settings do not describe one.
    """
    producer = producer or shared_producer()
    if not isinstance(portfolio_data, Mapping):
        raise InvalidEvent.at("portfolio_data", f"must be a mapping, not {type_name(portfolio_data)}")
    moment = _moment("timestamp", timestamp, producer)
    amounts = _amounts(portfolio_data)
    snapshot = PortfolioSnapshot.checked(
        snapshot_date=moment.date(),
        timestamp=moment,
        open_positions=_open_positions(portfolio_data.get("positions", [])),
        trade_count=portfolio_data.get("trade_count", 0),
        portfolio_id=portfolio_id,
        **amounts,
    )
    return producer.record(snapshot)


def archive_current_signals(
    signals: list[dict[str, Any]] | Mapping[str, Any] | None = None,
    *,
    signals_path: Path | str = "data/trades/current_signals.json",
    signals_url: str | None = None,
    portfolio_id: int | None = None,
    archived_at: datetime | None = None,
    producer: HistoryProducer | None = None,
) -> Receipt | None:
    """Archive the signals of this cycle; None when there are none. When this returns, they are durable.

    They are `signals` (an array, or an API's object with the array under "signals"), else what `signals_url`
    answers within 5 s, else the content of `signals_path`, which is only read. A file that is missing or empty
    means none. Pass the cycle's own time as `archived_at` and a repeated cycle archives once.

    Raises:
        InvalidEvent: a signal is no JSON object, or holds what JSON or PostgreSQL cannot; the message says where.
        SignalsUnreadable: the file or the URL's answer is broken, or late; the message names it and the position.
        OutboxError: the outbox cannot be written; nothing was recorded.
        SettingsError: there is no producer and the settings do not describe one.
    """
    producer = producer or shared_producer()
    moment = _moment("archived_at", archived_at, producer)
    found = read_signals(signals, signals_url=signals_url, signals_path=Path(signals_path))
    if not found:
        return None
    return producer.record(SignalArchive.checked(archived_at=moment, signals=found, portfolio_id=portfolio_id))


def _moment(field: str, given: datetime | None, producer: HistoryProducer) -> datetime:
    if given is None:
        return producer.now()
    if not isinstance(given, datetime):
        raise InvalidEvent.at(field, f"must be a datetime, not {type_name(given)}")
    return producer.localized(given, field)


def _amounts(portfolio: Mapping[str, Any]) -> dict[str, Decimal]:
    """The four amounts, each under the name that the event gives it; errors use the caller's name."""
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
    # An error's answer or another API's portfolio would become a row of zeros.
    raise InvalidEvent.at("portfolio_data", f"must have 'balance' or 'current_balance'; {_keys_found(portfolio)}")


def _keys_found(portfolio: Mapping[Any, Any]) -> str:
    """The keys for a message, without values; they may be many, long and anything: of others than text, the type."""
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
    # An enum's member, say, would never count, however many positions are open.
    raise InvalidEvent.at(f"positions.{index}.status", f"must be text, not {type_name(status)}")


def shared_producer() -> HistoryProducer:
    """The producer that all calls without `producer` share; tests that redirect producers have one of their own.

    Raises:
        SettingsError: it has to be made, and the settings do not describe one.
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
