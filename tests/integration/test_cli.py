"""The command `trading-history`: output, exit statuses, and errors as one line."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import psutil
import pytest
from redis import Redis
from sqlalchemy import text
from typer.testing import CliRunner

from consumers.cli import app
from consumers.cli.running import open_browser
from consumers.db.engine import get_db
from consumers.db.inserts import insert_event
from consumers.embedded.stack import stack
from consumers.operations import get_portfolio_history
from producers.events import event_of, json_schema
from tests.controllers import cli
from tests.factories import a_portfolio, a_signal, an_archive

PROGRAM = [sys.executable, "-m", "consumers.cli"]


_BIGINT = f"a whole number from {-(2**63)} to {2**63 - 1}"
_FROM_1 = f"a whole number from 1 to {2**63 - 1}"


def _run(*arguments: str, stdin: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PROGRAM, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
        check=False,
    )


def test_recorded_snapshot_and_archive_are_stored_and_listed(redis: Redis, database_url: str, tmp_path: Path) -> None:
    (tmp_path / "signals.json").write_text(json.dumps([a_signal(), a_signal()]))
    recorded = _run(
        "snapshot",
        "-",
        "--portfolio-id",
        "3",
        "--timestamp",
        "2026-11-22T17:00:00",
        stdin=json.dumps(a_portfolio()),
    )
    archived = _run("archive", "signals.json", "--portfolio-id", "3")
    worked = _run("worker", "--burst")
    snapshots, archives = _run("history", "--json"), _run("archives", "--json")

    assert [run.returncode for run in (recorded, archived, worked, snapshots, archives)] == [0] * 5
    assert recorded.stdout.startswith("accepted event ")
    (snapshot,) = json.loads(snapshots.stdout)
    (archive,) = json.loads(archives.stdout)
    assert (snapshot["portfolio_id"], snapshot["total_value"]) == (3, 9987.35)
    assert (archive["signals_count"], archive["signals_data"]) == (2, [a_signal(), a_signal()])
    assert "9,987.35" in _run("history").stdout
    assert "buy_yes Öffnet die Brücke? 🌉" in _run("archives").stdout


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_terminal_without_a_character_gets_its_json_escape(database_url: str, encoding: str) -> None:
    insert_event(event_of(an_archive(signals=[a_signal(market_question="Zürich € 😀")]), source="test", sequence=None))
    tables, document = (
        subprocess.run(
            [*PROGRAM, "archives", *arguments],
            capture_output=True,
            timeout=60,
            env={**os.environ, "PYTHONIOENCODING": encoding},
            check=True,
        ).stdout.decode(encoding)
        for arguments in ((), ("--json",))
    )
    shown = {
        "ascii": r"Z\u00fcrich \u20ac \ud83d\ude00",
        "latin-1": r"Zürich \u20ac \ud83d\ude00",
        "utf-8": "Zürich € 😀",
    }
    assert shown[encoding] in tables
    assert json.loads(document)[0]["signals_data"][0]["market_question"] == "Zürich € 😀"


def test_schema_prints_the_json_schema_of_the_events() -> None:
    run = cli("schema")
    assert (run.exit_code, json.loads(run.stdout)) == (0, json_schema())


def test_ctrl_c_before_the_command_begins_prints_no_traceback() -> None:
    """The exit status is 130, as later."""
    script = """
import os, signal
from consumers import cli
cli.app = lambda **_: os.kill(os.getpid(), signal.SIGINT)
cli.main()
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (130, "", "")


