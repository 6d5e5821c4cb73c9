"""Figures of performance: by hand, and against an independent library."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from datetime import date, timedelta
from decimal import Decimal

import empyrical
import numpy as np
import pandas as pd
import pytest

from consumers.db.performance import Close, Drawdown, Figures, Rates, performance

FIRST = date(2026, 1, 1)


def closes(*amounts: tuple[str, str], step_days: int = 1) -> list[Close]:
    """Return closes with these worths and profits or losses."""
    return [
        Close(FIRST + timedelta(days=number * step_days), Decimal(worth), Decimal(profit_loss))
        for number, (worth, profit_loss) in enumerate(amounts)
    ]


def figures(found: Sequence[Close], rates: Rates = Rates()) -> Figures:  # noqa: B008  # immutable
    result = performance(found, rates)
    assert result.problem is None
    assert result.figures is not None
    return result.figures


def problem(found: Sequence[Close]) -> str:
    result = performance(found, Rates())
    assert result.problem is not None
    assert result.figures is None
    return result.problem


def test_a_deposit_is_no_profit() -> None:
    """1,000 earn 10, then 500 are added, which earn nothing on that day, then 15.10 are lost."""
    found = closes(("1000", "0"), ("1010", "10"), ("1510", "10"), ("1494.90", "-5.10"))
    assert figures(found).total_return == pytest.approx(1.01 * 0.99 - 1)
    result = performance(found, Rates())
    assert (result.net_deposits, result.profit_loss) == (Decimal(500), Decimal("-5.10"))


def test_a_withdrawal_is_no_loss() -> None:
    """1,000 earn 100, then 600 are taken out, then the rest earns a tenth."""
    found = closes(("1000", "0"), ("1100", "100"), ("500", "100"), ("550", "150"))
    assert figures(found).total_return == pytest.approx(1.1 * 1.1 - 1)
    assert figures(found).deepest_drawdown is None
    assert performance(found, Rates()).net_deposits == -600


def test_without_profit_or_loss_deposits_cannot_be_distinguished_from_profit() -> None:
    assert problem(closes(("1000", "0"), ("1010", "0"))).startswith("total_profit_loss never changes")


def test_a_profit_or_loss_that_does_not_follow_the_worth_gives_no_ratio() -> None:
    """Only the last of three changes of the worth is the change of profit and loss."""
    found = closes(("1000", "5"), ("1010", "6"), ("990", "4"), ("991", "5"))
    assert problem(found).startswith("on 2 of the 3 dates with a change, the worth and total_profit_loss changed by")


def test_growth_of_which_half_is_no_profit_or_loss_gives_no_ratio() -> None:
    """The worth rises by 30 on each date, total_profit_loss on every second one."""
    found = closes(*((str(1000 + 30 * number), str(30 * (number // 2))) for number in range(9)))
    assert problem(found).startswith("on 4 of the 8 dates with a change")


@pytest.mark.parametrize("worth", ["1040", "1060"])
def test_a_profit_or_loss_that_is_counted_from_0_again_is_no_loss(worth: str) -> None:
    """The worth is unchanged or rises at that date."""
    found = closes(("1000", "0"), ("1020", "20"), ("1040", "40"), (worth, "0"), ("1080", "20"), ("1100", "40"))
    assert problem(found) == "total_profit_loss was reset to 0 on 2026-01-04; choose a period before or after it"
    falling = closes(("1000", "0"), ("1020", "20"), ("1040", "40"), ("1000", "0"), ("1020", "20"))
    assert figures(falling).total_return == pytest.approx(0.02)


def test_a_worth_without_the_invested_money_gives_no_figures() -> None:
    complete = closes(("10000", "0"), ("10010", "10"), ("10020", "20"))
    found = [*complete[:2], complete[2]._replace(incomplete=True)]
    assert problem(found).startswith(
        "total_value leaves out the invested money in 1 of the 3 closes; choose the measure"
    )


def test_profit_and_loss_may_be_rounded_to_cents() -> None:
    found = closes(("1000.004", "0"), ("1001.238", "1.23"), ("1002.001", "2.00"))
    assert figures(found).total_return == pytest.approx(0.002, abs=1e-5)


@pytest.mark.parametrize(("number", "text"), [(0, "there are none"), (1, "there is 1")])
def test_less_than_two_closes_have_no_return(number: int, text: str) -> None:
    assert text in problem(closes(("1000", "0"))[:number])


def test_nothing_can_be_earned_on_nothing() -> None:
    """A portfolio that begins empty is measured from its first deposit on, unless it had a profit before."""
    empty = closes(("0", "0"), ("1000", "0"), ("1010", "10"), ("1020", "20"))
    assert figures(empty).total_return == pytest.approx(1.01 * (1 + 10 / 1010) - 1)
    assert "the worth on 2026-01-01 is -5" in problem(closes(("-5", "0"), ("5", "10"), ("6", "11")))
    assert "no close before the last is worth more than 0" in problem(closes(("0", "0"), ("0", "0")))


def test_a_total_loss_ends_the_returns() -> None:
    assert "everything was lost on 2026-01-02" in problem(
        closes(("100", "0"), ("0", "-100"), ("30", "-100"), ("31", "-99"))
    )
    assert figures(closes(("100", "0"), ("110", "10"), ("0", "-100"))).total_return == pytest.approx(-1)
    assert "everything was lost on 2026-01-02" in problem(closes(("100", "0"), ("-50", "-150")))


@pytest.mark.parametrize("exponents", [range(0, 400, 10), [0, *[200] * 120]])
def test_returns_beyond_floats_give_no_figures(exponents: Sequence[int]) -> None:
    """Either the total return is, or the annual one."""
    worth = [Decimal(10) ** exponent for exponent in exponents]
    found = closes(*((str(one), str(one - 1)) for one in worth))
    assert "too large" in problem(found)


def test_a_flat_portfolio_has_returns_of_zero_and_no_ratio() -> None:
    flat = figures(closes(("1000", "0"), ("1000", "0"), ("1000", "0")))
    assert (flat.total_return, flat.volatility, flat.sharpe_ratio, flat.sortino_ratio) == (0, 0, None, None)
    assert (flat.deepest_drawdown, flat.longest_under_water_days, flat.winning_days) == (None, 0, None)


def test_a_steady_gain_has_no_ratio() -> None:
    """Its returns differ by the rounding of amounts only, and no ratio may be made of that."""
    worth = [(1000 * Decimal("1.01") ** number).quantize(Decimal("1e-8")) for number in range(40)]
    steady = figures(closes(*((str(one), str(one - 1000)) for one in worth)))
    assert steady.volatility == pytest.approx(0, abs=1e-8)
    assert (steady.sharpe_ratio, steady.sortino_ratio) == (None, None)


def test_the_rounding_of_floats_does_not_hide_a_recovery() -> None:
    """Each series falls, and rises again to exactly the worth that it had."""
    for low in range(1, 100):
        found = figures(closes(("100", "0"), (str(low), str(low - 100)), ("100", "0")))
        assert found.deepest_drawdown is not None
        assert found.deepest_drawdown.recovered == FIRST + timedelta(days=2)


def test_the_deepest_drawdown_has_the_dates_of_its_peak_trough_and_recovery() -> None:
    """100, 110, 99, 104.5, 110, 121: it begins at the second close and ends at the fifth."""
    profits = ["0", "10", "-1", "4.5", "10", "21"]
    found = figures(closes(*((str(100 + Decimal(one)), one) for one in profits)))
    days = [FIRST + timedelta(days=number) for number in range(6)]
    assert found.deepest_drawdown is not None
    assert found.deepest_drawdown.share == pytest.approx(-0.1)
    dates = replace(found.deepest_drawdown, share=-0.1)
    assert dates == Drawdown(share=-0.1, peak=days[1], trough=days[2], recovered=days[4])
    assert found.longest_under_water_days == 3
    assert (found.best_day.date, found.worst_day.date) == (days[1], days[2])
    assert found.winning_days == pytest.approx(4 / 5)


def test_a_drawdown_that_lasts_has_no_recovery() -> None:
    found = figures(closes(("100", "0"), ("90", "-10"), ("95", "-5")))
    assert found.deepest_drawdown is not None
    assert (found.deepest_drawdown.trough, found.deepest_drawdown.recovered) == (FIRST + timedelta(days=1), None)
    assert found.longest_under_water_days == 2


def test_the_longest_time_under_water_need_not_be_that_of_the_deepest_drawdown() -> None:
    profits = ["0", "-10", "1", "0.5", "0.6", "0.7", "2"]
    found = figures(closes(*((str(100 + Decimal(one)), one) for one in profits)))
    assert found.deepest_drawdown is not None
    assert found.deepest_drawdown.recovered == FIRST + timedelta(days=2)
    assert found.longest_under_water_days == 4


def test_a_year_has_an_annual_return_and_its_months() -> None:
    """From 2026-01-01 on, 10 days apart: 37 closes."""
    found = figures(closes(*((str(100 + number), str(number)) for number in range(37)), step_days=10))
    assert found.annual_return == pytest.approx(1.36 ** (365.25 / 360) - 1)
    assert [one.month for one in found.months] == [f"2026-{month:02}" for month in range(1, 13)]
    (year,) = found.years
    assert year.year == 2026
    assert year.total_return == pytest.approx(0.36)
    assert math.prod(1 + one.total_return for one in found.months) == pytest.approx(1.36)


def test_two_weeks_have_no_annual_return() -> None:
    found = figures(closes(*((str(100 + number), str(number)) for number in range(15))))
    assert (found.annual_return, found.calmar_ratio) == (None, None)


def _series(name: str) -> list[Close]:
    """Return 400 closes; each follows the one before by a random return that begins with the same seed."""
    chance = random.Random(name)  # not for secrets
    drift = {"random": 0.001, "negative": -0.004, "gapped": 0.0005}[name]
    start = Decimal(10_000)
    profit, day, found = Decimal(0), FIRST, []
    for _ in range(400):
        found.append(Close(day, start + profit, profit))
        profit += ((start + profit) * Decimal(str(chance.gauss(drift, 0.02)))).quantize(Decimal("1e-8"))
        day += timedelta(days=chance.choice([1, 1, 3, 8]) if name == "gapped" else 1)
    return found


@pytest.mark.parametrize("rates", [Rates(), Rates(risk_free_rate=0.03, days_of_a_year=252)])
@pytest.mark.parametrize("name", ["random", "negative", "gapped"])
def test_figures_agree_with_an_independent_library(name: str, rates: Rates) -> None:
    series = _series(name)
    found = figures(series, rates)
    days = rates.days_of_a_year
    free = (1 + rates.risk_free_rate) ** (1 / days) - 1
    index = pd.DatetimeIndex([one.day for one in series])
    returns = pd.Series([float(one.worth) for one in series], index=index).pct_change().dropna()

    assert found.total_return == pytest.approx(empyrical.cum_returns_final(returns))
    assert found.volatility == pytest.approx(empyrical.annual_volatility(returns, annualization=days))
    assert found.sharpe_ratio == pytest.approx(empyrical.sharpe_ratio(returns, free, annualization=days))
    assert found.sortino_ratio == pytest.approx(empyrical.sortino_ratio(returns, free, annualization=days))
    assert found.deepest_drawdown is not None
    assert found.deepest_drawdown.share == pytest.approx(empyrical.max_drawdown(returns))
    # That library counts returns, not days: so it gets the number of them in a calendar year.
    a_year = 365.25 * len(returns) / (series[-1].day - series[0].day).days
    assert found.annual_return == pytest.approx(empyrical.annual_return(returns, annualization=a_year))
    assert found.calmar_ratio == pytest.approx(empyrical.calmar_ratio(returns, annualization=a_year))
    months = empyrical.aggregate_returns(returns, "monthly")
    assert [one.total_return for one in found.months] == pytest.approx(list(months))
    years = empyrical.aggregate_returns(returns, "yearly")
    assert [one.total_return for one in found.years] == pytest.approx(list(years))
    assert found.best_day.total_return == pytest.approx(returns.max())
    assert found.worst_day.date == returns.idxmin().date()
    assert found.winning_days == pytest.approx((returns > 0).sum() / (returns != 0).sum())


def test_the_ratios_of_a_flat_series_are_undefined_for_an_independent_library_too() -> None:
    flat = pd.Series([0.0, 0.0, 0.0])
    assert np.isnan(empyrical.sharpe_ratio(flat))
    assert np.isnan(empyrical.sortino_ratio(flat))
