"""Metrics of a worker and of the API on real servers: exact, and within 2 s in every outage."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import quote

import pytest
import yaml
from fastapi.testclient import TestClient
from prometheus_client import generate_latest
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from rq.suspension import suspend
from sqlalchemy import make_url

from consumers.operations import get_portfolio_history, insert_portfolio_history_snapshot
from consumers.ops import exposition
from consumers.ops.exposition import worker_registry
from consumers.ops.failed import discard
from consumers.ops.metrics import COUNTS
from consumers.ops.queue_health import read_queue
from consumers.ops.rejections import rejections
from consumers.web import api
from consumers.worker.completion import Completion
from consumers.worker.deliveries import POISON_CRASHES
from consumers.worker.reservations import Reservations
from producers.events import ARCHIVE_TYPE, SNAPSHOT_TYPE, encode, event_of
from producers.history_producer import HistoryProducer
from producers.outbox import Outbox
from producers.redis_keys import quarantine_key
from tests.deliveries import burst, enqueue_snapshots, history_queue
from tests.documents import ROOT, table
from tests.factories import a_snapshot, an_archive
from tests.faults.proxy import Proxy
from tests.rq_programs import rq_worker, until
from tests.scrapes import PREFIX, Scrape, parsed, scraped, scraped_worker

pytestmark = pytest.mark.usefixtures("database_url")

_AMOUNTS = ("balance", "total_invested", "total_profit_loss", "total_value", "open_positions", "trade_count")


@pytest.fixture(autouse=True)
def counting_from_zero() -> None:
    COUNTS.forget()


def _scrape(redis: Redis) -> Scrape:
    """Scrape a worker of this process that does not wait for a server."""
    registry = worker_registry(lambda: None, lambda: read_queue(redis, "history"))
    return parsed(generate_latest(registry).decode())


def _of(scrape: Scrape, metric: str) -> Scrape:
    """Return the samples of one metric by their labels."""
    return {labels[1:]: value for labels, value in scrape.items() if labels[0] == metric}


def _outcomes(scrape: Scrape) -> Scrape:
    """Return (outcome, type) → count, without zeros."""
    return {labels: count for labels, count in _of(scrape, "events_total").items() if count}


def test_each_outcome_is_counted_once_under_its_name(redis: Redis) -> None:
    """Stored, duplicate, conflict, invalid, poison and unsupported, in one batch or alone."""
    queue = history_queue(redis)
    poisonous, *_ = enqueue_snapshots(redis, 4)
    redis.hset("history:crashes:history", poisonous, POISON_CRASHES)
    archive, second = event_of(an_archive(), source="other/3", sequence=1), timedelta(seconds=2)
    same = event_of(a_snapshot(after=second), source="other/2", sequence=1)
    other = event_of(a_snapshot(after=second, balance=1), source="other/2", sequence=2)
    for event in (same, other):
        queue.enqueue("consumers.handlers.record_portfolio_snapshot", encode(event))
    queue.enqueue("consumers.handlers.record_portfolio_snapshot", "{}")
    queue.enqueue("consumers.handlers.record_signal_archive", encode(archive))
    queue.enqueue("os.system", "touch pwned")
    burst(redis)

    scrape = _scrape(redis)
    assert _outcomes(scrape) == {
        ("stored", SNAPSHOT_TYPE): 3,
        ("stored", ARCHIVE_TYPE): 1,
        ("duplicate", SNAPSHOT_TYPE): 1,
        ("conflict", SNAPSHOT_TYPE): 1,
        ("invalid", SNAPSHOT_TYPE): 1,
        ("poison", SNAPSHOT_TYPE): 1,
        ("unsupported", "unknown"): 1,
    }
    assert scrape["batch_events_sum",] == 9
    assert scrape["lag_seconds_count",] == 4
    assert scrape["batch_events_count",] == scrape["insert_seconds_count",] >= 2
    assert scrape["failed_jobs",] == 4
    assert Path("pwned").exists() is False


def test_a_discarded_delivery_is_not_counted_as_a_rejection(redis: Redis) -> None:
    """An alert on rejections must not fire again for an event that an operator has dealt with."""
    queue = history_queue(redis)
    jobs = {"invalid": "consumers.handlers.record_portfolio_snapshot", "unsupported": "os.system"}
    for name, function in jobs.items():
        queue.enqueue(function, "{}", job_id=name)
    burst(redis)
    assert discard(rejections(), redis, "history", "a test") == 2
    for name, function in jobs.items():
        queue.enqueue(function, "{}", job_id=name)
    burst(redis)
    assert _outcomes(_scrape(redis)) == {
        ("invalid", SNAPSHOT_TYPE): 1,
        ("unsupported", "unknown"): 1,
        ("discarded", SNAPSHOT_TYPE): 1,
        ("discarded", "unknown"): 1,
    }


def test_redelivery_after_the_commit_counts_as_duplicate(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker loses Redis between commit and acknowledgement. The batch is redelivered, and is stored once."""
    complete, cut = Completion.complete, list[int]()

    def complete_the_second_time(*arguments: object) -> None:
        if not cut:
            cut.append(1)
            raise RedisConnectionError("cut")
        complete(*arguments)  # type: ignore[arg-type]  # passed on unchanged

    monkeypatch.setattr(Completion, "complete", complete_the_second_time)
    enqueue_snapshots(redis, 7)
    burst(redis)
    assert _outcomes(_scrape(redis)) == {("stored", SNAPSHOT_TYPE): 7, ("duplicate", SNAPSHOT_TYPE): 7}
    assert len(get_portfolio_history()) == 7


