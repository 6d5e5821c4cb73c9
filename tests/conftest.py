"""Fixtures with real servers: one PostgreSQL and Valkey per run, one database per test, an empty Redis per test."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import pytest
from pydantic import SecretStr
from redis import Redis
from rq import Queue, SimpleWorker
from rq.serializers import JSONSerializer
from sqlalchemy import Engine, create_engine, make_url

from consumers.db import engine as db_engine
from consumers.db.schema import apply_schema
from consumers.embedded import Addresses, servers
from producers import history_producer
from producers.history_producer import HistoryProducer

# nohup or a shell in the background may have set these signals to "ignore", which child processes would inherit.
for _number, _handler in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)

_TEMPLATE = "history_template"
_OUR_VARIABLES = ("DATABASE_URL", "REDIS_URL", "POSTGRES_", "HISTORY_")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Remove all settings, and run the test in its temporary folder, which has no .env."""
    for name in list(os.environ):
        if name.startswith(_OUR_VARIABLES):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    # When a producer is closed, it waits for acknowledgements. Most tests have no worker.
    monkeypatch.setattr(history_producer, "EXIT_SECONDS", 0.1)


@pytest.fixture(scope="session")
def pair() -> Iterator[Addresses]:
    """PostgreSQL and Valkey for this run, with a template database that has the tables."""
    with tempfile.TemporaryDirectory(prefix="th-", dir="/tmp") as folder, servers(Path(folder)) as addresses:
        make_template(addresses)
        yield addresses


def make_template(addresses: Addresses) -> None:
    """Create the template database with the tables, from which the databases of the tests are cloned."""
    administrator = _administrator(addresses)
    with administrator.connect() as db:
        db.exec_driver_sql(f"CREATE DATABASE {_TEMPLATE}")
    template = db_engine.create_store_engine(_url_of(addresses, _TEMPLATE))
    apply_schema(template)
    template.dispose()
    administrator.dispose()


def _administrator(addresses: Addresses) -> Engine:
    return create_engine(
        make_url(addresses.database_url).set(drivername="postgresql+psycopg2"), isolation_level="AUTOCOMMIT"
    )


def _url_of(addresses: Addresses, database: str) -> SecretStr:
    return SecretStr(make_url(addresses.database_url).set(database=database).render_as_string(hide_password=False))


@pytest.fixture
def empty_database_url(pair: Addresses, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """URL of a database without tables, to which the settings point."""
    yield from _database(pair, monkeypatch, "template1")


@pytest.fixture
def database_url(pair: Addresses, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """URL of a database with empty tables, to which the settings point."""
    yield from _database(pair, monkeypatch, _TEMPLATE)


def _database(pair: Addresses, monkeypatch: pytest.MonkeyPatch, template: str) -> Iterator[str]:
    with a_database(pair, template) as url:
        monkeypatch.setenv("DATABASE_URL", url)
        db_engine.engine.cache_clear()
        db_engine.limit_statements(0)
        yield url
        if db_engine.engine.cache_info().currsize:
            db_engine.reader().dispose()
            db_engine.engine().dispose()
            db_engine.engine.cache_clear()


@contextmanager
def a_database(pair: Addresses, template: str = _TEMPLATE) -> Iterator[str]:
    """Create a database from the template, yield its URL, and drop it at the end of the block."""
    name = f"test_{uuid4().hex}"
    administrator = _administrator(pair)
    with administrator.connect() as db:
        db.exec_driver_sql(f"CREATE DATABASE {name} TEMPLATE {template}")
    try:
        yield _url_of(pair, name).get_secret_value()
    finally:
        with administrator.connect() as db:
            db.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")
        administrator.dispose()


@pytest.fixture
def redis(pair: Addresses, monkeypatch: pytest.MonkeyPatch) -> Iterator[Redis]:
    """Client of an empty Valkey, to which the settings point."""
    monkeypatch.setenv("REDIS_URL", pair.redis_url)
    client = Redis.from_url(pair.redis_url)
    client.flushall()
    yield client
    client.close()


@pytest.fixture
def producer(redis: Redis, tmp_path: Path) -> Iterator[HistoryProducer]:
    with HistoryProducer(redis, outbox=tmp_path / "outbox.db") as producer:
        yield producer


@pytest.fixture
def work(redis: Redis, database_url: str) -> Callable[[], None]:
    """Function that runs RQ's SimpleWorker in this process until the queue is empty."""

    def burst() -> None:
        queue = Queue("history", connection=redis, serializer=JSONSerializer)
        SimpleWorker([queue], connection=redis, serializer=JSONSerializer).work(burst=True, logging_level="WARNING")

    return burst