def test_archive_without_signals_says_so_and_succeeds(redis: Redis) -> None:
    """A missing default file means that there are no signals."""
    run = _run("archive")
    missing = "data/trades/current_signals.json does not exist"
    assert (run.returncode, run.stdout) == (0, f"There are no signals to archive: {missing}.\n")


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (
            ["init-db"],
            {"DATABASE_URL": "postgresql://u:s3cret@127.0.0.1:1/x"},
            "error: PostgreSQL: connection to server",
        ),
        (
            ["init-db"],
            {"DATABASE_URL": "mysql://u:s3cret@h/x"},
            "error: DATABASE_URL: must be a postgresql:// or postgres:// URL",
        ),
        (["init-db"], {"REDIS_URL": "redis://h"}, "error: REDIS_URL is set but DATABASE_URL (or"),
        (["snapshot", "missing.json"], {}, "error: missing.json: No such file or directory"),
        (["archive", "missing.json"], {}, "error: missing.json: No such file or directory"),
        (["import", "missing"], {}, "error: missing: No such file or directory"),
        (["verify", "missing"], {}, "error: missing: No such file or directory"),
        (["outbox", "salvage", "missing.db"], {}, "error: missing.db: No such file or directory"),
        (["outbox", "salvage", "/"], {}, "error: /: Is a directory"),
        (["snapshot", "-"], {"REDIS_URL": "redis://127.0.0.1:1"}, "error: -: not JSON"),
        (["outbox", "status"], {}, "error: there is no outbox at"),
        (
            ["status"],
            {"HISTORY_TIMEZONE": "x", "REDIS_URL": "redis://h"},
            "error: HISTORY_TIMEZONE: must be the name of an IANA time zone",
        ),
    ],
)
def test_error_is_one_line_on_stderr_without_secrets(
    arguments: list[str], environment: dict[str, str], message: str
) -> None:
    run = _run(*arguments, stdin="{", **environment)
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (1, "", 1)
    assert run.stderr.startswith(message)
    assert "s3cret" not in run.stderr


def test_debug_shows_the_traceback() -> None:
    run = _run("--debug", "outbox", "status")
    assert run.returncode == 1
    assert "Traceback" in run.stderr


def test_wrong_usage_exits_2() -> None:
    """An unknown command, an unknown option, and a limit of 0."""
    statuses = [_run(*wrong).returncode for wrong in (["fly"], ["history", "--fly"], ["history", "-n", "0"])]
    assert statuses == [2, 2, 2]


_ENORMOUS = "99999999999999999999"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("history", "--limit", _ENORMOUS), f"Invalid value for '--limit' / '-n': must be {_FROM_1}"),
        (("history", "--limit", "0"), f"Invalid value for '--limit' / '-n': must be {_FROM_1}"),
        (("archives", "--portfolio-id", _ENORMOUS), f"Invalid value for '--portfolio-id': must be {_BIGINT}"),
        (("history", "--portfolio-id", f"-{_ENORMOUS}"), f"Invalid value for '--portfolio-id': must be {_BIGINT}"),
        (("snapshot", "-", "--portfolio-id", _ENORMOUS), f"Invalid value for '--portfolio-id': must be {_BIGINT}"),
        (("archive", "--portfolio-id", "1.5"), f"Invalid value for '--portfolio-id': must be {_BIGINT}"),
        (("import", ".", "--portfolio-id", _ENORMOUS), f"Invalid value for '--portfolio-id': must be {_BIGINT}"),
        (("verify", ".", "--portfolio-id", _ENORMOUS), f"Invalid value for '--portfolio-id': must be {_BIGINT}"),
        (("export", "x", "--portfolio-id", _ENORMOUS), f"Invalid value for '--portfolio-id': must be {_BIGINT}"),
        (("import", ".", "--rate", _ENORMOUS), f"Invalid value for '--rate': must be {_FROM_1}"),
        (("snapshot", "-", "--wait", "inf"), "Invalid value for '--wait': must be a finite number of seconds"),
        (("archive", "--wait", "nan"), "Invalid value for '--wait': must be a finite number of seconds"),
        (("outbox", "flush", "--timeout", "-1"), "Invalid value for '--timeout': must be a finite number of seconds"),
        (("outbox", "resend", "--since", "2026-01-01", "--timeout", "inf"), "Invalid value for '--timeout': must be a"),
    ],
)
def test_a_number_that_is_out_of_range_is_wrong_usage(arguments: tuple[str, ...], message: str) -> None:
    run = _run(*arguments, REDIS_URL="redis://127.0.0.1:1", DATABASE_URL="postgresql://u@127.0.0.1:1/x")
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (2, "", 1), run.stderr
    assert run.stderr.startswith(f"error: {message}")


@pytest.mark.parametrize("command", [("snapshot", "-"), ("archive",), ("relay",)])
def test_without_settings_a_command_of_the_base_install_names_redis_url(
    tmp_path: Path, command: tuple[str, ...]
) -> None:
    """The base install has no embedded servers."""
    script = "import sys; sys.modules['sqlalchemy'] = None; from consumers.cli import main; main()"
    run = subprocess.run(
        [sys.executable, "-c", script, *command],
        input="{}", capture_output=True, text=True, timeout=60, check=False,
        env={name: value for name, value in os.environ.items() if name not in ("REDIS_URL", "DATABASE_URL")},
    )  # fmt: skip
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr == (
        "error: neither DATABASE_URL nor REDIS_URL is set: set REDIS_URL, or pip install '.[all]' in a clone for the"
        " embedded servers\n"
    )


