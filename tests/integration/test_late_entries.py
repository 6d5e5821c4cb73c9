"""Readers of an outbox whose controller has ended: an event whose acknowledgement waits in Redis is not late."""

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

from consumers.web.api import create_app
from producers.history_producer import HistoryProducer
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
    """One that has ended two hours ago without its acknowledgements; some of its events are still queued."""
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
    """What /metrics, the page's health, `outbox status` and doctor say about the oldest entry."""
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
    """However long ago it was recorded; nobody has taken its acknowledgement."""
    _controller(redis, outbox, stored=3, queued=0)
    assert _ages(os.environ["REDIS_URL"], monkeypatch) == (0.0, None, None, "ok")
    assert states(outbox) == {"sent": 3}


def test_an_event_without_an_acknowledgement_is_late(
    redis: Redis, outbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside others that are."""
    _controller(redis, outbox, stored=2, queued=1)
    metrics, health, status, doctor = _ages(os.environ["REDIS_URL"], monkeypatch)
    assert metrics == pytest.approx(_HOURS_SECONDS, abs=60)
    assert health == pytest.approx(_HOURS_SECONDS, abs=60)
    assert status == pytest.approx(_HOURS_SECONDS, abs=60)
    assert doctor == "fail"


@pytest.mark.parametrize("mode", ["refuse", "swallow"])
def test_without_redis_they_say_what_they_know(
    redis: Redis, outbox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """The outbox can be read all the same, within the time of a scrape: its age counts then."""
    _controller(redis, outbox, stored=2, queued=0)
    with a_proxy(os.environ["REDIS_URL"], tmp_path) as (proxy, url):
        proxy.set_mode(mode)  # type: ignore[arg-type]  # one of its modes
        metrics, health, status, doctor = _ages(url, monkeypatch)
    assert metrics == pytest.approx(_HOURS_SECONDS, abs=60)
    assert health == pytest.approx(_HOURS_SECONDS, abs=60)
    assert status == pytest.approx(_HOURS_SECONDS, abs=60)
    assert doctor in ("warn", "fail")
