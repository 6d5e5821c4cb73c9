"""Importing the rows of adopted tables: `import --from-tables` and `verify --from-tables`."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from sqlalchemy import text

from consumers.db.engine import engine, get_db
from consumers.legacy.adoption import adopt_legacy
from consumers.legacy.legacy_rows import table_sources
from producers.errors import HistoryError
from tests.documents import block
from tests.legacy_databases import (
    ARCHIVES,
    FIRST_GENERATION,
    FIRST_GENERATION_SNAPSHOTS,
    SECOND_GENERATION,
    SECOND_GENERATION_SNAPSHOTS,
)

PROGRAM = [sys.executable, "-m", "consumers.cli"]
BERLIN = ("--timezone", "Europe/Berlin", "--json")


def _execute(*statements: str, **values: Any) -> None:
    with engine().begin() as db:
        for statement in statements:
            db.execute(text(statement), values)


def _run(*arguments: str) -> tuple[int, dict[str, Any]]:
    run = subprocess.run([*PROGRAM, *arguments], capture_output=True, text=True, timeout=100, check=False)
    assert run.stderr == ""
    return run.returncode, json.loads(run.stdout)


@pytest.fixture
def first_generation(empty_database_url: str) -> None:
    _execute(FIRST_GENERATION)
    _execute(FIRST_GENERATION_SNAPSHOTS, ARCHIVES, rows=700)
    adopt_legacy(engine())


def _counts(files: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [tuple(one[name] for name in ("name", "read", "stored", "already_there", "rejected")) for one in files]


def _totals(snapshots: str, archives: str) -> tuple[Any, ...]:
    """Return sums over two tables, old or new: amounts, counts, first and last date, and a digest of the signals."""
    with get_db() as db:
        row = db.execute(
            text(f"""
                SELECT count(*), sum(balance), sum(total_invested), sum(total_profit_loss), sum(total_value),
                    sum(open_positions), sum(trade_count), min(snapshot_date), max(snapshot_date),
                    (SELECT count(*) FROM {archives}), (SELECT sum(signals_count) FROM {archives}),
                    (SELECT md5(string_agg(CAST(signals_data AS text), ',' ORDER BY archived_at)) FROM {archives})
                FROM {snapshots}
            """)
        ).one()
    return tuple(row)


def test_the_first_generation_is_imported_completely_and_once(first_generation: None) -> None:
    """`verify` finds no difference, a second import inserts nothing, and `audit` finds no gap."""
    before = _totals("portfolio_history_legacy", "signal_archives_legacy")
    first = _run("import", "--from-tables", *BERLIN)
    verified = _run("verify", "--from-tables", *BERLIN)
    again = _run("import", "--from-tables", *BERLIN)
    audited = subprocess.run([*PROGRAM, "audit"], check=False, capture_output=True).returncode

    names = ("portfolio_history_legacy", "signal_archives_legacy")
    assert (first[0], _counts(first[1]["files"])) == (0, [(name, 700, 700, 0, 0) for name in names])
    assert (verified[0], verified[1]["differences"]) == (0, [])
    assert (again[0], _counts(again[1]["files"])) == (0, [(name, 700, 0, 700, 0) for name in names])
    assert audited == 0
    assert _totals("portfolio_history", "signal_archives") == before
    assert _totals(*names) == before


def test_each_portfolio_of_the_second_generation_keeps_its_number(empty_database_url: str) -> None:
    """--portfolio-id is only for entries without one. A count that was NULL becomes 0."""
    _execute(SECOND_GENERATION)
    _execute(SECOND_GENERATION_SNAPSHOTS, rows=30)
    adopt_legacy(engine())
    imported = _run("import", "--from-tables", "--portfolio-id", "99", *BERLIN)

    same = """
        SELECT count(*) FROM portfolio_history AS new JOIN portfolio_history_legacy AS old
        ON (new.portfolio_id, new.snapshot_date, new.balance, new.total_value, new.open_positions, new.trade_count)
        = (old.portfolio_id, old.snapshot_date, old.balance, old.total_value, coalesce(old.open_positions, 0),
            coalesce(old.trade_count, 0))
    """
    assert (imported[0], _counts(imported[1]["files"])) == (0, [("portfolio_history_legacy", 30, 30, 0, 0)])
    with get_db() as db:
        assert db.execute(text(same)).scalar_one() == 30


def test_rows_deleted_between_two_imports_leave_no_gap(first_generation: None) -> None:
    """The numbers of later rows decrease. Stored events are found by their event id."""
    _execute(
        "CREATE TABLE kept AS SELECT * FROM portfolio_history_legacy WHERE id > 400",
        "DELETE FROM portfolio_history_legacy WHERE id > 400",
    )
    _run("import", "--from-tables", *BERLIN)
    _execute(
        "DELETE FROM portfolio_history_legacy WHERE id IN (2, 77)",
        "INSERT INTO portfolio_history_legacy SELECT * FROM kept",
    )
    again = _run("import", "--from-tables", *BERLIN)
    audited = subprocess.run([*PROGRAM, "audit"], check=False, capture_output=True).returncode
    verified = _run("verify", "--from-tables", *BERLIN)

    assert again[0] == 0
    assert again[1]["files"][0]["stored"] == 300
    assert audited == 0
    # The two rows that are no longer in the old table.
    assert (verified[0], [one["what"] for one in verified[1]["differences"]]) == (1, ["unexpected", "unexpected"])


def test_without_adopted_tables_the_import_fails(database_url: str) -> None:
    """The error names the command that adopts them. Both a folder and --from-tables, or neither, is wrong usage."""
    run = subprocess.run([*PROGRAM, "import", "--from-tables"], capture_output=True, text=True, check=False)
    wrong = [
        subprocess.run([*PROGRAM, "import", *more], capture_output=True, check=False).returncode
        for more in ([], ["/tmp", "--from-tables"])
    ]

    with pytest.raises(HistoryError, match="there are no adopted tables in schema public"):
        table_sources(engine())
    assert (run.returncode, run.stderr) == (
        1,
        "error: there are no adopted tables in schema public: run trading-history init-db --adopt-legacy first\n",
    )
    assert wrong == [2, 2]


def test_the_commands_of_the_document_adopt_and_import_old_tables(empty_database_url: str) -> None:
    """The last one, `verify`, finds no difference."""
    _execute(FIRST_GENERATION)
    _execute(FIRST_GENERATION_SNAPSHOTS, ARCHIVES, rows=5)
    for line in block("consumers/legacy/README.md", "adopt").splitlines():
        run = subprocess.run([*PROGRAM, *line.split()[1:]], capture_output=True, text=True, timeout=60, check=False)
        assert run.returncode == 0, run.stderr
    assert _totals("portfolio_history", "signal_archives") == _totals(
        "portfolio_history_legacy", "signal_archives_legacy"
    )
