"""A connection to Redis that a test can interrupt."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis

from tests.controllers import Line
from tests.faults.proxy import Proxy


@pytest.fixture
def line(redis: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    """Proxy that REDIS_URL goes through; the client `redis` of a test does not use it."""
    proxy = Proxy(tmp_path / "redis.sock", Path(redis.connection_pool.connection_kwargs["path"]))
    monkeypatch.setenv("REDIS_URL", f"unix://{tmp_path / 'redis.sock'}")
    with proxy.running():
        yield Line(proxy)
        proxy.set_mode("pass")
