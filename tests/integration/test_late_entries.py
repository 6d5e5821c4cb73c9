"""Metrics and checks of an outbox whose controller has ended: an event with an acknowledgement in Redis is not late."""

from __future__ import annotations

import json
import os
import re
import subprocess
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from redis import Redis

from consumers.ops.outbox_health import oldest_unacknowledged_seconds
from consumers.web.api import create_app
from producers.history_producer import HistoryProducer
from producers.outbox import Outbox
from producers.redis_keys import acknowledgement_key
from tests.deliveries import burst
from tests.factories import a_snapshot
from tests.relaying import COMMAND, ROOT, a_proxy, make_older, states

_HOURS_SECONDS = 7200.0


@pytest.fixture(autouse=True)
def outbox(redis: Redis, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HISTORY_OUTBOX", str(tmp_path / "outbox.db"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path / "outbox.db"


def _controller(redis: Redis, outbox: Path, *, stored: int, queued: int) -> None:
    """Simulate a controller that ended two hours ago, with unread acknowledgements and queued events."""
    with HistoryProducer(redis) as producer:
        producer.record_many([a_snapshot(after=timedelta(seconds=number)) for number in range(stored + queued)])
        assert producer.flush(20) == 0
        producer.close(timeout=0)
    waiting: list[Any] = [redis.rpop("rq:queue:history") for _ in range(queued)]
    burst(redis)
    if waiting:
        redis.rpush("rq:queue:history", *waiting)
    make_older(outbox, _HOURS_SECONDS)
    assert states(outbox) == {"sent": stored + queued}


def _json(*arguments: str, **environment: str) -> dict[str, object]:
    run = subprocess.run(
        [*COMMAND, *arguments, "--json"],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
        check=False,
    )
    found = json.loads(run.stdout)
    return {one["name"]: one for one in found} if isinstance(found, list) else found


def _ages(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> tuple[float, object, object, str]:
    """Return the oldest entry's age by /metrics, by the page and by `outbox status`, and its state by doctor."""
    monkeypatch.setenv("REDIS_URL", redis_url)
    with TestClient(create_app(), base_url="http://127.0.0.1") as client:
        scraped = client.get("/metrics").text
        (age,) = re.findall(r"^trading_history_outbox_oldest_age_seconds (\S+)$", scraped, re.M)
        assert "trading_history_outbox_up 1.0" in scraped
        health = client.get("/page/health").json()["outbox"]["oldest_unacknowledged_seconds"]
    status, doctor = _json("outbox", "status"), _json("doctor")
    check = doctor["outbox"]
    assert isinstance(check, dict)
    return float(age), health, status["oldest_unacknowledged_seconds"], check["status"]


def test_an_acknowledged_event_is_not_late(redis: Redis, outbox: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is two hours old, and no relay has read its acknowledgement."""
    _controller(redis, outbox, stored=3, queued=0)
    assert _ages(os.environ["REDIS_URL"], monkeypatch) == (0.0, None, None, "ok")
    assert states(outbox) == {"sent": 3}


def test_an_event_without_an_acknowledgement_is_late(
    redis: Redis, outbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other events of the outbox are acknowledged."""
    _controller(redis, outbox, stored=2, queued=1)
    metrics, health, status, doctor = _ages(os.environ["REDIS_URL"], monkeypatch)
    assert metrics == pytest.approx(_HOURS_SECONDS, abs=60)
    assert health == pytest.approx(_HOURS_SECONDS, abs=60)
    assert status == pytest.approx(_HOURS_SECONDS, abs=60)
    assert doctor == "fail"


def test_an_event_is_late_although_a_thousand_older_ones_are_acknowledged(redis: Redis, outbox: Path) -> None:
    """The acknowledgements are looked up in pages of 1,000."""
    with Outbox(outbox) as opened:
        opened.append("bot", [a_snapshot(after=timedelta(seconds=number)) for number in range(1001)])
        opened.deliveries.mark_sent({one.position: 60.0 for one in opened.deliveries.pending(1001)})
        make_older(outbox, _HOURS_SECONDS)
        *acknowledged, (last, _) = opened.deliveries.sent(0, 1001)
        key = acknowledgement_key(last.source)
        redis.hset(key, mapping={head.job_id: "stored" for head, _ in acknowledged})
        assert oldest_unacknowledged_seconds(opened, redis) == pytest.approx(_HOURS_SECONDS, abs=60)
        redis.hset(key, last.job_id, "stored")
        assert oldest_unacknowledged_seconds(opened, redis) is None


@pytest.mark.parametrize("mode", ["refuse", "swallow"])
def test_the_age_counts_without_acknowledgements_if_redis_is_away(
    redis: Redis, outbox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """The outbox is still readable, within the time limit of a scrape."""
    _controller(redis, outbox, stored=2, queued=0)
    with a_proxy(os.environ["REDIS_URL"], tmp_path) as (proxy, url):
        proxy.set_mode(mode)  # type: ignore[arg-type]  # one of its modes
        metrics, health, status, doctor = _ages(url, monkeypatch)
    assert metrics == pytest.approx(_HOURS_SECONDS, abs=60)
    assert health == pytest.approx(_HOURS_SECONDS, abs=60)
    assert status == pytest.approx(_HOURS_SECONDS, abs=60)
    assert doctor in ("warn", "fail")
