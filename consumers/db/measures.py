"""Measures of a portfolio's worth, each computed from the amounts of one snapshot.

* `value`: total_value as recorded.
* `equity`: balance + total_invested + total_profit_loss.
* `profit_loss`: total_profit_loss.

The old controller recorded balance + total_profit_loss as total_value. Invested money is missing in it: a portfolio
that is fully invested seems to be worth nothing. Its equity has all three parts.
"""

from __future__ import annotations

from typing import Literal

Measure = Literal["value", "equity", "profit_loss"]

EXPRESSIONS: dict[Measure, str] = {
    "value": "total_value",
    "equity": "(balance + total_invested + total_profit_loss)",
    "profit_loss": "total_profit_loss",
}
"""SQL for each measure of a row of portfolio_history."""

FOLLOWS_OLD_FORMULA = """
    coalesce(bool_and(total_value = balance + total_profit_loss) AND bool_or(total_invested <> 0), false)
"""
"""SQL aggregate over rows: whether `equity` is their worth and `value` is not."""
