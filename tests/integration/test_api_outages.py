"""The API and `status` while PostgreSQL is gone, frozen, busy or restarted: an answer in seconds, and well again."""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import pytest
from fastapi.testclient import TestClient
from httpx2 import Response
from sqlalchemy import create_engine, make_url, text

from consumers.db import engine, waits
from consumers.ops import status
from consumers.web import api
from consumers.web.api import api_server
from consumers.web.listening import listen
from tests.faults.proxy import Proxy

HISTORY = "/trading/portfolio-history"


@pytest.fixture
def proxy(
    database_url: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Proxy]:
    """Between the API and PostgreSQL; the settings name it."""
    url = make_url(database_url)
    folder = Path("/tmp", f"th-{os.getpid()}-{time.monotonic_ns()}")
    folder.mkdir()
    between = Proxy(folder / ".s.PGSQL.5432", Path(str(url.query["host"])) / ".s.PGSQL.5432")
    with between.running():
        monkeypatch.setenv(
            "DATABASE_URL", f"postgresql://{url.username}@/{url.database}?host={quote(str(folder), safe='')}"
        )
        yield between
        engine.reader().dispose()
        engine.engine.cache_clear()
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


def _require_unavailable(answer: Response) -> None:
    assert (answer.status_code, answer.headers["content-type"]) == (503, "application/problem+json"), answer.text
    assert int(answer.headers["retry-after"]) > 0
    for secret in ("psycopg", "SELECT", "portfolio_history", "socket", "/tmp", "server"):
        assert secret not in answer.text


def test_a_database_that_is_gone_is_503_at_once_and_200_when_it_is_back(proxy: Proxy) -> None:
    """Whatever is asked; the process itself is well."""
    with TestClient(api.app) as client:
        assert client.get(HISTORY).status_code == 200
        proxy.set_mode("refuse")
        proxy.cut()
        began = time.monotonic()
        for url in (
            HISTORY,
            f"{HISTORY}?daily=last",
            "/trading/signal-archives",
            "/trading/signals?market_id=1",
            "/page/portfolios",
            "/readyz",
        ):
            _require_unavailable(client.get(url))
        assert client.get("/healthz").status_code == 200
        assert time.monotonic() - began < 2
        proxy.set_mode("pass")
        assert [client.get(url).status_code for url in (HISTORY, "/readyz")] == [200, 200]


def test_the_api_and_the_page_say_the_same_and_the_log_says_why(proxy: Proxy, caplog: pytest.LogCaptureFixture) -> None:
    """A reference leads from the answer to the reason; it is the same at each try, and each reason has its own."""
    with TestClient(api.app) as client:
        proxy.set_mode("refuse")
        told = [client.get(url).json()["detail"] for url in (HISTORY, "/page/portfolios", "/page/newest")]
        health = client.get("/page/health").json()["database"]["error"]
        proxy.set_mode("pass")
        with engine.get_db() as db:
            db.execute(text("DROP TABLE portfolio_history CASCADE"))
        missing = {client.get(url).json()["detail"].rpartition(" ")[0] for url in (HISTORY, "/page/portfolios")}

    assert {*told, health} == {told[0]}
    reference = told[0].removesuffix(".").rpartition(" ")[2]
    assert told[0] == f"The database cannot be read now. The log has the reason, reference {reference}."
    logged = [record.getMessage() for record in caplog.records if f"(reference {reference})" in record.getMessage()]
    assert len(logged) == 4
    assert "StoreUnavailable: PostgreSQL: " in logged[0]
    (no_tables,) = missing
    assert no_tables.startswith("The database has no tables yet: trading-history init-db makes them. The log ")


def test_without_a_database_in_the_settings_both_say_so() -> None:
    """503, not a defect; which setting it is stands in the log."""
    engine.engine.cache_clear()
    with TestClient(api.app) as client:
        answers = [client.get(url) for url in (HISTORY, "/page/portfolios")]
    for answer in answers:
        _require_unavailable(answer)
        assert answer.json()["detail"].startswith("A setting is missing or wrong. The log has the reason, reference ")


def test_a_restarted_database_is_not_even_noticed(proxy: Proxy) -> None:
    """A connection that broke while it was idle is replaced."""
    with TestClient(api.app) as client:
        assert client.get(HISTORY).status_code == 200
        proxy.cut()
        assert client.get(HISTORY).status_code == 200


def test_a_frozen_database_is_503_after_seconds(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is connected and never answers: whoever asks is not kept for ever, and the next one neither."""
    monkeypatch.setattr(api, "READ_SECONDS", 0.5)
    with TestClient(api.app) as client:
        assert client.get(HISTORY).status_code == 200
        proxy.set_mode("swallow")
        began = time.monotonic()
        _require_unavailable(client.get(HISTORY))
        assert time.monotonic() - began < 10
        proxy.set_mode("pass")
        assert client.get(HISTORY).status_code == 200


def test_status_says_that_a_frozen_database_does_not_answer(
    proxy: Proxy, redis: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it is connected already, or connects; and it sees when the database is well again."""
    monkeypatch.setattr(status, "READ_SECONDS", 0.5)
    monkeypatch.setattr(waits, "CONNECT_TIMEOUT_SECONDS", 0.5)
    assert status.pipeline_status()[0]["database"] == "reachable"
    for _ in range(2):
        proxy.set_mode("swallow")
        began = time.monotonic()
        facts, healthy = status.pipeline_status()
        assert (healthy, facts["redis"]) == (False, "reachable")
        assert facts["database"].startswith("PostgreSQL: no answer from the server in")
        assert time.monotonic() - began < 6
    proxy.set_mode("pass")
    assert status.pipeline_status()[0]["database"] == "reachable"


def test_a_client_that_takes_nothing_is_disconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would keep its answer in the server's memory."""
    monkeypatch.setattr(api_server, "_IDLE_SECONDS", 0.3)
    with listen("127.0.0.1", 0) as listening:
        api_server._disconnect_idle_readers(listening)
        with socket.create_connection(listening.getsockname()), listening.accept()[0] as accepted:
            accepted.settimeout(20)
            with pytest.raises(OSError, match="timed out") as caught:
                accepted.sendall(bytes(50_000_000))
    assert caught.value.errno == errno.ETIMEDOUT


def test_a_statement_that_takes_too_long_is_ended(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By PostgreSQL itself; here behind a lock that somebody holds."""
    monkeypatch.setattr(engine, "READ_SECONDS", 0.4)
    holder = create_engine(make_url(database_url).set(drivername="postgresql+psycopg2"))
    with TestClient(api.app) as client:
        with holder.begin() as db:
            db.execute(text("LOCK TABLE portfolio_history IN ACCESS EXCLUSIVE MODE"))
            answer = client.get(HISTORY)
        _require_unavailable(answer)
        assert "took too long" in answer.json()["detail"]
        assert client.get(HISTORY).status_code == 200
    holder.dispose()


def test_more_requests_than_connections_all_get_an_answer(database_url: str) -> None:
    """They wait for one another, or are told to come back; no connection is lost by it."""
    with TestClient(api.app) as client, ThreadPoolExecutor(30) as pool:
        together = threading.Barrier(30)

        def ask(_: int) -> int:
            together.wait(20)
            return client.get(HISTORY).status_code

        assert set(pool.map(ask, range(30))) == {200}
    with engine.get_db() as db:
        opened = db.execute(
            text("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()")
        ).scalar_one()
    assert opened <= 8
