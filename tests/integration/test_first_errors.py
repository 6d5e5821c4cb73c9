"""The first errors of a new user: one line that says what is wrong and what to type, and exit status 1 (usage: 2)."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest
from redis import Redis
from sqlalchemy import make_url, text

from consumers.db.engine import get_db
from consumers.ops.failed import discard
from consumers.ops.rejections import rejections
from producers.events import encode, event_of
from producers.history_producer import HistoryProducer
from producers.outbox import Outbox
from tests.deliveries import history_queue
from tests.factories import a_portfolio, a_snapshot
from tests.rq_programs import rq_process, until

PROGRAM = [sys.executable, "-m", "consumers.cli"]
INIT_DB = "run trading-history init-db"


def _run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PROGRAM, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
        check=False,
    )


def _error(*arguments: str, **environment: str) -> str:
    """Run a command that fails, and return its one line on stderr."""
    run = _run(*arguments, **environment)
    assert (run.returncode, run.stderr.count("\n")) == (1, 1), run.stderr
    return run.stderr


@contextmanager
def _started(log: Path, *arguments: str, **environment: str) -> Iterator[None]:
    """Run a command that does not end by itself, with its output in `log`, and stop it at the end of the block."""
    with log.open("wb") as output:
        command = [*PROGRAM, *arguments]
        process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **environment})
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def _with_database(url: str, name: str) -> str:
    return make_url(url).set(database=name).render_as_string(hide_password=False)


@pytest.mark.parametrize(
    "command",
    [
        ("history",),
        ("archives",),
        ("history", "--csv"),
        ("audit",),
        ("export", "folder"),
        ("failed", "list"),
        ("failed", "show", "x"),
        ("failed", "requeue", "--all"),
        ("failed", "discard", "--all", "--because", "x"),
        ("import", "old"),
        ("verify", "old"),
    ],
)
def test_a_command_without_tables_advises_init_db(
    redis: Redis, empty_database_url: str, command: tuple[str, ...]
) -> None:
    _write_old_history()
    error = _error(*command)
    if command[0] == "import":
        assert error.endswith(f"the tables are missing: {INIT_DB}\n")
    else:
        assert error.endswith(f" does not exist: {INIT_DB}\n")


def _write_old_history() -> None:
    amounts = dict.fromkeys(("balance", "total_invested", "total_profit_loss", "total_value"), 1)
    entry = {"date": "2026-05-01", "timestamp": "2026-05-01T10:00:00", **amounts, "open_positions": 0, "trade_count": 0}
    Path("old").mkdir()
    Path("old/portfolio_history.json").write_text(json.dumps([entry]))


_NEED_DATABASE = [
    ("history",),
    ("archives",),
    ("audit",),
    ("export", "folder"),
    ("failed", "list"),
    ("failed", "show", "x"),
    ("failed", "requeue", "--all"),
    ("failed", "discard", "--all", "--because", "x"),
    ("import", "old"),
    ("import", "--from-tables"),
    ("import", "--from-tables", "--dry-run"),
    ("verify", "old"),
    ("verify", "--from-tables"),
    ("init-db",),
    ("init-db", "--adopt-legacy"),
    ("init-db", "--adopt-legacy", "--dry-run"),
]


@pytest.mark.parametrize("command", _NEED_DATABASE)
def test_a_command_names_a_database_that_it_cannot_reach(
    redis: Redis, database_url: str, command: tuple[str, ...]
) -> None:
    """PostgreSQL that is away, and a wrong name of the database."""
    _write_old_history()
    away = _error(*command, DATABASE_URL="postgresql://u:s3cret@127.0.0.1:1/x")
    assert away.endswith("check that PostgreSQL runs, and host and port in DATABASE_URL or the POSTGRES_ variables\n")
    assert "s3cret" not in away
    wrong = _error(*command, DATABASE_URL=_with_database(database_url, "no_such_database"))
    assert 'database "no_such_database" does not exist: correct the name of the database in DATABASE_URL or' in wrong


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("no tables", f" does not exist: {INIT_DB}"),
        ("name", 'database "no_such_database" does not exist: correct the name of the database in DATABASE_URL or'),
        ("away", "check that PostgreSQL runs, and host and port in DATABASE_URL or"),
    ],
)
def test_the_api_says_at_its_start_that_it_cannot_read_the_tables(
    redis: Redis, empty_database_url: str, tmp_path: Path, wrong: str, message: str
) -> None:
    """In one line. It starts, and answers with status 503 until the tables can be read."""
    log = tmp_path / "log"
    urls = {
        "no tables": empty_database_url,
        "name": _with_database(empty_database_url, "no_such_database"),
        "away": "postgresql://u:s3cret@127.0.0.1:1/x",
    }
    with _started(log, "api", "--port", "0", DATABASE_URL=urls[wrong]):
        until(lambda: "Until then, requests are answered with status 503.\n" in log.read_text())
        (line,) = [line for line in log.read_text().splitlines() if "Until then" in line]
        assert ": PostgreSQL: " in line
        assert message in line
        assert "s3cret" not in log.read_text()
        port = log.read_text().partition("http://127.0.0.1:")[2].partition("/")[0]
        assert httpx.get(f"http://127.0.0.1:{port}/trading/portfolio-history").status_code == 503
        if wrong == "no tables":
            assert _run("init-db").returncode == 0
            assert httpx.get(f"http://127.0.0.1:{port}/trading/portfolio-history").status_code == 200


def test_the_dashboard_says_at_its_start_that_it_cannot_reach_redis(redis: Redis, tmp_path: Path) -> None:
    """It needs no database. With Redis there, it says nothing."""
    password = {"HISTORY_DASHBOARD_PASSWORD": "a password that is long"}
    wrong, right = tmp_path / "wrong", tmp_path / "right"
    with _started(wrong, "dashboard", "--port", "0", REDIS_URL="redis://:s3cret@127.0.0.1:1", **password):
        until(lambda: "stop with Ctrl-C" in wrong.read_text())
    (line,) = [line for line in wrong.read_text().splitlines() if "503" in line]
    assert ": Redis: " in line
    assert line.endswith(
        "check that Redis runs, and host and port in REDIS_URL. Until then, requests are answered with status 503."
    )
    assert "s3cret" not in line
    with _started(right, "dashboard", "--port", "0", DATABASE_URL="postgresql://u@127.0.0.1:1/x", **password):
        until(lambda: "stop with Ctrl-C" in right.read_text())
    assert right.read_text().count("\n") == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("no tables", f"the tables are missing: {INIT_DB}\n"),
        ("name", 'database "no_such_database" does not exist: correct the name of the database in DATABASE_URL or'),
        ("away", "check that PostgreSQL runs, and host and port in DATABASE_URL or the POSTGRES_ variables\n"),
    ],
)
def test_up_says_that_its_worker_waits_for_the_database(
    redis: Redis, empty_database_url: str, tmp_path: Path, wrong: str, message: str
) -> None:
    """In one line of the worker. It continues as soon as the database is there."""
    log = tmp_path / "log"
    urls = {
        "no tables": empty_database_url,
        "name": _with_database(empty_database_url, "no_such_database"),
        "away": "postgresql://u:s3cret@127.0.0.1:1/x",
    }
    with _started(log, "up", HISTORY_DASHBOARD_PASSWORD="a password that is long", DATABASE_URL=urls[wrong]):
        until(lambda: message in log.read_text(), 40)
    assert log.read_text().count("waits for the database and tries again") == 1
    assert "s3cret" not in log.read_text()


_MODULES = {
    "worker": ("sqlalchemy", "psycopg2", "prometheus_client"),
    "api": ("fastapi", "starlette", "uvicorn"),
    "dashboard": ("flask", "rq_dashboard", "six", "waitress", "werkzeug"),
}


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        *((command, "worker") for command in _NEED_DATABASE),
        (("history", "--csv"), "worker"),
        (("import", "old", "--dry-run"), "worker"),
        (("init-db", "--dry-run"), "worker"),
        (("worker",), "worker"),
        (("worker", "--processes", "2"), "worker"),
        (("status",), "worker"),
        (("api",), "api"),
        (("dashboard",), "dashboard"),
    ],
)
def test_a_command_names_the_extra_that_it_needs(command: tuple[str, ...], extra: str) -> None:
    """Python finds no module of that extra, as in an installation without it."""
    _write_old_history()
    hidden = f"import sys; sys.modules.update(dict.fromkeys({_MODULES[extra]})); from consumers.cli import main; main()"
    servers = {"DATABASE_URL": "postgresql://u@127.0.0.1:1/x", "REDIS_URL": "redis://127.0.0.1:1"}
    run = subprocess.run(
        [sys.executable, "-c", hidden, *command],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **servers, "HISTORY_DASHBOARD_PASSWORD": "a password that is long"},
        check=False,
    )
    advice = f"run pip install '.[{extra}]' in a clone of trading-history"
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr == f"error: this command needs the extra [{extra}]: {advice}\n"


def test_a_wrong_password_of_postgresql_is_called_so(redis: Redis, database_url: str, tmp_path: Path) -> None:
    """By a server that asks for a password (SCRAM). The password is not shown."""
    role, log = f"scram_{os.getpid()}", tmp_path / "log"
    with get_db() as db:
        hba = Path(db.scalar(text("SHOW hba_file")))
        db.execute(text(f"CREATE ROLE {role} LOGIN PASSWORD 'right'"))
        db.execute(text(f"GRANT trading_history_writer TO {role}"))
    before = hba.read_text()
    hba.write_text(f"local all {role} scram-sha-256\n{before}")

    def url(password: str | None) -> str:
        named = make_url(database_url).set(username=role, password=password)
        return named.render_as_string(hide_password=False)

    try:
        with get_db() as db:
            db.execute(text("SELECT pg_reload_conf()"))
        until(lambda: _run("history", DATABASE_URL=url("s3cret")).returncode == 1)
        assert _run("history", DATABASE_URL=url("right")).returncode == 0
        advice = "correct user and password in DATABASE_URL or the POSTGRES_ variables\n"
        wrong, missing = (_error("history", DATABASE_URL=url(password)) for password in ("s3cret", None))
        assert wrong.endswith(f'password authentication failed for user "{role}": {advice}')
        assert missing.endswith(f"no password supplied: {advice}")
        checks = json.loads(_run("doctor", "--json", DATABASE_URL=url("s3cret")).stdout)
        (failed,) = [one for one in checks if one["name"] == "PostgreSQL"]
        assert failed["advice"] == "correct user and password in DATABASE_URL or the POSTGRES_ variables"
        with _started(log, "worker", DATABASE_URL=url("s3cret")):
            until(lambda: advice in log.read_text())
        assert "s3cret" not in wrong + log.read_text() + str(checks)
    finally:
        hba.write_text(before)
        with get_db() as db:
            db.execute(text("SELECT pg_reload_conf()"))
            db.execute(text(f"DROP OWNED BY {role}"))
            db.execute(text(f"DROP ROLE {role}"))


def test_status_without_tables_advises_init_db(redis: Redis, empty_database_url: str) -> None:
    run = _run("status", "--json")
    assert run.returncode == 1
    assert json.loads(run.stdout)["database"].endswith(f" does not exist: {INIT_DB}")


def test_a_worker_without_tables_says_so_at_its_start(redis: Redis, empty_database_url: str, tmp_path: Path) -> None:
    """Before the first event comes. It continues as soon as the tables are there."""
    log = tmp_path / "log"
    with _started(log, "worker"):
        until(lambda: "waits for the database and tries again: the tables are missing: " in log.read_text())
        assert INIT_DB in log.read_text()
        assert _run("init-db").returncode == 0
        until(lambda: "continues after" in log.read_text())


def test_a_wrong_database_name_is_named_with_its_setting(redis: Redis, database_url: str, tmp_path: Path) -> None:
    """By each command, and by a worker at its start. `outbox flush` learns the worker's state."""
    wrong, log = _with_database(database_url, "no_such_database"), tmp_path / "log"
    message = 'database "no_such_database" does not exist: correct the name of the database in DATABASE_URL or'
    for command in ("history", "init-db"):
        assert message in _error(command, DATABASE_URL=wrong)
    assert message in _run("status", DATABASE_URL=wrong).stdout
    with _started(log, "worker", DATABASE_URL=wrong):
        until(lambda: message in log.read_text())
        assert log.read_text().count("waits for the database") == 1
        with HistoryProducer(outbox=tmp_path / "outbox.db") as producer:
            producer.record(a_snapshot())
            flushed = _run("outbox", "flush", "--timeout", "1", HISTORY_OUTBOX=str(tmp_path / "outbox.db"))
    assert "its workers wait for the database" in flushed.stderr


