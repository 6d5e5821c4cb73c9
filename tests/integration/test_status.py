"""`status`: it reads each part separately, and is fast for any number of rows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from redis import Redis
from sqlalchemy import text

from consumers.cli.status import status_lines
from consumers.db import row_counts
from consumers.db.engine import get_db
from consumers.ops.status import pipeline_status
from consumers.terminal import print_values

_PROGRAM = [sys.executable, "-m", "consumers.cli", "status"]

_NUMBERS = ("portfolio_snapshots", "signal_archives", "duplicate", "rejected")

_ROWS = """
    INSERT INTO {table} (event_id, source, snapshot_date, "timestamp", balance, total_invested, total_profit_loss,
        total_value, open_positions, trade_count)
    SELECT gen_random_uuid(), 'x', now(), now(), 1, 1, 1, 1, 1, 1 FROM generate_series(1, {count})
"""
_OUTCOMES = """
    INSERT INTO event_outcomes (job_id, outcome, reason)
    SELECT '{outcome}-' || number, '{outcome}', 'why' FROM generate_series(1, {count}) AS number
"""


def _execute(*statements: str) -> None:
    with get_db() as db:
        for statement in statements:
            db.execute(text(statement))


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Estimate counts above 100 rows."""
    monkeypatch.setattr(row_counts, "EXACT_UP_TO", 100)


def _spoil(outbox: Path, how: str) -> Path:
    if how == "no database":
        outbox.write_text("nonsense" * 1000)
    elif how == "of a newer release":
        import sqlite3

        with sqlite3.connect(outbox) as db:
            db.execute("PRAGMA user_version = 99")
        db.close()
    else:
        outbox = outbox.with_name("x" * 300)
    return outbox


@pytest.mark.parametrize("how", ["no database", "of a newer release", "a name too long"])
def test_status_reports_an_unreadable_outbox_and_all_other_parts(
    redis: Redis, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Database and queue are still shown. The exit status is 1, and --watch continues."""
    outbox = _spoil(tmp_path / "outbox.db", how)
    monkeypatch.setenv("HISTORY_OUTBOX", str(outbox))
    values = pipeline_status()
    assert values["outbox"].startswith(("outbox ", str(outbox)))
    assert str(outbox) in values["outbox"]
    assert (values["database"], values["redis"], values["queued"]) == ("reachable", "reachable", 0)
    assert values["problems"] != []

    once = subprocess.run([*_PROGRAM, "--json"], capture_output=True, text=True, timeout=60, check=False)
    assert (once.returncode, once.stderr, json.loads(once.stdout)["outbox"]) == (1, "", values["outbox"])
    if how == "no database":
        with subprocess.Popen([*_PROGRAM, "--watch", "--json"], stdout=subprocess.PIPE, text=True) as watching:
            assert watching.stdout is not None
            lines = [json.loads(watching.stdout.readline()) for _ in range(2)]
            watching.kill()
        assert [line["outbox"] for line in lines] == 2 * [values["outbox"]]


def test_few_rows_are_counted_exactly(
    redis: Redis, database_url: str, few: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also if PostgreSQL's statistics are outdated."""
    _execute(_ROWS.format(table="portfolio_history", count=200), "ANALYZE portfolio_history")
    _execute("DELETE FROM portfolio_history WHERE id > 100", _OUTCOMES.format(outcome="duplicate", count=60))
    _execute(_OUTCOMES.format(outcome="rejected", count=40))
    values = pipeline_status()
    assert [values[name] for name in _NUMBERS] == [100, 0, 60, 40]
    assert values["approximate"] == []
    print_values(status_lines(values))
    assert "approximate" not in capsys.readouterr().out


def test_many_rows_are_estimated(
    redis: Redis, database_url: str, few: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """The counts stay numbers; `approximate` names the estimates."""
    _execute(
        _ROWS.format(table="portfolio_history", count=2000),
        *(_OUTCOMES.format(outcome=outcome, count=count) for outcome, count in (("duplicate", 900), ("rejected", 50))),
        "ANALYZE",
        _ROWS.format(table="portfolio_history", count=2000),
    )
    values = pipeline_status()
    assert values["approximate"] == ["portfolio_snapshots", "duplicate"]
    assert values["portfolio_snapshots"] == pytest.approx(4000, rel=0.1)
    assert values["duplicate"] == pytest.approx(900, rel=0.1)
    assert (values["signal_archives"], values["rejected"]) == (0, 50)
    print_values(status_lines(values))
    assert "approximate          portfolio snapshots, duplicate\n" in capsys.readouterr().out


def test_estimate_without_statistics_is_above_the_limit(redis: Redis, database_url: str, few: None) -> None:
    """The planner then guesses. The result is at least the number of rows that were counted."""
    _execute(*(_OUTCOMES.format(outcome=outcome, count=150) for outcome in ("duplicate", "rejected")))
    values = pipeline_status()
    assert values["approximate"] == ["duplicate", "rejected"]
    assert min(values["duplicate"], values["rejected"]) > 100
    assert {type(values[name]) for name in _NUMBERS} == {int}
