"""The roles of schema.sql: the writer inserts, the reader selects, and no other role may read."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr
from redis import Redis
from sqlalchemy import Engine, make_url, text
from sqlalchemy.exc import ProgrammingError
from typer.testing import CliRunner

from consumers.cli import app
from consumers.db import engine, logins
from consumers.db.engine import create_store_engine
from consumers.db.logins import API, READER, WORKER, WRITER
from consumers.db.schema import apply_schema, role_notes
from consumers.embedded import Addresses
from consumers.operations import get_portfolio_history, insert_signal_archive
from consumers.settings import LoginSettings
from consumers.web.api import create_app
from tests.conftest import a_database
from tests.deliveries import burst, enqueue_snapshots, history_queue
from tests.factories import INSTANT, a_signal
from tests.histories import store_rejection
from tests.rq_programs import until

_PASSWORD = "n0t-for-a-log 'quoted' §"


def _execute(url: str, *statements: str) -> None:
    store = create_store_engine(SecretStr(url))
    with store.begin() as db:
        for statement in statements:
            db.exec_driver_sql(statement.replace("%", "%%"))
    store.dispose()


def _as(url: str, role: str) -> str:
    return make_url(url).set(username=role).render_as_string(hide_password=False)


def _run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command with these settings in addition to those of this process."""
    return subprocess.run(
        [sys.executable, "-m", "consumers.cli", *arguments],
        capture_output=True, text=True, check=False, timeout=60, env={**os.environ, **environment},
    )  # fmt: skip


