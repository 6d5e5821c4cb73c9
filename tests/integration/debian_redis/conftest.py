"""Tests that run again on Debian's Redis 7: here `pair` has its address.

Redis 6.2 is the oldest version that this project supports, but no package of it is available to the tests.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from consumers.embedded import Addresses
from tests.redis_servers import DEBIAN_REDIS, redis_server


@pytest.fixture(scope="session")
def pair(pair: Addresses) -> Iterator[Addresses]:
    """The PostgreSQL of this run, and Debian's Redis."""
    if not DEBIAN_REDIS.exists():
        pytest.fail(f"no Redis at {DEBIAN_REDIS}: apt-get install redis-server")
    with (
        tempfile.TemporaryDirectory(prefix="th-", dir="/tmp") as folder,
        redis_server(DEBIAN_REDIS, Path(folder)) as url,
    ):
        yield Addresses(pair.database_url, url)