def test_lag_is_measured_for_live_events_only(redis: Redis) -> None:
    """It begins at the event's own time; a time in the future gives 0. Imports are not counted."""
    now = datetime.now(UTC)
    for number, (source, age) in enumerate([("bot/1", 90), ("bot/1", -3600), ("import/x.json/0", 86400 * 365)]):
        moment = now - timedelta(seconds=age)
        event = event_of(a_snapshot(timestamp=moment), source=source, sequence=number)
        history_queue(redis).enqueue("consumers.handlers.record_portfolio_snapshot", encode(event))
    burst(redis)
    scrape = _scrape(redis)
    assert scrape["lag_seconds_count",] == 2
    assert 90 <= scrape["lag_seconds_sum",] < 120
    assert (scrape["lag_seconds_bucket", "60.0"], scrape["lag_seconds_bucket", "300.0"]) == (1, 2)


def test_requeued_jobs_of_dead_workers_are_counted(redis: Redis) -> None:
    enqueue_snapshots(redis, 3)
    Reservations(redis, history_queue(redis), "dead").reserve(2)
    redis.delete(*redis.keys("history:lease:*"))
    burst(redis)
    scrape = _scrape(redis)
    assert (scrape["recovered_jobs_total",], _outcomes(scrape)) == (2, {("stored", SNAPSHOT_TYPE): 3})


def test_scrape_has_queue_outbox_and_ages_of_snapshots(
    redis: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, producer: HistoryProducer
) -> None:
    """The number of portfolios is limited."""
    monkeypatch.setattr(exposition, "MOST_PORTFOLIOS", 2)
    monkeypatch.setenv("HISTORY_OUTBOX", str(tmp_path / "outbox.db"))
    now = datetime.now(UTC)
    for portfolio_id, minutes in ((1, 30), (1, 5), (2, 60), (3, 1), (None, 120)):
        row = {"timestamp": now - timedelta(minutes=minutes), "portfolio_id": portfolio_id}
        insert_portfolio_history_snapshot({**row, **dict.fromkeys(_AMOUNTS, 1)})
    producer.record(a_snapshot())
    producer.flush(10)

    scrape = _scrape(redis)
    ages = {portfolio: round(age / 60) for (portfolio,), age in _of(scrape, "newest_snapshot_age_seconds").items()}
    assert ages == {"1": 5, "2": 60, "none": 120}
    assert [scrape[f"{part}_up",] for part in ("database", "redis", "outbox")] == [1, 1, 1]
    assert (scrape["queue_jobs",], scrape["reserved_jobs",], scrape["workers",]) == (1, 0, 0)
    assert 0 <= scrape["queue_oldest_age_seconds",] < 20
    assert [scrape["outbox_entries", state] for state in ("pending", "sent", "rejected")] == [0, 1, 0]
    assert 0 <= scrape["outbox_oldest_age_seconds",] < 20
    assert 0 < scrape["outbox_used_bytes",] < scrape["outbox_max_bytes",] == 2**30
    assert [scrape["waiting", what] for what in ("the database", "Redis")] == [0, 0]


def test_idle_pipeline_exports_ages_of_0_and_no_metrics_of_a_missing_outbox(redis: Redis) -> None:
    """A gap in a graph must mean that the value could not be read, as the age of a job without a time."""
    scrape = _scrape(redis)
    assert (scrape["queue_jobs",], scrape["queue_oldest_age_seconds",]) == (0, 0)
    assert not any(name.startswith("outbox") for name, *_ in scrape)
    redis.rpush("rq:queue:history", "a job that was deleted")
    scrape = _scrape(redis)
    assert (scrape["queue_jobs",], scrape.get(("queue_oldest_age_seconds",))) == (1, None)


