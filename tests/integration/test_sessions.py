"""Sessions whose settings differ: by role, database, environment or pooler. The same commands give the same results."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from redis import Redis
from sqlalchemy import make_url, text

from consumers.db import inserts
from consumers.db.engine import engine, get_db, limit_statements, long_read, read_transaction, reader
from consumers.db.inserts import Stored, insert_events
from consumers.errors import StoreUnavailable
from consumers.operations import get_portfolio_history
from consumers.web.api import create_app
from producers.events import encode, event_of
from tests.deliveries import burst, enqueue_snapshots, history_queue
from tests.factories import INSTANT, a_snapshot, an_old_snapshot
from tests.histories import START, store_archive, store_rejection, store_values

ODD = {
    "TimeZone": "Asia/Tokyo",
    "DateStyle": "German, DMY",
    "IntervalStyle": "sql_standard",
    "extra_float_digits": "-10",
    "default_transaction_isolation": "serializable",
    "default_transaction_deferrable": "on",
    "client_encoding": "LATIN1",
    "bytea_output": "escape",
    "statement_timeout": "20min",
    "lock_timeout": "20min",
    "array_nulls": "off",
    "backslash_quote": "off",
    "standard_conforming_strings": "off",
    "transform_null_equals": "on",
    "quote_all_identifiers": "on",
    "gin_fuzzy_search_limit": "1",
    "exit_on_error": "on",
    "xmlbinary": "hex",
    "check_function_bodies": "off",
    "row_security": "off",
    "default_text_search_config": "german",
    "default_toast_compression": "pglz",
    "client_min_messages": "error",
    "plpgsql.extra_errors": "all",
    "jit": "off",
    **{f"enable_{scan}": "off" for scan in ("seqscan", "indexscan", "hashjoin", "mergejoin", "sort")},
}


def _make_odd(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Change the settings of the database and of the environment; later sessions begin with them."""
    name = make_url(database_url).database
    with get_db() as db:
        for setting, value in ODD.items():
            db.exec_driver_sql(f"ALTER DATABASE {name} SET {setting} = '{value}'")
    monkeypatch.setenv("PGTZ", "America/New_York")
    monkeypatch.setenv("PGDATESTYLE", "SQL, DMY")
    monkeypatch.setenv("TZ", "Asia/Kathmandu")
    reader().dispose()
    engine().dispose()


