"""fakeredis for the unit tests; a test can interrupt its connection."""

from __future__ import annotations

from typing import Any

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


def sent_commands(redis: fakeredis.FakeRedis, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Return a list that grows by the bytes of each command, or of each pipeline, that is sent to Redis from now on."""
    sent: list[bytes] = []
    kind: Any = redis.connection_pool.connection_class
    send = kind.send_packed_command

    def recorded(connection: Any, commands: Any, **options: Any) -> Any:
        sent.append(commands if isinstance(commands, bytes) else b"".join(commands))
        return send(connection, commands, **options)

    monkeypatch.setattr(kind, "send_packed_command", recorded)
    return sent
