"""Log lines of all processes: JSON if set, the event on each line about one, and never a password."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import urlopen

import pytest
from redis import Redis
from sqlalchemy import make_url, text

from consumers.db.engine import get_db
from consumers.operations import get_portfolio_history
from producers.events import encode, event_of
from producers.history_producer import HistoryProducer
from tests.deliveries import burst, history_queue
from tests.factories import a_snapshot
from tests.rq_programs import end, rq_worker, until
from tests.scrapes import log_lines, scraped, scraped_worker

_FIELDS = ("event_id", "job_id", "source", "sequence", "outcome")
_DATABASE_PASSWORD = "db pa/ss#word"
_REDIS_PASSWORD = "redis pa/ss#word"
_SECRETS = [form for word in (_DATABASE_PASSWORD, _REDIS_PASSWORD) for form in (word, quote(word, safe=""))]


def _about_events(log: Path) -> list[tuple[object, ...]]:
    lines = [tuple(line.get(name) for name in _FIELDS) for line in log_lines(log)]
    return [fields for fields in lines if any(fields)]


def _enqueue(redis: Redis, sequence: int, balance: str = "9900.12") -> tuple[str, str]:
    """Enqueue a snapshot of always the same instant; return the event id and the job id."""
    event = event_of(a_snapshot(balance=balance), source="bot/1", sequence=sequence)
    job = history_queue(redis).enqueue("consumers.handlers.record_portfolio_snapshot", encode(event))
    return str(event.id), job.id


def test_the_lines_of_a_worker_are_json_and_have_the_event(
    redis: Redis, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lines of RQ are JSON too."""
    monkeypatch.setenv("HISTORY_LOG", "json")
    log = tmp_path / "log"
    with scraped_worker(log) as (worker, _):
        event_id, first = _enqueue(redis, 1)
        until(lambda: len(get_portfolio_history()) == 1)
        _, second = _enqueue(redis, 2, balance="1")
        invalid = history_queue(redis).enqueue("consumers.handlers.record_portfolio_snapshot", "{}").id
        until(lambda: history_queue(redis).failed_job_registry.count == 2)
        worker.terminate()
        assert worker.wait(15) == 0
    assert set(_about_events(log)) == {
        (event_id, first, "bot/1", 1, "stored"),
        (event_id, second, "bot/1", 2, "conflict"),
        (None, invalid, None, None, "invalid"),
    }
    assert len(_about_events(log)) == 3
    assert {"rq.worker", "rq.worker.history", "consumers.worker.history_worker"} <= {
        line["logger"] for line in log_lines(log)
    }


