"""A managed Redis whose provider has disabled CLIENT, CONFIG and INFO: everything works, or says what is not known."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis

from consumers.embedded import Addresses
from consumers.embedded.installation import installed
from consumers.operations import get_portfolio_history
from consumers.ops.masking import Mask
from consumers.ops.redis_health import redis_checks
from consumers.ops.status import pipeline_status
from producers.history_producer import HistoryProducer
from producers.settings import TransportSettings
from tests.dashboard_server import dashboard_of
from tests.deliveries import burst
from tests.factories import a_snapshot
from tests.redis_servers import redis_server
from tests.relaying import a_worker
from tests.rq_programs import until

DISABLED = ("CLIENT", "CONFIG", "INFO", "MONITOR", "SHUTDOWN", "KEYS")


@pytest.fixture(scope="module")
def pair(pair: Addresses) -> Iterator[Addresses]:
    """The PostgreSQL of this run, and a Valkey without these commands."""
    settings = "".join(f'rename-command {name} ""\n' for name in DISABLED)
    with (
        tempfile.TemporaryDirectory(prefix="th-", dir="/tmp") as folder,
        redis_server(installed().valkey, Path(folder), settings) as url,
    ):
        yield Addresses(pair.database_url, url)


def test_an_event_is_stored_and_the_state_is_known(
    redis: Redis, database_url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The worker says in one line that RQ's list will not show its address."""
    with HistoryProducer(redis, outbox=tmp_path / "outbox.db") as producer:
        receipt = producer.record(a_snapshot())
        assert producer.flush(10) == 0
        values = pipeline_status()
        assert values["queued"] == 1
        assert "does not have command INFO" in values["capacity"]["not_read"]["Redis memory"]
        burst(redis)
        assert receipt.wait(10) == get_portfolio_history()[0]["id"]
    (line,) = [one.getMessage() for one in caplog.records if "CLIENT" in one.getMessage()]
    assert line.endswith(": RQ's list will not show its address, because Redis forbids CLIENT")


def test_a_worker_process_starts_and_logs_nothing_else(redis: Redis, database_url: str, tmp_path: Path) -> None:
    with a_worker(redis, tmp_path / "log"):
        values = pipeline_status()
        assert (values["redis"], values["workers"], values["problems"]) == ("reachable", 1, [])
    log = (tmp_path / "log").read_text()
    assert ("Traceback" in log, log.count("CLIENT")) == (False, 1), log


def test_doctor_says_what_is_not_known(redis: Redis) -> None:
    """One line for the server's settings; the queue is checked."""
    checks = {one.name: one for one in redis_checks(TransportSettings.from_environment(), Mask(()))}
    server = checks["Redis server"]
    assert (server.state, checks["queue"].state) == ("unknown", "ok")
    assert "Redis does not have command INFO, or it is renamed or disabled there" in server.found
    assert server.advice == (
        "run doctor as a user that may run INFO, such as trading_history_reader, or look in the provider's console"
    )


def test_the_dashboard_works(redis: Redis, database_url: str, tmp_path: Path) -> None:
    with (
        a_worker(redis, tmp_path / "worker"),
        dashboard_of(os.environ["REDIS_URL"], tmp_path / "log") as dashboard,
        dashboard.client() as client,
    ):
        until(lambda: len(client.get("0/data/workers.json").json()["workers"]) == 1)
        assert client.get("0/data/queues.json").status_code == 200
