"""Formulas of total_value before and after the switch from an old controller: `doctor` and `verify` compare them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from sqlalchemy import text

from consumers.db.engine import get_db
from consumers.db.formula_changes import PortfolioFormulas, compare_formulas
from consumers.db.inserts import insert_event
from consumers.db.portfolio_queries import portfolios
from consumers.legacy.verification import Difference, Verification
from producers.events import event_of
from producers.trading_controller import snapshot_of
from tests.controllers import cli
from tests.factories import INSTANT, a_snapshot, an_old_snapshot

pytestmark = pytest.mark.usefixtures("database_url")

PROGRAM = [sys.executable, "-m", "consumers.cli"]
IMPORT = f"import/portfolio_history.json/{'0' * 32}"
AT_THE_SWITCH = timedelta(days=100)

PROFIT = "balance + total_profit_loss"
INVESTED = "balance + total_invested"
ALL = "balance + total_invested + total_profit_loss"
Amounts = tuple[float, float, float]
MIXED: Sequence[Amounts] = [(1000, 0, 0), (400, 600, 0), (400, 600, 12.25), (1012.25, 0, 12.25)]


def _value(formula: str, amounts: Amounts) -> float:
    return float(eval(formula, dict(zip(("balance", "total_invested", "total_profit_loss"), amounts, strict=True))))


def _store(
    source: str, formula: str, amounts: Sequence[Amounts], *, portfolio: int | None = 1, first: timedelta = timedelta(0)
) -> None:
    """Store a snapshot a day."""
    for number, (balance, invested, profit_loss) in enumerate(amounts):
        at = INSTANT + first + timedelta(days=number)
        snapshot = a_snapshot(
            timestamp=at, snapshot_date=at.date(), portfolio_id=portfolio, balance=balance, total_invested=invested,
            total_profit_loss=profit_loss, total_value=_value(formula, (balance, invested, profit_loss)),
        )  # fmt: skip
        insert_event(event_of(snapshot, source=source, sequence=number if source == IMPORT else None))


def _import(formula: str, amounts: Sequence[Amounts] = MIXED, portfolio: int | None = 1) -> None:
    _store(IMPORT, formula, amounts, portfolio=portfolio)


def _record(formula: str, amounts: Sequence[Amounts] = MIXED, portfolio: int | None = 1) -> None:
    _store("direct", formula, amounts, portfolio=portfolio, first=AT_THE_SWITCH)


def _compared() -> dict[int | None, PortfolioFormulas]:
    with get_db() as db:
        compared, left_out = compare_formulas(db, [one.portfolio for one in portfolios(db)], 60)
    assert left_out == 0
    return {one.portfolio: one for one in compared}


def _run(*arguments: str) -> tuple[int, str]:
    run = subprocess.run([*PROGRAM, *arguments], capture_output=True, text=True, timeout=60, check=False)
    return run.returncode, run.stdout


def _doctored() -> dict[str, str]:
    (check,) = (one for one in json.loads(_run("doctor", "--json")[1]) if one["name"] == "formula of total_value")
    return dict(check)


@pytest.mark.parametrize("formula", [PROFIT, INVESTED, ALL])
def test_the_same_formula_before_and_after_the_switch_is_no_change(formula: str) -> None:
    _import(formula)
    _record(formula)
    (one,) = _compared().values()
    assert (one.imported.followed, one.recorded.followed, one.changed) == ([formula], [formula], False)


@pytest.mark.parametrize(("before", "after"), [*permutations((PROFIT, INVESTED, ALL), 2)])
def test_another_formula_after_the_switch_is_a_change(before: str, after: str) -> None:
    """The text has the counted rows, and an argument that gives the imported formula."""
    _import(before)
    _record(after)
    (one,) = _compared().values()
    assert one.changed
    assert one.found == (
        f"portfolio 1: 3 of 3 imported rows (100 %) are {before} (1 more fit every formula),"
        f" 3 of 3 recorded rows (100 %) are {after} (1 more fit every formula); read: 4 imported and 4 recorded rows"
    )
    passed = one.advice.partition("total_value=")[2].partition(";")[0]
    portfolio = {"balance": 400, "total_invested": 600, "total_profit_loss": 12.25}
    assert eval(passed, {"portfolio": portfolio}) == _value(before, (400, 600, 12.25))
    assert ("leave total_value out" in one.advice) is (before == PROFIT)
    assert ("equity" in one.advice) is (before != INVESTED)


def test_without_total_value_the_call_continues_the_formula_that_the_advice_says() -> None:
    """The advice to leave total_value out is true for the call of the controller."""
    snapshot = snapshot_of({"balance": 400, "total_invested": 600, "total_profit_loss": 12.25}, 1, INSTANT, None)
    assert float(snapshot.total_value) == _value(PROFIT, (400, 600, 12.25))


@pytest.mark.parametrize(
    ("imported", "recorded", "reason"),
    [
        ([(1000, 0, 0)], MIXED, "nothing was invested or gained before the switch"),
        (MIXED, [(1000, 0, 0)], "nothing was invested or gained after it"),
        ([(1000, 0, 5)], [(1000, 0, 5)], "nothing was ever invested"),
        ([(1000, 0, 5)], MIXED, "before it nothing was invested: all three parts fit too"),
        ([(400, 600, 0.01)], MIXED, "the profit may be the rounding to cents"),
    ],
)
def test_rows_that_decide_nothing_are_no_change(
    imported: Sequence[Amounts], recorded: Sequence[Amounts], reason: str
) -> None:
    before = INVESTED if imported == [(400, 600, 0.01)] else PROFIT
    _import(before, imported)
    _record(ALL, recorded)
    (one,) = _compared().values()
    assert (one.has_both, one.changed) == (True, False), reason


@pytest.mark.parametrize(("others", "changed"), [(1, True), (2, False)])
def test_a_formula_needs_95_percent_of_the_rows_that_decide(others: int, changed: bool) -> None:
    """One of 20 imported rows may have another value, two of 20 may not."""
    deciding: list[Amounts] = [(400, 600, 5)] * 20
    _import(PROFIT, deciding)
    _record(ALL)
    with get_db() as db:
        db.execute(text("UPDATE portfolio_history SET total_value = 77 WHERE sequence < :others"), {"others": others})
    (one,) = _compared().values()
    assert one.changed is changed
    if changed:
        assert one.found.startswith(f"portfolio 1: 19 of 20 imported rows (95 %) are {PROFIT}, 3 of 3 recorded")


def test_few_invested_rows_decide_between_two_formulas() -> None:
    """Money was invested in 2 of 100 imported rows only. These two follow the old formula, and no other one."""
    _import(PROFIT, [(1000, 0, 5)] * 98 + [(400, 600, 5)] * 2)
    _record(ALL)
    (one,) = _compared().values()
    assert (one.imported.followed, one.changed) == ([PROFIT], True)


def test_few_rows_that_fit_by_chance_do_not_make_a_change() -> None:
    """Nothing was invested in 95 of 100 imported rows. Of the other five, three fit one formula and two another."""
    _import(PROFIT, [(1000, 0, 5)] * 95 + [(400, 600, 5)] * 5)
    _record(PROFIT)
    with get_db() as db:
        db.execute(text("UPDATE portfolio_history SET total_value = 1005 WHERE sequence >= 97"))
    (one,) = _compared().values()
    assert (one.imported.followed, one.changed) == ([PROFIT, ALL], False)


def test_float_noise_and_cents_still_fit() -> None:
    """Old controllers summed floats, and some rounded each amount to cents."""
    noisy = [(400.123456785, 600, 5.000000005), (0.1, 600, 0.2)]
    _import(PROFIT, noisy)
    _record(ALL, [(400, 600, 5)])
    with get_db() as db:
        db.execute(text("UPDATE portfolio_history SET total_value = total_value + 0.00000001 WHERE sequence = 0"))
        db.execute(text("UPDATE portfolio_history SET total_value = total_value + 0.0002 WHERE sequence = 1"))
    (one,) = _compared().values()
    assert (one.imported.followed, one.changed) == ([PROFIT], True)


@pytest.mark.parametrize("store", [_import, _record])
def test_only_imported_or_only_recorded_rows_are_not_compared(store: Callable[[str], None]) -> None:
    store(PROFIT)
    (one,) = _compared().values()
    assert (one.has_both, one.changed) == (False, False)
    assert one.imported.read + one.recorded.read == 4
    check = _doctored()
    assert (check["status"], check["advice"]) == ("ok", "")
    assert check["found"] == (
        "no change found: 0 of 1 portfolios have both imported and recorded rows on their newest 1,000 dates"
    )


def test_each_portfolio_is_compared_with_itself() -> None:
    """Rows without a portfolio too. doctor names the portfolios with a change, and what to pass."""
    _import(PROFIT, portfolio=1)
    _record(PROFIT, portfolio=1)
    _import(ALL, portfolio=2)
    _record(PROFIT, portfolio=2)
    _import(INVESTED, portfolio=None)
    _record(ALL, portfolio=None)
    compared = _compared()
    assert {portfolio: one.changed for portfolio, one in compared.items()} == {1: False, 2: True, None: True}
    assert compared[None].found.startswith("rows without a portfolio: 3 of 3 imported rows")
    shown = _run("doctor")[1]
    check = _doctored()
    assert check["status"] == "warn"
    assert check["found"] == f"{compared[2].found}; {compared[None].found}"
    assert check["advice"] == f"portfolio 2: {compared[2].advice}. rows without a portfolio: {compared[None].advice}"
    assert "warn  formula of total_value" in shown


def test_doctor_without_rows_has_nothing_to_compare(redis: Redis) -> None:
    check = _doctored()
    assert (check["status"], check["found"]) == ("ok", "no change found: no snapshots")
    assert _run("doctor")[0] == 0


_MANY = """
    INSERT INTO portfolio_history (event_id, source, sequence, portfolio_id, snapshot_date, "timestamp", balance,
        total_invested, total_profit_loss, total_value, open_positions, trade_count)
    SELECT gen_random_uuid(), :source, number, 1, CAST(at AT TIME ZONE 'UTC' AS date), at, 400, 600, 5, :value, 0, 0
    FROM generate_series(1, 30000) AS number,
        LATERAL (SELECT CAST(:first AS timestamptz) + number * interval '1 minute' AS at) AS moment
