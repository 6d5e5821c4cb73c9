"""Measures of a portfolio's worth, each computed from the amounts of one snapshot.

* `value`: total_value as recorded.
* `equity`: balance + total_invested + total_profit_loss.
* `profit_loss`: total_profit_loss.

The old controller recorded balance + total_profit_loss as total_value. Invested money is missing in it: a portfolio
that is fully invested seems to be worth nothing. Its equity has all three parts.
"""

from __future__ import annotations

from typing import Literal, get_args

Measure = Literal["value", "equity", "profit_loss"]

EXPRESSIONS: dict[Measure, str] = {
    "value": "total_value",
    "equity": "(balance + total_invested + total_profit_loss)",
    "profit_loss": "total_profit_loss",
}
"""SQL for each measure of a row of portfolio_history."""

Formula = Literal[
    "balance + total_profit_loss", "balance + total_invested", "balance + total_invested + total_profit_loss"
]

OLD_FORMULA: Formula = "balance + total_profit_loss"
"""Formula of the old controller, and of this project's calls if `total_value` is not given."""

FORMULAS: tuple[Formula, ...] = get_args(Formula)
"""Formulas of `total_value` that controllers use, each as SQL over the columns of portfolio_history."""

FITS: dict[Formula, str] = {
    formula: f"(abs(total_value - ({formula})) <= least(0.02, abs(total_value) / 1000) + 0.00000002)"
    for formula in FORMULAS
}
"""SQL conditions for a row whose total_value follows the formula.

Old controllers calculated with floats, and some rounded each amount to cents. If four amounts are rounded, total_value
may differ from the sum by 0.02. That is too coarse for an account in bitcoin, hence the limit of 0.1 % of the value.
The 0.00000002 are the rounding of four amounts to 8 decimals.
"""

FOLLOWS_OLD_FORMULA = f"""
    coalesce(bool_and({FITS[OLD_FORMULA]}) AND bool_or(total_invested <> 0), false)
"""
"""SQL aggregate over rows: whether `equity` is their worth and `value` is not."""
