"""The Redis or Valkey server: whether it answers, takes writes, keeps them, and has room for more."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

from redis import Redis
from redis.exceptions import ResponseError

from consumers.ops.doctor.checks import Check, looked, size
from consumers.ops.doctor.masking import Mask
from consumers.ops.doctor.queue_checks import queue_checks
from producers.settings import TransportSettings

REDIS = "Redis"
_OLDEST_VERSION = (6, 2)
_HIGH_SHARE = 0.75
_FULL_SHARE = 0.95
_MANAGED = "let this user run INFO and CONFIG GET, or look at the provider's console"


def redis_checks(settings: TransportSettings, mask: Mask) -> Iterator[Check]:
    """Of the server, then of the queue; only the first when it does not answer.

    Raises:
        SettingsError: REDIS_URL cannot be read.
        RedisError: it does not answer, or does not let us in.
    """
    redis = settings.redis()
    try:
        began = time.monotonic()
        redis.ping()
        yield Check(REDIS, "ok", f"answers after {1000 * (time.monotonic() - began):.0f} ms")
        looks = {"Redis version": version, "Redis role": role, "Redis persistence": persistence, "Redis memory": memory}
        for name, look in looks.items():
            # A managed service or an access list may forbid INFO: then it is not known to be wrong.
            yield from looked(name, partial(look, redis), mask, advice=_MANAGED, unseen=(ResponseError,))
        yield from queue_checks(redis, settings.queue, mask)
    finally:
        redis.close()


def version(redis: Redis) -> Iterator[Check]:
    info = _info(redis, "server")
    if "valkey_version" in info:
        yield Check("Redis version", "ok", f"Valkey {info['valkey_version']}")
        return
    number = str(info["redis_version"])
    old = tuple(int(part) for part in number.split(".")[:2]) < _OLDEST_VERSION
    yield Check(
        "Redis version", "fail" if old else "ok", f"Redis {number}", "6.2 is the oldest that works" if old else ""
    )


def role(redis: Redis) -> Iterator[Check]:
    info = _info(redis, "replication")
    if info["role"] == "master":
        yield Check("Redis role", "ok", "a primary")
    else:
        found = f"a replica of {info.get('master_host')}, port {info.get('master_port')}: it takes no events"
        yield Check("Redis role", "fail", found, "point REDIS_URL to the primary")


def persistence(redis: Redis) -> Iterator[Check]:
    """The append-only file and its last writes; without it, only what is in outboxes comes again."""
    name, info = "Redis persistence", _info(redis, "persistence")
    try:
        fsync = _text(redis.config_get("appendfsync").get("appendfsync"))
    except ResponseError:
        fsync = None
    if not info["aof_enabled"]:
        advice = "appendonly yes: what Redis holds dies with it, and comes again only from outboxes"
        # Who may not read the configuration cannot change it either: a service may keep its data by other means.
        yield Check(name, "warn" if fsync is None else "fail", "no append-only file", advice)
        return
    broken = [what for what, key in _LAST_WRITES.items() if info.get(key, "ok") != "ok"]
    if "write" in broken:
        yield Check(name, "fail", "the last write to the append-only file failed", "look at its disk and its log")
    elif broken:
        yield Check(name, "warn", f"the last {' and '.join(broken)} failed", "look at its disk and its log")
    elif fsync == "no":
        yield Check(name, "warn", "append-only file, appendfsync no", "appendfsync everysec")
    else:
        known = f"appendfsync {fsync}" if fsync else "appendfsync not to be seen (CONFIG is forbidden)"
        yield Check(name, "ok", f"append-only file, {known}")


_LAST_WRITES = {
    "write": "aof_last_write_status",
    "rewrite": "aof_last_bgrewrite_status",
    "snapshot": "rdb_last_bgsave_status",
}


def memory(redis: Redis) -> Iterator[Check]:
    """Nothing may be evicted, and there must be room for more."""
    info = _info(redis, "memory")
    policy = _text(info["maxmemory_policy"])
    evicts = policy != "noeviction"
    yield Check(
        "Redis eviction",
        "fail" if evicts else "ok",
        policy,
        "maxmemory-policy noeviction: an evicted event is missing until it is sent again" if evicts else "",
    )
    used, limit, machine = int(info["used_memory"]), int(info["maxmemory"]), int(info.get("total_system_memory", 0))
    whole, what = (limit, "maxmemory") if limit else (machine, "the machine's memory, no maxmemory set")
    if not whole:
        yield Check("Redis memory", "ok", f"{size(used)} used, no maxmemory set")
        return
    share = used / whole
    status, advice = _room(share)
    yield Check("Redis memory", status, f"{size(used)} used, {share:.0%} of {size(whole)} ({what})", advice)


def _room(share: float) -> tuple[Any, str]:
    if share <= _HIGH_SHARE:
        return "ok", ""
    return "fail" if share > _FULL_SHARE else "warn", "start workers, raise maxmemory, or look what else is in there"


def _info(redis: Redis, section: str) -> dict[str, Any]:
    return redis.info(section)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