def test_audit_continues_without_redis(database_url: str) -> None:
    """It uses Redis only if it is there. The exit status is that of the numbers."""
    run = _run("audit", REDIS_URL="redis://u:s3cret@127.0.0.1:1")
    assert (run.returncode, run.stderr.count("\n")) == (0, 1), run.stderr
    assert run.stderr.startswith("note: Redis: ")
    assert run.stderr.endswith("; events that are only in the queue count as missing\n")
    assert "s3cret" not in run.stderr


def test_init_db_succeeds_twice_at_the_same_time_and_again_afterwards(empty_database_url: str) -> None:
    both = [subprocess.Popen([*PROGRAM, "init-db"], stdout=subprocess.PIPE) for _ in range(2)]
    answers = [one.communicate(timeout=60)[0] for one in both]
    again = _run("init-db")

    assert ([one.returncode for one in both], answers) == ([0, 0], [b"The tables are ready in schema public.\n"] * 2)
    assert (again.returncode, get_portfolio_history()) == (0, [])


def test_snapshot_keeps_every_digit_of_its_file(redis: Redis, database_url: str) -> None:
    """Amounts are never converted to float."""
    recorded = _run("snapshot", "-", stdin='{"balance": 123456789012.12345678}')
    _run("worker", "--burst")
    with get_db() as db:
        balance = db.execute(text("SELECT balance FROM portfolio_history")).scalar()
    assert (recorded.returncode, balance) == (0, Decimal("123456789012.12345678"))


