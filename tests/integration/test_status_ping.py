"""`status --ping` and `outbox status --ping`: what a monitoring service gets in each situation, and exit statuses."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from producers.outbox import Outbox
from tests.factories import a_snapshot
from tests.monitoring_service import CHECK_ID, Service, monitoring_service, refusing_url
from tests.relaying import a_worker, make_older

_PROGRAM = [sys.executable, "-m", "consumers.cli"]
_WITHOUT_DRIVER = [
    sys.executable,
    "-c",
    "import sys; sys.modules.update(sqlalchemy=None, psycopg2=None); from consumers.cli import main; main()",
]
_CRASHING = [
    sys.executable,
    "-c",
    "import consumers.ops.status as s, consumers.cli as c\n"
    "def crash(): raise RuntimeError('balance 1234 of the event')\n"
    "s.pipeline_status = crash\n"
    "c.main()",
]
_PASSWORD = "s3cr%40t"


def _run(
    service: Service | str, *arguments: str, program: Sequence[str] = _PROGRAM, **environment: Any
) -> subprocess.CompletedProcess[str]:
    """Run `status`, or the command of `arguments`, with --ping. Its output never has the id of the check."""
    url = service if isinstance(service, str) else service.url
    command = arguments if arguments and arguments[0][0] != "-" else ("status", *arguments)
    ran = subprocess.run(
        [*program, *command, "--ping", url],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, **environment},
        check=False,
    )
    assert CHECK_ID not in ran.stdout + ran.stderr
    return ran


def test_service_gets_success_while_a_worker_runs_and_failure_without_one(
    redis: Redis, database_url: str, tmp_path: Path
) -> None:
    """Rejected events do not change that: they hold up no other event, and `failed list` is the check for them."""
    redis.zadd("rq:failed:history", {"a": 1})
    with monitoring_service() as service:
        with a_worker(redis, tmp_path / "log"):
            well = _run(service)
            alone = _run(refusing_url())
        redis.delete("rq:workers:history")
        ill = _run(service)
    assert service.lines == ["GET /ping/ID", "POST /ping/ID/fail"]
    assert service.got[1].body == "workers: none"
    assert (well.returncode, well.stderr, ill.returncode, ill.stderr) == (0, "", 1, "")
    assert "problem              workers: none" in ill.stdout
    assert (alone.returncode, alone.stdout.splitlines()[0]) == (1, well.stdout.splitlines()[0])
    assert alone.stderr == "error: the ping to 127.0.0.1 was not delivered: Connection refused\n"


def test_service_gets_each_problem_in_one_line(redis: Redis, database_url: str, tmp_path: Path) -> None:
    """Events that are late, in the queue or in the outbox, and suspended workers."""
    outbox = tmp_path / "outbox.db"
    with Outbox(outbox) as opened:
        opened.append("bot", [a_snapshot()])
    make_older(outbox, 3600)
    redis.rpush("rq:queue:history", "job")
    redis.hset("rq:job:job", "enqueued_at", "2026-01-01T00:00:00.000000Z")
    with monitoring_service() as service:
        _run(service, HISTORY_OUTBOX=str(outbox))
        redis.set("rq:suspended", 1)
        _run(service, HISTORY_OUTBOX=str(outbox))
    late, suspended = (one.body.splitlines() for one in service.got)
    assert [line.partition(":")[0] for line in late] == ["queue", "workers", "outbox"]
    assert late[0].startswith("queue: 1 jobs in history, the first ")
    assert late[2] == "outbox: 1 pending, 0 sent, the oldest 60 min old; no process sends them"
    assert suspended[0] == "queue: 1 jobs, but RQ's workers are suspended"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"DATABASE_URL": f"nonsense://u:{_PASSWORD}@h/x"}, "DATABASE_URL: "),
        ({"DATABASE_URL": ""}, "REDIS_URL is set but DATABASE_URL (or POSTGRES_HOST) is not"),
        ({"REDIS_URL": ""}, "the database is set but REDIS_URL is not"),
        ({"REDIS_URL": f"redis://u:{_PASSWORD}@h:x"}, "REDIS_URL: must be "),
        ({"HISTORY_TIMEZONE": "Nowhere"}, "HISTORY_TIMEZONE: "),
        ({"HISTORY_LOG": "loud"}, "HISTORY_LOG: "),
        ({"RQ_KEY_PREFIX": ""}, "RQ_KEY_PREFIX is empty"),
        ({"DATABASE_URL": f"postgresql://u:{_PASSWORD}@127.0.0.1:1/x"}, "database: PostgreSQL: "),
    ],
)
def test_wrong_settings_are_a_failure_too(
    redis: Redis, database_url: str, settings: dict[str, str], reason: str
) -> None:
    """The service gets the message that is on stderr, or on stdout for a server that does not answer."""
    with monitoring_service() as service:
        ran = _run(service, **settings)
    assert (ran.returncode, service.lines) == (1, ["POST /ping/ID/fail"])
    assert service.got[0].body.startswith(reason)
    if not reason.startswith("database: "):
        assert ran.stderr == f"error: {service.got[0].body}\n"
    for secret in (_PASSWORD, "s3cr@t"):
        assert secret not in service.got[0].body + ran.stderr + ran.stdout


def test_an_env_file_that_cannot_be_read_is_a_failure_too(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"HISTORY_QUEUE=\xff\n")
    with monitoring_service() as service:
        ran = _run(service)
    assert (ran.returncode, service.got[0].body) == (1, ".env cannot be read: UnicodeDecodeError")


def test_crash_is_a_failure_too_and_its_message_is_not_sent(redis: Redis, database_url: str) -> None:
    """It may have the content of an event."""
    with monitoring_service() as service:
        ran = _run(service, program=_CRASHING)
    assert (ran.returncode, service.lines) == (1, ["POST /ping/ID/fail"])
    assert service.got[0].body == "RuntimeError, a defect: run the command by hand to see more"
    assert "Traceback" in ran.stderr


def test_secrets_are_masked_in_what_is_sent(database_url: str, tmp_path: Path) -> None:
    """Also if a server repeats them, and passwords of other settings."""
    secret = "hunter22"
    with monitoring_service() as service:
        _run(
            service, "outbox", "status",
            HISTORY_OUTBOX=str(tmp_path / f"{secret}-{secret[::-1]}.db"),
            HISTORY_API_TOKEN=secret, HISTORY_DASHBOARD_PASSWORD=secret[::-1],
        )  # fmt: skip
    assert service.got[0].body == f"there is no outbox at {tmp_path}/***-***.db; set HISTORY_OUTBOX to its path"


def test_url_comes_from_a_setting_if_its_name_is_given(redis: Redis, database_url: str, tmp_path: Path) -> None:
    """Without --ping, the setting alone sends nothing."""
    with monitoring_service() as service:
        environment = {"HISTORY_PING_URL": service.url}
        plain = subprocess.run(
            [*_PROGRAM, "status"], capture_output=True, env=os.environ | environment, timeout=60, check=False
        )
        assert (plain.returncode, service.lines) == (1, [])
        _run("HISTORY_PING_URL", **environment)
        (tmp_path / ".env").write_text(f"HISTORY_PING_URL={service.url}/\n")
        _run("HISTORY_PING_URL")
    assert service.lines == ["POST /ping/ID/fail", "POST /ping/ID/fail"]
    (tmp_path / ".env").unlink()
    missing, wrong = _run("HISTORY_PING_URL"), _run("HISTORY_PING_URL", HISTORY_PING_URL=f"ftp://h/{CHECK_ID}")
    assert missing.stderr == "error: HISTORY_PING_URL is not set, so --ping HISTORY_PING_URL has no URL\n"
    assert wrong.stderr == "error: HISTORY_PING_URL: must be an http:// or https:// URL with a host name\n"
    assert (missing.returncode, wrong.returncode) == (1, 1)


def test_wrong_use_is_one_line_without_the_url(database_url: str) -> None:
    wrong, both = _run(f"hc.example/{CHECK_ID}"), _run(refusing_url(), "--watch")
    assert (wrong.returncode, both.returncode) == (2, 2)
    assert wrong.stderr.startswith("error: Invalid value for '--ping': must be an http:// or https:// URL")
    assert both.stderr.startswith("error: Invalid value for --ping: cannot be used with --watch")


def test_the_traceback_of_debug_does_not_show_the_url(redis: Redis, database_url: str) -> None:
    ran = _run(refusing_url(), program=[*_PROGRAM, "--debug"], DATABASE_URL="nonsense://h/x")
    assert (ran.returncode, "Traceback" in ran.stderr) == (1, True)


def test_host_with_an_outbox_only_can_be_watched(redis: Redis, tmp_path: Path) -> None:
    """A controller's host has no database driver. Its outbox must be sound, not late and not nearly full."""
    outbox, late = tmp_path / "outbox.db", tmp_path / "late.db"
    for path in (outbox, late):
        with Outbox(path) as opened:
            opened.append("bot", [a_snapshot()])
    make_older(late, 3600)
    (tmp_path / "damaged.db").write_bytes(b"SQLite format 3\0" + b"nonsense" * 1000)
    with monitoring_service() as service:
        runs = [
            _run(service, "outbox", "status", program=_WITHOUT_DRIVER, HISTORY_OUTBOX=str(path))
            for path in (outbox, late, tmp_path / "none.db", tmp_path / "damaged.db")
        ]
        for arguments in (("status",), ("outbox", "status")):
            _run(service, *arguments, program=_WITHOUT_DRIVER, HISTORY_LOG="loud", HISTORY_OUTBOX=str(outbox))
        _run(service, "status", program=_WITHOUT_DRIVER, HISTORY_OUTBOX=str(outbox))
    assert [run.returncode for run in runs] == [0, 1, 1, 1]
    assert service.lines == ["GET /ping/ID", *(["POST /ping/ID/fail"] * 6)]
    bodies = [one.body for one in service.got]
    assert bodies[1] == "outbox: 1 pending, 0 sent, the oldest 60 min old; no process sends them"
    assert bodies[2] == f"there is no outbox at {tmp_path}/none.db; set HISTORY_OUTBOX to its path"
    assert str(tmp_path / "damaged.db") in bodies[3]
    assert [body.partition(":")[0] for body in bodies[4:6]] == ["HISTORY_LOG", "HISTORY_LOG"]
    assert bodies[6].startswith("this command needs the extra [worker]")
    assert "problem" in runs[1].stdout


def test_servers_that_hang_are_a_failure_in_bounded_time() -> None:
    """They accept connections and never answer. Nothing is measured then, and all of it takes less than a minute."""
    with socket.create_server(("127.0.0.1", 0)) as hanging, monitoring_service() as service:
        place = f"127.0.0.1:{hanging.getsockname()[1]}"
        began = time.monotonic()
        ran = _run(service, DATABASE_URL=f"postgresql://u@{place}/x", REDIS_URL=f"redis://{place}")
        took = time.monotonic() - began
    assert (ran.returncode, took < 45 + 10 + 5) == (1, True)
    assert [line.partition(":")[0] for line in service.got[0].body.splitlines()] == ["database", "Redis"]
    assert "Redis memory  -" in ran.stdout


def test_status_and_ping_are_bounded_while_the_service_hangs(redis: Redis, database_url: str) -> None:
    with monitoring_service("silent") as service:
        began = time.monotonic()
        ran = _run(service)
        took = time.monotonic() - began
    assert (ran.returncode, took < 25) == (1, True)
    assert ran.stderr.startswith("error: the ping to 127.0.0.1 was not delivered: no answer within ")
