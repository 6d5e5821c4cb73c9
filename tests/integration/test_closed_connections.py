"""Pooled connections that the server has closed are replaced, usually without a round trip to find that out."""

from __future__ import annotations

import time

import pytest
from sqlalchemy import create_engine, make_url, text

from consumers.db.engine import engine, get_db, long_read, read_transaction
from consumers.errors import StoreUnavailable

pytestmark = pytest.mark.usefixtures("database_url")


@pytest.mark.parametrize("check", ["socket", "ping"])
def test_a_transaction_after_the_server_has_closed_the_connection_has_a_new_one(
    monkeypatch: pytest.MonkeyPatch, check: str
) -> None:
    """Each of the two checks finds it alone."""
    monkeypatch.setattr("consumers.db.engine.PING_AFTER_SECONDS", 60.0 if check == "socket" else 0.0)
    if check == "ping":
        monkeypatch.setattr("consumers.db.engine.is_readable", lambda descriptor: False)
    terminate = text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid = :pid")
    closed: list[int] = []
    for _ in range(3):
        with get_db() as db:
            process: int = db.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
        assert process not in closed
        with read_transaction() as other:
            assert other.execute(terminate, {"pid": process}).scalar_one()
        closed.append(process)
        time.sleep(0.2)


def test_a_connection_that_was_just_used_is_not_pinged(monkeypatch: pytest.MonkeyPatch) -> None:
    pinged: list[object] = []
    with get_db():
        pass
    monkeypatch.setattr(engine().dialect, "do_ping", pinged.append)
    with get_db():
        pass
    assert not pinged
    monkeypatch.setattr("consumers.db.engine.PING_AFTER_SECONDS", 0.0)
    with get_db():
        pass
    assert len(pinged) == 1


def test_a_transaction_that_gets_no_free_connection_fails_as_if_the_database_were_away(
    database_url: str,
) -> None:
    address = make_url(database_url).set(drivername="postgresql+psycopg2")
    store = create_engine(address, pool_size=1, max_overflow=0, pool_timeout=0.1)
    with long_read(store), pytest.raises(StoreUnavailable, match="PostgreSQL: TimeoutError"), long_read(store):
        pass
    store.dispose()
