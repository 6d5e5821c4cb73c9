"""The capacity in `status`: rates, sizes and ages, with real servers; what is not known is left out, never wrong."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from rq import Queue
from rq.serializers import JSONSerializer
from sqlalchemy import text

from consumers.cli.status import capacity_lines
from consumers.db.capacity_queries import database_capacity
from consumers.db.engine import get_db
from consumers.ops.redis_memory import read_memory
from consumers.ops.status import pipeline_status
from producers.events import KINDS
from producers.history_producer import HistoryProducer
from producers.outbox import MAX_BYTES, Outbox
from tests.documents import table
from tests.factories import a_snapshot

_ROWS = """
    INSERT INTO portfolio_history (event_id, source, snapshot_date, "timestamp", balance, total_invested,
        total_profit_loss, total_value, open_positions, trade_count, created_at)
    SELECT gen_random_uuid(), 'x', now(), now(), 1, 1, 1, 1, 1, 1, clock_timestamp() - interval '1 second' * ({ago})
    FROM generate_series(1, {count}) AS n
"""
_UNKNOWN: dict[str, Any] = {
    "stored_per_minute": None,
    "stored_rate_seconds": None,
    "queue_oldest_age_seconds": None,
    "outbox_oldest_age_seconds": None,
    "outbox_used_bytes": None,
    "outbox_max_bytes": None,
    "outbox_growth_bytes_per_second": None,
    "outbox_full_in_seconds": None,
    "table_bytes": None,
    "redis_used_bytes": None,
    "redis_max_bytes": None,
    "redis_key_bytes": None,
    "not_read": {},
}


def _insert(count: int, ago: str) -> None:
    with get_db() as db:
        db.execute(text(_ROWS.format(count=count, ago=ago)))


def _measured() -> Any:
    with get_db() as db:
        return database_capacity(db)


@pytest.mark.usefixtures("database_url")
def test_rate_counts_the_rows_of_the_last_5_minutes() -> None:
    """Rows of all history tables are counted. If there are none, the rate is 0, not unknown."""
    assert (_measured().stored_per_second, _measured().rate_seconds) == (0.0, 300.0)
    _insert(2000, "1000 - n / 10")  # all of them are older
    assert _measured().stored_per_second == 0.0
    _insert(1200, "200 - n / 10.0")
    assert _measured().stored_per_second == pytest.approx(1200 / 300)


@pytest.mark.usefixtures("database_url")
def test_rate_ignores_rows_of_a_clock_that_was_ahead() -> None:
    """The server's clock was a day ahead, and was set back: their time is not within the last minutes."""
    _insert(700, "-86400")
    assert _measured().stored_per_second == 0.0
    _insert(30, "20")
    assert _measured().stored_per_second == pytest.approx(30 / 300)


@pytest.mark.usefixtures("database_url")
def test_rate_of_very_many_rows_is_measured_over_a_shorter_time() -> None:
    """At most 50,000 rows are read."""
    _insert(60_000, "120 - n * 0.001")
    measured = _measured()
    assert 109 < measured.rate_seconds < 140  # 110 s, and the duration of the insert
    assert measured.stored_per_second == pytest.approx(50_000 / measured.rate_seconds)


@pytest.mark.usefixtures("database_url")
def test_rate_reads_few_rows_of_a_large_table() -> None:
    """Its cost does not grow with the table: one page beyond the last minutes, by the primary key."""
    _insert(20_000, "20000 - n * 0.9")
    with get_db() as db:
        db.exec_driver_sql("ANALYZE portfolio_history")
    with get_db() as db:
        before = db.exec_driver_sql("SELECT pg_stat_get_xact_tuples_returned('portfolio_history'::regclass)").scalar()
        database_capacity(db)
        reads = "SELECT pg_stat_get_xact_tuples_returned('portfolio_history'::regclass)"
        fetches = (
            "SELECT sum(pg_stat_get_xact_tuples_fetched(indexrelid) + pg_stat_get_xact_tuples_returned(indexrelid))"
            " FROM pg_index WHERE indrelid = 'portfolio_history'::regclass"
        )
        assert (db.exec_driver_sql(reads).scalar(), before) == (0, 0)
        assert 500 <= (db.exec_driver_sql(fetches).scalar() or 0) <= 2000


@pytest.mark.usefixtures("database_url")
def test_size_of_each_table_is_that_of_postgresql() -> None:
    _insert(5000, "1")
    tables = [*(kind.table for kind in KINDS.values()), "event_outcomes", "withdrawals"]
    found = _measured().table_bytes
    assert list(found) == tables
    with get_db() as db:
        for table in tables:
            assert found[table] == db.execute(text(f"SELECT pg_total_relation_size('{table}')")).scalar()


