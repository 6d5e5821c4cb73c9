"""Failover of PostgreSQL to another host: the primary is killed, and its standby is read-only until promoted."""

from __future__ import annotations

import os
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from urllib.parse import quote

import pytest
from pydantic import SecretStr
from redis import Redis
from sqlalchemy import text

from consumers.db import waits
from consumers.db.engine import create_store_engine, engine, reader
from consumers.db.schema import apply_schema
from consumers.db.waits import DatabaseWaits
from consumers.embedded import Addresses, postgres, servers
from consumers.embedded.child_processes import worker_process
from consumers.embedded.installation import installed
from consumers.embedded.server_process import run
from consumers.errors import StoreUnavailable
from consumers.operations import get_portfolio_history
from producers.history_producer import HistoryProducer
from tests.factories import a_snapshot
from tests.rq_programs import until

_PORT = 5433  # of the standby; the base backup has the primary's lock file for 5432


class _Standby:
    """Streaming standby of the primary in the folder `home`."""

    def __init__(self, home: Path) -> None:
        self._primary, self.folder = home / "postgres", home / "standby"
        self._installation = installed()

    def _run(self, program: str, *arguments: object) -> None:
        result = run(self._installation.postgres_bin / program, *arguments, account=self._installation.account)
        log = self.folder / "log"
        assert result.returncode == 0, result.stdout + (log.read_text() if log.exists() else "")

    def _control(self, *arguments: object) -> None:
        self._run("pg_ctl", *arguments, "-w", "-D", self.folder, "-l", self.folder / "log")

    @contextmanager
    def running(self) -> Iterator[None]:
        self.folder.mkdir(mode=0o700)
        if account := self._installation.account:
            os.chown(self.folder, account.pw_uid, account.pw_gid)
        self._run("pg_basebackup", "-h", self._primary, "-U", "postgres", "-D", self.folder, "-R", "-c", "fast")
        self._control("start", "-o", f"-h '' -p {_PORT} -k {self.folder}")
        try:
            yield
        finally:
            self._control("stop", "-m", "immediate")

    def promote(self) -> None:
        self._control("promote")


@pytest.fixture
def primary() -> Iterator[tuple[Path, Addresses]]:
    """A separate PostgreSQL and Redis, with the tables."""
    with tempfile.TemporaryDirectory(prefix="th-", dir="/tmp") as folder, servers(Path(folder)) as addresses:
        store = create_store_engine(SecretStr(addresses.database_url))
        apply_schema(store)
        store.dispose()
        yield Path(folder), addresses


def _wait_for_standbys(addresses: Addresses) -> None:
    """Turn on synchronous replication: from now on a commit returns once the standby has it."""
    store = create_store_engine(SecretStr(addresses.database_url))
    with store.connect().execution_options(isolation_level="AUTOCOMMIT") as db:
        db.exec_driver_sql("ALTER SYSTEM SET synchronous_standby_names = '*'")
        db.exec_driver_sql("SELECT pg_reload_conf()")
        until(lambda: db.execute(text("SELECT sync_state FROM pg_stat_replication")).scalar() == "sync")
    store.dispose()


def test_a_worker_continues_on_the_promoted_standby(
    primary: tuple[Path, Addresses], redis: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the only reachable host is read-only, the worker waits; after the promotion all committed rows exist."""
    home, addresses = primary
    standby, log = _Standby(home), tmp_path / "log"
    hosts = f"{quote(str(home / 'postgres'), safe='')},{quote(str(standby.folder), safe='')}:{_PORT}"
    monkeypatch.setenv("DATABASE_URL", f"postgresql://postgres@{hosts}/{postgres.DATABASE}")
    engine.cache_clear()
    with ExitStack() as stack:
        stack.enter_context(standby.running())
        _wait_for_standbys(addresses)
        producer = stack.enter_context(HistoryProducer(redis, outbox=tmp_path / "outbox.db"))
        stack.enter_context(worker_process(log))
        before = producer.record_many([a_snapshot(after=timedelta(seconds=number)) for number in range(300)])
        rows = [receipt.wait(30) for receipt in before]
        server = postgres.server(home).process()
        assert server is not None
        server.send_signal(signal.SIGKILL)
        after = producer.record_many([a_snapshot(after=timedelta(days=1, seconds=number)) for number in range(300)])
        until(lambda: "session is read-only" in log.read_text())
        standby.promote()
        rows += [receipt.wait(60) for receipt in after]
        assert sorted(row["id"] for row in get_portfolio_history()) == sorted(rows)
        assert len(set(rows)) == 600
        reader().dispose()
        engine().dispose()
    engine.cache_clear()


def test_a_connection_skips_a_frozen_host_after_its_time_limit(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each host has its own time limit, in a worker too."""
    monkeypatch.setattr(waits, "CONNECT_TIMEOUT_SECONDS", 0.2)
    folder, name = str(engine().url.query["host"]), engine().url.database
    with socket.create_server(("127.0.0.1", 0)) as frozen, DatabaseWaits(60, threading.Event()).limited():
        hosts = f"127.0.0.1:{frozen.getsockname()[1]},{quote(folder, safe='')}:5432"
        url = SecretStr(f"postgresql://postgres@{hosts}/{name}?sslmode=disable&gssencmode=disable")
        for read_only in (False, True):
            store = create_store_engine(url, read_only=read_only)
            with store.connect() as db:
                assert db.execute(text("SELECT 1")).scalar() == 1
            store.dispose()


def test_a_failed_connection_names_the_reason_of_each_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message is one line and does not contain the password."""
    monkeypatch.setenv("DATABASE_URL", "postgresql://me:s3cret@127.0.0.1:1,127.0.0.1:2/history")
    engine.cache_clear()
    with pytest.raises(
        StoreUnavailable, match=r"no usable host in DATABASE_URL: 127\.0\.0\.1: .*; 127\.0\.0\.1: "
    ) as caught:
        get_portfolio_history()
    assert "s3cret" not in str(caught.value)
    assert "\n" not in str(caught.value)
    reader().dispose()
    engine.cache_clear()