"""


def test_of_many_rows_a_bounded_number_is_read_and_stated() -> None:
    """30,000 rows of each kind in 21 days, one a minute. PostgreSQL has no statistics yet, as after an import."""
    with get_db() as db:
        for source, first, value in ((IMPORT, "2026-01-01Z", 405), ("bot/x", "2026-02-01Z", 1005)):
            db.execute(text(_MANY), {"source": source, "first": first, "value": value})
    (one,) = _compared().values()
    assert one.found == (
        f"portfolio 1: 1,000 of 1,000 imported rows (100 %) are {PROFIT},"
        f" 1,000 of 1,000 recorded rows (100 %) are {ALL}; read: 1,000 imported and 1,000 recorded rows"
    )
    _assert_few_rows_are_read()
    with get_db() as db:
        db.execute(text("ANALYZE portfolio_history"))
    _assert_few_rows_are_read()


def _assert_few_rows_are_read() -> None:
    """Compare the counters of the table's index before and after: 2,000 rows, and a close for each of 22 dates."""
    counter = text("""
        SELECT sum(pg_stat_get_xact_tuples_returned(indexrelid)) + pg_stat_get_xact_tuples_returned(indrelid)
        FROM pg_index WHERE indrelid = to_regclass('portfolio_history') GROUP BY indrelid
    """)
    with get_db() as db:
        before = db.execute(counter).scalar_one()
        compare_formulas(db, [1], 60)
        assert 2_000 <= db.execute(counter).scalar_one() - before <= 2_100


