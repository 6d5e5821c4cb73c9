"""Performance of a portfolio, computed from its daily closes.

The return of a close is the change of total_profit_loss since the close before, divided by the worth at that earlier
close: a deposit changes the worth (a measure of consumers.db.measures), but not the profit or loss. So returns are free
of deposits and withdrawals; money that is added between two closes earns nothing until the second. What the worth
changed by besides profit and loss is reported as net deposits.

With the returns r_1 … r_n, their mean m, the risk-free rate R of a year, P days of a year and f = (1 + R)^(1/P) - 1:

* total return: (1 + r_1) … (1 + r_n) - 1, also of months and years
* annual return: (1 + total return)^(365.25 / calendar days) - 1, from 30 calendar days on
* volatility: standard deviation of the returns (divisor n - 1) * sqrt(P)
* Sharpe ratio: (m - f) / standard deviation * sqrt(P)                 (Sharpe, The Sharpe Ratio, 1994)
* Sortino ratio: (m - f) / sqrt(mean of min(r - f, 0)^2) * sqrt(P)     (Sortino and Price, 1994)
* Calmar ratio: annual return / the deepest drawdown as a positive number   (Young, 1991, over the whole time)
* drawdown: (1 + r_1) … (1 + r_t) / its highest value until then (1 at the start) - 1
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from decimal import Decimal
from itertools import accumulate, groupby, pairwise
from operator import attrgetter, mul
from typing import Literal, NamedTuple

WorthMeasure = Literal["value", "equity"]
_FEWEST_DAYS = 30  # an annual return of a shorter time would say nothing
_CALENDAR_YEAR = 365.25
_AS_HIGH = 1 - 1e-12  # products of returns are rounded
_ROUNDING = Decimal("0.0001")  # of the worth; controllers round profit and loss to cents
_SAME = 1e-9  # deviations below this come from the rounding of amounts to 8 decimals


class Close(NamedTuple):
    """Amounts of the last snapshot of a date. `incomplete`: the worth leaves out money that is invested."""

    day: date
    worth: Decimal
    profit_loss: Decimal
    incomplete: bool = False


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Arguments of the ratios: the risk-free rate of a year, above -1, and the number of closes that a year has.

    A market that is always open has 365 closes a year, an exchange about 252.
    """

    risk_free_rate: float = 0.0
    days_of_a_year: float = 365


@dataclass(frozen=True, kw_only=True)
class DayReturn:
    """Return of one close; 0.01 is one per cent."""

    date: date
    total_return: float


@dataclass(frozen=True, kw_only=True)
class MonthReturn:
    """Return of the closes of a month, such as 2026-11."""

    month: str
    total_return: float


@dataclass(frozen=True, kw_only=True)
class YearReturn:
    """Return of the closes of a year."""

    year: int
    total_return: float