def test_a_burst_of_an_empty_queue_needs_no_database(redis: Redis) -> None:
    """For a worker that is not started in a burst, the database matters at once."""
    run = _run("worker", "--burst", DATABASE_URL="postgresql://nobody@127.0.0.1:1/x")
    assert run.returncode == 0, run.stderr


def test_a_database_that_is_away_is_named_with_its_setting() -> None:
    error = _error("history", DATABASE_URL="postgresql://u:s3cret@127.0.0.1:1/x")
    assert "check that PostgreSQL runs, and host and port in DATABASE_URL or the POSTGRES_ variables" in error
    assert "s3cret" not in error


def test_a_wrong_password_of_redis_is_named(redis: Redis, database_url: str, tmp_path: Path) -> None:
    """Waiting for Redis to come back would not help."""
    outbox = str(tmp_path / "outbox.db")
    with HistoryProducer(redis, outbox=outbox) as producer:
        producer.record(a_snapshot())
    redis.config_set("requirepass", "another")
    try:
        flushed = _run("outbox", "flush", "--timeout", "0.5", HISTORY_OUTBOX=outbox)
        worker = tmp_path / "log"
        with _started(worker, "worker"):
            until(lambda: "correct user and password in REDIS_URL" in worker.read_text())
        shown = _run("failed", "requeue", "--all")
    finally:
        redis.config_set("requirepass", "")
    last = flushed.stderr.splitlines()[-1]
    assert flushed.returncode == 1
    assert "when it is back" not in last
    assert "correct user and password in REDIS_URL" in last
    assert shown.returncode == 0  # there is nothing to requeue, so Redis is not asked


