"""The pipeline at a glance, for the page: what can be known quickly, each part by itself."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from pydantic import Field, field_validator
from redis import RedisError

from consumers.disclosure import disclosed
from consumers.errors import StoreUnavailable
from consumers.page import queries, state_queries
from consumers.status import outbox_facts, queue_facts
from producers.errors import OutboxError
from producers.settings import EnvironmentSettings, TransportSettings


class PageSettings(EnvironmentSettings):
    """What only the page needs."""

    dashboard_url: str | None = Field(None, alias="HISTORY_DASHBOARD_URL")

    @field_validator("dashboard_url")
    @classmethod
    def _is_a_web_address(cls, url: str | None) -> str | None:
        # It becomes a link: javascript: would run in the page.
        if url is not None and urlsplit(url).scheme not in ("http", "https"):
            raise ValueError("must be an http:// or https:// URL")
        return url


def health() -> dict[str, Any]:
    """The database, Redis and the outbox of this machine: facts of each, or the word that they cannot be had.

    `redis` is None without REDIS_URL, `outbox` is None when this machine has none.
    """
    transport = TransportSettings.from_environment()
    return {
        "database": _database(),
        "redis": None if transport.redis_url is None else _redis(transport),
        "outbox": _outbox(transport),
        "dashboard_url": PageSettings.from_environment().dashboard_url,
    }


def _database() -> dict[str, Any]:
    try:
        with queries.reading() as db:
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
        return outbox_facts(transport.outbox)
    except OutboxError as error:
        return {"error": disclosed(error)}
