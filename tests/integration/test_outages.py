"""A producer in every kind of Redis outage: calls return at once, the log has one line, and no event is lost."""

from __future__ import annotations

import logging
import os
import time
from datetime import timedelta
from pathlib import Path

import pytest
from redis import Redis

from producers.history_producer import HistoryProducer
from tests.factories import a_snapshot
from tests.outages import OUTAGES


@pytest.mark.parametrize("kind", [kind for kind in OUTAGES if kind != "slow"])
def test_calls_return_at_once_and_the_outage_is_logged_once(
    redis: Redis, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The events stay pending. After the outage, another producer of the outbox sends them."""
    with caplog.at_level(logging.WARNING), OUTAGES[kind](os.environ["REDIS_URL"], tmp_path) as client:
        producer = HistoryProducer(client, outbox=tmp_path / "outbox.db")
        for number in range(20):
            producer.record(a_snapshot(after=timedelta(seconds=number)))
        deadline = time.monotonic() + 20
        while producer._transport.relay._failures < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
        failures, status = producer._transport.relay._failures, producer.status()
        producer.close(timeout=0)

    assert failures >= 3
    assert (status.pending, status.sent) == (20, 0)
    logged = [record.getMessage() for record in caplog.records]
    assert len(logged) == 1
    assert "events stay in the outbox" in logged[0]
    assert "wrong" not in logged[0]
    with HistoryProducer(redis, outbox=tmp_path / "outbox.db") as successor:
        assert successor.flush(20) == 0
    assert redis.llen("rq:queue:history") == 20


def test_a_slow_redis_delays_sending_only(redis: Redis, tmp_path: Path) -> None:
    """Each event is sent once."""
    with (
        OUTAGES["slow"](os.environ["REDIS_URL"], tmp_path) as client,
        HistoryProducer(client, outbox=tmp_path / "outbox.db") as producer,
    ):
        for number in range(20):
            producer.record(a_snapshot(after=timedelta(seconds=number)))
        assert producer.flush(20) == 0
    assert redis.llen("rq:queue:history") == 20
