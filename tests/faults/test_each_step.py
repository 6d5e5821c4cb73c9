"""A process dies with SIGKILL at each step of an event's way, one test for each; nothing is lost or doubled."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from redis import Redis

from producers.history_producer import HistoryProducer
from producers.outbox import Outbox
from tests.faults.programs import PRODUCER_STEPS, WORKER_STEPS
from tests.faults.verdict import verdict

pytestmark = pytest.mark.usefixtures("database_url", "redis")

ROOT = Path(__file__).parents[2]


def _start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.faults.programs", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
    )


def _told(output: str) -> list[tuple[str, int, str]]:
    lines = [line.split() for line in output.splitlines()]
    return [(source, int(sequence), event_id) for source, sequence, event_id in lines]


def _until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)


@pytest.mark.parametrize("step", PRODUCER_STEPS)
@pytest.mark.parametrize("times", [1, 3])
def test_a_producer_that_dies_loses_nothing(redis: Redis, tmp_path: Path, step: str, times: int) -> None:
    """The next process that opens its outbox delivers what it had accepted."""
    outbox = tmp_path / "outbox.db"
    worker = _start("worker")
    dying = _start("producer", str(outbox), "7", "40", "0.01", FAULT_STEP=step, FAULT_TIMES=str(times))
    output, _ = dying.communicate(timeout=60)
    assert dying.returncode == -signal.SIGKILL
    with HistoryProducer(redis, outbox=outbox, name="producer-7") as heir:
        _until(lambda: heir.status().depth == 0, 40)
    worker.terminate()
    worker.communicate(timeout=20)

    judged = verdict([outbox], _told(output))
    assert judged.breaches == []
    assert judged.accepted >= len(_told(output))


@pytest.mark.parametrize("step", WORKER_STEPS)
@pytest.mark.parametrize("times", [1, 5])
def test_a_worker_that_dies_loses_nothing(
    redis: Redis, tmp_path: Path, step: str, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another worker goes on with what it held."""
    outbox = tmp_path / "outbox.db"
    producer = _start("producer", str(outbox), "8", "40", "0.0")
    output, _ = producer.communicate(timeout=60)
    dying = _start("worker", FAULT_STEP=step, FAULT_TIMES=str(times))
    if step == "while handing back" and times > 1:
        _until(lambda: redis.llen("rq:queue:history") == 0, 30)
        dying.kill()
    dying.communicate(timeout=60)
    assert dying.returncode == -signal.SIGKILL
    # What is proven here is that the lease brings the work back; its length is proven elsewhere.
    for lease in redis.scan_iter("history:lease:*"):
        redis.delete(lease)
    heir = _start("worker")
    with HistoryProducer(redis, outbox=outbox, name="producer-8") as rest:
        _until(lambda: rest.status().depth == 0, 40)
    heir.terminate()
    heir.communicate(timeout=20)

    judged = verdict([outbox], _told(output))
    assert (judged.accepted, judged.breaches) == (40, [])
    assert Outbox(outbox).status().depth == 0
