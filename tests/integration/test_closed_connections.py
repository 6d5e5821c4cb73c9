"""Pooled connections that the server has closed are replaced, usually without a round trip to find that out."""

from __future__ import annotations

import time

import pytest
from sqlalchemy import text

from consumers.db.engine import engine, get_db, read_transaction

pytestmark = pytest.mark.usefixtures("database_url")


@pytest.mark.parametrize("checked_after_seconds", [0.0, 60.0])
def test_a_transaction_after_the_server_has_closed_the_connection_has_a_new_one(
    monkeypatch: pytest.MonkeyPatch, checked_after_seconds: float
) -> None:
    """Whether the connection was just used, so that only its socket is looked at, or is asked for an answer."""
    monkeypatch.setattr("consumers.db.engine.UNCHECKED_SECONDS", checked_after_seconds)
    sessions = text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid = :pid")
    closed: list[int] = []
    for _ in range(2):
        with get_db() as db:
            process: int = db.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
        assert process not in closed
        with read_transaction() as other:
            assert other.execute(sessions, {"pid": process}).scalar_one()
        closed.append(process)
        time.sleep(0.2)


def test_a_connection_that_was_just_used_is_not_asked_for_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    with get_db():
        pass
    monkeypatch.setattr(engine().dialect, "do_ping", asked.append)
    with get_db():
        pass
    assert not asked
    monkeypatch.setattr("consumers.db.engine.UNCHECKED_SECONDS", 0.0)
    with get_db():
        pass
    assert len(asked) == 1
