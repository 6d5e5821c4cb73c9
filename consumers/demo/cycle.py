"""Simulated trading cycles: the same three months on every run, from the JSON files beside this module."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

FIRST_CYCLE = datetime(2026, 4, 1, 17, 2, 46, 101234, tzinfo=UTC)
DAYS = 91
PORTFOLIO_IDS = (1, 2)


@dataclass(frozen=True)
class Cycle:
    """Arguments of the two producer calls of one trading cycle."""

    portfolio_id: int
    at: datetime
    portfolio: dict[str, Any]
    signals: list[dict[str, Any]]


def cycles() -> Iterator[Cycle]:
    """Yield one cycle per day and portfolio, oldest first."""
    folder = Path(__file__).parent
    portfolio = json.loads((folder / "portfolio.json").read_text("utf-8"))
    signals = json.loads((folder / "current_signals.json").read_text("utf-8"))
    dice = random.Random(20260401)
    portfolios = {portfolio_id: deepcopy(portfolio) for portfolio_id in PORTFOLIO_IDS}
    for day in range(DAYS):
        for portfolio_id, state in portfolios.items():
            at = FIRST_CYCLE + timedelta(days=day, seconds=portfolio_id, microseconds=dice.randrange(1000))
            _trade(state, dice, at)
            yield Cycle(portfolio_id, at, deepcopy(state), _signals(signals, dice, at))


def _trade(portfolio: dict[str, Any], dice: random.Random, at: datetime) -> None:
    """Change the value of every open position; now and then close one and open another."""
    for position in portfolio["positions"]:
        if position["status"] == "open":
            # Floats with their rounding noise, as a controller passes them.
            position["current_pnl"] += position["amount"] * dice.gauss(0.004, 0.05)
    if dice.random() < 0.2:
        closing = dice.choice([position for position in portfolio["positions"] if position["status"] == "open"])
        closing["status"] = "closed"
        portfolio["balance"] += closing["current_pnl"]
        opened = deepcopy(closing) | {"status": "open", "current_pnl": 0.0, "entry_timestamp": at.isoformat()}
        opened["trade_id"] = f"t-{portfolio['trade_count']:04d}"
        portfolio["positions"].append(opened)
        portfolio["trade_count"] += 1
    open_pnl = sum(position["current_pnl"] for position in portfolio["positions"] if position["status"] == "open")
    portfolio["total_profit_loss"] = open_pnl
    portfolio["last_updated"] = at.isoformat()


def _signals(signals: list[dict[str, Any]], dice: random.Random, at: datetime) -> list[dict[str, Any]]:
    chosen = dice.sample(signals, dice.randint(1, len(signals)))
    price = round(dice.uniform(0.05, 0.95), 4)
    return [
        signal | {"timestamp": at.isoformat(), "yes_price": price, "no_price": round(1 - price, 4)} for signal in chosen
    ]
