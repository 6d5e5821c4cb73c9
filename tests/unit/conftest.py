"""A Redis that is not there: it can be cut off, and holds what the code under test put into it."""

from __future__ import annotations

import fakeredis
import pytest
from rq import Queue
from rq.serializers import JSONSerializer


@pytest.fixture
def server() -> fakeredis.FakeServer:
    """Set `connected` to False for an outage."""
    return fakeredis.FakeServer()


@pytest.fixture
def redis(server: fakeredis.FakeServer) -> fakeredis.FakeRedis:
    return fakeredis.FakeRedis(server=server)


def queue_of(redis: fakeredis.FakeRedis, name: str = "history") -> Queue:
    return Queue(name, connection=redis, serializer=JSONSerializer)
