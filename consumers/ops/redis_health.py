"""Checks of the Redis or Valkey server: version, role, persistence and eviction."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from redis import Redis
from redis.exceptions import ResponseError

from consumers.ops.checks import HealthCheck, check_result, checks_or_error
from consumers.ops.masking import Mask
from consumers.ops.queue_health import read_queue
from producers.settings import TransportSettings

_OLDEST_VERSION = (6, 2)
_LAST_WRITES = {
    "write": "aof_last_write_status",
    "rewrite": "aof_last_bgrewrite_status",
    "snapshot": "rdb_last_bgsave_status",
}


def redis_checks(settings: TransportSettings, mask: Mask) -> Iterator[HealthCheck]:
    """Yield the checks of the server, then those of the queue.

    Raises:
        SettingsError: REDIS_URL is invalid.
        RedisError: Redis does not answer, or refuses the login.
    """
    with settings.redis() as redis:
        began = time.monotonic()
        redis.ping()
        yield HealthCheck("Redis", "ok", f"answered in {1000 * (time.monotonic() - began):.0f} ms")
        # A managed service or an access list may forbid INFO: that alone is no failure.
        advice = (
            "run doctor as a user that may run INFO, such as trading_history_reader, or look in the provider's console"
        )
        read = partial(_read_server, redis)
        yield from checks_or_error("Redis server", read, mask, advice=advice, unknown=(ResponseError,))
        yield from checks_or_error("queue", lambda: read_queue(redis, settings.queue).checks(), mask)


def _read_server(redis: Redis) -> Iterator[HealthCheck]:
    info: Any = redis.info()
    try:
        reply: Any = redis.config_get("appendfsync").get("appendfsync")
        fsync = reply.decode() if isinstance(reply, bytes) else reply
    except ResponseError:
        fsync = None
    return redis_server_checks(info, fsync)


def redis_server_checks(info: Mapping[str, Any], fsync: str | None) -> Iterator[HealthCheck]:
    """Yield the checks of a reply to INFO. `fsync` is the value of appendfsync, None if it cannot be read."""
    valkey, number = info.get("valkey_version"), str(info["redis_version"])
    old = not valkey and tuple(int(part) for part in number.split(".")[:2]) < _OLDEST_VERSION
    found = f"Valkey {valkey}" if valkey else f"Redis {number}"
    yield check_result("Redis version", found, found if old else "", advice="upgrade to Redis 6.2 or newer, or Valkey")
    master = f"{info.get('master_host')}, port {info.get('master_port')}"
    problem = "" if info["role"] == "master" else f"a replica of {master}: events cannot be enqueued here"
    yield check_result("Redis role", "a primary", problem, advice="point REDIS_URL to the primary")
    yield _persistence(info, fsync)
    policy = str(info["maxmemory_policy"])
    advice = "set maxmemory-policy noeviction: an evicted job is delayed until its outbox sends the event again"
    yield check_result("Redis eviction", policy, "" if policy == "noeviction" else policy, advice=advice)


def _persistence(info: Mapping[str, Any], fsync: str | None) -> HealthCheck:
    """Check the append-only file and the last writes to disk."""
    name, advice = "Redis persistence", "check the disk and the log of Redis"
    if not info["aof_enabled"]:
        # A service that forbids CONFIG is probably a managed one, which may keep its data in another way.
        lost = "set appendonly yes: otherwise a restart of Redis loses the jobs of programs that have no outbox"
        return HealthCheck(name, "warn" if fsync is None else "fail", "no append-only file", lost)
    broken = [what for what, key in _LAST_WRITES.items() if info.get(key, "ok") != "ok"]
    if "write" in broken:
        return HealthCheck(name, "fail", "the last write to the append-only file failed", advice)
    if broken:
        return HealthCheck(name, "warn", f"the last {' and '.join(broken)} failed", advice)
    if fsync == "no":
        return HealthCheck(name, "warn", "append-only file, appendfsync no", "set appendfsync everysec")
    known = f"appendfsync {fsync}" if fsync else "appendfsync unknown (CONFIG is forbidden)"
    return HealthCheck(name, "ok", f"append-only file, {known}")