def test_the_first_row_after_the_switch_is_compared_on_the_same_day() -> None:
    _store(IMPORT, PROFIT, [(400, 600, 5)])
    _store("direct", ALL, [(400, 600, 5)], first=timedelta(minutes=5))
    (one,) = _compared().values()
    assert one.changed


def test_after_the_time_the_other_portfolios_are_counted_and_left_out() -> None:
    for portfolio in (1, 2, 3):
        _record(PROFIT, portfolio=portfolio)
    with get_db() as db:
        compared, left_out = compare_formulas(db, [1, 2, 3], -1)
    assert (compared, left_out) == ([], 3)


def _old_file(folder: Path, formula: str) -> None:
    folder.mkdir()
    entries = []
    for number, (balance, invested, profit_loss) in enumerate(MIXED):
        value = _value(formula, (balance, invested, profit_loss))
        amounts = {"balance": balance, "total_invested": invested, "total_profit_loss": profit_loss}
        entries.append(an_old_snapshot(datetime(2026, 1, 1 + number), **amounts, total_value=value))
    (folder / "portfolio_history.json").write_text(json.dumps(entries))


def test_verify_ends_with_the_change_and_keeps_its_exit_status(tmp_path: Path) -> None:
    """It is a note on what follows. As JSON it is beside the differences."""
    _old_file(tmp_path / "old", PROFIT)
    options = (str(tmp_path / "old"), "--timezone", "UTC", "--portfolio-id", "1")
    assert _run("import", *options)[0] == 0
    before = _run("verify", *options)
    _record(PROFIT, portfolio=2)
    _import(ALL, portfolio=2)  # not in the files
    _record(ALL)
    status, shown = _run("verify", *options)
    facts: dict[str, Any] = json.loads(_run("verify", *options, "--json")[1])
    one = _compared()[1]
    assert (before[0], "note:" in before[1]) == (0, False)
    assert (status, shown.splitlines()[-1]) == (0, f"note: {one.found} → {one.advice}")
    assert facts["formula_changes"] == [{"portfolio_id": 1, "found": one.found, "advice": one.advice}]
    with get_db() as db:
        db.execute(text("UPDATE portfolio_history SET balance = 399, total_value = 411.25 WHERE total_value = 412.25"))
    assert _run("verify", *options)[0] == 1


