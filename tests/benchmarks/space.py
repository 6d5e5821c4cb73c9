"""Size of an event: in Redis while it waits, is finished, rejected or acknowledged, and in PostgreSQL as a row."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path

from sqlalchemy import text

from consumers.db.engine import engine, get_db
from consumers.db.inserts import insert_events
from producers.events import Event, PortfolioSnapshot, SignalArchive, event_of
from producers.history_producer import HistoryProducer
from tests.benchmarks.backlog import snapshots
from tests.benchmarks.checks import require, rows, wait_for_progress
from tests.benchmarks.environment import bench_stack, checkpoint, queue_name, redis, vacuum
from tests.benchmarks.report import Report
from tests.benchmarks.workers import history_workers
from tests.factories import a_signal, a_snapshot, an_archive

SIGNALS = 50
# fmt: off
_WORDS = (
    "the", "a", "of", "in", "at", "bridge", "river", "harbour", "election", "rate", "bank", "oil", "gold", "storm",
    "night", "team", "cup", "vote", "law", "price", "index", "court", "minister", "launch", "rocket", "summer",
    "winter", "north", "south", "reopen", "reach", "fall", "rise", "win", "lose", "leave", "join", "sign", "report",
    "two", "three",
)
# fmt: on
_BATCH = 500
_ARCHIVES_PART = 10  # snapshots per archive
_IN_REDIS = 2000
_WAL = text("SELECT pg_current_wal_insert_lsn() - CAST(:since AS pg_lsn)")
_SIZES = text("SELECT pg_table_size(CAST(:table AS regclass)), pg_indexes_size(CAST(:table AS regclass))")
_KINDS = {"rq:job:": "job", "rq:results:": "result", "history:ack:": "acknowledgement"}


def archives(count: int) -> Iterator[SignalArchive]:
    """Yield different archives of SIGNALS signals, whose numbers and words compress no better than real ones."""
    chance = random.Random(2026)
    for number in range(count):
        signals = [
            a_signal(
                market_id=str(chance.randrange(500_000, 600_000)),
                market_question=f"Will {' '.join(chance.choices(_WORDS, k=8))} before {chance.randrange(2026, 2031)}?",
                reason=" ".join(chance.choices(_WORDS, k=12)),
                confidence=chance.randrange(1000) / 1000,
                yes_price=chance.randrange(10_000) / 10_000,
                market_liquidity=chance.randrange(10**8) / 100,
                market_volume=chance.randrange(10**7),
            )
            for _ in range(SIGNALS)
        ]
        yield an_archive(after=timedelta(seconds=number), signals=signals)


def measure_space(count: int, report: Report) -> None:
    """Print the bytes per event; the tables have `count` snapshots and a tenth as many archives."""
    with bench_stack() as folder:
        _measure_redis(folder, report)
        _measure_tables(count, report)


def _print(report: Report, label: str, value: float, unit: str = "bytes") -> None:
    report.add("space", label, unit, [value])
    print(f"{label:64}{value:12,.0f} {unit}", flush=True)


def _measure_redis(folder: Path, report: Report) -> None:
    print("\nRedis, bytes per event (MEMORY USAGE)", flush=True)
    few = _IN_REDIS // _ARCHIVES_PART
    for name, payloads in (("snapshot", snapshots(_IN_REDIS)), (f"archive of {SIGNALS} signals", archives(few))):
        _record(folder, payloads)
        _print(report, f"{name}, waiting", sum(_used().values()) / _queued())
        with redis() as client:
            client.flushall()
    _record(folder, snapshots(_IN_REDIS))
    with history_workers(folder):
        wait_for_progress(rows, _IN_REDIS)
        wait_for_progress(_acknowledged, _IN_REDIS)
    used, kept = _used(), _keys("rq:job:")
    _print(report, "snapshot, finished, while it is kept", (used["job"] + used["result"]) / kept)
    _print(report, "snapshot, acknowledgement not yet read by its producer", used["acknowledgement"] / _IN_REDIS)
    _print(report, f"finished jobs kept of {_IN_REDIS:,}", kept, "jobs")
    with redis() as client:
        client.flushall()
    _record(folder, (a_snapshot(after=timedelta(seconds=number), balance=1) for number in range(_IN_REDIS)))
    with history_workers(folder):
        wait_for_progress(_acknowledged, _IN_REDIS)
    used = _used()
    _print(report, "snapshot, rejected, until requeue or discard", (used["job"] + used["result"]) / _IN_REDIS)


def _record(folder: Path, payloads: Iterator[PortfolioSnapshot] | Iterator[SignalArchive]) -> None:
    """Enqueue the events; the producer is closed before a worker acknowledges them."""
    for file in folder.glob("outbox.db*"):
        file.unlink()
    with HistoryProducer(outbox=folder / "outbox.db", name="space") as producer:
        producer.record_many(list(payloads))
        require(producer.flush(60) == 0, "the queue did not take the events")


def _queued() -> int:
    with redis() as client:
        return int(client.llen(f"rq:queue:{queue_name()}"))


def _acknowledged() -> int:
    with redis() as client:
        return sum(int(client.hlen(key)) for key in client.keys("history:ack:*"))


def _keys(prefix: str) -> int:
    with redis() as client:
        return len(client.keys(f"{prefix}*"))


def _used() -> dict[str, int]:
    """Return the bytes by kind of key, with all elements counted (MEMORY USAGE ... SAMPLES 0)."""
    used = dict.fromkeys([*_KINDS.values(), "other"], 0)
    with redis() as client:
        keys = [key.decode() for key in client.keys("*")]
        with client.pipeline(transaction=False) as pipe:
            for key in keys:
                pipe.memory_usage(key, samples=0)
            for key, size in zip(keys, pipe.execute(), strict=True):
                kind = next((name for prefix, name in _KINDS.items() if key.startswith(prefix)), "other")
                used[kind] += size or 0
    return used


def _measure_tables(count: int, report: Report) -> None:
    archive_count = count // _ARCHIVES_PART
    print(f"\nPostgreSQL, bytes per row with {count:,} snapshots and {archive_count:,} archives", flush=True)
    with engine().begin() as db:
        db.execute(text("TRUNCATE portfolio_history, signal_archives, event_outcomes, withdrawals"))
    for table, name, payloads, number in (
        ("portfolio_history", "snapshot", snapshots(count), count),
        ("signal_archives", f"archive of {SIGNALS} signals", archives(archive_count), archive_count),
    ):
        checkpoint()
        wal = _insert(payloads)
        vacuum()
        with get_db() as db:
            of_table, of_indexes = db.execute(_SIZES, {"table": table}).one()
        _print(report, f"{name}: table", of_table / number)
        _print(report, f"{name}: indexes", of_indexes / number)
        _print(report, f"{name}: WAL, starting at a checkpoint", wal / number)


def _insert(payloads: Iterator[PortfolioSnapshot] | Iterator[SignalArchive]) -> int:
    """Insert the events in batches, like a worker; return the bytes of WAL."""
    with get_db() as db:
        since = db.execute(text("SELECT pg_current_wal_insert_lsn()")).scalar_one()
    events: list[Event] = []
    each: Iterable[PortfolioSnapshot | SignalArchive] = payloads
    for sequence, payload in enumerate(each, start=1):
        events.append(event_of(payload, source="space/0123456789abcdef0123456789abcdef", sequence=sequence))
        if len(events) == _BATCH:
            with get_db() as db:
                insert_events(db, events)
            events = []
    if events:
        with get_db() as db:
            insert_events(db, events)
    with get_db() as db:
        return int(db.execute(_WAL, {"since": since}).scalar_one())