def test_status_is_0_while_servers_answer_and_a_worker_is_alive(redis: Redis, database_url: str) -> None:
    worker = subprocess.Popen([*PROGRAM, "worker"], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 20
    while not redis.smembers("rq:workers:history") and time.monotonic() < deadline:
        time.sleep(0.05)
    healthy = _run("status", "--json")
    worker.terminate()

    assert worker.wait(20) == 0
    assert (healthy.returncode, json.loads(healthy.stdout)["workers"]) == (0, 1)


def test_environment_is_restored_after_the_embedded_servers_stop(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second use starts them again."""
    monkeypatch.setenv("HISTORY_HOME", str(home))
    for _ in range(2):
        with stack(database=True, redis=True) as embedded:
            assert (embedded, get_portfolio_history()) == (True, [])
        assert "DATABASE_URL" not in os.environ
        assert "REDIS_URL" not in os.environ


def test_status_shows_each_problem(redis: Redis, database_url: str) -> None:
    """Without a worker, or while a server is away, the exit status is 1. The other parts are still shown."""
    idle = _run("status", "--json")
    away = _run("status", "--json", REDIS_URL="redis://127.0.0.1:1")

    assert (idle.returncode, away.returncode) == (1, 1)
    shown = json.loads(idle.stdout)
    assert (shown["database"], shown["redis"], shown["workers"], shown["queued"]) == (
        "reachable",
        "reachable",
        0,
        0,
    )
    assert json.loads(away.stdout)["redis"].startswith("ConnectionError: ")


@pytest.fixture
def home() -> Iterator[Path]:
    with TemporaryDirectory(prefix="th-", dir="/tmp") as folder:
        yield Path(folder)


def _processes_of(home: Path) -> list[str]:
    lines = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    return [line for line in lines if str(home) in line]


def test_command_without_settings_uses_the_embedded_servers_and_says_so(home: Path) -> None:
    """Data is kept between commands. No process is left."""
    notice = f"using the embedded PostgreSQL and Valkey in {home}\n"
    recorded = _run("snapshot", "-", "--portfolio-id", "1", stdin=json.dumps(a_portfolio()), HISTORY_HOME=str(home))
    worked = _run("worker", "--burst", HISTORY_HOME=str(home))
    shown = _run("history", "--json", HISTORY_HOME=str(home))

    assert [run.returncode for run in (recorded, worked, shown)] == [0, 0, 0]
    assert recorded.stderr.startswith(notice)
    assert [row["portfolio_id"] for row in json.loads(shown.stdout)] == [1]
    assert _processes_of(home) == []


def test_command_works_with_a_closed_stdout(database_url: str) -> None:
    """Some supervisors start programs without stdout. The command must not end with a traceback."""
    closed = ["bash", "-c", 'exec "$@" >&-', "bash", *PROGRAM, "history"]
    run = subprocess.run(closed, stderr=subprocess.PIPE, text=True, check=False, timeout=60)
    assert (run.returncode, run.stderr) == (0, "")


def test_demo_opens_the_page_on_its_data(home: Path, tmp_path: Path) -> None:
    """In the browser of the standard library. The address is printed too, and served until Ctrl-C."""
    opened = tmp_path / "opened"
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" >{opened}\n')
    browser.chmod(0o755)
    demo = subprocess.Popen(
        [*PROGRAM, "demo", "--open"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True,
        env={**os.environ, "HISTORY_HOME": str(home), "BROWSER": str(browser)},
    )  # fmt: skip
    try:
        assert demo.stdout is not None
        url = next(line for line in demo.stdout if line.startswith("http://")).partition(" - ")[0]
        rows = httpx.get(f"{url}trading/portfolio-history?limit=1000", timeout=30).json()
        health = httpx.get(f"{url}page/health", timeout=30).json()
        deadline = time.monotonic() + 10
        while not opened.exists() or not opened.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(demo.pid, signal.SIGINT)
        assert demo.wait(30) == 130
    finally:
        demo.kill()
        demo.communicate()
    assert (len(rows), opened.read_text().strip()) == (182, url)
    assert (health["redis"]["workers"], health["outbox"]["rejected"]) == (1, 0)
    assert _processes_of(home) == []


def test_without_a_display_no_browser_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A browser for terminals would take over this terminal. The line says what to do."""
    browser = tmp_path / "www-browser"
    browser.write_text("#!/bin/sh\necho started\n")
    browser.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("TERM", "xterm")
    for name in ("BROWSER", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    open_browser("http://127.0.0.1:1/")
    assert capfd.readouterr() == ("", "No browser was found on this machine: open the address yourself.\n")


def test_version_is_one_line_with_what_matters_for_a_report() -> None:
    """Version of this project, of Python and of the two libraries, also without a command."""
    run = _run("--version")
    assert run.returncode == 0
    assert re.fullmatch(r"trading-history \d[\w.]*, Python 3\.\d+\.\d\S*, rq 3\.0\S*, redis-py \d\S*\n", run.stdout)


def test_killed_demo_leaves_no_worker_and_the_next_demo_succeeds(home: Path) -> None:
    """After kill -9, its worker ends. The next run counts correctly and leaves no process."""
    environment = {**os.environ, "HISTORY_HOME": str(home)}
    killed = subprocess.Popen([*PROGRAM, "demo"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
    assert killed.stdout is not None
    killed.stdout.readline()  # the servers are up
    deadline = time.monotonic() + 20
    while not (workers := psutil.Process(killed.pid).children()) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1)
    killed.kill()
    killed.communicate()
    again = _run("demo", HISTORY_HOME=str(home))

    assert again.returncode == 0, again.stderr
    assert workers
    assert [worker for worker in workers if worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE] == []
    assert _processes_of(home) == []


def test_worker_without_redis_logs_it_once_without_secrets(tmp_path: Path) -> None:
    """It tries again until SIGTERM ends it, with exit status 0."""
    log = tmp_path / "log"
    settings = {"DATABASE_URL": "postgresql://h/d", "REDIS_URL": "redis://u:s3cret@127.0.0.1:1"}
    with log.open("w") as stderr:
        worker = subprocess.Popen(
            [sys.executable, "-m", "consumers.cli", "worker"], stderr=stderr, env={**os.environ, **settings}
        )
    try:
        deadline = time.monotonic() + 30
        while "waits for Redis and tries again: Error 111 connecting to 127.0.0.1:1" not in log.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(1)  # enough for more attempts
        worker.terminate()
        assert worker.wait(20) == 0
    finally:
        worker.kill()
        worker.wait()
    assert log.read_text().count("waits for Redis") == 1
    assert "s3cret" not in log.read_text()


@pytest.mark.parametrize(
    "command",
    [
        ("history", "--since"),
        ("archives", "--until"),
        ("audit", "--since"),
        ("export", "folder", "--since"),
        ("outbox", "resend", "--since"),
        ("snapshot", "portfolio.json", "--timestamp"),
        ("archive", "--archived-at"),
    ],
)
def test_an_invalid_time_is_named_with_an_example(command: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, [*command, "tomorrow"], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert "tomorrow is not a time: write for example 2026-11-22T17:00, 2026-11-22T17:00+01:00, 7d" in result.output
