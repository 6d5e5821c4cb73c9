"""Summary of the pipeline: row counts, queue, workers and outbox."""

from __future__ import annotations

import threading
from typing import Any

from redis import RedisError
from sqlalchemy import text

from consumers.db.engine import READ_SECONDS, get_db
from consumers.db.row_counts import quick_counts
from consumers.db.waits import DatabaseWaits
from consumers.errors import StoreUnavailable
from consumers.ops.health import HealthReader, Reading
from consumers.ops.redis_errors import redis_problem
from producers.errors import OutboxError

_COUNTING_SECONDS = 30.0  # enough for a slow disk
_ALL_SECONDS = 45.0
_ANY = text("SELECT 1")


def _counts() -> tuple[dict[str, int], list[str]]:
    # Without a limit, libpq waits for ever for a server that is connected but frozen.
    with DatabaseWaits(READ_SECONDS, threading.Event()).limited(), get_db() as db:
        db.execute(_ANY)
    with DatabaseWaits(_COUNTING_SECONDS, threading.Event()).limited():
        return quick_counts()


_reader = HealthReader(_counts)


def pipeline_status() -> tuple[dict[str, Any], bool]:
    """Return the values by name, and whether the pipeline is healthy: all parts can be read, and a worker is alive.

    Above 100,000 rows, counts are estimates; `approximate` lists their names.

    Raises:
        SettingsError: a setting is missing or invalid.
    """
    health = _reader.read(_ALL_SECONDS)
    values: dict[str, Any] = {}
    if health.database.value is not None:
        counts, approximate = health.database.value
        values |= {**counts, "approximate": approximate}
    values["database"] = _problem(health.database) or "reachable"
    if queue := health.queue.value:
        values |= {"queued": queue.queued, "failed": queue.failed, "workers": queue.workers}
    values["redis"] = _problem(health.queue) or ("reachable" if queue else "REDIS_URL is not set")
    if outbox := health.outbox.value:
        values |= {"outbox_pending": outbox.pending, "outbox_sent": outbox.sent, "outbox_rejected": outbox.rejected}
    if problem := _problem(health.outbox):
        values["outbox"] = problem
    errors = [reading.error for reading in (health.database, health.queue, health.outbox) if reading.error]
    return values, not errors and queue is not None and queue.state != "unknown" and bool(queue.workers)


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