@pytest.fixture
def roles(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """URL of a database, as its owner, with the two login roles and a third one without privileges."""
    for name in ("HISTORY_WRITER_PASSWORD", "HISTORY_READER_PASSWORD"):
        monkeypatch.setenv(name, _PASSWORD)
    lines = _in_process("init-db").splitlines()
    assert lines[1:] == [f"Login {login} is ready, with the password from the settings." for login in (WORKER, API)]
    _execute(database_url, "CREATE ROLE another_login LOGIN")
    yield database_url
    _execute(database_url, *[f"DROP OWNED BY {name}; DROP ROLE {name}" for name in (WORKER, API, "another_login")])


_NEW_ROW = """INSERT INTO portfolio_history (event_id, source, snapshot_date, "timestamp", balance, total_invested,
    total_profit_loss, total_value, open_positions, trade_count)
    VALUES (gen_random_uuid(), 'x', now(), now(), 1, 1, 1, 1, 1, 1)"""
_NEW_OUTCOME = "INSERT INTO event_outcomes (job_id, outcome) VALUES (CAST(gen_random_uuid() AS text), 'duplicate')"
_TABLES = ("portfolio_history", "signal_archives", "event_outcomes", "withdrawals")
_READS = [f"SELECT * FROM {table}" for table in _TABLES]
_WRITES = [_NEW_ROW, _NEW_OUTCOME, "UPDATE event_outcomes SET reason = 'x'", "DELETE FROM event_outcomes"]
_CHANGES = [
    *(f"{verb} portfolio_history{rest}" for verb, rest in (("UPDATE", " SET balance = 0"), ("DELETE FROM", ""))),
    *(f"{verb} signal_archives{rest}" for verb, rest in (("UPDATE", " SET source = ''"), ("DELETE FROM", ""))),
    """INSERT INTO withdrawals (event_id, source, row_id, content, reason, actor, created_at)
    VALUES (gen_random_uuid(), 'x', 1, '{}', 'x', 'x', now())""",
    "UPDATE withdrawals SET reason = 'x'",
    "DELETE FROM withdrawals",
    "LOCK TABLE portfolio_history IN SHARE ROW EXCLUSIVE MODE",
    *(f"TRUNCATE {table}" for table in _TABLES),
    "DROP TABLE portfolio_history",
    "ALTER TABLE portfolio_history ADD x integer",
    "CREATE INDEX ON portfolio_history (balance)",
    "CREATE TABLE public.mine (x integer)",
    "CREATE FUNCTION public.lower(x integer) RETURNS integer LANGUAGE sql AS 'SELECT 1'",
    "SELECT setval('portfolio_history_id_seq', 1)",
    "COPY (SELECT 1) TO PROGRAM 'true'",
    "SELECT pg_read_file('postgresql.conf')",
    "SELECT rolpassword FROM pg_authid",
    "CREATE ROLE another",
    f"GRANT {WRITER} TO {API}",
]


def _refused(url: str, statements: list[str]) -> list[str]:
    """Return the statements for which the privilege is missing."""
    store = create_store_engine(SecretStr(url))
    refused = []
    for statement in statements:
        with store.connect() as db:
            try:
                db.exec_driver_sql(statement)
            except ProgrammingError as error:
                if getattr(error.orig, "pgcode", None) != "42501":  # insufficient_privilege
                    raise
                refused.append(statement)
            db.rollback()
    store.dispose()
    return refused


@pytest.mark.parametrize(
    ("role", "may"),
    [(WORKER, [*_READS, *_WRITES]), (API, _READS), ("another_login", [])],
    ids=["worker", "api", "another login"],
)
def test_each_role_has_exactly_these_privileges(roles: str, role: str, may: list[str]) -> None:
    """No role can change or delete rows of history, or create objects that others would use."""
    everything = [*_READS, *_WRITES, *_CHANGES]
    assert _refused(_as(roles, role), everything) == [one for one in everything if one not in may]


def _become(monkeypatch: pytest.MonkeyPatch, url: str, role: str) -> None:
    """Let this process use that role from now on."""
    engine.reader().dispose()
    engine.engine().dispose()
    engine.engine.cache_clear()
    monkeypatch.setenv("DATABASE_URL", _as(url, role))


def _in_process(*arguments: str, status: int = 0) -> str:
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == status, (arguments, done.output, done.exception)
    return done.output


def test_commands_of_a_worker_host_need_only_the_writer(
    roles: str, redis: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker stores and rejects events; failed, audit, status, doctor, import, verify and export work. Only the
    owner may withdraw a row.
    """
    _become(monkeypatch, roles, WORKER)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "portfolio_history.json").write_text(
        '[{"date": "2026-01-02", "timestamp": "2026-01-02T10:00:00", "balance": 1, "total_invested": 0,'
        ' "total_profit_loss": 0, "total_value": 1, "open_positions": 0, "trade_count": 0}]'
    )
    old, new, zone = str(tmp_path / "old"), str(tmp_path / "new"), ("--timezone", "UTC")
    enqueue_snapshots(redis, 2)
    enqueue_snapshots(redis, 2)
    for job_id in ("to-requeue", "to-discard"):
        history_queue(redis).enqueue("consumers.handlers.record_portfolio_snapshot", "{}", job_id=job_id)
    worker = subprocess.Popen([sys.executable, "-m", "consumers.cli", "worker"], stderr=subprocess.DEVNULL)
    try:
        _in_process("import", old, *zone)
        until(lambda: history_queue(redis).failed_job_registry.count == 2 and history_queue(redis).count == 0)
        assert '"workers": 1' in _in_process("status", "--json")
    finally:
        worker.terminate()
        assert worker.wait(30) == 0
    _in_process("verify", old, *zone)
    _in_process("export", new, *zone, "--portfolio-id", "none")
    assert "to-discard" in _in_process("failed", "list", status=1)
    _in_process("failed", "requeue", "to-requeue")
    _in_process("failed", "discard", "to-discard", "--because", "a test")
    burst(redis)
    event_id = str(get_portfolio_history()[0]["event_id"])
    done = _run("withdraw", event_id, "--reason", "a test")
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert f"role {WORKER} may not withdraw a row of portfolio_history, which needs DELETE there" in done.stderr
    for command in ("audit", "history", "archives"):
        _in_process(command, "--json")
    assert f"{WORKER} has all privileges of a worker" in CliRunner().invoke(app, ["doctor", "--json"]).output


def test_handler_under_a_stock_worker_needs_only_the_writer(
    roles: str, redis: Redis, work: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stores an event, finds a duplicate and rejects a job."""
    _become(monkeypatch, roles, WORKER)
    enqueue_snapshots(redis, 2)
    enqueue_snapshots(redis, 1)
    history_queue(redis).enqueue("consumers.handlers.record_portfolio_snapshot", "{}")
    work()
    assert len(get_portfolio_history()) == 2
    assert history_queue(redis).failed_job_registry.count == 1


_PATHS = [
    "/readyz", "/trading/portfolio-history", "/trading/portfolio-history?daily=last", "/trading/signal-archives",
    "/trading/signals?market_id=1", "/page/newest", "/page/portfolios", "/page/curve?portfolio=1",
    "/page/daily?portfolio=1", "/page/months?portfolio_id=1", "/page/archives?portfolio_id=1&month=2026-11",
    "/page/signals?portfolio_id=1&month=2026-11", "/page/archives/1", "/page/health",
]  # fmt: skip


def test_api_and_page_need_only_the_reader(roles: str, redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every path that reads the database answers as for the owner, and doctor names the use of this role."""
    enqueue_snapshots(redis, 1)
    burst(redis)
    insert_signal_archive({"archived_at": INSTANT, "signals": [a_signal()], "portfolio_id": 1})
    store_rejection("job", "why")

    def statuses() -> dict[str, int]:
        with TestClient(create_app(), base_url="http://localhost", raise_server_exceptions=False) as client:
            return {path: client.get(path).status_code for path in _PATHS}

    as_owner = statuses()
    _become(monkeypatch, roles, API)
    assert statuses() == as_owner
    assert {path: status for path, status in as_owner.items() if status != 200} == {}
    output = CliRunner().invoke(app, ["doctor", "--json"]).output
    assert f"{API} may only read: enough for the API, not for a worker" in output


def test_password_never_reaches_the_servers_log(pair: Addresses, database_url: str) -> None:
    """The log has only a SCRAM verifier, even if every statement is logged. Another run sets another verifier."""
    _execute(database_url, f"ALTER DATABASE {make_url(database_url).database} SET log_statement = 'all'")
    owner = create_store_engine(SecretStr(database_url))
    verifiers = []
    for _ in range(2):
        assert _run("init-db", HISTORY_WRITER_PASSWORD=_PASSWORD).returncode == 0
        with owner.connect() as db:
            verifiers.append(
                str(db.scalar(text("SELECT rolpassword FROM pg_authid WHERE rolname = :name"), {"name": WORKER}))
            )
            assert db.scalar(text("SELECT count(*) FROM pg_roles WHERE rolname = :name"), {"name": API}) == 0
    owner.dispose()
    log = (Path(str(make_url(database_url).query["host"])).parent / "postgres.log").read_text()
    _execute(database_url, f"DROP ROLE {WORKER}")

    assert f'ROLE "{WORKER}" LOGIN PASSWORD \'SCRAM-SHA-256$' in log
    assert "n0t-for-a-log" not in log
    assert verifiers[0] != verifiers[1]
    assert {one.split("$")[0] for one in verifiers} == {"SCRAM-SHA-256"}


def test_init_db_takes_back_what_everybody_was_granted_on_the_tables(database_url: str) -> None:
    """Otherwise each role of the server could read them, or change them."""
    tables = ("portfolio_history", "signal_archives", "event_outcomes", "withdrawals")
    _execute(database_url, *(f"GRANT ALL ON {table} TO PUBLIC" for table in tables))
    store = create_store_engine(SecretStr(database_url))
    apply_schema(store)
    with store.connect() as db:
        granted = "SELECT count(*) FROM pg_class, aclexplode(relacl) WHERE relname = ANY (:tables) AND grantee = 0"
        assert db.execute(text(granted), {"tables": list(tables)}).scalar_one() == 0
    store.dispose()


@pytest.mark.parametrize("word", ["NOTICE", "HINWEIS", "NOTICE ", "ЗАМЕЧАНИЕ", "お知らせ"])
def test_notes_about_roles_are_found_in_each_language_of_the_server(empty_database_url: str, word: str) -> None:
    store = create_store_engine(SecretStr(empty_database_url))
    with store.begin() as db, role_notes(db) as notes:
        session: Any = db.connection.driver_connection
        session.notices.append(f"{word}:  roles: x was not created: reason\n")
        session.notices.append(f"{word}:  another notice about roles: y\n")
    store.dispose()
    assert notes == ["x was not created: reason"]


@pytest.fixture
def without_groups(empty_database_url: str) -> Iterator[str]:
    """Database on a server without our roles: those of the other tests are renamed meanwhile."""
    _execute(empty_database_url, *[f"ALTER ROLE {name} RENAME TO away_{name}" for name in (WRITER, READER)])
    yield empty_database_url
    _execute(empty_database_url, *[f"ALTER ROLE away_{name} RENAME TO {name}" for name in (WRITER, READER)])


def test_init_db_without_the_right_to_create_roles_creates_the_tables(
    without_groups: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A managed server may give only a plain owner. init-db prints a note; it fails only if a login is wanted.

    The owner's settings do not suppress the note.
    """
    database = make_url(without_groups).database
    _execute(without_groups, "CREATE ROLE plain_owner LOGIN", f"ALTER DATABASE {database} OWNER TO plain_owner")
    _execute(without_groups, "ALTER ROLE plain_owner SET client_min_messages = error")
    monkeypatch.setenv("DATABASE_URL", _as(without_groups, "plain_owner"))
    done = _run("init-db")
    asked = _run("init-db", HISTORY_READER_PASSWORD=_PASSWORD)
    _execute(without_groups, "REASSIGN OWNED BY plain_owner TO CURRENT_USER", "DROP OWNED BY plain_owner")
    _execute(without_groups, "DROP ROLE plain_owner")

    assert (done.returncode, done.stderr) == (0, "")
    notes = done.stdout.splitlines()
    assert [line.partition(" was not created")[0] for line in notes[1:3]] == [f"Note: {WRITER}", f"Note: {READER}"]
    assert notes[0] == "The tables are ready in schema public."
    assert (asked.returncode, len(asked.stderr.splitlines())) == (1, 1)
    assert f"login role {API} was not created or changed: permission denied" in asked.stderr
    assert _PASSWORD not in asked.stderr


def test_concurrent_init_db_of_several_databases_creates_the_roles_once(pair: Addresses) -> None:
    """Roles belong to the whole server, where the lock of one database does not protect another."""
    with a_database(pair, "template1") as one, a_database(pair, "template1") as other:
        stores = [create_store_engine(SecretStr(url)) for url in (one, other, one, other)]
        barrier = threading.Barrier(len(stores))

        def make(store: Engine) -> Any:
            barrier.wait(10)
            apply_schema(store)
            settings = LoginSettings(HISTORY_WRITER_PASSWORD=None, HISTORY_READER_PASSWORD=SecretStr(_PASSWORD))
            return list(logins.set_passwords(store, settings))

        with ThreadPoolExecutor(len(stores)) as pool:
            assert list(pool.map(make, stores)) == [[API]] * len(stores)
        for store in stores:
            store.dispose()
        _execute(one, f"DROP ROLE {API}")