def _enqueued(redis: Redis, count: int, size: int) -> int:
    """Enqueue jobs with an argument of this size, and return the bytes of all their keys."""
    queue = Queue("history", connection=redis, serializer=JSONSerializer)
    jobs = [queue.enqueue("consumers.handlers.record_portfolio_snapshot", "x" * size) for _ in range(count)]
    return sum(redis.memory_usage(job.key, samples=0) or 0 for job in jobs)


def test_redis_keys_are_estimated_from_a_sample(redis: Redis) -> None:
    """The jobs of a queue, its list, reservations and acknowledgements; keys of other programs are not counted."""
    exact = _enqueued(redis, 300, 700)
    redis.set("another:key", "x" * 100_000)
    redis.hset("history:ack:bot/1", "a", "x" * 5000)
    redis.hset("history:owners:history", "one:0000000a", "")
    redis.rpush("history:reserved:history:one:0000000a", redis.lindex("rq:queue:history", 0) or b"")
    redis.lpop("rq:queue:history")
    memory = read_memory(redis, "history")
    assert memory.key_bytes is not None
    assert memory.key_bytes["jobs"] == pytest.approx(exact, rel=0.05)
    for group, key in (
        ("queue", "rq:queue:history"),
        ("reservations", "history:reserved:history:one:0000000a"),
        ("acknowledgements", "history:ack:bot/1"),
    ):
        assert memory.key_bytes[group] == pytest.approx(redis.memory_usage(key) or 0, rel=0.2), group
    assert memory.key_bytes["registries"] == 0
    assert memory.used_bytes is not None
    assert memory.used_bytes > exact
    assert (memory.max_bytes, memory.not_read) == (None, {})


def test_redis_memory_has_the_limit_of_the_server(redis: Redis) -> None:
    redis.config_set("maxmemory", 2**30)
    try:
        assert read_memory(redis, "history").max_bytes == 2**30
    finally:
        redis.config_set("maxmemory", 0)


