"""A worker stops waiting for PostgreSQL after a time limit, even if the server enforces none."""

from __future__ import annotations

import socket
import threading
import time

import psycopg2
import pytest

from consumers.db import waits
from consumers.db.waits import DatabaseWaits


def test_connecting_ends_if_the_server_accepts_but_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """libpq's own connect_timeout has no effect while DatabaseWaits waits in its place."""
    monkeypatch.setattr(waits, "CONNECT_TIMEOUT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server, DatabaseWaits(60, threading.Event()).limited():
        port = server.getsockname()[1]
        with pytest.raises(psycopg2.OperationalError, match="no answer from the server"):
            psycopg2.connect(host="127.0.0.1", port=port, user="x", dbname="x", sslmode="disable")


def test_a_statement_without_an_answer_ends_and_closes_its_connection(database_url: str) -> None:
    """The server may still send an answer, which no later statement may read."""
    limits = DatabaseWaits(1.0, threading.Event())
    with limits.limited():
        connection = psycopg2.connect(database_url)
        with pytest.raises(psycopg2.OperationalError, match="no answer from the server in 1 s"):
            connection.cursor().execute("SELECT pg_sleep(10)")
        assert connection.closed
        assert limits.seconds(threading.get_ident()) == 0.0


def test_after_a_stop_request_a_worker_waits_for_a_shorter_time(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer within that time is still read."""
    monkeypatch.setattr(waits, "_STOPPING_SECONDS", 1.5)
    stopping = threading.Event()
    stopping.set()
    with DatabaseWaits(60, stopping).limited():
        connection = psycopg2.connect(database_url)
        cursor = connection.cursor()
        cursor.execute("SELECT pg_sleep(0.7), 5")
        assert cursor.fetchone() == ("", 5)
        began = time.monotonic()
        with pytest.raises(psycopg2.OperationalError, match="no answer"):
            cursor.execute("SELECT pg_sleep(30)")
        assert time.monotonic() - began < 10