@pytest.mark.parametrize("arguments", [("--worker-class", "consumers.worker.HistoryWorker", "history"), ("a", "b")])
def test_rqs_command_reports_a_wrong_setting_in_one_line(
    redis: Redis, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    log = tmp_path / "log"
    ours = ("--worker-class", "consumers.worker.HistoryWorker")
    with rq_process("worker", *(arguments if "history" in arguments else (*ours, *arguments)), log=log) as process:
        assert process.wait(30) == 1
    last = log.read_text().splitlines()[-1]
    assert last.startswith("error: DATABASE_URL is not set" if "history" in arguments else "error: HistoryWorker takes")
    assert "Traceback" not in log.read_text()


def test_a_stock_worker_without_a_database_keeps_the_job(
    redis: Redis, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RQ logs a traceback that ends with our line. The job is in the failed registry until its event is sent again."""
    log, options = tmp_path / "log", ("--burst", "history", "--serializer", "json")
    message = "producers.errors.SettingsError: DATABASE_URL is not set (for example postgresql://"
    with HistoryProducer(redis, outbox=tmp_path / "outbox.db") as producer:
        receipt = producer.record(a_snapshot())
        assert producer.flush(20) == 0
        monkeypatch.delenv("DATABASE_URL")
        with rq_process("worker", *options, log=log) as process:
            assert process.wait(60) == 0
        assert message in log.read_text()
        (job_id,) = history_queue(redis).failed_job_registry.get_job_ids()
        job = history_queue(redis).fetch_job(job_id)
        assert job is not None
        result = job.latest_result()
        assert result is not None
        assert str(result.exc_string).splitlines()[-1].startswith(message)
        assert receipt.state == "sent"
        monkeypatch.setenv("DATABASE_URL", database_url)
        until(lambda: history_queue(redis).count == 1, 60)  # the relay sends it again
        with rq_process("worker", *options, log=log) as process:
            assert process.wait(60) == 0
        until(lambda: receipt.state == "stored")
    assert history_queue(redis).failed_job_registry.count == 0


@pytest.mark.parametrize("command", ["api", "dashboard"])
def test_a_taken_port_is_named_with_its_option(redis: Redis, database_url: str, command: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        error = _error(command, "--port", str(port), HISTORY_DASHBOARD_PASSWORD="a password that is long")
    assert error == (
        f"error: cannot listen at 127.0.0.1 port {port}: Address already in use;"
        " choose another address with --host and --port\n"
    )


def test_a_taken_port_of_metrics_is_named_with_its_option(redis: Redis, database_url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        run = _run("worker", "--metrics-port", str(taken.getsockname()[1]))
    assert run.returncode == 1
    assert run.stderr.endswith("HISTORY_METRICS_PORT, or --metrics-port\n")


def test_outbox_status_of_a_damaged_file_says_what_to_do(tmp_path: Path) -> None:
    """Also if the damage is found only by the check of the whole file. Another program's file is called so."""
    path, other = tmp_path / "outbox.db", tmp_path / "other.db"
    with Outbox(path, repair=True) as outbox:
        outbox.append("a", [a_snapshot()])
        outbox.relay_lock().acquire()
    path.write_bytes(os.urandom(8192))
    other.write_bytes(b"x" * 4096)
    error = _error("outbox", "status", HISTORY_OUTBOX=str(path))
    assert error.startswith(f"error: outbox {path}: ")
    assert "start the controller or trading-history relay" in error
    assert "trading-history outbox salvage FILE" in error
    assert "set HISTORY_OUTBOX to another path" in _error("outbox", "status", HISTORY_OUTBOX=str(other))


def test_flush_reports_that_entries_of_an_unreadable_file_may_be_lost(redis: Redis, tmp_path: Path) -> None:
    """It ends with status 1 until the operator deletes the salvaged file."""
    path = tmp_path / "outbox.db"
    with Outbox(path, repair=True) as outbox:
        outbox.append("a", [a_snapshot()])
        outbox.relay_lock().acquire()
    for file in tmp_path.glob("outbox.db-wal"):
        file.unlink()
    path.write_bytes(os.urandom(8192))
    flushed = _run("outbox", "flush", "--timeout", "20", HISTORY_OUTBOX=str(path))
    (salvaged,) = tmp_path.glob("outbox.db.salvaged-*")
    assert (flushed.returncode, flushed.stdout) == (1, "")
    assert (
        f"Entries may be lost: not all of {salvaged} could be read. Run trading-history audit, which names missing"
        f" events, then delete what you have examined: rm {salvaged}; until then, this command ends with status 1.\n"
    ) in flushed.stderr
    as_json = _run("outbox", "flush", "--json", HISTORY_OUTBOX=str(path))
    assert (as_json.returncode, json.loads(as_json.stdout)["lossy_files"]) == (1, [str(salvaged)])
    salvaged.unlink()
    assert _run("outbox", "flush", HISTORY_OUTBOX=str(path)).returncode == 0


def test_an_unusable_input_is_named(redis: Redis, tmp_path: Path) -> None:
    """By its file or its option."""
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "empty.json").write_text("{}")
    (tmp_path / "signals.json").write_text("[1]")
    outbox = str(tmp_path / "outbox.db")
    assert _error("snapshot", "list.json", HISTORY_OUTBOX=outbox) == (
        "error: list.json: must be a JSON object with the portfolio, not list\n"
    )
    assert _error("snapshot", "empty.json", HISTORY_OUTBOX=outbox).startswith("error: empty.json: portfolio_data: ")
    assert _error("archive", "signals.json", HISTORY_OUTBOX=outbox).startswith("error: signals.json: ")
    assert _error("archive", "--url", "http://127.0.0.1:1/?token=s3cret", HISTORY_OUTBOX=outbox) == (
        "error: --url cannot be read: Connection refused; check its host and port\n"
    )
    assert _error("archive", "--url", "nonsense", HISTORY_OUTBOX=outbox) == (
        "error: --url is not a valid http:// or https:// URL\n"
    )


def test_a_folder_or_a_file_in_the_wrong_place_is_named(redis: Redis, database_url: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert _error("export", "file") == ("error: file is not a folder: give the path of a folder, which may be new\n")
    folder = f"error: outbox {tmp_path} is a folder: give the path of a file, such as {tmp_path}/outbox.db\n"
    assert _error("relay", "--outbox", str(tmp_path)) == folder
    (tmp_path / "portfolio.json").write_text(json.dumps(a_portfolio()))
    assert _error("snapshot", "portfolio.json", HISTORY_OUTBOX=str(tmp_path)) == folder


def test_snapshot_that_waits_says_what_it_waits_for(redis: Redis, tmp_path: Path) -> None:
    """Redis that is away, or a worker."""
    (tmp_path / "portfolio.json").write_text(json.dumps(a_portfolio()))
    command = ("snapshot", "portfolio.json", "--wait", "0.5")
    away = _run(*command, REDIS_URL="redis://127.0.0.1:1", HISTORY_OUTBOX=str(tmp_path / "a.db"))
    no_worker = _run(*command, HISTORY_OUTBOX=str(tmp_path / "b.db"))
    for run, reason in (
        (away, "Redis cannot be reached (ConnectionError): check that Redis runs, and host and port in REDIS_URL. "),
        (no_worker, "Queue history has 1 waiting job and no worker"),
    ):
        last = run.stderr.splitlines()[-1]
        assert run.returncode == 1
        assert f"is not stored after 0.5 s, but safe in the outbox. {reason}" in last


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fly",), "error: No such command 'fly'; see python -m consumers.cli --help\n"),
        (("history", "--fly"), "error: No such option: --fly; see python -m consumers.cli history --help\n"),
        (
            ("histroy",),
            "error: No such command 'histroy'. Did you mean 'history'? See python -m consumers.",
        ),
        (
            ("history", "--limit", "x"),
            "error: Invalid value for '--limit' / '-n': must be a whole number from 1 to 9223372036854775807; see ",
        ),
        (
            ("outbox", "flush", "--timeout", "x"),
            "error: Invalid value for '--timeout': must be a finite number of seconds, at least 0; see python -m ",
        ),
        (
            ("audit", "--since"),
            "error: Option '--since' requires an argument; see python -m consumers.cli audit --help\n",
        ),
        (
            ("--debug", "outbox", "flush", "--timeout"),
            "error: Option '--timeout' requires an argument; see python -m consumers.cli outbox flush --help\n",
        ),
        (("snapshot",), "error: Missing argument 'FILE'; see python -m consumers.cli snapshot --help\n"),
    ],
)
def test_an_error_of_usage_is_one_line(arguments: tuple[str, ...], message: str) -> None:
    run = _run(*arguments)
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (2, "", 1)
    assert run.stderr.startswith(message)


