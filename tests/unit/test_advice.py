"""Errors of servers: the message that is shown, and what to do."""

from __future__ import annotations

import sys

import psycopg2
import pytest
from redis.exceptions import AuthenticationError, RedisError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError
from sqlalchemy import create_engine
from sqlalchemy.exc import OperationalError

from consumers.cli.error_messages import error_message
from consumers.db.engine import translated_errors
from consumers.errors import StoreUnavailable, first_line
from consumers.ops.redis_errors import redis_problem

_AT = 'connection to server at "h" (10.0.0.5), port 5432 failed:'
_REFUSED = f"{_AT} Connection refused\n\tIs the server running on that host and accepting TCP/IP connections?\n"


@pytest.mark.parametrize(
    ("message", "shown", "advice"),
    [
        (f'{_AT} FATAL:  password authentication failed for user "u"\n', "password authentication", "correct user and"),
        (f'{_AT} FATAL:  role "u" does not exist\n', 'role "u" does not exist', "correct user and password"),
        (f"{_AT} fe_sendauth: no password supplied\n", "no password supplied", "correct user and password"),
        (f'{_AT} FATAL:  database "d" does not exist\n', 'FATAL: database "d"', "correct the name of the database"),
        (f"{_AT} FATAL:  no such database: d\n", "no such database", "this is a pooler whose own list"),
        (f"{_AT} FATAL:  the database system is starting up\n", "starting up", ""),
        (_REFUSED, "Connection refused", "check that PostgreSQL runs"),
        (
            'could not translate host name "h" to address: Name or service not known\n',
            "host name",
            "check that Postgre",
        ),
        # localhost has two addresses, and the server listens at the second one only.
        (_REFUSED + f'{_AT} FATAL:  password authentication failed for user "u"\n', "password", "correct user and"),
        (
            "server closed the connection unexpectedly\n\tThis probably means\n",
            "server closed",
            "check that PostgreSQL runs; a pooler, such as pgbouncer, must have pool_mode transaction or session",
        ),
        (
            f"{_AT} timeout expired\n",
            "timeout expired",
            "check that PostgreSQL runs, and host and port in DATABASE_URL",
        ),
        (
            f"{_AT} server does not support SSL, but SSL was required\n",
            "SSL was required",
            "this is about TLS: correct sslmode and sslrootcert",
        ),
        (f"{_AT} SSL error: certificate verify failed\n", "certificate verify", "this is about TLS: correct sslmode"),
        (
            f"{_AT} channel binding required, but server authenticated client without channel binding\n",
            "channel binding required",
            "channel_binding=require needs TLS",
        ),
        # Other languages.
        (
            f"{_AT} FATAL:  Passwort-Authentifizierung für Benutzer »u« fehlgeschlagen\n",
            "Passwort-Authentifizierung",
            "if this does not end by itself, check the name of the database, user and password in DATABASE_URL",
        ),
        (f'{_AT} ВАЖНО:  база данных "d" не существует\n', "база", "if this does not end by itself, check the name"),
    ],
)
def test_a_failed_connection_to_postgresql_has_advice(message: str, shown: str, advice: str) -> None:
    """It names the settings. An outage that ends by itself has none."""
    with pytest.raises(StoreUnavailable) as caught, translated_errors(create_engine("postgresql+psycopg2://")):
        raise OperationalError("SELECT 1", None, psycopg2.OperationalError(message))
    assert shown in str(caught.value)
    assert caught.value.advice.startswith(advice)
    assert bool(caught.value.advice) == bool(advice)
    assert "\n" not in caught.value.with_advice()


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (AuthenticationError("invalid username-password pair or user is disabled."), ": correct user and password in"),
        (RedisConnectionError("Error 111 connecting to h:1. Connection refused."), "refused: check that Redis runs"),
        (ResponseError("LOADING Redis is loading the dataset in memory"), "in memory"),
    ],
)
def test_an_error_of_redis_has_advice(error: RedisError, advice: str) -> None:
    assert advice in redis_problem(error)


def test_the_reason_of_an_error_is_found_without_importing_redis(monkeypatch: pytest.MonkeyPatch) -> None:
    """That would take time, and a process that has not imported it has none of its errors."""
    monkeypatch.delitem(sys.modules, "redis")
    assert first_line(OSError("one\ntwo")) == "one"
    assert "redis" not in sys.modules


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (StoreUnavailable("PostgreSQL: refused"), "PostgreSQL: refused"),
        (OSError(28, "No space left on device", "out.csv"), "[Errno 28] No space left on device: 'out.csv'"),
        (ResponseError("LOADING Redis is loading the dataset in memory"), "Redis: LOADING Redis is loading"),
        (ModuleNotFoundError("No module named 'pyarrow'", name="pyarrow"), "this command needs the extra [parquet]"),
    ],
)
def test_an_error_that_a_command_expects_is_one_line(error: Exception, message: str) -> None:
    shown = error_message(error)
    assert shown is not None
    assert shown.startswith(message)
    assert "\n" not in shown


@pytest.mark.parametrize(
    "error", [KeyError("x"), ValueError("x"), ModuleNotFoundError("No module named 'x'", name="x")]
)
def test_a_defect_has_no_message_so_that_its_traceback_is_shown(error: Exception) -> None:
    assert error_message(error) is None