def test_verify_prints_its_comparison_although_the_formulas_cannot_be_read_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line on stderr says so, and the exit status is that of the comparison."""
    _old_file(tmp_path / "old", PROFIT)
    options = (str(tmp_path / "old"), "--timezone", "UTC", "--portfolio-id", "1")
    assert cli("import", *options).exit_code == 0
    compare = Verification.differences

    def compare_then_rename(verification: Verification, advance: Callable[[], None]) -> Iterator[Difference]:
        yield from compare(verification, advance)
        with get_db() as db:
            db.execute(text("ALTER TABLE portfolio_history RENAME TO away"))

    monkeypatch.setattr(Verification, "differences", compare_then_rename)
    run = cli("verify", *options, "--json")
    facts = json.loads(run.stdout)
    assert (run.exit_code, facts["differences"], facts["files"][0]["equal"], facts["formula_changes"]) == (0, [], 4, [])
    assert run.stderr.startswith("the formulas of total_value were not compared: ")


def test_verify_says_how_many_portfolios_of_a_large_history_were_not_compared(tmp_path: Path) -> None:
    """It compares 201."""
    entries = [an_old_snapshot(datetime(2026, 1, 1), portfolio_id=number) for number in range(203)]
    (tmp_path / "portfolio_history.json").write_text(json.dumps(entries))
    run = cli("verify", str(tmp_path), "--timezone", "UTC")
    assert (run.exit_code, run.stderr) == (1, "the formula of total_value was not compared in 2 more portfolios\n")
