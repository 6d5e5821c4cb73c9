"""Summary of the pipeline: row counts, queue, workers, outbox and problems, and its capacity."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

from redis import RedisError
from sqlalchemy import text

from consumers.db.capacity_queries import DatabaseCapacity, database_capacity
from consumers.db.engine import READ_SECONDS, get_db
from consumers.db.row_counts import quick_counts
from consumers.db.waits import DatabaseWaits
from consumers.errors import StoreUnavailable
from consumers.ops.health import Health, HealthReader
from consumers.ops.outbox_capacity import OutboxCapacity, outbox_capacity_of_settings
from consumers.ops.outbox_health import outbox_of_settings
from consumers.ops.probes import Probe, Reading, readings
from consumers.ops.redis_errors import redis_problem
from consumers.ops.redis_memory import RedisMemory, redis_memory_of_settings
from producers.errors import OutboxError
from producers.outbox import MAX_BYTES

_COUNTING_SECONDS = 30.0  # enough for a slow disk
_CAPACITY_SECONDS = 3.0  # of one statement
_MEASURING_SECONDS = 5.0
_ALL_SECONDS = 45.0
_ANY = text("SELECT 1")


@dataclass(frozen=True)
class _Database:
    counts: dict[str, int]
    approximate: list[str]
    capacity: DatabaseCapacity | None
    capacity_error: StoreUnavailable | None = None


def _database() -> _Database:
    # Without a limit, libpq waits for ever for a server that is connected but frozen.
    with DatabaseWaits(READ_SECONDS, threading.Event()).limited(), get_db() as db:
        db.execute(_ANY)
    with DatabaseWaits(_COUNTING_SECONDS, threading.Event()).limited():
        counts, approximate = quick_counts()
    try:
        with (
            DatabaseWaits(READ_SECONDS, threading.Event()).limited(),
            get_db(statement_seconds=_CAPACITY_SECONDS) as db,
        ):
            return _Database(counts, approximate, database_capacity(db))
    except StoreUnavailable as error:  # the counts are there nevertheless
        return _Database(counts, approximate, None, error)


_reader = HealthReader(_database, outbox=partial(outbox_of_settings, ask_relay=True))
_memory = Probe("redis-memory", redis_memory_of_settings)
_outbox = Probe("outbox-capacity", outbox_capacity_of_settings)


def pipeline_status() -> dict[str, Any]:
    """Return the values by name. If the pipeline is healthy, `problems` is empty.

    Above 100,000 rows, counts are estimates; `approximate` lists their names. `capacity` has numbers, with their units
    in their names; they are None if they are not known. Takes at most 45 s.

    Raises:
        SettingsError: a setting is missing or invalid.
    """
    began = time.monotonic()
    measuring: list[Future[Any]] = [_memory.start(), _outbox.start()]
    health = _reader.read(_ALL_SECONDS)
    memory, outbox = readings(measuring, max(_MEASURING_SECONDS - (time.monotonic() - began), 0.0))
    values: dict[str, Any] = {}
    if (database := health.database.value) is not None:
        values |= {**database.counts, "approximate": database.approximate}
    values["database"] = _problem(health.database) or "reachable"
    if queue := health.queue.value:
        values |= {"queued": queue.queued, "failed_jobs": queue.failed, "workers": queue.workers}
    values["redis"] = _problem(health.queue) or ("reachable" if queue else "REDIS_URL is not set")
    if found := health.outbox.value:
        values |= {"outbox_pending": found.pending, "outbox_sent": found.sent, "outbox_rejected": found.rejected}
    if problem := _problem(health.outbox):
        values["outbox"] = problem
    values["problems"] = [*_problems(health)]
    values["capacity"] = _capacity(health, memory, outbox)
    return values


def _problems(health: Health[_Database]) -> Iterator[str]:
    """Yield what is wrong: a part that cannot be read, events that are late, and each failed health check."""
    for name, reading in (("database", health.database), ("Redis", health.queue), ("outbox", health.outbox)):
        if problem := _problem(reading):
            yield f"{name}: {problem}"
    if (queue := health.queue.value) is not None:
        yield from queue.problems()
    elif health.queue.error is None:
        yield "Redis: REDIS_URL is not set"
    if (outbox := health.outbox.value) is not None:
        yield from outbox.problems()


def _problem(reading: Reading[Any]) -> str | None:
    """Return the error as text. Raise an error that is not an outage."""
    error = reading.error
    if error is None:
        return None
    if not isinstance(error, StoreUnavailable | RedisError | OutboxError | TimeoutError):
        raise error
    if isinstance(error, StoreUnavailable):
        return error.with_advice()
    return f"{type(error).__name__}: {redis_problem(error)}" if isinstance(error, RedisError) else str(error)


def _capacity(
    health: Health[_Database], memory: Reading[RedisMemory | None], outbox: Reading[OutboxCapacity | None]
) -> dict[str, Any]:
    """Return the capacity, with all its names: what is not known is None, and `not_read` says why."""
    rows, redis, file = health.database.value, memory.value, outbox.value
    database = rows.capacity if rows else None
    rate = database.stored_per_second if database else None
    found: dict[str, Any] = {
        "stored_per_minute": None if rate is None else round(60 * rate, 1),
        "stored_rate_seconds": None if database is None else round(database.rate_seconds, 1),
        "queue_oldest_age_seconds": _rounded(getattr(health.queue.value, "oldest_age_seconds", None)),
        "outbox_oldest_age_seconds": _rounded(getattr(health.outbox.value, "oldest_unacknowledged_seconds", None)),
        "outbox_used_bytes": getattr(file, "used_bytes", None),
        "outbox_max_bytes": MAX_BYTES if file else None,
        "outbox_growth_bytes_per_second": _rounded(getattr(file, "growth_bytes_per_second", None)),
        "outbox_full_in_seconds": _rounded(getattr(file, "full_in_seconds", None)),
    }
    found["table_bytes"] = database.table_bytes if database else None
    for name in ("used_bytes", "max_bytes", "key_bytes"):
        found[f"redis_{name}"] = getattr(redis, name, None)
    found["not_read"] = not_read = dict[str, str]()
    if rows and rows.capacity_error:
        not_read["tables"] = rows.capacity_error.with_advice()
    for what, reading, part in (("Redis memory", memory, health.queue), ("outbox size", outbox, health.outbox)):
        problem = _problem(reading)
        if part.error is None and problem:  # otherwise the reason is among the problems
            not_read[what] = problem
    if redis and health.queue.error is None:
        not_read |= redis.not_read
    return found


def _rounded(number: float | None) -> float | None:
    return None if number is None else round(number, 1)
