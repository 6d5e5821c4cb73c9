"""`doctor` on real servers: each check in a healthy and in a broken installation, without secrets in the output."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import quote

import pytest
from redis import Redis
from rq import Queue, SimpleWorker
from rq.serializers import JSONSerializer
from rq.suspension import resume, suspend
from rq.utils import as_text
from sqlalchemy import make_url, text
from typer.testing import CliRunner

from consumers.cli import app
from consumers.db import schema_comparison
from consumers.db.engine import engine
from consumers.embedded import Addresses
from consumers.legacy.legacy_json import history_files
from consumers.ops import doctor
from consumers.ops.checks import HealthCheck
from consumers.ops.outbox_health import outbox_copy_checks, outbox_file_checks
from producers.history_producer import HistoryProducer
from producers.outbox import Outbox
from producers.redis_keys import (
    crashes_key,
    lease_key,
    orphans_key,
    owners_key,
    quarantine_key,
    reserved_key,
    token_key,
)
from producers.settings import TransportSettings
from tests.documents import block
from tests.factories import a_snapshot, an_archive
from tests.legacy_databases import FIRST_GENERATION, SECOND_GENERATION
from tests.outages import hanging

PROGRAM = [sys.executable, "-m", "consumers.cli"]
PASSWORD = "s3c:ret/@ß w"
ENCODED = quote(PASSWORD, safe="")
HISTORY = Path("data/history")


def _diagnosed(*folders: Path) -> dict[str, HealthCheck]:
    checks = doctor.diagnose(lambda: [file for folder in (HISTORY, *folders) for file in history_files(folder)])
    assert len({one.name for one in checks}) == len(checks)
    assert [one for one in checks if one.state == "fail" and not (one.found and one.advice)] == []
    return {one.name: one for one in checks}


def _found(name: str) -> tuple[str, str]:
    check = _diagnosed()[name]
    return check.state, check.found


def _execute(statement: str, **values: Any) -> None:
    with engine().begin() as db:
        db.execute(text(statement), values)


def _alter_database(setting: str) -> None:
    with engine().begin() as db:
        name = db.exec_driver_sql("SELECT current_database()").scalar_one()
        db.exec_driver_sql(f"ALTER DATABASE {name} SET {setting}")


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PROGRAM, "doctor", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
        check=False,
    )


@contextmanager
def _worker(redis: Redis, **environment: str) -> Iterator[str]:
    """Run a HistoryWorker during the block. Yields its name in Redis."""
    process = subprocess.Popen(
        [*PROGRAM, "worker"], env={**os.environ, **environment}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        _until(lambda: bool(redis.hkeys(owners_key("history"))))
        yield as_text(redis.hkeys(owners_key("history"))[0]).rpartition(":")[0]
    finally:
        process.terminate()
        process.wait(30)


def test_healthy_installation_passes_every_check(redis: Redis, database_url: str) -> None:
    with _worker(redis):
        run = _run("--json")
        shown = _run()
    checks = {check["name"]: check for check in json.loads(run.stdout)}

    assert [check for check in checks.values() if check["status"] != "ok" or check["advice"]] == []
    assert (run.returncode, run.stderr, shown.returncode) == (0, "", 0)
    assert list(checks) == [
        "database setting",
        "Redis setting",
        "time zone setting",
        "PostgreSQL",
        "PostgreSQL version",
        "PostgreSQL encoding",
        "PostgreSQL writes",
        "PostgreSQL disk writes",
        "PostgreSQL clock",
        "tables",
        "privileges",
        "rejected in the last day",
        "formula of total_value",
        "Redis",
        "Redis version",
        "Redis role",
        "Redis persistence",
        "Redis eviction",
        "queue",
        "workers",
        "reserved jobs",
        "poison candidates",
        "failed jobs",
        "quarantine",
        "outbox",
        "JSON history",
        "RQ",
    ]
    lines = shown.stdout.splitlines()
    assert len(lines) == len(checks) + 1
    assert lines[-1] == f"{len(checks)} ok, 0 warn, 0 fail"
    assert checks["workers"]["found"] == "HistoryWorkers: 1, stock RQ workers: 0"


def test_routine_checks_of_the_document_find_nothing_in_a_healthy_installation(redis: Redis, database_url: str) -> None:
    with _worker(redis):
        for line in block("consumers/cli/README.md", "routine checks").splitlines():
            command = [*PROGRAM, *line.removeprefix("trading-history ").split()]
            assert subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 0, line


def test_warnings_alone_end_with_status_0(redis: Redis, database_url: str) -> None:
    """If nothing waits, a missing worker is a warning."""
    run = _run()
    assert run.returncode == 0
    assert re.search(r"^warn  workers +none → start trading-history worker$", run.stdout, re.MULTILINE)


def test_without_settings_the_embedded_servers_are_started_and_checked() -> None:
    """Afterwards they are stopped."""
    with TemporaryDirectory(prefix="th-", dir="/tmp") as home:
        run = _run("--json", HISTORY_HOME=home)
        checks = {check["name"]: check for check in json.loads(run.stdout)}
        assert (run.returncode, run.stderr) == (0, f"using the embedded PostgreSQL and Valkey in {home}\n")
        assert (checks["embedded servers"]["status"], checks["tables"]["status"]) == ("ok", "ok")
        assert not (Path(home) / "valkey.pid").exists()


def test_embedded_servers_that_do_not_start_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here their folder is a file. The other checks are still made."""
    (tmp_path / "home").touch()
    monkeypatch.setenv("HISTORY_HOME", str(tmp_path / "home"))
    checks = _diagnosed()
    assert checks["embedded servers"].state == "fail"
    assert checks["RQ"].state == "ok"


