"""`history --csv` and `archives --csv`: all rows with exact values, written to a pipe."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest

from consumers.db.engine import get_db
from consumers.db.inserts import insert_events
from producers.events import PortfolioSnapshot, SignalArchive, event_of
from tests.factories import INSTANT, a_signal, a_snapshot, an_archive

pytestmark = pytest.mark.usefixtures("database_url")

PROGRAM = [sys.executable, "-m", "consumers.cli"]


def _run(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    # This encoding cannot write the data; it must have no effect.
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    return subprocess.run([*PROGRAM, *arguments], capture_output=True, timeout=60, check=False, env=environment)


def _rows(run: subprocess.CompletedProcess[bytes]) -> list[dict[str, str]]:
    assert (run.returncode, run.stderr) == (0, b"")
    return list(csv.DictReader(io.StringIO(run.stdout.decode(), newline="")))


def _store(*payloads: PortfolioSnapshot | SignalArchive) -> None:
    with get_db() as db:
        insert_events(db, [event_of(one, source="csv/1", sequence=n) for n, one in enumerate(payloads)])


def test_csv_of_snapshots_is_exact_and_newest_first() -> None:
    """Amounts have every digit, times are ISO 8601 with offset, NULL is an empty field, lines end as in RFC 4180."""
    _store(a_snapshot(balance="-123456789012.00000001", portfolio_id=None), a_snapshot(after=timedelta(hours=1)))

    run = _run("history", "--csv")

    newest, oldest = _rows(run)
    assert run.stdout.count(b"\r\n") == 3
    assert list(oldest.items())[2:-1] == [
        ("source", "csv/1"),
        ("sequence", "0"),
        ("portfolio_id", ""),
        ("snapshot_date", "2026-11-22"),
        ("timestamp", "2026-11-22T17:02:46.101234+00:00"),
        ("balance", "-123456789012.00000001"),
        ("total_invested", "100"),
        ("total_profit_loss", "197.25"),
        ("total_value", "10097.37"),
        ("open_positions", "1"),
        ("trade_count", "2"),
    ]
    assert datetime.fromisoformat(oldest["created_at"]).utcoffset() == timedelta(0)
    assert datetime.fromisoformat(newest["timestamp"]) == INSTANT + timedelta(hours=1)


def test_csv_of_archives_has_the_signals_as_json_text() -> None:
    """Every digit and character is kept."""
    signals = [a_signal(market_question='Is it "so",\nor\r\nnot? 🌉', price=Decimal("0.10000000000000000001"))]
    _store(an_archive(signals=signals))

    (row,) = _rows(_run("archives", "--csv"))

    read = json.loads(row["signals_data"], parse_float=Decimal)
    assert (read[0]["market_question"], read[0]["price"]) == (signals[0]["market_question"], signals[0]["price"])
    assert row["signals_data"].startswith("[")
    assert (row["archive_month"], row["signals_count"]) == ("2026-11", "1")


def test_csv_of_an_empty_table_is_only_a_header() -> None:
    """It has all columns."""
    run = _run("archives", "--csv")
    assert (run.returncode, run.stdout.decode()) == (
        0,
        "id,event_id,source,sequence,portfolio_id,archived_at,archive_month,signals_count,signals_data,created_at\r\n",
    )


def test_csv_has_all_rows_or_those_of_the_filter() -> None:
    """There is no limit by default; portfolio and period work as without --csv."""
    hours = [datetime(2026, 1, 1, hour, tzinfo=UTC) for hour in range(24)]
    _store(*(a_snapshot(timestamp=hour, portfolio_id=portfolio) for hour in hours for portfolio in (1, 2)))
    _store(*(an_archive(archived_at=hour, portfolio_id=portfolio) for hour in hours for portfolio in (1, 2)))

    for command in ("history", "archives"):
        chosen = ("--portfolio-id", "2", "--since", "2026-01-01T10:00:00", "--until", "2026-01-01T20:00:00")
        numbers = [len(_rows(_run(command, "--csv", *options))) for options in ((), ("-n", "3"), chosen)]
        assert numbers == [48, 3, 10]


def test_csv_ends_quietly_if_the_reader_closes_the_pipe() -> None:
    """It prints no traceback, and exits with the status of SIGPIPE like other programs."""
    _store(*(an_archive(after=timedelta(seconds=n), signals=[a_signal(reason="x" * 50_000)]) for n in range(40)))
    for command, form in (("archives", "--csv"), ("archives", "--ndjson"), ("history", "--csv")):
        writer = subprocess.Popen([*PROGRAM, command, form], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert writer.stdout is not None
        assert writer.stderr is not None
        if command == "archives":
            assert writer.stdout.readline().startswith((b"id,event_id", b'{"id": '))
        writer.stdout.close()
        errors = writer.stderr.read()
        writer.stderr.close()
        assert (writer.wait(30), errors) == (141, b"")