def test_a_group_without_a_command_prints_its_help() -> None:
    run = _run("outbox")
    assert run.returncode == 2
    assert "Commands" in run.stdout + run.stderr


def test_audit_counts_the_sources_that_since_leaves_out(redis: Redis, database_url: str, tmp_path: Path) -> None:
    """Nothing is left out without the option. The newest source is first; JSON has host and time of each."""
    for name in ("old", "new"):
        with HistoryProducer(redis, outbox=tmp_path / f"{name}.db", name=name) as producer:
            producer.record(a_snapshot(portfolio_id=1 if name == "old" else 2))
        assert _run("worker", "--burst").returncode == 0
    with get_db() as db:
        db.execute(text("UPDATE portfolio_history SET created_at = '2020-01-01Z' WHERE source LIKE 'old/%'"))
    here = {"HISTORY_OUTBOX": str(tmp_path / "none.db")}
    every, shown = json.loads(_run("audit", "--json", **here).stdout), _run("audit", **here).stdout
    assert [(one["source"].split("/")[0], one["host"]) for one in every] == [("new", None), ("old", None)]
    assert every[1]["last_at"].startswith("2020-01-01")
    assert shown.index("new/") < shown.index("old/")
    assert "2020-01-01 00:00:00Z" in shown
    since = _run("audit", "--since", "2021-01-01T00:00:00Z", "--json", **here)
    assert [one["source"].split("/")[0] for one in json.loads(since.stdout)] == ["new"]
    assert since.stderr.startswith("note: 1 source left out: it has no event since then, and its outbox is not on ")
    own = json.loads(_run("audit", "--json", HISTORY_OUTBOX=str(tmp_path / "old.db")).stdout)
    assert [one["host"] for one in own] == [None, socket.gethostname()]


