"""The pipeline at a glance, for the page: what can be known quickly, each part by itself."""

from __future__ import annotations

from typing import Any

from redis import RedisError

from consumers.db import state_queries
from consumers.db.engine import read_transaction
from consumers.errors import StoreUnavailable
from consumers.ops.status import outbox_facts, queue_facts
from consumers.settings import DashboardSettings
from consumers.web.disclosure import disclosed
from producers.errors import OutboxError
from producers.settings import TransportSettings


def health() -> dict[str, Any]:
    """The database, Redis and the outbox of this machine: facts of each, or the word that they cannot be had.

    `redis` is None without REDIS_URL, `outbox` is None when this machine has none.
    """
    transport = TransportSettings.from_environment()
    return {
        "database": _database(),
        "redis": None if transport.redis_url is None else _redis(transport),
        "outbox": _outbox(transport),
        "dashboard_url": DashboardSettings.from_environment().url,
    }


def _database() -> dict[str, Any]:
    try:
        with read_transaction() as db:
            return {"last_stored": state_queries.last_stored(db), "rejections": state_queries.rejections(db)}
    except StoreUnavailable as error:
        return {"error": disclosed(error)}


def _redis(transport: TransportSettings) -> dict[str, Any]:
    try:
        with transport.redis() as redis:
            return queue_facts(redis, transport.queue)
    except RedisError as error:
        return {"error": disclosed(error)}


def _outbox(transport: TransportSettings) -> dict[str, Any] | None:
    try:
        return outbox_facts(transport)
    except OutboxError as error:
        return {"error": disclosed(error)}
