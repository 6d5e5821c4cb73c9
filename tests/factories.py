"""Valid events and inputs with default values; a test overrides only the values that matter to it."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from typing import Any

from producers.events import PortfolioSnapshot, SignalArchive

INSTANT = datetime(2026, 11, 22, 17, 2, 46, 101234, tzinfo=UTC)


def a_signal(**overrides: Any) -> dict[str, Any]:
    signal = {
        "timestamp": "2026-11-22T17:02:44.871120",
        "market_id": "510372",
        "market_question": "Öffnet die Brücke? 🌉",
        "action": "buy_yes",
        "target_price": 0.455,
        "amount": 120,
        "confidence": 0.71,
        "reason": "Two reports.",
        "yes_price": 0.9995,
        "no_price": 0.0005,
        "market_liquidity": 18250.75,
        "market_volume": 240113,
        "event_id": None,
        "event_title": None,
        "event_end_date": None,
    }
    return signal | overrides


def a_snapshot(*, after: timedelta = timedelta(0), **overrides: Any) -> PortfolioSnapshot:
    values: dict[str, Any] = {
        "snapshot_date": date(2026, 11, 22),
        "timestamp": INSTANT + after,
        "balance": "9900.12",
        "total_invested": 100,
        "total_profit_loss": "197.25",
        "total_value": "10097.37",
        "open_positions": 1,
        "trade_count": 2,
        "portfolio_id": 1,
    }
    return PortfolioSnapshot.checked(**values | overrides)


def an_archive(*, after: timedelta = timedelta(0), **overrides: Any) -> SignalArchive:
    values: dict[str, Any] = {
        "archived_at": INSTANT + after,
        "signals": [a_signal(), a_signal(market_id="514006")],
        "portfolio_id": 1,
    }
    return SignalArchive.checked(**values | overrides)


def a_portfolio(**overrides: Any) -> dict[str, Any]:
    """Return the dict that a controller passes to create_daily_portfolio_snapshot."""
    position = {
        "trade_id": "t-1",
        "market_id": "510372",
        "market_question": "Öffnet die Brücke? 🌉",
        "action": "buy_yes",
        "amount": 100,
        "entry_price": 0.9995,
        "entry_timestamp": "2026-11-20T09:02:51.004512",
        "status": "open",
        "current_pnl": 1.5,
    }
    portfolio = {
        "balance": 9900.0,
        "total_invested": 100,
        "total_profit_loss": 87.350000000001,
        "trade_count": 2,
        "created_at": "2026-11-01T00:00:00",
        "last_updated": "2026-11-22T17:02:46.101234",
        "positions": [position, position | {"trade_id": "t-0", "status": "closed"}],
    }
    return portfolio | overrides


def an_old_snapshot(moment: datetime, **overrides: Any) -> dict[str, Any]:
    """Return an entry of portfolio_history.json; `moment` is the old controller's local time."""
    entry = {
        "date": moment.date().isoformat(),
        "timestamp": moment.isoformat(),
        "balance": 9900.0,
        "total_invested": 100.0,
        "total_profit_loss": 0.0,
        "total_value": 9987.350000000001,
        "open_positions": 1,
        "trade_count": 1,
    }
    return entry | overrides


def an_old_archive(moment: datetime, signals: list[dict[str, Any]]) -> dict[str, Any]:
    """Return an entry of signals_archive_YYYY-MM.json."""
    return {"archived_at": moment.isoformat(), "signals_count": len(signals), "signals": signals}
