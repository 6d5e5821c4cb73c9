"""The Redis or Valkey server: whether it answers, takes writes, and keeps what it has taken."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from redis import Redis
from redis.exceptions import ResponseError

from consumers.ops.facts import Fact, check, facts_or_error
from consumers.ops.masking import Mask
from consumers.ops.queue_health import read_queue
from producers.settings import TransportSettings

_OLDEST_VERSION = (6, 2)
_LAST_WRITES = {
    "write": "aof_last_write_status",
    "rewrite": "aof_last_bgrewrite_status",
    "snapshot": "rdb_last_bgsave_status",
}


def redis_facts(settings: TransportSettings, mask: Mask) -> Iterator[Fact]:
    """Facts of the server, then of the queue.

    Raises:
        SettingsError: REDIS_URL cannot be read.
        RedisError: it does not answer, or does not let us in.
    """
    with settings.redis() as redis:
        began = time.monotonic()
        redis.ping()
        yield Fact("Redis", "ok", f"answers after {1000 * (time.monotonic() - began):.0f} ms")
        # A managed service or an access list may forbid INFO: then it is not known to be wrong.
        advice = "let this user run INFO and CONFIG GET, or look at the provider's console"
        read = partial(_read_server, redis)
        yield from facts_or_error("Redis server", read, mask, advice=advice, unknown=(ResponseError,))
        yield from facts_or_error("queue", lambda: read_queue(redis, settings.queue).facts(), mask)


def _read_server(redis: Redis) -> Iterator[Fact]:
    info: Any = redis.info()
    try:
        reply: Any = redis.config_get("appendfsync").get("appendfsync")
        fsync = reply.decode() if isinstance(reply, bytes) else reply
    except ResponseError:
        fsync = None
    return redis_server_facts(info, fsync)


def redis_server_facts(info: Mapping[str, Any], fsync: str | None) -> Iterator[Fact]:
    """Facts of the reply to INFO; `fsync` is appendfsync, None if it cannot be read."""
    valkey, number = info.get("valkey_version"), str(info["redis_version"])
    old = not valkey and tuple(int(part) for part in number.split(".")[:2]) < _OLDEST_VERSION
    found = f"Valkey {valkey}" if valkey else f"Redis {number}"
    yield check("Redis version", found, found if old else "", advice="6.2 is the oldest that works")
    master = f"{info.get('master_host')}, port {info.get('master_port')}"
    problem = "" if info["role"] == "master" else f"a replica of {master}: it takes no events"
    yield check("Redis role", "a primary", problem, advice="point REDIS_URL to the primary")
    yield _persistence(info, fsync)
    policy = str(info["maxmemory_policy"])
    advice = "set maxmemory-policy noeviction: an evicted job is delayed until its outbox sends it again"
    yield check("Redis eviction", policy, "" if policy == "noeviction" else policy, advice=advice)


def _persistence(info: Mapping[str, Any], fsync: str | None) -> Fact:
    """The append-only file and its last writes."""
    name, advice = "Redis persistence", "look at its disk and its log"
    if not info["aof_enabled"]:
        # A user that may not read the configuration cannot change it: a service may keep its data by other means.
        lost = "set appendonly yes: if Redis loses its memory, only outboxes can send events again"
        return Fact(name, "warn" if fsync is None else "fail", "no append-only file", lost)
    broken = [what for what, key in _LAST_WRITES.items() if info.get(key, "ok") != "ok"]
    if "write" in broken:
        return Fact(name, "fail", "the last write to the append-only file failed", advice)
    if broken:
        return Fact(name, "warn", f"the last {' and '.join(broken)} failed", advice)
    if fsync == "no":
        return Fact(name, "warn", "append-only file, appendfsync no", "appendfsync everysec")
    known = f"appendfsync {fsync}" if fsync else "appendfsync unknown (CONFIG is forbidden)"
    return Fact(name, "ok", f"append-only file, {known}")
