"""State of the database, the queue and the outbox for the page. Each part is read independently."""

from __future__ import annotations

from typing import Any

from consumers.db import state_queries
from consumers.db.engine import read_transaction
from consumers.ops.health import shared_reader
from consumers.ops.probes import Reading
from consumers.settings import DashboardSettings
from consumers.web.disclosure import Unreadable, disclosed

_SECONDS = 15.0
_QUEUE = ("queued", "reserved", "oldest_age_seconds", "failed", "workers", "state")
_OUTBOX = ("pending", "sent", "rejected", "oldest_unacknowledged_seconds", "state")


def health() -> dict[str, Any]:
    """Return the values of the database, Redis and this machine's outbox, or an `error` for a part that cannot be read.

    `redis` is None without REDIS_URL, `outbox` is None if this machine has no outbox.
    """
    read = shared_reader(_rows).read(_SECONDS)
    return {
        "database": _shown(read.database),
        "redis": _shown(read.queue, _QUEUE),
        "outbox": _shown(read.outbox, _OUTBOX),
        "dashboard_url": DashboardSettings.from_environment().url,
    }


def _rows() -> dict[str, Any]:
    with read_transaction() as db:
        return {"last_stored": state_queries.last_stored(db), "rejections": state_queries.newest_rejections(db)}


def _shown(reading: Reading[Any], names: tuple[str, ...] = ()) -> Any:
    """Return the named attributes of the value; the value itself if `names` is empty."""
    if reading.error is None:
        value = reading.value
        return {name: getattr(value, name) for name in names} if names and value is not None else value
    if not isinstance(reading.error, Unreadable):
        raise reading.error
    return {"error": disclosed(reading.error)}