@pytest.fixture
def odd_database(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _make_odd(database_url, monkeypatch)


def _settings(transaction: AbstractContextManager[Any], *names: str) -> list[str]:
    with transaction as db:
        return [db.exec_driver_sql(f"SHOW {name}").scalar_one() for name in names]


@pytest.mark.usefixtures("odd_database")
@pytest.mark.parametrize(
    ("transaction", "isolation", "read_only", "statement_timeout"),
    [
        (get_db, "read committed", "off", "0"),
        (read_transaction, "repeatable read", "on", "5s"),
        (long_read, "repeatable read", "on", "0"),
    ],
)
def test_each_transaction_has_its_own_settings(
    transaction: Any, isolation: str, read_only: str, statement_timeout: str
) -> None:
    names = ("transaction_isolation", "transaction_read_only", "statement_timeout", "TimeZone", "client_encoding",
             "array_nulls", "gin_fuzzy_search_limit", "quote_all_identifiers", "exit_on_error")  # fmt: skip
    expected = [isolation, read_only, statement_timeout, "UTC", "UTF8", "on", "0", "off", "off"]
    for _ in range(3):  # also on a connection that was used before
        assert _settings(transaction(), *names) == expected


@pytest.mark.usefixtures("odd_database")
def test_a_long_read_has_no_time_limit() -> None:
    names = ["statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout"]
    with long_read() as db:
        if int(db.exec_driver_sql("SHOW server_version_num").scalar_one()) >= 170000:
            names.append("transaction_timeout")
    assert _settings(long_read(), *names) == ["0"] * len(names)


def test_transactions_of_an_import_have_no_time_limit(database_url: str) -> None:
    """Its statements have one."""
    _limit_transactions(database_url, "1h")
    limit_statements(20.0, long_transactions=True)
    names = ["statement_timeout", "idle_in_transaction_session_timeout"]
    with get_db() as db:
        if int(db.exec_driver_sql("SHOW server_version_num").scalar_one()) >= 170000:
            names.append("transaction_timeout")
    assert _settings(get_db(), *names) == ["20s", *["0"] * (len(names) - 1)]


def _limit_transactions(database_url: str, limit: str) -> None:
    name = make_url(database_url).database
    with get_db() as db:
        db.exec_driver_sql(f"ALTER DATABASE {name} SET idle_in_transaction_session_timeout = '{limit}'")
        if int(db.exec_driver_sql("SHOW server_version_num").scalar_one()) >= 170000:
            db.exec_driver_sql(f"ALTER DATABASE {name} SET transaction_timeout = '{limit}'")
    engine().dispose()
    engine.cache_clear()


@pytest.mark.usefixtures("redis")
def test_long_commands_work_where_transactions_must_be_short(database_url: str, tmp_path: Path) -> None:
    _limit_transactions(database_url, "50ms")
    old = tmp_path / "old"
    old.mkdir()
    entries = [an_old_snapshot((START + timedelta(minutes=number)).replace(tzinfo=None)) for number in range(5000)]
    (old / "portfolio_history.json").write_text(json.dumps(entries))
    options = ["--timezone", "UTC", "--portfolio-id", "1"]
    for command in (
        ["init-db"], ["import", str(old), *options], ["verify", str(old), *options], ["history", "--csv"],
        ["export", str(tmp_path / "new"), *options], ["audit"],
    ):  # fmt: skip
        run = _run(*command)
        assert run.returncode == 0, (command, run.stderr)
        assert "waiting" not in run.stderr


@pytest.mark.usefixtures("redis")
@pytest.mark.usefixtures("database_url")
def test_the_insert_of_a_frozen_process_does_not_block_its_event(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped worker's transaction stays open. Without a limit, no other worker could store the event meanwhile."""
    monkeypatch.setattr(inserts, "IDLE_SECONDS", 0.1)
    inserts._insert_statement.cache_clear()
    event = event_of(a_snapshot(), source="other/1", sequence=1)

    def freeze_while_another_inserts() -> None:
        with get_db() as frozen:
            insert_events(frozen, [event])
            with get_db(statement_seconds=5) as other:  # waits for the lock of the frozen one, for 0.5 s at most
                (stored,) = insert_events(other, [event])
            assert isinstance(stored, Stored)
            assert stored.created

    with pytest.raises(StoreUnavailable, match="closed the connection|idle-in-transaction"):
        freeze_while_another_inserts()
    assert len(get_portfolio_history()) == 1
    inserts._insert_statement.cache_clear()


@pytest.mark.parametrize("transaction", [read_transaction, long_read])
def test_a_read_only_transaction_cannot_change_anything(database_url: str, transaction: Any) -> None:
    with pytest.raises(StoreUnavailable, match="read-only transaction"), transaction() as db:
        db.exec_driver_sql("DELETE FROM portfolio_history")


@pytest.mark.usefixtures("odd_database")
def test_a_worker_stores_rows_under_odd_settings(redis: Redis) -> None:
    """Also NULL: the array of a column is written in another form if nothing else is in it."""
    enqueue_snapshots(redis, 3)
    burst(redis)
    event = event_of(a_snapshot(portfolio_id=None), source="other/1", sequence=None)
    history_queue(redis).enqueue("consumers.handlers.record_portfolio_snapshot", encode(event))
    burst(redis)
    rows = get_portfolio_history()
    assert len(rows) == 4
    assert {row["timestamp"].utcoffset() for row in rows} == {timedelta(0)}
    assert max(row["timestamp"] for row in rows) >= INSTANT


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "consumers.cli", *command]
    return subprocess.run(program, capture_output=True, text=True, timeout=60, check=False)


def _outputs(folder: Path) -> dict[str, str]:
    """Print the history in each form, then import, verify and export it."""
    commands = [
        ["history"], ["history", "--json"], ["history", "--csv"],
        ["archives"], ["archives", "--json"], ["archives", "--csv"],
        ["failed", "list"], ["failed", "list", "--each", "--json"],
        ["export", str(folder), "--timezone", "Europe/Berlin", "--portfolio-id", "1"],
        ["verify", str(folder), "--timezone", "Europe/Berlin", "--portfolio-id", "1"],
        ["import", str(folder), "--timezone", "Europe/Berlin", "--portfolio-id", "1", "--json"],
        ["audit", "--json"], ["audit", "--since", "2026-06-01T00:00:00Z"],
    ]  # fmt: skip
    found = {}
    for command in commands:
        run = _run(*command)
        found[" ".join(command).replace(str(folder), "FOLDER")] = f"{run.returncode} {run.stdout}{run.stderr}".replace(
            str(folder), "FOLDER"
        )
    files = {file.name: file.read_text() for file in folder.iterdir()}
    return found | files


@pytest.mark.usefixtures("redis")
def test_commands_print_the_same_as_with_default_settings(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store_values([100.25, 0.1 + 0.2, None, 1e9])
    store_archive([{"market_id": "1", "title": "Zürich 東京", "price": 0.30000000000000004}])
    store_rejection("job-1", "x")
    expected = _outputs(tmp_path / "default")
    failing = [name for name, output in expected.items() if not output.startswith(("0 ", "["))]
    assert failing == ["failed list", "failed list --each --json"]
    _make_odd(database_url, monkeypatch)
    assert _outputs(tmp_path / "odd") == expected


@pytest.fixture
def at_noon(database_url: str) -> None:
    """Snapshots of three days at noon in UTC, an archive, and a rejection."""
    store_values([100, 101, 102])
    store_archive([{"market_id": "1"}])
    store_rejection("job-1", "x")
    with get_db() as db:
        db.execute(text("UPDATE event_outcomes SET created_at = :at"), {"at": START})


@pytest.mark.usefixtures("redis", "at_noon", "odd_database")
def test_each_time_that_ends_in_z_is_in_utc(tmp_path: Path) -> None:
    """In the listings, and in the rows without an entry that `verify` finds."""
    folder = tmp_path / "old"
    folder.mkdir()
    ends = [an_old_snapshot((START + timedelta(days=day)).replace(tzinfo=None)) for day in (0, 2)]
    (folder / "portfolio_history.json").write_text(json.dumps(ends))

    outputs = [_run(*command).stdout for command in (["history"], ["archives"], ["failed", "list"])]
    verified = _run("verify", str(folder), "--timezone", "UTC", "--portfolio-id", "1").stdout

    assert [output for output in outputs if "2026-06-01 12:00:00Z" not in output] == []
    assert "unexpected: portfolio_history row 2: 2026-06-02 12:00:00.000000Z of portfolio 1" in verified


@pytest.mark.usefixtures("redis", "at_noon", "odd_database")
@pytest.mark.parametrize(
    "path",
    [
        "/trading/portfolio-history",
        "/trading/portfolio-history?format=csv",
        "/trading/signal-archives",
        "/trading/signals?market_id=1",
        "/page/curve?portfolio=1",
        "/page/archives?month=2026-06",
        "/page/signals?month=2026-06&search=1",
    ],
)
def test_each_time_of_the_api_and_the_page_is_in_utc(path: str) -> None:
    with TestClient(create_app()) as client:
        response = client.get(path)
    assert response.status_code == 200, response.text
    assert "2026-06-01T12:00:00+00:00" in response.text or "2026-06-03T12:00:00+00:00" in response.text
    assert not re.search(r"T12:[0-9:.]+(?!\+00:00)[+-]|\+0[1-9]:|\+[1-9][0-9]:|-0[1-9]:[0-9]{2}\b", response.text)