def test_one_server_without_the_other_fails(pair: Addresses, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server that is set is still checked."""
    monkeypatch.setenv("REDIS_URL", pair.redis_url)
    only_redis = _diagnosed()
    monkeypatch.delenv("REDIS_URL")
    monkeypatch.setenv("DATABASE_URL", pair.database_url)
    only_database = _diagnosed()

    assert [only_redis[name].state for name in ("database setting", "Redis setting", "Redis")] == ["fail", "ok", "ok"]
    assert [only_database[name].state for name in ("database setting", "Redis setting", "PostgreSQL")] == [
        "ok",
        "fail",
        "ok",
    ]
    assert "PostgreSQL" not in only_redis
    assert "Redis" not in only_database


_WITHOUT_DRIVER = """
import sys
sys.modules.update(sqlalchemy=None, psycopg2=None)
from consumers.cli import main
main()
"""


@pytest.mark.parametrize(
    ("database", "status", "found"),
    [
        ("", "ok", "not set, and no database driver is installed: a controller's host needs none"),
        (f"postgresql://u:{ENCODED}@h/d", "warn", "set, but no database driver is installed here"),
    ],
)
def test_host_without_a_database_driver_needs_no_database(redis: Redis, database: str, status: str, found: str) -> None:
    """There, REDIS_URL alone is ok, and everything but PostgreSQL is checked."""
    run = subprocess.run(
        [sys.executable, "-c", _WITHOUT_DRIVER, "doctor", "--json"],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "DATABASE_URL": database},
        check=False,
    )
    checks = {check["name"]: check for check in json.loads(run.stdout)}
    assert (run.returncode, run.stderr) == (0, "")
    assert (checks["database setting"]["status"], checks["database setting"]["found"]) == (status, found)
    assert {"Redis", "queue", "outbox", "RQ"} <= checks.keys()
    assert "PostgreSQL" not in checks


def test_setting_checks_name_the_servers_and_the_origin_of_each_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment has priority over .env."""
    Path(".env").write_text(
        f"POSTGRES_HOST=127.0.0.1\nPOSTGRES_PASSWORD='{PASSWORD}'\nHISTORY_TIMEZONE=Europe/Berlin\n"
    )
    monkeypatch.setenv("POSTGRES_PORT", "1")
    monkeypatch.setenv("REDIS_URL", f"redis://me:{ENCODED}@127.0.0.1:1/3")
    checks = _diagnosed()
    assert checks["database setting"].found == (
        "trading_history on 127.0.0.1, port 1, as trading_history"
        " (POSTGRES_HOST, POSTGRES_PASSWORD, POSTGRES_PORT from .env and environment)"
    )
    assert checks["Redis setting"].found == (
        "database 3 on 127.0.0.1, port 1, as me, queue history (REDIS_URL from environment)"
    )
    assert checks["time zone setting"].found.startswith("a naive time means Europe/Berlin, now ")
    monkeypatch.setenv("REDIS_URL", f"redis+sentinel://me:{ENCODED}@127.0.0.1:1,127.0.0.1:2/mymaster/3")
    assert _diagnosed()["Redis setting"].found == (
        "database 3 on the master of mymaster, by Sentinel 127.0.0.1:1, 127.0.0.1:2, as me,"
        " queue history (REDIS_URL from environment)"
    )


@pytest.mark.parametrize(
    ("name", "value", "check", "found"),
    [
        (
            "HISTORY_TIMEZONE",
            "Middle/Earth",
            "time zone setting",
            "HISTORY_TIMEZONE: must be the name of",
        ),
        ("HISTORY_QUEUE", "two queues", "Redis setting", "HISTORY_QUEUE: "),
        ("DATABASE_URL", "mysql://h/d", "database setting", "DATABASE_URL: must be a postgresql:// or postgres:// URL"),
        ("DATABASE_URL", "postgresql://u:p@ss@h/d", "database setting", "DATABASE_URL: percent-encode @"),
        ("REDIS_URL", "redis://h:port", "Redis setting", "REDIS_URL: must be"),
        ("REDIS_URL", "redis://:12/34@h", "Redis setting", "REDIS_URL: / ? and # in the password"),
        ("REDIS_URL", "redis+sentinel://:12/34@h/m", "Redis setting", "REDIS_URL: / ? and # in the password"),
    ],
)
def test_invalid_setting_is_reported(
    redis: Redis, database_url: str, monkeypatch: pytest.MonkeyPatch, *, name: str, value: str, check: str, found: str
) -> None:
    """The other parts are still checked."""
    monkeypatch.setenv(name, value)
    checks = {one.name: one for one in doctor.diagnose(list)}
    assert checks[check].state == "fail"
    assert checks[check].found.startswith(found)
    assert checks["RQ"].state == "ok"


def test_refused_connections_are_reported_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is one line per server, and none about tables or queue."""
    monkeypatch.setenv("DATABASE_URL", "postgresql://u@127.0.0.1:1/x")
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:1")
    checks = _diagnosed()
    assert (checks["PostgreSQL"].state, checks["Redis"].state) == ("fail", "fail")
    assert "Connection refused" in checks["PostgreSQL"].found
    assert "Connection refused" in checks["Redis"].found
    assert not {"tables", "queue"} & checks.keys()


def test_servers_that_never_answer_end_the_checks_within_10_s(
    pair: Addresses, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Both accept the connection and send nothing."""
    with hanging(pair.redis_url, tmp_path) as client:
        port = client.connection_pool.connection_kwargs["port"]
        monkeypatch.setenv("DATABASE_URL", f"postgresql://u@127.0.0.1:{port}/x?sslmode=disable")
        monkeypatch.setenv("REDIS_URL", f"redis://127.0.0.1:{port}")
        began = time.monotonic()
        checks = _diagnosed()
    assert time.monotonic() - began < 10
    assert (checks["PostgreSQL"].state, checks["Redis"].state) == ("fail", "fail")
    assert checks["RQ"].state == "ok"


def test_doctor_does_not_wait_for_a_call_without_a_time_limit(
    redis: Redis, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name of the Redis server is never resolved. PostgreSQL is still checked."""
    never = threading.Event()
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: never.wait(60))
    monkeypatch.setattr(doctor, "READ_SECONDS", 2.0)
    monkeypatch.setenv("REDIS_URL", "redis://somewhere")
    began = time.monotonic()
    checks = _diagnosed()
    took = time.monotonic() - began
    never.set()
    assert (checks["Redis"].state, checks["Redis"].found) == ("fail", "no answer within 2 s")
    assert (checks["tables"].state, checks["RQ"].state, took < 10) == ("ok", "ok", True)


def test_wrong_password_is_reported_without_it(
    redis: Redis, database_url: str, pair: Addresses, monkeypatch: pytest.MonkeyPatch
) -> None:
    socket = redis.connection_pool.connection_kwargs["path"]
    with ExitStack() as undo:
        undo.enter_context(_password_needed("doctor_pw"))
        redis.config_set("requirepass", "right")
        undo.callback(redis.config_set, "requirepass", "")
        wrong = make_url(database_url).set(username="doctor_pw", password=PASSWORD)
        monkeypatch.setenv("DATABASE_URL", wrong.render_as_string(hide_password=False))
        monkeypatch.setenv("REDIS_URL", f"unix://:{ENCODED}@{socket}")
        checks = _diagnosed()
    assert 'password authentication failed for user "doctor_pw"' in checks["PostgreSQL"].found
    assert checks["PostgreSQL"].advice.startswith("correct user and password in DATABASE_URL")
    assert (checks["Redis"].state, "invalid username-password pair" in checks["Redis"].found) == ("fail", True)
    assert PASSWORD not in str(checks)


@contextmanager
def _password_needed(role: str) -> Iterator[None]:
    """Create a role that needs a password during the block. All other roles need none."""
    with engine().begin() as db:
        db.exec_driver_sql(f"CREATE ROLE {role} LOGIN PASSWORD 'right'")
        file = Path(db.exec_driver_sql("SHOW hba_file").scalar_one())
    before = file.read_text()
    file.write_text(f"local all {role} scram-sha-256\n{before}")
    _execute("SELECT pg_reload_conf()")
    _until(lambda: _scalar("SELECT count(*) FROM pg_hba_file_rules WHERE auth_method = 'scram-sha-256'") == 1)
    try:
        yield
    finally:
        file.write_text(before)
        _execute("SELECT pg_reload_conf()")
        _execute(f"DROP ROLE {role}")


def _scalar(statement: str) -> Any:
    with engine().begin() as db:
        return db.execute(text(statement)).scalar_one()


@pytest.mark.parametrize(
    ("setting", "check", "found"),
    [
        ("default_transaction_read_only = on", "PostgreSQL writes", "transactions are read-only"),
        ("synchronous_commit = off", "PostgreSQL disk writes", "synchronous_commit off"),
    ],
)
def test_unsafe_setting_of_the_database_fails(
    redis: Redis, database_url: str, setting: str, check: str, found: str
) -> None:
    """An administrator may have set it with ALTER DATABASE."""
    _alter_database(setting)
    status, shown = _found(check)
    assert (status, shown.startswith(found)) == ("fail", True)


@pytest.mark.parametrize("setting", ["fsync", "full_page_writes"])
def test_postgres_that_does_not_wait_for_its_disk_fails(redis: Redis, database_url: str, setting: str) -> None:
    """A power cut could lose everything."""
    with _server_setting(setting, "off"):
        assert _found("PostgreSQL disk writes") == ("fail", f"{setting} off")
    assert _found("PostgreSQL disk writes")[0] == "ok"


@contextmanager
def _server_setting(name: str, value: str) -> Iterator[None]:
    def reload(change: str, expected: str) -> None:
        with engine().connect().execution_options(isolation_level="AUTOCOMMIT") as db:
            db.exec_driver_sql(f"ALTER SYSTEM {change}")
            db.exec_driver_sql("SELECT pg_reload_conf()")
        _until(lambda: bool(_scalar(f"SHOW {name}") == expected))

    before = _scalar(f"SHOW {name}")
    reload(f"SET {name} = {value}", value)
    try:
        yield
    finally:
        reload(f"RESET {name}", before)


def test_redis_replica_fails(redis: Redis, database_url: str) -> None:
    redis.replicaof("127.0.0.1", "1")
    try:
        state, found = _found("Redis role")
    finally:
        redis.replicaof("no", "one")
    assert (state, found.startswith("a replica of 127.0.0.1, port 1")) == ("fail", True)


def test_clocks_are_compared(redis: Redis, database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the clock of this machine is one hour behind."""
    real = time.time
    monkeypatch.setattr("consumers.ops.database_health.time.time", lambda: real() - 3600)
    assert _found("PostgreSQL clock") == ("fail", "60 min ahead of this machine")


def test_missing_tables_need_init_db(redis: Redis, empty_database_url: str) -> None:
    """There is no other line about tables."""
    checks = _diagnosed()
    assert (checks["tables"].state, checks["tables"].advice) == ("fail", "run trading-history init-db")
    missing = "portfolio_history, signal_archives, event_outcomes, withdrawals"
    assert checks["tables"].found == f"missing in schema public: {missing}"
    assert not {"privileges", "rejected in the last day"} & checks.keys()


@pytest.mark.parametrize(
    ("old", "tables"),
    [(FIRST_GENERATION, "portfolio_history, signal_archives"), (SECOND_GENERATION, "portfolio_history")],
)
def test_tables_of_the_old_shape_need_adoption(redis: Redis, empty_database_url: str, old: str, tables: str) -> None:
    _execute(old)
    check = _diagnosed()["tables"]
    assert (check.state, check.found) == ("fail", f"tables of the old shape: {tables}")
    assert check.advice == "run trading-history init-db --adopt-legacy"


@pytest.mark.parametrize(
    ("change", "status", "found"),
    [
        (
            "ALTER TABLE portfolio_history DROP COLUMN trade_count",
            "fail",
            "columns missing: portfolio_history.trade_count",
        ),
        (
            "ALTER TABLE signal_archives DROP CONSTRAINT signal_archives_event_once",
            "warn",
            "indexes missing or invalid: signal_archives_event_once",
        ),
        ("DROP INDEX portfolio_history_newest", "warn", "indexes missing or invalid: portfolio_history_newest"),
        ("COMMENT ON TABLE event_outcomes IS 'schema version 1'", "fail", "the tables are too old (schema version 1"),
        ("ALTER TABLE event_outcomes ADD COLUMN note text", "ok", "all tables, columns and indexes of schema.sql"),
    ],
)
def test_tables_are_compared_with_schema_sql(
    redis: Redis, database_url: str, change: str, status: str, found: str
) -> None:
    """Compared are the version, and the names of columns and indexes. Additional columns are ok."""
    _execute(change)
    state, shown = _found("tables")
    assert (state, shown.startswith(found)) == (status, True)


def test_compared_names_are_those_of_schema_sql(database_url: str) -> None:
    """All columns and indexes of a new database, and no others."""
    with engine().begin() as db:
        columns = db.execute(
            text("""
            SELECT CAST(table_name AS text), CAST(column_name AS text) FROM information_schema.columns
            WHERE table_schema = 'public'
        """)
        ).all()
        indexes = db.execute(text("SELECT tablename, indexname FROM pg_indexes WHERE schemaname = 'public'")).all()
    named = {(table, name) for table, names in schema_comparison.COLUMNS.items() for name in names.split()}
    assert set(map(tuple, columns)) == named
    named = {(table, f"{table}_{name}") for table, names in schema_comparison.INDEXES.items() for name in names.split()}
    assert set(map(tuple, indexes)) == named


def test_missing_privileges_of_a_role_are_reported(
    redis: Redis, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The advice has the GRANT statements, after which no privilege is missing."""
    with _role("doctor_role"):
        _execute("GRANT SELECT ON ALL TABLES IN SCHEMA public TO doctor_role")
        limited = make_url(database_url).set(username="doctor_role").render_as_string(hide_password=False)
        monkeypatch.setenv("DATABASE_URL", limited)
        lacking = _diagnosed()["privileges"]
        for grant in lacking.advice.split("; "):
            _execute(grant)
        granted = _diagnosed()
        _execute("REVOKE USAGE ON SCHEMA public FROM PUBLIC")
        closed = _found("tables")
        _execute("GRANT USAGE ON SCHEMA public TO PUBLIC")

    assert (lacking.state, lacking.found) == (
        "fail",
        "doctor_role lacks INSERT ON portfolio_history; INSERT ON signal_archives;"
        " INSERT, UPDATE, DELETE ON event_outcomes;"
        " USAGE ON SEQUENCE portfolio_history_id_seq; USAGE ON SEQUENCE signal_archives_id_seq",
    )
    assert (granted["privileges"].state, granted["tables"].state) == ("ok", "ok")
    assert closed == (
        "fail",
        "this role may use no schema of its search_path; tables of these names are in schema public",
    )


@contextmanager
def _role(name: str) -> Iterator[None]:
    _execute(f"CREATE ROLE {name} LOGIN")
    try:
        yield
    finally:
        _execute(f"DROP OWNED BY {name}")
        _execute(f"DROP ROLE {name}")


def test_locked_table_is_a_warning_and_delays_nothing(redis: Redis, database_url: str) -> None:
    """All checks that need no lock are made."""
    with engine().begin() as db:
        db.exec_driver_sql("LOCK TABLE portfolio_history, signal_archives, event_outcomes IN ACCESS EXCLUSIVE MODE")
        began = time.monotonic()
        checks = _diagnosed()
        took = time.monotonic() - began
    names = ("tables", "privileges", "rejected in the last day")
    assert [checks[name].state for name in names] == ["ok", "ok", "unknown"]
    assert "lock timeout" in checks["rejected in the last day"].found
    assert took < 8


def test_recent_rejections_are_reported_with_the_most_frequent_reason(redis: Redis, database_url: str) -> None:
    """Reasons that differ only in numbers count as one. Older rejections and duplicates do not count."""
    insert = "INSERT INTO event_outcomes (job_id, outcome, reason, created_at) VALUES (:job, :outcome, :reason, {at})"
    conflict = "event 7c1f366e-c9c3-5876-873e-6a33c29b098{} is stored already as row {}, with other content"
    for number in range(3):
        _execute(
            insert.format(at="now()"), job=f"j-{number}", outcome="rejected", reason=conflict.format(number, number)
        )
    _execute(insert.format(at="now()"), job="j-4", outcome="rejected", reason="balance: is not a number")
    _execute(insert.format(at="now()"), job="j-5", outcome="duplicate", reason=None)
    _execute(insert.format(at="now() - interval '25 hours'"), job="j-6", outcome="rejected", reason="old")
    status, found = _found("rejected in the last day")
    assert status == "warn"
    assert found.startswith("4, of which 3 because: event 7c1f366e-")


@pytest.mark.parametrize(
    ("setting", "value", "usual", "check", "found"),
    [
        ("maxmemory-policy", "allkeys-lru", "noeviction", "Redis eviction", "allkeys-lru"),
        ("appendonly", "no", "yes", "Redis persistence", "no append-only file"),
    ],
)
def test_redis_that_may_lose_data_fails(
    redis: Redis, database_url: str, *, setting: str, value: str, usual: str, check: str, found: str
) -> None:
    """By eviction, or without an append-only file."""
    redis.config_set(setting, value)
    try:
        shown = _found(check)
    finally:
        redis.config_set(setting, usual)
    assert shown == ("fail", found)
    assert _found(check)[0] == "ok"


def test_redis_that_never_waits_for_its_disk_is_a_warning(redis: Redis, database_url: str) -> None:
    """The operating system decides when it writes."""
    redis.config_set("appendfsync", "no")
    try:
        shown = _found("Redis persistence")
    finally:
        redis.config_set("appendfsync", "everysec")
    assert shown == ("warn", "append-only file, appendfsync no")


def test_redis_that_forbids_info_or_config_is_a_warning(
    redis: Redis, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First INFO and CONFIG are forbidden, then only CONFIG, with and without an append-only file."""
    socket = redis.connection_pool.connection_kwargs["path"]
    password = "s3cret/@w"
    forbidden = ["-info", "-config"]
    redis.acl_setuser(
        "tenant", enabled=True, passwords=[f"+{password}"], keys=["*"], categories=["+@all"], commands=forbidden
    )
    monkeypatch.setenv("REDIS_URL", f"unix://tenant:{quote(password, safe='')}@{socket}")
    try:
        closed = _diagnosed()
        redis.acl_setuser("tenant", enabled=True, commands=["+info", "-llen"])
        uncounted = _diagnosed()["queue"]
        redis.acl_setuser("tenant", enabled=True, commands=["+llen"])
        informed = _found("Redis persistence")
        redis.config_set("appendonly", "no")
        without_file = _found("Redis persistence")
    finally:
        redis.config_set("appendonly", "yes")
        redis.acl_deluser("tenant")
    assert closed["Redis server"].state == "unknown"
    assert [closed[name].state for name in ("Redis", "queue", "reserved jobs")] == ["ok"] * 3
    assert (uncounted.state, "llen" in uncounted.found) == ("fail", True)
    assert informed == ("ok", "append-only file, appendfsync unknown (CONFIG is forbidden)")
    assert without_file[0] == "warn"


def test_waiting_jobs_without_a_worker_fail(redis: Redis, database_url: str, producer: HistoryProducer) -> None:
    """The line says how many wait, and the age of the first."""
    producer.record_many([a_snapshot(), an_archive()])
    assert producer.flush(5) == 0
    fresh = _diagnosed()
    first = as_text(redis.lindex("rq:queue:history", 0) or b"")
    redis.hset(f"rq:job:{first}", "enqueued_at", "2026-01-01T00:00:00.000000Z")
    old = _found("queue")

    assert (fresh["workers"].state, fresh["workers"].found) == ("fail", "none, but jobs wait")
    assert (fresh["queue"].state, fresh["queue"].found[:31]) == ("ok", "2 jobs in history, the first 0 ")
    assert (old[0], old[1].startswith("2 jobs in history, the first ")) == ("warn", True)


def test_suspended_workers_fail(redis: Redis, database_url: str) -> None:
    """An operator may forget `rq suspend`."""
    suspend(redis)
    check = _diagnosed()["queue"]
    resume(redis)
    assert (check.state, check.advice) == ("fail", "run rq resume")


def test_stock_workers_alone_are_a_warning(redis: Redis, database_url: str) -> None:
    """They are correct, but slow."""
    queue = Queue("history", connection=redis, serializer=JSONSerializer)
    worker = SimpleWorker([queue], connection=redis, serializer=JSONSerializer)
    worker.register_birth()  # type: ignore[no-untyped-call]  # RQ annotates only a part of its methods
    assert _found("workers") == ("warn", "HistoryWorkers: 0, stock RQ workers: 1")


def test_worker_that_waits_for_the_database_fails(redis: Redis, database_url: str, producer: HistoryProducer) -> None:
    """It is alive, but stores nothing."""
    producer.record(a_snapshot())
    assert producer.flush(5) == 0
    with _worker(redis, DATABASE_URL="postgresql://u@127.0.0.1:1/x") as name:
        _until(lambda: redis.hget(f"rq:worker:{name}", "state") == b"waiting for the database")
        status, found = _found("workers")
    assert (status, found) == ("fail", f"HistoryWorkers: 1, stock RQ workers: 0; {name} is waiting for the database")


def test_reserved_jobs_of_dead_workers_are_reported(redis: Redis, database_url: str) -> None:
    """Without a live worker, nothing requeues them."""
    dead_list = reserved_key("history", "dead:0000000a")
    redis.hset(owners_key("history"), "dead:0000000a", "")
    redis.rpush(dead_list, "job-1", "job-2")
    dead = _diagnosed()["reserved jobs"]
    redis.hset(owners_key("history"), "alive:0000000b", "")
    redis.set(lease_key("history", "alive:0000000b"), "1")
    redis.rpush(reserved_key("history", "alive:0000000b"), "job-3")
    watched = _diagnosed()["reserved jobs"]
    redis.delete(dead_list)
    fine = _diagnosed()["reserved jobs"]

    assert (dead.state, dead.found) == ("fail", "2 of crashed workers")
    assert (watched.state, watched.found) == ("warn", "2 of crashed workers")
    assert (fine.state, fine.found) == ("ok", "1, all with a valid lease")


def test_jobs_and_keys_that_need_an_operator_are_reported(redis: Redis, database_url: str) -> None:
    """Jobs that crashed a worker, failed jobs and unusable entries. Candidates and orphans need no operator."""
    redis.hset(crashes_key("history"), "job-0", 0)
    redis.hset(orphans_key("history"), "job-1", 1)
    harmless = _diagnosed()
    redis.hset(crashes_key("history"), "job-2", 2)
    redis.zadd("rq:failed:history", {"job-3": -1})
    redis.rpush(quarantine_key("history"), b"\xff")
    checks = _diagnosed()

    assert [harmless[name].state for name in ("poison candidates", "quarantine", "orphans")] == ["ok"] * 3
    assert harmless["orphans"].found.startswith("1 jobs are queued but in no list")
    assert checks["poison candidates"].found == "1 jobs, up to 2 crashes each"
    assert checks["failed jobs"].found == "1"
    assert [checks[name].state for name in ("poison candidates", "failed jobs", "quarantine")] == ["warn"] * 3


def test_keys_of_the_wrong_type_give_unknown_checks(redis: Redis, database_url: str) -> None:
    """Another program may use the same names."""
    for key in ("rq:queue:history", owners_key("history"), crashes_key("history"), quarantine_key("history")):
        redis.set(key, "not ours")
    checks = _diagnosed()
    assert [checks[name].state for name in ("queue", "workers", "poison candidates", "quarantine")] == ["unknown"] * 4
    assert checks["failed jobs"].state == "ok"


def test_outbox_of_this_machine_is_checked(redis: Redis, database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its entries, size, file and copies are checked. A damaged file fails."""
    with Outbox("data/outbox.db") as outbox:
        outbox.append("bot", [a_snapshot()])
    sound = _diagnosed()
    Path("damaged.db").write_bytes(b"no database at all" * 100)
    monkeypatch.setenv("HISTORY_OUTBOX", str(Path("damaged.db").absolute()))
    damaged = _diagnosed()["outbox"]

    assert sound["outbox"].found.startswith("1 pending, 0 sent, the oldest 0 s old")
    names = ("outbox", "outbox rejections", "outbox size", "outbox file", "outbox copies")
    assert [sound[name].state for name in names] == ["ok"] * 5
    assert (damaged.state, damaged.found.endswith("file is not a database")) == ("fail", True)


def test_a_damaged_file_that_no_relay_has_salvaged_fails() -> None:
    path = Path("data/outbox.db").absolute()
    Outbox(path).close()
    Path("data/outbox.db.damaged-1").touch()
    (check,) = outbox_file_checks(path)
    assert (check.state, check.found) == ("fail", f"damaged files that are not salvaged yet: {path}.damaged-1")
    assert check.advice == "start the controller or trading-history relay: either salvages their entries"


def test_another_copy_of_the_outbox_is_a_warning_before_a_relay_notices_it(redis: Redis) -> None:
    """Redis has the token of the copy that sent last."""
    with Outbox("data/outbox.db") as outbox:
        outbox.append("bot", [a_snapshot()])
        (source,) = outbox.sources()
    redis.set(token_key(source.full_name), "another token")
    (check,) = outbox_copy_checks(TransportSettings.from_environment())
    assert (check.state, check.found) == ("warn", f"another copy of this outbox now uses its source {source.full_name}")


def test_doctor_creates_no_outbox(redis: Redis, database_url: str, tmp_path: Path) -> None:
    """A worker's host has none."""
    assert _found("outbox")[0] == "ok"
    assert list(tmp_path.iterdir()) == []


def test_old_files_that_are_still_written_are_reported(redis: Redis, database_url: str, tmp_path: Path) -> None:
    """In the default folder, and in the one of --history-dir. Older files are ok."""
    other = tmp_path / "elsewhere"
    for folder, name in ((HISTORY, "portfolio_history.json"), (other, "signals_archive_2026-11.json")):
        folder.mkdir(parents=True)
        (folder / name).write_text("[]")
    both = _diagnosed(other)["JSON history"]
    for file in (HISTORY / "portfolio_history.json", other / "signals_archive_2026-11.json"):
        os.utime(file, (0, time.time() - 4 * 86400))
    old = _diagnosed(other)["JSON history"]

    assert both.state == "warn"
    assert both.found.endswith(" was written 0 s ago, 1 more in the last 3 days")
    assert (old.state, old.found) == ("ok", "2 files, none written in the last 3 days")


def test_missing_history_dir_is_wrong_usage() -> None:
    """The exit status is 2, and nothing is checked."""
    run = _run("--history-dir", "missing")
    assert (run.returncode, run.stdout) == (2, "")


@pytest.mark.parametrize("form", [[], ["--json"]])
@pytest.mark.parametrize(
    "environment",
    [
        {"DATABASE_URL": f"postgresql://u:{ENCODED}@127.0.0.1:1/x", "REDIS_URL": f"redis://u:{ENCODED}@127.0.0.1:1/0"},
        {"DATABASE_URL": f"postgresql://u:{PASSWORD}@127.0.0.1:1/x", "REDIS_URL": f"redis://:{PASSWORD}@127.0.0.1:1"},
        {"DATABASE_URL": f"postgresql://u@127.0.0.1:1/x?password={ENCODED}", "REDIS_URL": f"redis://127.0.0.1:1?password={ENCODED}"},
        {"DATABASE_URL": f"{PASSWORD}", "REDIS_URL": f"redis://h:{PASSWORD}"},
        {"DATABASE_URL": f"postgresql://u:{ENCODED}@no-such-host.invalid/x", "REDIS_URL": f"rediss://:{ENCODED}@no-such-host.invalid"},
        {"POSTGRES_HOST": "127.0.0.1", "POSTGRES_PORT": "1", "POSTGRES_PASSWORD": PASSWORD, "REDIS_URL": f"unix://:{ENCODED}@/no/socket"},
        {"POSTGRES_PORT": PASSWORD, "REDIS_URL": f"http://:{ENCODED}@h"},
        {"DATABASE_URL": f"postgresql://u:{ENCODED}@127.0.0.1:1/x?{ENCODED}=1", "REDIS_URL": f"redis://:{ENCODED}@h?{ENCODED}=1"},
        {"DATABASE_URL": "postgresql://u@127.0.0.1:1/x?s3cret=1", "REDIS_URL": "redis://h?s3cret=1"},
        {"DATABASE_URL": f"postgresql://u:{ENCODED}@127.0.0.1:1,127.0.0.1:2/x", "REDIS_URL": f"redis+sentinel://:{ENCODED}@127.0.0.1:1/m?sentinel_password={ENCODED}"},
    ],
)  # fmt: skip
def test_no_password_is_ever_shown(
    environment: dict[str, str], form: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither plain nor encoded, nor its first part, as text or JSON, on stdout or stderr."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    run = CliRunner().invoke(app, ["doctor", *form])
    shown = run.stdout + run.stderr
    assert run.exit_code == 1
    assert isinstance(run.exception, SystemExit)
    for secret in (PASSWORD, ENCODED, "s3c"):
        assert secret not in shown
