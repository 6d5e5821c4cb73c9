"""A process dies with SIGKILL at each step of an event's way, one test for each; nothing is lost or doubled."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from redis import Redis

from producers import relay
from producers.history_producer import HistoryProducer
from producers.redis_keys import lease_key
from tests.faults.programs import PRODUCER_STEPS, WORKER_STEPS
from tests.faults.verdict import verdict

pytestmark = pytest.mark.usefixtures("database_url", "redis")

ROOT = Path(__file__).parents[2]


@contextmanager
def _started(*arguments: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """One of the programs; it does not outlive the block. What it writes to stderr is shown when the test fails."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.faults.programs", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def _told(output: str) -> list[tuple[str, int, str]]:
    lines = [line.split() for line in output.splitlines()]
    return [(source, int(sequence), event_id) for source, sequence, event_id in lines]


def _until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)


def _settle_the_rest(redis: Redis, outbox: Path, name: str, worker: subprocess.Popen[str]) -> None:
    def settled() -> bool:
        assert worker.poll() is None, "the worker that should go on has ended"
        return heir.status().depth == 0

    with HistoryProducer(redis, outbox=outbox, name=name) as heir:
        _until(settled, 40)


def _retire(worker: subprocess.Popen[str]) -> None:
    worker.terminate()
    worker.communicate(timeout=20)
    # By the signal itself when nothing was left to do and it had not got to the point of catching it.
    assert worker.returncode in (0, -signal.SIGTERM)


@pytest.mark.parametrize("step", PRODUCER_STEPS)
@pytest.mark.parametrize("times", [1, 3])
def test_a_producer_that_dies_loses_nothing(
    redis: Redis, tmp_path: Path, step: str, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next process that opens its outbox delivers what it had accepted."""
    monkeypatch.setattr(relay, "_FIRST_CHECK_SECONDS", 0.5)
    outbox = tmp_path / "outbox.db"
    with _started("worker") as worker:
        with _started(
            "producer", str(outbox), "7", "40", "0.01", "10", FAULT_STEP=step, FAULT_TIMES=str(times)
        ) as dying:
            output, _ = dying.communicate(timeout=60)
        assert dying.returncode == -signal.SIGKILL
        _settle_the_rest(redis, outbox, "producer-7", worker)
        _retire(worker)

    judged = verdict([outbox], _told(output))
    assert judged.breaches == []
    assert judged.accepted >= len(_told(output))


@pytest.mark.parametrize("step", WORKER_STEPS)
@pytest.mark.parametrize(("times", "batch"), [(1, 500), (5, 6)])
def test_a_worker_that_dies_loses_nothing(redis: Redis, tmp_path: Path, step: str, times: int, batch: int) -> None:
    """With everything in one batch, or in the fifth of several: another worker goes on with what it held."""
    outbox = tmp_path / "outbox.db"
    with _started("producer", str(outbox), "8", "40", "0.0") as producer:
        output, _ = producer.communicate(timeout=60)
    with _started("worker", FAULT_STEP=step, FAULT_TIMES=str(times), FAULT_BATCH=str(batch)) as dying:
        dying.communicate(timeout=60)
    assert dying.returncode == -signal.SIGKILL
    # What is proven here is that the lease brings the work back; its length is proven elsewhere.
    for lease in redis.scan_iter(lease_key("history", "*")):
        redis.delete(lease)
    with _started("worker") as heir:
        _settle_the_rest(redis, outbox, "producer-8", heir)
        _retire(heir)

    judged = verdict([outbox], _told(output))
    assert (judged.accepted, judged.breaches) == (40, [])