@dataclass(frozen=True, kw_only=True)
class Drawdown:
    """Deepest drawdown, a negative share of its peak. `recovered` is None until the peak is reached again.

    `peak` is the last date at the highest value before the drawdown.
    """

    share: float
    peak: date
    trough: date
    recovered: date | None


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Figures of a portfolio's returns; None where a formula is not defined. Shares and returns: 0.01 is one per cent.

    `winning_days` is a share of the days whose return is not 0. `longest_under_water_days` counts the calendar days
    from a peak until it was reached again, or until the last close. The first and last month may be incomplete.
    """

    total_return: float
    annual_return: float | None
    volatility: float | None
    sharpe_ratio: float | None
    sortino_ratio: float | None
    calmar_ratio: float | None
    deepest_drawdown: Drawdown | None
    longest_under_water_days: int
    best_day: DayReturn
    worst_day: DayReturn
    best_month: MonthReturn
    worst_month: MonthReturn
    winning_days: float | None
    months: Sequence[MonthReturn]
    years: Sequence[YearReturn]


@dataclass(frozen=True, kw_only=True)
class Performance:
    """Performance between the first and last close. Either `figures` or `problem` is None.

    Amounts are None without closes.
    """

    closes: int
    first: date | None
    last: date | None
    worth: Decimal | None
    profit_loss: Decimal | None
    net_deposits: Decimal | None
    problem: str | None
    figures: Figures | None


def performance(closes: Sequence[Close], rates: Rates) -> Performance:
    """Return the performance over these closes, oldest first; its `profit_loss` and `net_deposits` are changes."""
    problem = _problem(closes)
    returns = [] if problem else _returns(closes)
    if not problem and not returns:
        problem = "no close before the last is worth more than 0"
    change = closes[-1].profit_loss - closes[0].profit_loss if closes else None
    figures = None if problem else _figures(returns, rates)
    if not problem and figures is None:
        problem = "the returns are too large for figures: compare the worth of the closes"
    return Performance(
        closes=len(closes),
        first=closes[0].day if closes else None,
        last=closes[-1].day if closes else None,
        worth=closes[-1].worth if closes else None,
        profit_loss=change,
        net_deposits=None if change is None else closes[-1].worth - closes[0].worth - change,
        problem=problem,
        figures=figures,
    )


class _Return(NamedTuple):
    day: date
    since: date
    value: float


def _problem(closes: Sequence[Close]) -> str | None:
    """Return why figures made of these closes would be wrong."""
    if len(closes) < 2:
        return f"a return needs the closes of two dates, and there {'is 1' if closes else 'are none'}"
    incomplete = sum(one.incomplete for one in closes)
    if incomplete:
        return (
            f"total_value leaves out the invested money in {incomplete} of the {len(closes)} closes; choose the measure"
            " equity, or a period without them"
        )
    return _deposit_problem(closes) or _loss_problem(closes)


def _deposit_problem(closes: Sequence[Close]) -> str | None:
    """Return why deposits cannot be distinguished from profit."""
    moved = [(before, after) for before, after in pairwise(closes) if before[1:] != after[1:]]
    if moved and all(before.profit_loss == after.profit_loss for before, after in moved):
        return "total_profit_loss never changes, but the worth does: deposits cannot be distinguished from profit"
    flows = [(before, after) for before, after in moved if abs(_flow(before, after)) > _ROUNDING * abs(before.worth)]
    for before, after in flows:
        if before.profit_loss and not after.profit_loss:
            return f"total_profit_loss was reset to 0 on {after.day}; choose a period before or after it"
    if 2 * len(flows) >= len(moved) > 0:
        return (
            f"on {len(flows)} of the {len(moved)} dates with a change, the worth and total_profit_loss changed by"
            " different amounts: deposits cannot be distinguished from profit"
        )
    return None


def _flow(before: Close, after: Close) -> Decimal:
    """Return what was deposited between two closes; 0 if nothing was there before."""
    if not before.worth:
        return Decimal(0)
    return after.worth - before.worth - (after.profit_loss - before.profit_loss)


def _loss_problem(closes: Sequence[Close]) -> str | None:
    """Return why a return has no base."""
    for before, after in pairwise(closes):
        change = after.profit_loss - before.profit_loss
        if change and before.worth <= 0:
            worth = f"{before.worth.normalize():f}"
            return f"the worth on {before.day} is {worth}: no return can be based on it; choose a period after it"
        left = before.worth + change  # without deposits
        if before.worth > 0 and (left < 0 or (left == 0 and after is not closes[-1])):
            return f"everything was lost on {after.day}; choose a period before or after it"
    return None


def _returns(closes: Sequence[Close]) -> list[_Return]:
    return [
        _Return(after.day, before.day, float((after.profit_loss - before.profit_loss) / before.worth))
        for before, after in pairwise(closes)
        if before.worth > 0
    ]


def _figures(returns: Sequence[_Return], rates: Rates) -> Figures | None:
    """Return the figures, or None if they exceed a float."""
    try:
        figures = _finite_figures(returns, rates)
    except OverflowError:
        return None
    return figures if math.isfinite(figures.total_return) else None


def _finite_figures(returns: Sequence[_Return], rates: Rates) -> Figures:
    days_of_a_year = rates.days_of_a_year
    values = [one.value for one in returns]
    total = _compound(values)
    annual = _annual(total, (returns[-1].day - returns[0].since).days)
    deepest, under_water = _drawdowns(returns)
    free = (1 + rates.risk_free_rate) ** (1 / days_of_a_year) - 1
    excess = statistics.fmean(values) - free
    deviation = statistics.stdev(values) if len(values) > 1 else None
    downside = math.sqrt(statistics.fmean(min(value - free, 0.0) ** 2 for value in values))
    days = [DayReturn(date=one.day, total_return=one.value) for one in returns]
    months = [
        MonthReturn(month=f"{month:%Y-%m}", total_return=value)
        for month, value in _periods(returns, lambda day: day.replace(day=1))
    ]
    years = [
        YearReturn(year=year.year, total_return=value)
        for year, value in _periods(returns, lambda day: day.replace(month=1, day=1))
    ]
    by_return = attrgetter("total_return")
    changes = [value for value in values if value]
    return Figures(
        total_return=total,
        annual_return=annual,
        volatility=None if deviation is None else deviation * math.sqrt(days_of_a_year),
        sharpe_ratio=_ratio(excess, deviation, days_of_a_year),
        sortino_ratio=_ratio(excess, downside, days_of_a_year),
        calmar_ratio=None if annual is None or deepest is None else annual / -deepest.share,
        deepest_drawdown=deepest,
        longest_under_water_days=under_water,
        best_day=max(days, key=by_return),
        worst_day=min(days, key=by_return),
        best_month=max(months, key=by_return),
        worst_month=min(months, key=by_return),
        winning_days=sum(value > 0 for value in changes) / len(changes) if changes else None,
        months=months,
        years=years,
    )


def _compound(values: Sequence[float]) -> float:
    return math.prod(1 + value for value in values) - 1


def _annual(total: float, days: int) -> float | None:
    return (1 + total) ** (_CALENDAR_YEAR / days) - 1 if days >= _FEWEST_DAYS and total > -1 else None


def _ratio(excess: float, deviation: float | None, days_of_a_year: float) -> float | None:
    return excess / deviation * math.sqrt(days_of_a_year) if deviation is not None and deviation > _SAME else None


def _periods(returns: Sequence[_Return], period: Callable[[date], date]) -> list[tuple[date, float]]:
    """Return the first day and the return of each period that has returns."""
    return [
        (first, _compound([one.value for one in group]))
        for first, group in groupby(returns, key=lambda one: period(one.day))
    ]


def _drawdowns(returns: Sequence[_Return]) -> tuple[Drawdown | None, int]:
    """Return the deepest drawdown, and the most days between a peak and the next close that is as high."""
    worth = [1.0, *accumulate((1 + one.value for one in returns), mul)]
    days = [returns[0].since, *(one.day for one in returns)]
    deepest: Drawdown | None = None
    peak, longest = 0, 0
    for now in range(1, len(worth)):
        if worth[now] < worth[peak] * _AS_HIGH:
            longest = max(longest, (days[now] - days[peak]).days)
            share = worth[now] / worth[peak] - 1
            if deepest is None or share < deepest.share:
                deepest = Drawdown(share=share, peak=days[peak], trough=days[now], recovered=None)
            continue
        if now - peak > 1:
            longest = max(longest, (days[now] - days[peak]).days)
            if deepest is not None and deepest.recovered is None:
                deepest = replace(deepest, recovered=days[now])
        peak = now
    return deepest, longest
