"""The recipes of consumers/db/ANALYSIS.md run on files that its commands write, and lose nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest

from consumers.db.engine import get_db
from consumers.db.inserts import insert_events
from producers.events import event_of
from tests.documents import block
from tests.factories import INSTANT, a_signal, a_snapshot, an_archive

PROGRAMS = str(Path(sys.executable).parent)
EXACT = "123456789012.12345678"  # a float has 16 digits

_CHECKS = {
    "pandas": """
from datetime import UTC
assert str(history["total_value"].dtype) == "decimal128(20, 8)[pyarrow]"
assert str(history["portfolio_id"].dtype) == "int64[pyarrow]"
assert history["portfolio_id"].isna().tolist() == [False, False, True]
assert history["timestamp"].tolist() == times, history["timestamp"].tolist()
assert not_invested.tolist() == [value - Decimal("100") for value in values], not_invested.tolist()
assert sorted(daily.tolist()) == sorted([values[0], values[2]]), daily
assert from_csv["total_value"].tolist() == values
assert from_csv["timestamp"].tolist() == times
assert from_csv["portfolio_id"].tolist()[:2] == [2**53 + 1] * 2
assert signals["market_question"].tolist() == [question] * 2
assert signals["price"].tolist() == [price] * 2
assert signals["archived_at"][0] == times[2]
""",
    "polars": """
assert history.collect_schema()["total_value"] == pl.Decimal(20, 8)
assert history.collect()["timestamp"].to_list() == times
assert sorted(daily["total_value"].to_list()) == sorted([values[0], values[2]])
for rows in (history.collect(), from_ndjson.collect()):
    assert rows["total_value"].to_list() == values
    assert rows["timestamp"].to_list() == times
    assert rows["portfolio_id"].to_list() == [2**53 + 1] * 2 + [None]
assert from_ndjson.collect().schema == {**history.collect_schema(), "open_positions": pl.Int64, "trade_count": pl.Int64}
assert signals["market_id"].to_list() == ["510372", "514006"]
assert signals["archived_at"][0] == times[2]
""",
    "duckdb": """
assert [row[2] for row in daily.fetchall()] == [values[0], values[2]], daily
assert [str(kind) for kind in daily.types] == ["BIGINT", "DATE", "DECIMAL(20,8)"]
names = from_csv.columns
rows = [dict(zip(names, row)) for row in from_csv.fetchall()]
assert [row["total_value"] for row in rows] == values
assert [row["timestamp"] for row in rows] == times
assert [row["portfolio_id"] for row in rows] == [2**53 + 1] * 2 + [None]
assert signals.fetchall() == [(times[2], "510372", "buy_yes"), (times[2], "514006", "buy_yes")]
text = duckdb.sql("SELECT total_value FROM 'history.ndjson'")
assert [Decimal(value) for value, in text.fetchall()] == values
""",
}


@pytest.fixture
def folder(database_url: str, tmp_path: Path) -> Path:
    """Folder in which the documented commands have written their files."""
    question, large = "Öffnet die Brücke?\u2028🌉", 2**53 + 1  # a float has no such integer
    later = timedelta(microseconds=898_766)  # to a full second: RFC 3339 then has no fraction
    snapshots = [
        a_snapshot(portfolio_id=None, total_value="-0.00000001"),
        a_snapshot(portfolio_id=large, total_value="0.3"),
        a_snapshot(portfolio_id=large, total_value=EXACT, after=later),
    ]
    signals = [a_signal(market_id=market, market_question=question, price=0.1) for market in ("510372", "514006")]
    with get_db() as db:
        events = [*snapshots, an_archive(signals=signals)]
        insert_events(db, [event_of(one, source="bot/1", sequence=number) for number, one in enumerate(events)])
    script = block("consumers/db/ANALYSIS.md", "write")
    path = f"{PROGRAMS}:{os.environ['PATH']}"
    subprocess.run(["sh", "-ec", script], cwd=tmp_path, env={**os.environ, "PATH": path}, check=True)
    return tmp_path


@pytest.mark.parametrize(
    ("library", "recipe"),
    [
        ("pandas", block("consumers/db/ANALYSIS.md", "pandas")),
        ("polars", block("consumers/db/ANALYSIS.md", "polars")),
        ("duckdb", block("consumers/db/ANALYSIS.md", "duckdb")),
    ],
)
def test_a_recipe_reads_exact_amounts_and_utc_times(folder: Path, library: str, recipe: str) -> None:
    """In a new process, where a warning is an error: digits, times, large and missing portfolios, signals."""
    expected = f"""
from datetime import UTC, datetime
from decimal import Decimal
values = [Decimal("{EXACT}"), Decimal("0.3"), Decimal("-0.00000001")]
times = [datetime.fromisoformat(one) for one in ("{INSTANT + timedelta(microseconds=898_766)}", *["{INSTANT}"] * 2)]
question, price = "Öffnet die Brücke?\\u2028🌉", Decimal("0.1")
"""
    program = folder / "recipe.py"
    program.write_text(recipe + expected + _CHECKS[library], "utf-8")
    run = subprocess.run(
        [sys.executable, "-W", "error", str(program)], cwd=folder, capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stderr) == (0, "")