def test_scrape_has_suspension_and_quarantined_entries(redis: Redis) -> None:
    scrape = _scrape(redis)
    assert (scrape["suspended",], scrape["quarantined_entries",]) == (0, 0)
    suspend(redis)
    redis.rpush(quarantine_key("history"), "no job id", "another one")
    scrape = _scrape(redis)
    assert (scrape["suspended",], scrape["quarantined_entries",]) == (1, 2)


def test_unreadable_outbox_sets_outbox_up_to_0(redis: Redis) -> None:
    Path("data").mkdir()
    Path("data/outbox.db").write_bytes(b"no database at all" * 100)
    scrape = _scrape(redis)
    assert (scrape["outbox_up",], scrape["database_up",]) == (0, 1)
    assert ("outbox_oldest_age_seconds",) not in scrape


def test_damaged_files_of_an_outbox_are_counted_until_they_are_deleted(redis: Redis) -> None:
    """Salvaged ones too: they may have lost events."""
    Path("data").mkdir()
    Outbox("data/outbox.db").close()
    assert _scrape(redis)["outbox_damaged_files",] == 0
    for name in ("outbox.db.damaged-1", "outbox.db.salvaged-2", "outbox.db.salvaged-2-wal"):
        Path("data", name).touch()
    scrape = _scrape(redis)
    assert (scrape["outbox_damaged_files",], scrape["outbox_up",]) == (2, 1)


def test_documented_metrics_are_those_that_are_exported(redis: Redis) -> None:
    """The table of consumers/ops/README.md, with labels. The alert rules use only these metrics."""
    insert_portfolio_history_snapshot({"timestamp": datetime.now(UTC), "portfolio_id": 1, **dict.fromkeys(_AMOUNTS, 1)})
    Path("data").mkdir()
    Outbox("data/outbox.db").close()
    collected = {one.name: one for one in worker_registry(lambda: None, lambda: read_queue(redis, "history")).collect()}
    families = {
        name: {label for sample in family.samples for label in sample.labels} - {"le"}
        for name, family in collected.items()
        if name.startswith(PREFIX)
    }
    (meaning,) = (cells[2] for cells in table("consumers/ops/README.md", "metrics") if "events_total" in cells[0])
    outcomes = {sample.labels["outcome"] for sample in collected[f"{PREFIX}events"].samples}
    assert set(re.findall(r"`(\w+)`", meaning)) == outcomes
    cells = " ".join(cell for cell, *_ in table("consumers/ops/README.md", "metrics"))
    documented = re.findall(r"`(\w+?)(?:_total)?(?:\{([\w,]+)\})?`", cells)
    assert {f"{PREFIX}{name}": set(labels.split(",")) - {""} for name, labels in documented} == families

    (group,) = yaml.safe_load((ROOT / "consumers/deploy/alerts.yaml").read_text("utf-8"))["groups"]
    used = set(re.findall(rf"{PREFIX}\w+", " ".join(rule["expr"] for rule in group["rules"])))
    assert {re.sub("_(total|bucket)$", "", name) for name in used} <= set(families)


@pytest.fixture
def proxies(redis: Redis, database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Proxy, Proxy]]:
    """Put one proxy before PostgreSQL and one before Redis, and point the settings to them."""
    folder = Path("/tmp", f"th-{os.getpid()}-{time.monotonic_ns()}")
    folder.mkdir()
    url = make_url(database_url)
    database = Proxy(folder / ".s.PGSQL.5432", Path(str(url.query["host"])) / ".s.PGSQL.5432")
    queue = Proxy(folder / "redis.sock", Path(redis.connection_pool.connection_kwargs["path"]))
    with database.running(), queue.running():
        where = quote(str(folder), safe="")
        monkeypatch.setenv("DATABASE_URL", f"postgresql://{url.username}@/{url.database}?host={where}")
        monkeypatch.setenv("REDIS_URL", f"unix://{folder}/redis.sock")
        yield database, queue
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


def _timed(scrape: Callable[[], Scrape]) -> Scrape:
    began = time.monotonic()
    found = scrape()
    assert time.monotonic() - began < 2
    return found