def test_the_lines_of_rqs_own_command_are_json_and_have_the_event(
    redis: Redis, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RQ's lines from before the worker class starts are not."""
    monkeypatch.setenv("HISTORY_LOG", "json")
    event_id, job_id = _enqueue(redis, 1)
    log = tmp_path / "log"
    with rq_worker("consumers.worker.HistoryWorker", log):
        until(lambda: "stored event" in log.read_text())
    assert _about_events(log) == [(event_id, job_id, "bot/1", 1, "stored")]


_TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.mark.parametrize("how", ["HistoryWorker text", "HistoryWorker json", "SimpleWorker text"])
def test_a_workers_lines_about_an_event_have_the_callers_trace_context(
    producer: HistoryProducer, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """A line about a stored event and one about a rejected event, by this project's worker and by a stock worker."""
    worker, form = how.split()
    monkeypatch.setenv("HISTORY_LOG", form)
    log = tmp_path / "log"
    with rq_worker("consumers.worker.HistoryWorker" if worker == "HistoryWorker" else "rq.SimpleWorker", log):
        for balance, expected in ((2, "stored event"), (1, "rejected job")):
            producer.record(a_snapshot(balance=balance), traceparent=_TRACEPARENT)
            until(lambda expected=expected: expected in log.read_text())  # type: ignore[misc]  # called in this iteration
    lines = [line for line in log.read_text().splitlines() if "stored event" in line or "rejected job" in line]
    assert len(lines) == 2
    for line in lines:
        message = json.loads(line)["message"] if form == "json" else line
        assert message.endswith(f" (traceparent {_TRACEPARENT})")
    if form == "json":
        assert {json.loads(line)["traceparent"] for line in lines} == {_TRACEPARENT}


def test_the_lines_of_the_api_are_json(tmp_path: Path) -> None:
    """Those of uvicorn too."""
    log = tmp_path / "log"
    command = [sys.executable, "-m", "consumers.cli", "api", "--port=0"]
    with _at_port(1) as urls, log.open("wb") as output:
        settings = {**os.environ, **urls, "HISTORY_LOG": "json"}
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=output, env=settings, text=True)
        assert server.stdout is not None
        with server.stdout:
            address = server.stdout.readline().split()[0]
        _response(f"{address}readyz")
        server.terminate()
        assert server.wait(20) == 128 + signal.SIGTERM
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert {"uvicorn.error", "consumers.web.api"} <= {line["logger"] for line in lines}
    assert "not ready: PostgreSQL: Connection refused" in [line["message"] for line in lines]


def test_the_relay_of_a_controller_logs_a_rejection_once(
    redis: Redis, database_url: str, producer: HistoryProducer, caplog: pytest.LogCaptureFixture
) -> None:
    """The controller may never read the receipt."""
    with caplog.at_level(logging.WARNING, "producers.relay"):
        producer.record(a_snapshot())
        receipt = producer.record(a_snapshot(balance=1))
        producer.record(a_snapshot(after=timedelta(seconds=1)))
        producer.flush(10)
        burst(redis)
        until(lambda: producer.status().depth == 0)
        producer.close()
    (record,) = [record for record in caplog.records if record.name == "producers.relay"]
    assert record.getMessage().startswith(f"event {receipt.event_id} was rejected: event {receipt.event_id} is stored")
    source_id = receipt.source.rpartition("/")[2]
    found = tuple(getattr(record, name) for name in _FIELDS)
    assert (found[0], *found[2:]) == (str(receipt.event_id), receipt.source, 2, "rejected")
    assert found[1].startswith(f"{source_id}-2-")


def test_a_wrong_setting_is_an_error_and_doctor_reports_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """`doctor` starts with wrong settings, in order to report them."""
    monkeypatch.setenv("HISTORY_LOG", "yaml")
    command = [sys.executable, "-m", "consumers.cli"]
    ended = subprocess.run([*command, "schema"], capture_output=True, text=True, timeout=30, check=False)
    assert (ended.returncode, ended.stderr) == (1, "error: HISTORY_LOG: Input should be 'text' or 'json'\n")

    monkeypatch.setenv("HISTORY_METRICS_PORT", "99999")
    monkeypatch.setenv("HISTORY_DASHBOARD_URL", "foo")
    monkeypatch.setenv("HISTORY_API_TOKEN", "two words")
    doctor = [*command, "doctor", "--json"]
    ended = subprocess.run(doctor, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    reported = [check["found"].split(":")[0] for check in json.loads(ended.stdout) if check["name"] == "settings"]
    assert reported == ["HISTORY_METRICS_PORT", "HISTORY_LOG", "HISTORY_DASHBOARD_URL", "HISTORY_API_TOKEN"]


@contextmanager
def _wrong_passwords(redis: Redis, database_url: str) -> Iterator[dict[str, str]]:
    """Settings whose passwords the real servers do not accept."""
    url = make_url(database_url)
    with get_db() as db:
        db.execute(text("CREATE ROLE guest LOGIN PASSWORD 'another'"))
        hba = Path(db.scalar(text("SHOW hba_file")))
    before = hba.read_text()
    with ExitStack() as undo:
        undo.callback(_reload, "DROP ROLE guest")
        undo.callback(hba.write_text, before)
        hba.write_text(f"local all guest scram-sha-256\n{before}")
        _reload()
        redis.config_set("requirepass", "another")
        undo.callback(redis.config_set, "requirepass", "")
        where, path = quote(str(url.query["host"]), safe=""), redis.connection_pool.connection_kwargs["path"]
        yield {
            "DATABASE_URL": f"postgresql://guest:{quote(_DATABASE_PASSWORD, safe='')}@/{url.database}?host={where}",
            "REDIS_URL": f"unix://:{quote(_REDIS_PASSWORD, safe='')}@{path}",
        }


def _reload(*statements: str) -> None:
    with get_db() as db:
        for statement in (*statements, "SELECT pg_reload_conf()"):
            db.execute(text(statement))


@contextmanager
def _at_port(port: int) -> Iterator[dict[str, str]]:
    yield {
        "DATABASE_URL": f"postgresql://user:{quote(_DATABASE_PASSWORD, safe='')}@127.0.0.1:{port}/history",
        "REDIS_URL": f"redis://:{quote(_REDIS_PASSWORD, safe='')}@127.0.0.1:{port}/0",
    }


@contextmanager
def _frozen() -> Iterator[dict[str, str]]:
    """Settings of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent, _at_port(silent.getsockname()[1]) as urls:
        yield urls


def _worker_output(log: Path, urls: dict[str, str]) -> str:
    with scraped_worker(log, **urls) as (_, url):
        assert [scraped(url)[f"{part}_up",] for part in ("database", "redis")] == [0, 0]
        until(lambda: all(f"cannot read {part}" in log.read_text() for part in ("database", "redis")))
        until(lambda: "waits for Redis" in log.read_text())
    return log.read_text()


def _api_output(log: Path, urls: dict[str, str], path: str) -> str:
    command = [sys.executable, "-m", "consumers.cli", "--debug", "api", "--port=0"]
    with log.open("wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **urls})
    try:
        until(lambda: "http://" in log.read_text(), seconds=40)
        address = log.read_text().partition("http://")[2].split("/")[0]
        responses = [_response(f"http://{address}/{name}") for name in ("metrics", path)]
        until(lambda: all(f"cannot read {part}" in log.read_text() for part in ("database", "redis")))
    finally:
        end(server)
    return log.read_text() + "".join(responses)


def _response(url: str) -> str:
    try:
        with urlopen(url, timeout=30) as response:
            return str(response.read().decode())
    except HTTPError as error:
        return error.read().decode()


def _commands_output(urls: dict[str, str]) -> str:
    Path("portfolio.json").write_text(json.dumps({"balance": 1}))
    output = []
    for arguments in (["status"], ["snapshot", "portfolio.json"]):
        command = [sys.executable, "-m", "consumers.cli", "--debug", *arguments]
        environment = {**os.environ, **urls}
        ended = subprocess.run(command, capture_output=True, text=True, timeout=30, env=environment, check=False)
        output.append(ended.stdout + ended.stderr)
    return "".join(output)


def test_no_password_is_shown_when_connections_fail(redis: Redis, database_url: str, tmp_path: Path) -> None:
    """With wrong passwords, unreachable and frozen servers, in worker, API and commands, tracebacks included."""
    with (
        _wrong_passwords(redis, database_url) as wrong,
        _frozen() as frozen,
        _at_port(1) as unreachable,
        ThreadPoolExecutor(5) as pool,
    ):
        outputs = [pool.submit(_commands_output, wrong)]
        outputs.append(pool.submit(_worker_output, tmp_path / "wrong-worker", wrong))
        outputs.append(pool.submit(_worker_output, tmp_path / "unreachable-worker", unreachable))
        outputs.append(pool.submit(_api_output, tmp_path / "wrong-api", wrong, "readyz"))
        outputs.append(pool.submit(_api_output, tmp_path / "frozen-api", frozen, "trading/portfolio-history"))
        everything = "".join(one.result() for one in outputs)
    for reason in ("password authentication failed", "invalid username-password pair", "Connection refused", "Timeout"):
        assert reason in everything
    assert [secret for secret in _SECRETS if secret in everything] == []