def test_a_few_round_trips_measure_a_long_queue(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Acknowledgements are not searched in a large database: they are unknown, and the rest is there."""
    redis.rpush("rq:queue:history", *(f"job-{number}" for number in range(30_000)))
    with redis.pipeline() as pipe:
        for number in range(30_000):
            pipe.hset(f"rq:job:job-{number}", "data", "x" * 400)
        pipe.execute()
    redis.config_resetstat()
    began = time.monotonic()
    memory = read_memory(redis, "history")
    took = time.monotonic() - began
    calls = sum(one["calls"] for one in redis.info("commandstats").values())
    assert memory.key_bytes is not None
    assert memory.key_bytes["acknowledgements"] is None
    one_job = redis.memory_usage("rq:job:job-7", samples=0) or 0
    assert memory.key_bytes["jobs"] == pytest.approx(30_000 * one_job, rel=0.02)
    assert (took < 5, calls < 150) == (True, True), (took, calls)


def test_number_of_commands_and_round_trips_is_limited(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """With more jobs of each state, worker threads and sources than are sampled; the limits of the document."""
    job_ids = [f"job-{number}" for number in range(150)]
    with redis.pipeline() as pipe:
        for job_id in job_ids:
            pipe.hset(f"rq:job:{job_id}", "data", "x")
            pipe.hset(f"history:ack:bot/{job_id}", "a", "x")
        pipe.rpush("rq:queue:history", *job_ids)
        pipe.zadd("rq:failed:history", dict.fromkeys(job_ids, 1.0))
        pipe.zadd("rq:finished:history", dict.fromkeys(job_ids, 1.0))
        for owner in range(100):
            pipe.hset("history:owners:history", f"one:{owner:08x}", "")
            pipe.rpush(f"history:reserved:history:one:{owner:08x}", job_ids[owner])
        for number in range(9_000):
            pipe.set(f"other:{number}", "")
        pipe.execute()
    sent: list[object] = []
    connection = redis.connection_pool.connection_class
    send = connection.send_packed_command

    def counted(*given: Any, **named: Any) -> None:
        sent.append(given)
        send(*given, **named)

    monkeypatch.setattr(connection, "send_packed_command", counted)
    redis.config_resetstat()
    sent.clear()
    memory = read_memory(redis, "history")
    round_trips = len(sent)
    calls = sum(one["calls"] for one in redis.info("commandstats").values())
    assert memory.key_bytes is not None
    assert None not in (memory.key_bytes["jobs"], memory.key_bytes["reservations"])
    (cells,) = (row for row in table("consumers/ops/CAPACITY.md", "cost") if row[0] == "Redis")
    found = re.search(r"at most (\d+) round trips and (\d+) commands", cells[1])
    assert found is not None
    most_round_trips, most_calls = map(int, found.groups())
    assert most_round_trips / 2 < round_trips <= most_round_trips
    assert most_calls / 2 < calls <= most_calls


def test_reserved_jobs_are_estimated_although_most_threads_have_none(redis: Redis) -> None:
    job = redis.memory_usage(Queue("history", connection=redis, serializer=JSONSerializer).enqueue("f", job_id="a").key)
    redis.delete("rq:queue:history")
    for owner in range(40):
        redis.hset("history:owners:history", f"one:{owner:08x}", "")
    redis.rpush(f"history:reserved:history:one:{39:08x}", "a", "a")
    memory = read_memory(redis, "history")
    assert memory.key_bytes is not None
    assert memory.key_bytes["jobs"] == 2 * (job or 0)


class _Worked(Redis):
    """Client that empties the queue before its third pipeline: a worker has taken all jobs meanwhile."""

    pipelines = 0

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> Any:
        self.pipelines += 1
        if self.pipelines == 3:
            self.delete("rq:queue:history")
        return super().pipeline(transaction, shard_hint)


def test_jobs_that_are_gone_before_they_are_measured_are_unknown(redis: Redis) -> None:
    _enqueued(redis, 3, 100)
    memory = read_memory(_Worked(connection_pool=redis.connection_pool), "history")
    assert memory.key_bytes is not None
    assert (memory.key_bytes["jobs"], memory.key_bytes["registries"]) == (None, 0)


class _Filled(Redis):
    """Client before whose first SCAN another program adds 30,000 keys."""

    def scan(self, cursor: int = 0, *args: Any, **kwargs: Any) -> Any:
        if cursor == 0:
            self.eval("for number = 1, 30000 do redis.call('set', number, '') end", 0)
        return super().scan(cursor, *args, **kwargs)


def test_acknowledgements_are_unknown_if_many_keys_are_added_meanwhile(redis: Redis) -> None:
    """The search for their keys ends after 20 pages."""
    redis.hset("history:ack:bot/1", "a", "x")
    memory = read_memory(_Filled(connection_pool=redis.connection_pool), "history")
    assert memory.key_bytes is not None
    assert memory.key_bytes["acknowledgements"] is None


def test_key_of_the_wrong_type_is_unknown_and_the_others_are_shown(redis: Redis) -> None:
    redis.set("rq:queue:history", "no list")
    redis.set("history:owners:history", "no hash")
    memory = read_memory(redis, "history")
    assert memory.key_bytes is not None
    assert {name for name, size in memory.key_bytes.items() if size is None} == {"jobs", "reservations"}


def test_capacity_is_in_the_status(redis: Redis, database_url: str, tmp_path: Path) -> None:
    """As numbers with units in their names, and on a terminal with units."""
    _insert(600, "20")
    with HistoryProducer(redis, outbox=tmp_path / "outbox.db") as producer:
        producer.record(a_snapshot())
        assert producer.flush(10) == 0
        environment = {**os.environ, "HISTORY_OUTBOX": str(tmp_path / "outbox.db")}
        program = [sys.executable, "-m", "consumers.cli", "status"]
        runs = [
            subprocess.run([*program, *arguments], capture_output=True, text=True, env=environment, check=False)
            for arguments in (["--json"], [])
        ]
    capacity = json.loads(runs[0].stdout)["capacity"]
    assert list(capacity) == list(_UNKNOWN)
    assert (capacity["stored_per_minute"], capacity["stored_rate_seconds"]) == (120.0, 300.0)
    assert capacity["queue_oldest_age_seconds"] < 60
    assert capacity["outbox_oldest_age_seconds"] < 60
    assert 0 < capacity["outbox_used_bytes"] < capacity["outbox_max_bytes"] == MAX_BYTES
    assert (capacity["outbox_growth_bytes_per_second"], capacity["outbox_full_in_seconds"]) == (None, None)
    assert capacity["table_bytes"]["portfolio_history"] > 100_000
    assert capacity["redis_used_bytes"] > capacity["redis_key_bytes"]["jobs"] > 100
    assert capacity["not_read"] == {}
    shown = runs[1].stdout.splitlines()
    assert "stored rate          120 events a minute in the last 5 min" in shown
    assert [line.split("  ")[0] for line in shown][-6:] == [name for name, _ in capacity_lines(_UNKNOWN)]


def test_what_cannot_be_measured_is_named_beside_what_can(
    redis: Redis, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The counts and the state of each part are there too."""

    def failing(_: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setenv("HISTORY_OUTBOX", str(tmp_path / "outbox.db"))
    Outbox(tmp_path / "outbox.db").close()
    monkeypatch.setattr(shutil, "disk_usage", failing)
    with get_db() as db:
        db.exec_driver_sql("ALTER TABLE portfolio_history DROP COLUMN created_at")
    values = pipeline_status()
    capacity = values["capacity"]
    assert (values["portfolio_snapshots"], values["outbox_pending"], values["database"]) == (0, 0, "reachable")
    assert (capacity["table_bytes"], capacity["outbox_used_bytes"]) == (None, None)
    assert capacity["redis_used_bytes"] > 0
    assert list(capacity["not_read"]) == ["tables", "outbox size"]
    assert 'column "created_at" does not exist' in capacity["not_read"]["tables"]
    assert capacity["not_read"]["outbox size"] == f"outbox {tmp_path / 'outbox.db'}: Input/output error"


def test_without_redis_url_the_rest_of_the_status_is_there(database_url: str) -> None:
    """Nothing of Redis is measured, and that it is not set is the only problem."""
    values = pipeline_status()
    assert (values["redis"], values["problems"]) == ("REDIS_URL is not set", ["Redis: REDIS_URL is not set"])
    capacity = values["capacity"]
    assert (capacity["redis_used_bytes"], capacity["not_read"]) == (None, {})
    assert capacity["table_bytes"]["portfolio_history"] > 0


def test_everything_is_unknown_while_no_server_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """All names are there, so that a table on a terminal does not jump."""
    monkeypatch.setenv("DATABASE_URL", "postgresql://u@127.0.0.1:1/x")
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:1")
    values = pipeline_status()
    assert (values["capacity"], values["problems"] != []) == (_UNKNOWN, True)
    assert [problem.partition(":")[0] for problem in values["problems"]] == ["database", "Redis"]
    lines = dict(capacity_lines(_UNKNOWN))
    assert set(lines.values()) == {"-"}


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"stored_per_minute": 0.0, "stored_rate_seconds": 300.0}, "0 events a minute in the last 5 min"),
        ({"stored_per_minute": 3.25, "stored_rate_seconds": 300.0}, "3.2 events a minute in the last 5 min"),
        ({"stored_per_minute": 123456.7, "stored_rate_seconds": 30.0}, "123,457 events a minute in the last 30 s"),
    ],
)
def test_rate_is_readable(values: dict[str, Any], line: str) -> None:
    assert dict(capacity_lines(_UNKNOWN | values))["stored rate"] == line


