"""fakeredis for the unit tests; a test can interrupt its connection."""

from __future__ import annotations

import fakeredis
import pytest
from rq import Queue
from rq.serializers import JSONSerializer


@pytest.fixture
def server() -> fakeredis.FakeServer:
    """Fake server; a test sets `connected` to False for an outage."""
    return fakeredis.FakeServer()


@pytest.fixture
def redis(server: fakeredis.FakeServer) -> fakeredis.FakeRedis:
    return fakeredis.FakeRedis(server=server)


def queue_of(redis: fakeredis.FakeRedis, name: str = "history") -> Queue:
    return Queue(name, connection=redis, serializer=JSONSerializer)