@pytest.mark.parametrize("worker", ["ours", "stock"])
def test_a_discarded_event_that_is_sent_again_does_not_fail_again(
    redis: Redis, database_url: str, tmp_path: Path, worker: str
) -> None:
    """Its producer learns that it is rejected. RQ's failed registry stays empty, and it stays discarded."""
    arguments = ["--burst", "history", "--serializer", "json"]
    if worker == "ours":
        arguments = ["--worker-class", "consumers.worker.HistoryWorker", *arguments]

    def work() -> None:
        with rq_process("worker", *arguments, log=tmp_path / "log") as process:
            assert process.wait(60) == 0

    history_queue(redis).enqueue(
        "consumers.handlers.record_portfolio_snapshot",
        encode(event_of(a_snapshot(balance="1"), source="other/1", sequence=1)),
    )
    work()
    with HistoryProducer(redis, outbox=tmp_path / "outbox.db") as producer:
        receipt = producer.record(a_snapshot(balance="2"))
        assert producer.flush(20) == 0
        work()
        until(lambda: receipt.state == "rejected")
        assert discard(rejections(), redis, "history", "a test") == 1
        assert producer.resend(datetime(2020, 1, 1, tzinfo=UTC)) == 1
        assert producer.flush(20) == 0
        work()
        until(lambda: receipt.state == "rejected")
    assert history_queue(redis).failed_job_registry.count == 0
    assert list(rejections()) == []
    with get_db() as db:
        assert db.scalar(text("SELECT outcome FROM event_outcomes WHERE event_id IS NOT NULL")) == "discarded"
