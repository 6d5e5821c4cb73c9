"""Health without servers: checks and states computed from given values, and probes that hang or fail."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
from fakeredis import FakeRedis
from prometheus_client import generate_latest

from consumers.ops import exposition
from consumers.ops.checks import HealthCheck
from consumers.ops.database_health import database_server_checks
from consumers.ops.exposition import worker_registry
from consumers.ops.health import HealthReader
from consumers.ops.outbox_health import OutboxHealth
from consumers.ops.probes import Probe
from consumers.ops.queue_health import Owner, QueueHealth, read_queue
from consumers.ops.redis_health import redis_server_checks
from producers.errors import OutboxError
from producers.outbox import MAX_BYTES

DATABASE = {
    "version_number": 140000,
    "version": "14.0",
    "encoding": "UTF8",
    "another": "x_utf8",
    "replica": False,
    "read_only": False,
    "read_only_by_default": False,
    "synchronous_commit": "on",
    "fsync": "on",
    "full_page_writes": "on",
}
REDIS = {"redis_version": "6.2.0", "role": "master", "aof_enabled": 1, "maxmemory_policy": "noeviction"}


def _bad(checks: Any) -> list[tuple[str, str]]:
    """Return name and state of each check that is not ok. Only those have advice."""
    listed: list[HealthCheck] = list(checks)
    assert [bool(one.advice) for one in listed] == [one.state != "ok" for one in listed]
    return [(one.name, one.state) for one in listed if one.state != "ok"]


@pytest.mark.parametrize(
    ("values", "bad"),
    [
        ({"owners": {"one:0000000a": Owner(leased=True, jobs=2)}}, []),
        ({}, [("workers", "warn")]),
        ({"queued": 1}, [("workers", "fail")]),
        ({"worker_states": {"stock": "busy"}}, [("workers", "warn")]),
        ({"owners": {"dead:0000000a": Owner(leased=False, jobs=2)}}, [("workers", "warn"), ("reserved jobs", "fail")]),
        (
            {"owners": {"a:0000000a": Owner(leased=False, jobs=2), "b:0000000b": Owner(leased=True, jobs=0)}},
            [("reserved jobs", "warn")],
        ),
    ],
)
def test_worker_checks_depend_on_leases_and_waiting_jobs(values: dict[str, Any], bad: list[tuple[str, str]]) -> None:
    assert _bad(QueueHealth("history", **values).checks()) == bad


@pytest.mark.parametrize(
    ("values", "bad"),
    [
        ({"queued": 1, "oldest_age_seconds": 300.0}, []),
        ({"queued": 1, "oldest_age_seconds": 301.0}, [("queue", "warn")]),
        ({"suspended": True}, [("queue", "fail")]),
        ({"queued": None}, [("queue", "unknown")]),
        ({"worker_states": {"one": "waiting for the database"}}, [("workers", "fail")]),
        ({"crash_counts": [0, 0]}, []),
        ({"crash_counts": [0, 2]}, [("poison candidates", "warn")]),
        ({"failed": 1, "quarantined": 1}, [("failed jobs", "warn"), ("quarantine", "warn")]),
        ({"failed": None, "quarantined": None}, [("failed jobs", "unknown"), ("quarantine", "unknown")]),
        ({"orphans": 3}, []),
    ],
)
def test_queue_checks_with_a_live_worker(values: dict[str, Any], bad: list[tuple[str, str]]) -> None:
    health = QueueHealth("history", owners={"one:0000000a": Owner(leased=True, jobs=0)}, **values)
    assert _bad(health.checks()) == bad


def test_unreadable_owners_give_unknown_checks() -> None:
    bad = _bad(QueueHealth("history", owners=None, crash_counts=None).checks())
    assert bad == [("workers", "unknown"), ("reserved jobs", "unknown"), ("poison candidates", "unknown")]


def test_queue_is_read_although_some_keys_have_the_wrong_type() -> None:
    redis = FakeRedis()
    redis.rpush("rq:queue:history", "job")
    redis.hset("rq:job:job", "enqueued_at", "2026-01-01T00:00:00.000000Z")
    redis.sadd("rq:workers:history", "rq:worker:one", b"\xff")
    redis.hset("rq:worker:one", mapping={"birth": "1", "state": "busy"})
    redis.hset("history:owners:history", mapping={"one:0000000a": "", "dead:0000000b": ""})
    redis.set("history:lease:history:one:0000000a", "1")
    redis.rpush("history:reserved:history:one:0000000a", "a", "b")
    redis.set("history:reserved:history:dead:0000000b", "no list")
    redis.set("history:quarantine:history", "no list")
    health = read_queue(redis, "history")
    assert (health.queued, health.workers, health.reserved, health.quarantined, health.failed) == (1, 2, 2, None, 0)
    assert (health.worker_states, health.oldest_age_seconds is not None) == ({"one": "busy"}, True)
    assert health.owners == {"dead:0000000b": Owner(leased=False, jobs=0), "one:0000000a": Owner(leased=True, jobs=2)}


@pytest.mark.parametrize(
    ("values", "bad"),
    [
        ({}, []),
        ({"oldest_unacknowledged_seconds": 600.0, "is_relayed": True}, []),
        ({"oldest_unacknowledged_seconds": 601.0}, [("outbox", "warn")]),
        ({"oldest_unacknowledged_seconds": 601.0, "is_relayed": False}, [("outbox", "fail")]),
        ({"oldest_unacknowledged_seconds": 86401.0, "is_relayed": True}, [("outbox", "fail")]),
        ({"rejected": 1}, [("outbox rejections", "warn")]),
        ({"used_bytes": round(0.6 * MAX_BYTES)}, [("outbox size", "warn")]),
        ({"used_bytes": round(0.95 * MAX_BYTES)}, [("outbox size", "fail")]),
    ],
)
def test_outbox_checks_depend_on_the_oldest_entry_and_the_size(
    values: dict[str, Any], bad: list[tuple[str, str]]
) -> None:
    empty: dict[str, Any] = dict.fromkeys(("pending", "sent", "rejected", "used_bytes"), 0)
    assert _bad(OutboxHealth(**(empty | {"oldest_unacknowledged_seconds": None} | values)).checks()) == bad


@pytest.mark.parametrize(
    ("values", "problems"),
    [
        ({}, []),
        ({"failed": 3, "crash_counts": [2], "quarantined": 1}, []),
        ({"queued": 1, "oldest_age_seconds": 301.0}, ["queue: 1 jobs in history, the first 5 min old"]),
        ({"queued": None}, ["queue: cannot be read"]),
        ({"suspended": True}, ["queue: 0 jobs, but RQ's workers are suspended"]),
        (
            {"worker_states": {"one": "waiting for the database"}},
            ["workers: HistoryWorkers: 1, stock RQ workers: 0; one is waiting for the database"],
        ),
        ({"workers": 0}, ["workers: none"]),
        ({"workers": None}, ["workers: cannot be read"]),
        ({"workers": 0, "queued": 1, "owners": {}}, ["workers: none, but jobs wait"]),
        (
            {"owners": {"dead:0000000a": Owner(leased=False, jobs=2)}},
            ["reserved jobs: 2 of crashed workers"],
        ),
    ],
)
def test_problems_of_the_queue_are_late_jobs_and_failed_checks(values: dict[str, Any], problems: list[str]) -> None:
    """Rejected events and other warnings are no problem: they hold up no event."""
    well: dict[str, Any] = {"workers": 1, "owners": {"one:0000000a": Owner(leased=True, jobs=0)}}
    assert [*QueueHealth("history", **(well | values)).problems()] == problems


@pytest.mark.parametrize(
    ("values", "problems"),
    [
        ({"rejected": 1, "oldest_unacknowledged_seconds": 600.0}, []),
        ({"oldest_unacknowledged_seconds": 720.0}, ["outbox: 0 pending, 0 sent, the oldest 12 min old"]),
        ({"used_bytes": MAX_BYTES * 60 // 100}, []),
        ({"used_bytes": MAX_BYTES * 95 // 100}, ["outbox size: 972.8 MiB, 95% of its limit"]),
    ],
)
def test_problems_of_the_outbox_are_late_entries_and_a_full_file(values: dict[str, Any], problems: list[str]) -> None:
    empty: dict[str, Any] = dict.fromkeys(("pending", "sent", "rejected", "used_bytes"), 0)
    health = OutboxHealth(**(empty | {"oldest_unacknowledged_seconds": None} | values))
    assert [*health.problems()] == problems


@pytest.mark.parametrize(
    ("values", "bad"),
    [
        ({}, None),
        ({"version_number": 130012}, ("PostgreSQL version", "fail")),
        ({"encoding": "LATIN1"}, ("PostgreSQL encoding", "fail")),
        ({"replica": True}, ("PostgreSQL writes", "fail")),
        ({"read_only_by_default": True}, ("PostgreSQL writes", "fail")),
        ({"fsync": "off"}, ("PostgreSQL disk writes", "fail")),
        ({"synchronous_commit": "local"}, None),
    ],
)
def test_database_server_checks_depend_on_its_settings(values: dict[str, Any], bad: tuple[str, str] | None) -> None:
    server: Any = SimpleNamespace(**(DATABASE | values))
    assert _bad(database_server_checks(server, 0.0)) == ([bad] if bad else [])


@pytest.mark.parametrize(
    ("values", "fsync", "bad"),
    [
        ({}, "everysec", None),
        ({}, None, None),
        ({"redis_version": "6.0.16"}, "everysec", ("Redis version", "fail")),
        ({"redis_version": "6.0.16", "valkey_version": "9.0.0"}, "everysec", None),
        ({"role": "slave"}, "everysec", ("Redis role", "fail")),
        ({"aof_enabled": 0}, "everysec", ("Redis persistence", "fail")),
        ({"aof_enabled": 0}, None, ("Redis persistence", "warn")),
        ({"aof_last_write_status": "err"}, "everysec", ("Redis persistence", "fail")),
        ({"aof_last_bgrewrite_status": "err"}, "everysec", ("Redis persistence", "warn")),
        ({"rdb_last_bgsave_status": "err"}, "everysec", ("Redis persistence", "warn")),
        ({}, "no", ("Redis persistence", "warn")),
        ({"maxmemory_policy": "allkeys-lru"}, "everysec", ("Redis eviction", "fail")),
    ],
)
def test_redis_server_checks_depend_on_version_role_and_persistence(
    values: Mapping[str, Any], fsync: str | None, bad: tuple[str, str] | None
) -> None:
    assert _bad(redis_server_checks({**REDIS, **values}, fsync)) == ([bad] if bad else [])


def test_part_that_hangs_or_fails_does_not_hide_the_others() -> None:
    """The reading ends in time. While a server hangs, it is not asked again."""
    never, asked = threading.Event(), list[int]()

    def hanging() -> None:
        asked.append(1)
        never.wait(60)

    def broken() -> OutboxHealth:
        raise OutboxError("no file")

    reader = HealthReader(hanging, lambda: QueueHealth("history"), broken)
    began = time.monotonic()
    reader.read(0.1)
    health = reader.read(0.1)
    took = time.monotonic() - began
    never.set()
    assert (took < 10, asked) == (True, [1])
    assert isinstance(health.database.error, TimeoutError)
    assert health.queue.value == QueueHealth("history")
    assert isinstance(health.outbox.error, OutboxError)


def test_probe_that_hangs_is_not_started_again() -> None:
    """All callers wait for the same reading. When it has ended, the next call starts a new one."""
    release, started = threading.Event(), list[int]()

    def read() -> int:
        started.append(1)
        release.wait(10)
        return len(started)

    probe = Probe("a server", read)
    with pytest.raises(TimeoutError):
        probe.start().result(0.05)
    assert probe.start() is probe.start()
    assert started == [1]
    release.set()
    assert probe.start().result(10) == 1
    assert probe.start().result(10) == 2


def test_failed_part_of_a_scrape_is_logged_once_and_once_when_it_has_ended(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Otherwise a scrape every few seconds would fill the log. A defect is logged with its traceback."""
    failures: list[Exception | None] = [OutboxError("no\nsecret"), OutboxError("no"), None, ZeroDivisionError("defect")]

    def read() -> QueueHealth:
        if failure := failures.pop(0):
            raise failure
        return QueueHealth("history")

    monkeypatch.setattr(exposition, "SCRAPE_SECONDS", 10)  # for a slow machine
    monkeypatch.setenv("DATABASE_URL", "postgresql://u@127.0.0.1:1/x")
    registry = worker_registry(lambda: None, read)
    with caplog.at_level(logging.WARNING):
        while failures:
            generate_latest(registry)
    records = [record for record in caplog.records if "redis" in record.getMessage()]
    assert [record.getMessage() for record in records] == [
        "metrics cannot read redis: OutboxError: no",
        "metrics can read redis again",
        "metrics cannot read redis: ZeroDivisionError: defect",
    ]
    assert [bool(record.exc_info) for record in records] == [False, False, True]