@pytest.mark.parametrize(
    ("growth", "full", "line"),
    [
        (None, None, "12.0 MiB of 1.0 GiB"),
        (0.0, None, "12.0 MiB of 1.0 GiB, backlog not growing"),
        (-5.0, None, "12.0 MiB of 1.0 GiB, backlog not growing"),
        (1024.0, 300_000.0, "12.0 MiB of 1.0 GiB, full in 3 d 11 h at 60.0 KiB a minute"),
        (0.1, 1e10, "12.0 MiB of 1.0 GiB, not full within a year"),
    ],
)
def test_outbox_size_is_readable(growth: float | None, full: float | None, line: str) -> None:
    values = {
        "outbox_used_bytes": 12 * 2**20,
        "outbox_max_bytes": 2**30,
        "outbox_growth_bytes_per_second": growth,
        "outbox_full_in_seconds": full,
    }
    assert dict(capacity_lines(_UNKNOWN | values))["outbox size"] == line


def test_sizes_have_a_sum_unless_one_is_unknown() -> None:
    known = {"queue": 1024, "jobs": 2**20, "registries": 0, "reservations": 0, "acknowledgements": 0}
    shown = dict(capacity_lines(_UNKNOWN | {"redis_key_bytes": known}))
    assert shown["Redis keys"] == "about 1.0 MiB: jobs 1.0 MiB, queue 1.0 KiB"
    assert dict(capacity_lines(_UNKNOWN | {"redis_key_bytes": dict.fromkeys(known, 0)}))["Redis keys"] == "none"
    shown = dict(capacity_lines(_UNKNOWN | {"redis_key_bytes": known | {"acknowledgements": None}}))
    assert shown["Redis keys"] == "about jobs 1.0 MiB, queue 1.0 KiB, acknowledgements unknown"


def test_documented_names_are_those_of_the_json() -> None:
    assert [row[0].strip("`") for row in table("consumers/ops/CAPACITY.md", "capacity")] == list(_UNKNOWN)
