"""Databases and clients with another encoding than UTF8: a clear message and no lost event."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from pydantic import SecretStr
from redis import Redis
from sqlalchemy import create_engine, make_url, text
from typer.testing import CliRunner

from consumers.cli import app
from consumers.db import engine as db_engine
from consumers.db.engine import create_store_engine, engine, get_db
from consumers.db.schema import apply_schema, schema_sql
from consumers.embedded import Addresses
from consumers.errors import StoreUnavailable
from consumers.legacy.adoption import adopt_legacy
from consumers.operations import get_recent_signal_archives
from consumers.ops.doctor import diagnose
from consumers.worker.history_worker import HistoryWorker
from producers.history_producer import HistoryProducer
from tests.deliveries import history_queue
from tests.factories import a_signal, an_archive
from tests.legacy_databases import FIRST_GENERATION
from tests.rq_programs import until

ENCODINGS = ("SQL_ASCII", "LATIN1")
_TITLES = ["Zürich", "5 € 🌉"]


def _archive() -> Any:
    return an_archive(signals=[a_signal(market_id=str(n), title=title) for n, title in enumerate(_TITLES)])


@contextmanager
def _administrator(url: str) -> Iterator[Any]:
    plain = make_url(url).set(drivername="postgresql+psycopg2")
    server = create_engine(plain, isolation_level="AUTOCOMMIT")
    with server.connect() as db:
        yield db
    server.dispose()


@pytest.fixture(params=ENCODINGS)
def other_encoding_url(
    request: pytest.FixtureRequest, pair: Addresses, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """Database with that encoding and without tables; the settings name it."""
    name = f"test_{request.param.lower()}"
    with _administrator(pair.database_url) as db:
        db.exec_driver_sql(
            f"CREATE DATABASE {name} TEMPLATE template0 ENCODING '{request.param}' LC_COLLATE 'C' LC_CTYPE 'C'"
        )
        url = make_url(pair.database_url).set(database=name).render_as_string(hide_password=False)
        monkeypatch.setenv("DATABASE_URL", url)
        db_engine.engine.cache_clear()
        yield url
        db_engine.engine().dispose()
        db_engine.engine.cache_clear()
        for database in (name, f"{name}_utf8"):
            db.exec_driver_sql(f"DROP DATABASE IF EXISTS {database} WITH (FORCE)")


def _tables() -> list[str]:
    with engine().connect() as db:
        return list(
            db.execute(text("SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY 1")).scalars()
        )


def test_init_db_refuses_another_encoding_and_prints_how_to_create_the_database(other_encoding_url: str) -> None:
    """It changes nothing, and the statement that it prints works."""
    run = CliRunner().invoke(app, ["init-db"])
    assert (run.exit_code, isinstance(run.exception, StoreUnavailable)) == (1, True)
    message = str(run.exception)
    assert message.endswith("Nothing was changed.")
    assert "\n" not in message
    assert _tables() == []

    create = re.search(r"CREATE DATABASE (\w+) [^)]*", message)
    assert create is not None
    with _administrator(other_encoding_url) as db:
        db.exec_driver_sql(create[0])
    url = make_url(other_encoding_url).set(database=create[1]).render_as_string(hide_password=False)
    store = create_store_engine(SecretStr(url))
    assert apply_schema(store) == []
    store.dispose()


def test_adoption_refuses_another_encoding(other_encoding_url: str) -> None:
    """The old tables keep their names."""
    with engine().begin() as db:
        db.execute(text(FIRST_GENERATION))
    with pytest.raises(StoreUnavailable, match="CREATE DATABASE"):
        adopt_legacy(engine())
    assert _tables() == ["portfolio_history", "signal_archives"]


def test_doctor_fails_on_another_encoding(other_encoding_url: str, redis: Redis) -> None:
    """It gives the same advice."""
    (check,) = [one for one in diagnose(list) if one.name == "PostgreSQL encoding"]
    name = make_url(other_encoding_url).database
    assert (check.state, check.found in ENCODINGS) == ("fail", True)
    assert f"CREATE DATABASE {name}_utf8 TEMPLATE template0 ENCODING 'UTF8'" in check.advice


def test_worker_waits_for_a_database_in_utf8_and_logs_why(
    other_encoding_url: str, redis: Redis, producer: HistoryProducer, caplog: pytest.LogCaptureFixture
) -> None:
    """psql can create the tables in any encoding. The worker rejects no event."""
    with _administrator(other_encoding_url) as db:
        db.exec_driver_sql(schema_sql().replace("%", "%%"))
    receipt = producer.record(_archive())
    producer.flush(10)
    worker = HistoryWorker([history_queue(redis)], connection=redis)
    worker._install_signal_handlers = lambda: None  # type: ignore[method-assign]  # only the main thread may
    thread = threading.Thread(target=worker.work, kwargs={"logging_level": "WARNING"})
    thread.start()
    try:
        until(lambda: "waits for the database" in caplog.text)
        assert "CREATE DATABASE" in caplog.text
        assert thread.is_alive()
    finally:
        worker._stopping.set()
        thread.join(30)
    with get_db() as db:
        assert db.execute(text("SELECT count(*) FROM event_outcomes")).scalar_one() == 0
    assert (history_queue(redis).count, receipt.event_id is not None) == (1, True)


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII", "no encoding"])
def test_client_encoding_is_always_utf8(
    redis: Redis,
    producer: HistoryProducer,
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
    encoding: str,
) -> None:
    """PGCLIENTENCODING, the setting of the database and the URL have no effect."""
    with _administrator(database_url) as db:
        name = make_url(database_url).database
        db.exec_driver_sql(f"ALTER DATABASE {name} SET client_encoding = 'LATIN1'")
    monkeypatch.setenv("PGCLIENTENCODING", encoding)
    monkeypatch.setenv("DATABASE_URL", f"{database_url}&client_encoding=LATIN1")
    db_engine.engine.cache_clear()
    receipt = producer.record(_archive())
    producer.flush(10)
    HistoryWorker([history_queue(redis)], connection=redis).work(burst=True, logging_level="WARNING")

    assert receipt.wait(20) == 1
    assert [signal["title"] for signal in get_recent_signal_archives()[0]["signals_data"]] == _TITLES
    for store in (db_engine.engine(), db_engine.reader()):
        with store.connect() as db:
            assert db.exec_driver_sql("SHOW client_encoding").scalar_one() == "UTF8"
