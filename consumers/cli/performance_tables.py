"""Output of the command `performance` for people: figures by name, then the months of each year."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from consumers.terminal import print_rows, print_text, print_values

_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


def print_performances(performances: Sequence[Mapping[str, Any]]) -> None:
    """Print the dicts of `consumers.operations.get_performance`."""
    if not performances:
        print_text("There are no portfolio snapshots.")
    for number, one in enumerate(performances):
        if number:
            print_text("")
        name = "Snapshots without a portfolio" if one["portfolio_id"] is None else f"Portfolio {one['portfolio_id']}"
        print_text(name if not one["closes"] else f"{name}: {one['first']} to {one['last']}, {one['closes']:,} closes")
        figures = one["figures"]
        if one["closes"]:
            print_values(_amounts(one) | ({} if figures is None else _figures(figures)))
        if figures is None:
            print_text(f"No figures: {one['problem']}.")
        else:
            print_text("\nReturns in per cent:")
            print_rows(("year", *_MONTHS, "all"), _years(figures), "")


def _amounts(one: Mapping[str, Any]) -> dict[str, str]:
    return {
        f"{one['measure']} at the end": f"{one['worth']:,.2f}",
        "profit/loss": f"{one['profit_loss']:+,.2f}",
        "net deposits": f"{one['net_deposits']:+,.2f}",
    }


def _figures(figures: Mapping[str, Any]) -> dict[str, str]:
    worst = figures["deepest_drawdown"]
    shown = {
        "total return": _percent(figures["total_return"]),
        "annual return": _percent(figures["annual_return"]),
        "volatility": _percent(figures["volatility"]).lstrip("+"),
        **{f"{name} ratio": _ratio(figures[f"{name.lower()}_ratio"]) for name in ("Sharpe", "Sortino", "Calmar")},
        "deepest drawdown": "none" if worst is None else _drawdown(worst),
        "longest under water": _days(figures["longest_under_water_days"]),
    }
    for name in ("best_day", "worst_day"):
        shown[name] = f"{_percent(figures[name]['total_return'])} on {figures[name]['date']}"
    for name in ("best_month", "worst_month"):
        shown[name] = f"{_percent(figures[name]['total_return'])} in {figures[name]['month']}"
    return shown | {"winning days": "-" if figures["winning_days"] is None else f"{figures['winning_days']:.1%}"}


def _drawdown(drawdown: Mapping[str, Any]) -> str:
    recovered = drawdown["recovered"]
    end = "not recovered yet" if recovered is None else f"recovered on {recovered}"
    return f"{_percent(drawdown['share'])} from {drawdown['peak']} to {drawdown['trough']}, {end}"


def _years(figures: Mapping[str, Any]) -> list[list[str]]:
    """Return a row for each year: its number, the return of each month, and that of the year, in per cent."""
    months = {one["month"]: f"{100 * one['total_return']:.1f}" for one in figures["months"]}
    return [
        [
            str(one["year"]),
            *(months.get(f"{one['year']}-{number:02}", "") for number in range(1, 13)),
            f"{100 * one['total_return']:.1f}",
        ]
        for one in figures["years"]
    ]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:+.2%}"


def _ratio(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def _days(number: int) -> str:
    return f"{number:,} day{'' if number == 1 else 's'}"
