"""The server that these tests use."""

from __future__ import annotations

from redis import Redis


def test_server_is_redis_7(redis: Redis) -> None:
    """An error in a fixture could use Valkey, which calls itself Redis 7.2."""
    info = redis.info("server")
    assert ("valkey_version" in info, info["redis_version"].split(".")[0]) == (False, "7")
