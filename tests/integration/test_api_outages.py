"""The API and `status` answer within seconds while PostgreSQL is down, frozen, busy or restarted, and then recover."""

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
    """Proxy between the API and PostgreSQL; the settings name it."""
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


def test_without_a_database_requests_get_503_at_once_and_200_when_it_is_back(proxy: Proxy) -> None:
    """On all paths that read the database; /healthz still answers 200."""
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


def test_the_api_and_the_page_give_the_same_reference_and_the_log_has_the_reason(
    proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    """The same reason has the same reference at each request; another reason has another one."""
    with TestClient(api.app) as client:
        proxy.set_mode("refuse")
        details = [client.get(url).json()["detail"] for url in (HISTORY, "/page/portfolios", "/page/newest")]
        health = client.get("/page/health").json()["database"]["error"]
        proxy.set_mode("pass")
        with engine.get_db() as db:
            db.execute(text("DROP TABLE portfolio_history CASCADE"))
        missing = {client.get(url).json()["detail"].rpartition(" ")[0] for url in (HISTORY, "/page/portfolios")}

    assert {*details, health} == {details[0]}
    reference = details[0].removesuffix(").").rpartition(" ")[2]
    assert details[0] == f"The database cannot be read now. The API's log has the reason (reference {reference})."
    logged = [record.getMessage() for record in caplog.records if f"(reference {reference})" in record.getMessage()]
    assert len(logged) == 4
    assert "StoreUnavailable: PostgreSQL: " in logged[0]
    (no_tables,) = missing
    assert no_tables.startswith("The database has no tables yet: run trading-history init-db. The API's log ")


def test_without_a_database_in_the_settings_the_api_and_the_page_answer_503() -> None:
    """The answer reports that a setting is missing; the log names it."""
    engine.engine.cache_clear()
    with TestClient(api.app) as client:
        answers = [client.get(url) for url in (HISTORY, "/page/portfolios")]
    for answer in answers:
        _require_unavailable(answer)
        assert answer.json()["detail"].startswith(
            "A setting is missing or wrong. The API's log has the reason (reference "
        )


def test_a_restart_of_the_database_fails_no_request(proxy: Proxy) -> None:
    """An idle connection that was closed is replaced."""
    with TestClient(api.app) as client:
        assert client.get(HISTORY).status_code == 200
        proxy.cut()
        assert client.get(HISTORY).status_code == 200


def test_a_frozen_database_gives_503_after_seconds(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server is connected and never answers; later requests work again."""
    monkeypatch.setattr(api, "READ_SECONDS", 0.5)
    with TestClient(api.app) as client:
        assert client.get(HISTORY).status_code == 200
        proxy.set_mode("swallow")
        began = time.monotonic()
        _require_unavailable(client.get(HISTORY))
        assert time.monotonic() - began < 10
        proxy.set_mode("pass")
        assert client.get(HISTORY).status_code == 200


def test_status_reports_that_a_frozen_database_does_not_answer(
    proxy: Proxy, redis: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an open connection and with a new one; it also reports when the database answers again."""
    monkeypatch.setattr(status, "READ_SECONDS", 0.5)
    monkeypatch.setattr(waits, "CONNECT_TIMEOUT_SECONDS", 0.5)
    assert status.pipeline_status()["database"] == "reachable"
    for _ in range(2):
        proxy.set_mode("swallow")
        began = time.monotonic()
        facts = status.pipeline_status()
        assert (facts["problems"] != [], facts["redis"]) == (True, "reachable")
        assert facts["database"].startswith("PostgreSQL: no answer from the server in")
        assert time.monotonic() - began < 6
    proxy.set_mode("pass")
    assert status.pipeline_status()["database"] == "reachable"


def test_a_client_that_reads_nothing_is_disconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the server would keep its answer in memory."""
    monkeypatch.setattr(api_server, "_IDLE_SECONDS", 0.3)
    with listen("127.0.0.1", 0) as listening:
        api_server._disconnect_idle_readers(listening)
        with socket.create_connection(listening.getsockname()), listening.accept()[0] as accepted:
            accepted.settimeout(20)
            with pytest.raises(OSError, match="timed out") as caught:
                accepted.sendall(bytes(50_000_000))
    assert caught.value.errno == errno.ETIMEDOUT


def test_a_statement_that_takes_too_long_gives_503(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PostgreSQL ends it: here it waits for a lock of another session."""
    monkeypatch.setattr(engine, "READ_SECONDS", 0.4)
    other = create_engine(make_url(database_url).set(drivername="postgresql+psycopg2"))
    with TestClient(api.app) as client:
        with other.begin() as db:
            db.execute(text("LOCK TABLE portfolio_history IN ACCESS EXCLUSIVE MODE"))
            answer = client.get(HISTORY)
        _require_unavailable(answer)
        assert "took too long" in answer.json()["detail"]
        assert client.get(HISTORY).status_code == 200
    other.dispose()


def test_more_requests_than_connections_all_get_an_answer(database_url: str) -> None:
    """They share at most eight connections, and none of them is lost."""
    with TestClient(api.app) as client, ThreadPoolExecutor(30) as pool:
        together = threading.Barrier(30)

        def ask(_: int) -> int:
            together.wait(20)
            return client.get(HISTORY).status_code

        assert set(pool.map(ask, range(30))) == {200}
    with engine.get_db() as db:
        opened = db.execute(
            text(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
                " AND backend_type = 'client backend'"
            )
        ).scalar_one()
    assert opened <= 8