def test_scrape_of_a_worker_is_answered_within_2_s_in_every_outage(
    proxies: tuple[Proxy, Proxy], redis: Redis, tmp_path: Path
) -> None:
    """Servers are away, frozen and back again. The scrape says which one is away; the counters are always there."""
    database, _ = proxies
    enqueue_snapshots(redis, 1)
    with scraped_worker(tmp_path / "log") as (_, url):
        until(lambda: _outcomes(scraped(url)) == {("stored", SNAPSHOT_TYPE): 1})
        assert [scraped(url)[f"{part}_up",] for part in ("database", "redis")] == [1, 1]

        database.set_mode("refuse")
        database.cut()
        assert _timed(lambda: scraped(url))["database_up",] == 0
        enqueue_snapshots(redis, 2)
        until(lambda: scraped(url)["waiting", "the database"] == 1)
        database.set_mode("pass")
        until(lambda: (_scraped := scraped(url))["database_up",] == 1 and _scraped["waiting", "the database"] == 0)

        for proxy in proxies:
            proxy.set_mode("swallow")
        frozen = _timed(lambda: scraped(url))
        assert [frozen[f"{part}_up",] for part in ("database", "redis")] == [0, 0]
        assert ("queue_jobs",) not in frozen
        assert not any(name == "newest_snapshot_age_seconds" for name, *_ in frozen)
        assert _outcomes(frozen)["stored", SNAPSHOT_TYPE] == 2
        _timed(lambda: scraped(url))
        for proxy in proxies:
            proxy.set_mode("pass")
        until(lambda: [scraped(url)[f"{part}_up",] for part in ("database", "redis")] == [1, 1])


def test_scrape_of_the_api_is_answered_within_2_s_in_every_outage(proxies: tuple[Proxy, Proxy]) -> None:
    """Repeatedly, while both servers are frozen."""
    with TestClient(api.app) as client:

        def scrape() -> Scrape:
            answer = client.get("/metrics")
            assert answer.status_code == 200
            return parsed(answer.text)

        assert [scrape()[f"{part}_up",] for part in ("database", "redis")] == [1, 1]
        for proxy in proxies:
            proxy.set_mode("swallow")
        for _ in range(2):
            assert [_timed(scrape)[f"{part}_up",] for part in ("database", "redis")] == [0, 0]
        for proxy in proxies:
            proxy.set_mode("pass")
        until(lambda: [scrape()[f"{part}_up",] for part in ("database", "redis")] == [1, 1])


def test_metrics_of_the_api_need_its_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have no counters of events, and without REDIS_URL nothing about Redis. The client chooses the format."""
    monkeypatch.setenv("HISTORY_API_TOKEN", "right")
    with TestClient(api.app) as client:
        assert client.get("/metrics").status_code == 401
        answer = client.get("/metrics", headers={"Authorization": "Bearer right"})
        accept = {"Authorization": "Bearer right", "Accept": "application/openmetrics-text; version=1.0.0"}
        other = client.get("/metrics", headers=accept)
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert parsed(answer.text) == {("database_up",): 1}
    assert (other.headers["content-type"].split(";")[0], other.text.endswith("# EOF\n")) == (
        "application/openmetrics-text",
        True,
    )


def test_worker_whose_metrics_port_is_taken_ends_with_an_error(redis: Redis) -> None:
    """Nobody would scrape another port."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "consumers.cli", "worker", f"--metrics-port={port}"]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (ended.returncode, ended.stderr.splitlines()[-1]) == (
        1,
        f"error: cannot serve metrics at 127.0.0.1 port {port}: Address already in use;"
        " choose another address with HISTORY_METRICS_HOST and HISTORY_METRICS_PORT, or --metrics-port",
    )


def test_next_worker_gets_the_port_of_a_killed_worker_and_counts_from_0(redis: Redis, tmp_path: Path) -> None:
    enqueue_snapshots(redis, 2)
    with scraped_worker(tmp_path / "log") as (worker, url):
        until(lambda: _outcomes(scraped(url)) == {("stored", SNAPSHOT_TYPE): 2})
        worker.send_signal(signal.SIGKILL)
        worker.wait()
    with scraped_worker(tmp_path / "next", f"--metrics-port={url.split(':')[2].split('/')[0]}") as (next_worker, same):
        assert (same, _outcomes(scraped(same))) == (url, {})
        next_worker.terminate()
        assert next_worker.wait(15) == 0


def test_rqs_own_command_serves_metrics_at_the_port_of_the_setting(
    redis: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("HISTORY_METRICS_PORT", str(port))
    enqueue_snapshots(redis, 1)
    with rq_worker("consumers.worker.HistoryWorker", tmp_path / "log"):
        until(lambda: len(get_portfolio_history()) == 1)
        until(lambda: _outcomes(scraped(f"http://127.0.0.1:{port}/metrics")) == {("stored", SNAPSHOT_TYPE): 1})
