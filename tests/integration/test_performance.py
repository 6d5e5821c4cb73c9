"""Performance with a real database: the operation, the endpoint, the page's data and the command say the same."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import fields
from datetime import date
from typing import Any

import pytest
from fastapi.testclient import TestClient

from consumers.db.performance import Figures
from consumers.operations import get_performance
from consumers.web.api import app
from tests.controllers import cli
from tests.documents import block, table
from tests.histories import store_amounts, store_values

PATH = "/trading/performance"


@pytest.fixture
def client(database_url: str) -> Iterator[TestClient]:
    with TestClient(app) as client:
        yield client


def _store_old_controller() -> None:
    """Store 10,000 invested without cash, as the old controller recorded it: 1 % up, then 500 added, then 1 % down."""
    store_amounts(
        ("0", "10000", "0", "0"), ("0", "10000", "100", "100"), ("500", "10000", "100", "600"),
        ("500", "10000", "-6", "494"),
    )  # fmt: skip


def test_invested_money_is_part_of_the_worth_that_returns_are_based_on(client: TestClient) -> None:
    """Case: total_value is balance + total_profit_loss. The default measure is equity, so 100 of 10,000 is 1 %."""
    _store_old_controller()
    (found,) = get_performance()
    assert (found["portfolio_id"], found["measure"], found["closes"], found["problem"]) == (1, "equity", 4, None)
    assert (found["worth"], found["profit_loss"], found["net_deposits"]) == (10494.0, -6.0, 500.0)
    assert found["figures"]["total_return"] == pytest.approx(1.01 * (1 - 106 / 10600) - 1)
    (by_value,) = client.get(PATH, params={"measure": "value"}).json()
    assert by_value["figures"] is None
    assert "leaves out the invested money in 4 of the 4 closes; choose the measure equity" in by_value["problem"]


@pytest.mark.usefixtures("database_url")
def test_one_row_of_another_formula_makes_no_figures_of_a_part_of_the_worth() -> None:
    """The default measure is value then, which leaves out 10,000 in the other rows."""
    rows = [("0", "10000", str(number), str(number)) for number in range(1, 20)]
    store_amounts(*rows, ("0", "10000", "20", "10020"))
    (found,) = get_performance()
    assert (found["measure"], found["figures"]) == ("value", None)
    assert "leaves out the invested money in 19 of the 20 closes; choose the measure equity" in found["problem"]
    (by_equity,) = get_performance(measure="equity")
    assert by_equity["figures"]["total_return"] == pytest.approx(19 / 10_001, rel=1e-3)


def test_the_endpoint_the_page_and_the_command_say_what_the_operation_says(client: TestClient) -> None:
    _store_old_controller()
    wanted: dict[str, Any] = {"risk_free_rate": 0.02, "days_of_a_year": 252}
    (expected,) = json.loads(json.dumps(get_performance(1, **wanted), default=str))
    assert client.get(PATH, params={"portfolio_id": 1, **wanted}).json() == [expected]
    run = cli("performance", "--portfolio-id", "1", "--risk-free-rate", "0.02", "--days-of-a-year", "252", "--json")
    assert (run.exit_code, json.loads(run.stdout)) == (0, [expected])
    shown = client.get("/page/performance", params={"portfolio": 1}).json()
    assert float(shown["worth"]) == expected["worth"]
    assert shown["figures"]["total_return"] == expected["figures"]["total_return"]
    assert shown["figures"]["sharpe_ratio"] != expected["figures"]["sharpe_ratio"]  # its rates are the defaults


def test_the_dates_begin_with_since_and_end_before_until(client: TestClient) -> None:
    """The first close of the period is the base of its first return."""
    _store_old_controller()
    (found,) = get_performance(since=date(2026, 6, 2), until=date(2026, 6, 4))
    assert (found["first"], found["last"], found["closes"]) == (date(2026, 6, 2), date(2026, 6, 3), 2)
    (same,) = client.get(PATH, params={"since": "2026-06-02", "until": "2026-06-04"}).json()
    assert (same["first"], same["last"], same["net_deposits"]) == ("2026-06-02", "2026-06-03", 500.0)
    for until in (date.min, date.max):
        assert get_performance(1, until=until)[0]["closes"] == (0 if until == date.min else 4)


def test_each_portfolio_has_an_answer_also_that_without_a_number(client: TestClient) -> None:
    for portfolio in (7, None, 2):
        store_values([1000, 1010], portfolio=portfolio)
    answers = client.get(PATH).json()
    assert [one["portfolio_id"] for one in answers] == [2, 7, None]
    # store_values changes total_value alone, which might be a deposit
    assert {one["problem"] for one in answers} == {
        "total_profit_loss never changes, but the worth does: deposits cannot be distinguished from profit"
    }
    (unknown,) = client.get(PATH, params={"portfolio_id": 3}).json()
    assert (unknown["closes"], unknown["worth"]) == (0, None)
    assert client.get("/page/performance", params={"portfolio": "none"}).json()["portfolio_id"] is None


def test_the_example_of_the_document_prints_the_dates_and_the_return(
    database_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _store_old_controller()
    exec(block("consumers/db/PERFORMANCE.md", "performance"))
    assert capsys.readouterr().out.startswith("2026-06-01 2026-06-04 -0.01%")


def test_the_document_names_every_figure() -> None:
    named = re.findall("`([a-z_]+)`", " ".join(cells[0] for cells in table("consumers/db/PERFORMANCE.md", "figures")))
    shown_by_dates = {"best_day", "worst_day", "best_month", "worst_month", "months", "years"}
    assert {one.name for one in fields(Figures)} - shown_by_dates == set(named)


@pytest.mark.parametrize(
    "wrong",
    [
        {"risk_free_rate": "-1"}, {"risk_free_rate": "inf"}, {"days_of_a_year": "0"}, {"days_of_a_year": "367"},
        {"measure": "profit_loss"}, {"since": "june"}, {"limit": "1"},
    ],
)  # fmt: skip
def test_a_wrong_parameter_is_named(client: TestClient, wrong: dict[str, str]) -> None:
    answer = client.get(PATH, params=wrong)
    assert answer.status_code == 422
    assert next(iter(wrong)) in answer.text


@pytest.mark.parametrize("wrong", [{"risk_free_rate": -1}, {"risk_free_rate": float("nan")}, {"days_of_a_year": 0}])
@pytest.mark.usefixtures("database_url")
def test_a_wrong_rate_of_the_operation_is_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        get_performance(**wrong)


@pytest.mark.usefixtures("database_url")
def test_the_command_prints_figures_and_a_table_of_months() -> None:
    _store_old_controller()
    run = cli("performance")
    assert run.exit_code == 0, run.stderr
    lines = run.stdout.splitlines()
    assert lines[0] == "Portfolio 1: 2026-06-01 to 2026-06-04, 4 closes"
    text = [" ".join(line.split()) for line in lines]
    assert "equity at the end 10,494.00" in text
    assert "net deposits +500.00" in text
    assert "total return -0.01%" in text
    assert "annual return -" in text
    assert "deepest drawdown -1.00% from 2026-06-03 to 2026-06-04, not recovered yet" in text
    assert text[-2:] == ["year Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec all", "2026 -0.0 -0.0"]


@pytest.mark.usefixtures("database_url")
def test_the_command_prints_each_portfolio_and_names_one_without_closes_since_then() -> None:
    """An empty line separates two portfolios. Without closes there are no amounts."""
    store_values([1000, 1010])
    store_values([1000, 1010, 1020, 1030], portfolio=2)
    lines = cli("performance", "--since", "2026-06-03").stdout.splitlines()
    assert lines[:3] == ["Portfolio 1", "No figures: a return needs the closes of two dates, and there are none.", ""]
    assert lines[3] == "Portfolio 2: 2026-06-03 to 2026-06-04, 2 closes"


@pytest.mark.usefixtures("database_url")
def test_the_command_says_why_there_are_no_returns() -> None:
    assert cli("performance").stdout == "There are no portfolio snapshots.\n"
    store_values([1000, 1010])
    run = cli("performance")
    assert "No figures: total_profit_loss never changes, but the worth does" in run.stdout
    wrong = cli("performance", "--since", "june")
    assert (wrong.exit_code, wrong.stdout) == (2, "")
    assert "june is not a date: write for example 2026-11-22, 7d" in wrong.stderr
    assert "risk_free_rate must be" in cli("performance", "--risk-free-rate", "-2").stderr
