"""The examples and tables in consumers/db/README.md and consumers/db/GROWTH.md are correct."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import text
from typer.testing import CliRunner

from consumers.cli import app
from consumers.db.engine import get_db
from consumers.db.logins import API, READER, WORKER, WRITER
from consumers.db.schema_comparison import COLUMNS
from consumers.operations import insert_portfolio_history_snapshot
from consumers.settings import LoginSettings
from tests.documents import block, table
from tests.histories import START, store_archive, store_rejection, store_values

pytestmark = pytest.mark.usefixtures("database_url")


def _run(sql: str) -> list[Sequence[Any]]:
    """Run statements in one transaction and return the rows of each."""
    statements = [statement for statement in sql.split(";") if statement.strip()]
    with get_db() as db:
        return [db.exec_driver_sql(statement).all() for statement in statements]


def test_sql_examples_find_the_rows() -> None:
    """Each statement of README.md returns the row that the test has stored for it."""
    store_values([1, 2], step=timedelta(hours=1))
    store_archive([{"market_id": "510372", "action": "buy_yes", "yes_price": 0.5}, {"market_id": "other"}])
    store_rejection("job", "balance: must be a number")
    values, signals, rejections = _run(block("consumers/db/README.md", "queries"))
    assert [row.total_value for row in values] == [2]
    assert [(row.action, row.price) for row in signals] == [("buy_yes", "0.5")]
    assert [(row.reason, row.count) for row in rejections] == [("balance: must be a number", 1)]


def test_python_read_examples_run() -> None:
    exec(block("consumers/db/README.md", "reads"))


def test_python_insert_example_is_idempotent() -> None:
    """Run twice, it returns the same id and leaves one row in each table."""
    example, first, second = block("consumers/db/README.md", "inserts"), dict[str, Any](), dict[str, Any]()
    exec(example, first)
    exec(example, second)
    assert first["row_id"] == second["row_id"]
    with get_db() as db:
        counts = "SELECT (SELECT count(*) FROM portfolio_history), (SELECT count(*) FROM signal_archives)"
        assert tuple(db.execute(text(counts)).one()) == (1, 1)


def test_withdrawal_example_prints_the_documented_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the snapshot that the example of README.md inserts."""
    monkeypatch.setenv("HISTORY_TIMEZONE", "UTC")
    exec(block("consumers/db/README.md", "inserts"))
    prompt, *printed = block("consumers/db/WITHDRAWALS.md", "withdraw").splitlines()
    dry = CliRunner().invoke(app, [*shlex.split(prompt)[2:], "--dry-run"])
    done = CliRunner().invoke(app, shlex.split(prompt)[2:])
    assert (done.exit_code, done.output.splitlines()) == (0, printed)
    assert dry.output.splitlines()[:-1] == printed[:-1]
    ((listed,),) = _run(block("consumers/db/WITHDRAWALS.md", "list"))
    assert (listed.actor, listed.reason, listed.balance) == ("alice", "read before the deposit", "9900.12")


def test_transaction_example_counts_the_rows() -> None:
    row = dict.fromkeys(("balance", "total_invested", "total_profit_loss", "total_value"), 1)
    insert_portfolio_history_snapshot({"timestamp": START, **row, "open_positions": 1, "trade_count": 1})
    namespace: dict[str, Any] = {}
    exec(block("consumers/db/README.md", "transaction"), namespace)
    assert namespace["count"] == 1


def _documented_columns(marker: str) -> list[str]:
    return re.findall("`([^`]+)`", " ".join(cells[0] for cells in table("consumers/db/README.md", marker)))


def test_every_column_is_documented() -> None:
    """The tables of columns have the columns of the database, and no others."""
    both = _documented_columns("columns: both")
    documented = {
        "portfolio_history": [*both, *_documented_columns("columns: portfolio_history")],
        "signal_archives": [*both, *_documented_columns("columns: signal_archives")],
        "event_outcomes": _documented_columns("columns: event_outcomes"),
        "withdrawals": re.findall(
            "`([^`]+)`", " ".join(row[0] for row in table("consumers/db/WITHDRAWALS.md", "columns: withdrawals"))
        ),
    }
    assert {name: sorted(columns) for name, columns in documented.items()} == {
        name: sorted(columns.split()) for name, columns in COLUMNS.items()
    }


def test_roles_logins_and_settings_are_documented() -> None:
    passwords = [str(field.alias) for field in LoginSettings.model_fields.values()]
    documented = [[cells[0], *cells[2:]] for cells in table("consumers/db/README.md", "roles")]
    assert documented == [
        [f"`{role}`", f"`{login}`", f"`{password}`"]
        for role, login, password in zip((WRITER, READER), (WORKER, API), passwords, strict=True)
    ]


@pytest.fixture
def analyst() -> Iterator[str]:
    """The login that the example names."""
    with get_db() as db:
        db.exec_driver_sql("CREATE ROLE an_analyst LOGIN")
    yield "an_analyst"
    with get_db() as db:
        db.exec_driver_sql("DROP ROLE an_analyst")


def test_analyst_example_grants_read_access_only(analyst: str) -> None:
    with get_db() as db:
        db.exec_driver_sql(block("consumers/db/README.md", "analyst"))
        can = text("SELECT has_table_privilege(:role, 'portfolio_history', :privilege)")
        found = [db.execute(can, {"role": analyst, "privilege": one}).scalar_one() for one in ("SELECT", "INSERT")]
    assert found == [True, False]


def test_autovacuum_example_sets_both_tables() -> None:
    with get_db() as db:
        db.exec_driver_sql(block("consumers/db/GROWTH.md", "autovacuum"))
        rows = db.execute(text("SELECT relname, reloptions FROM pg_class WHERE cardinality(reloptions) = 2 ORDER BY 1"))
        options = {row.relname: [float(one.partition("=")[2]) for one in row.reloptions] for row in rows}
    assert options == {"portfolio_history": [0.02, 0.02], "signal_archives": [0.02, 0.02]}  # the defaults are 0.2, 0.1
