"""Full disk under the outbox: the call raises, and the events accepted before are not lost."""

from __future__ import annotations

from pathlib import Path

import pytest
from redis import Redis

from tests.faults.test_each_step import judge, run_producer, settle_the_rest, started, stop_worker

pytestmark = pytest.mark.usefixtures("database_url", "redis")


def test_a_call_on_a_full_disk_raises_and_no_accepted_event_is_lost(redis: Redis, tmp_path: Path) -> None:
    """While its files cannot grow, the producer cannot write states either. With room again, all is settled."""
    outbox = tmp_path / "outbox.db"
    with started("worker") as worker:
        status, accepted = run_producer(tmp_path, "--seed", "9", "--count", "100000", FAULT_FILE_BYTES="4000000")
        assert status == 1  # it ended with OutboxError
        assert len(accepted.deliveries) > 100
        settle_the_rest(redis, [outbox], worker)
        stop_worker(worker)

    judged = judge(accepted, outbox)
    assert (judged.accepted, judged.breaches) == (len(accepted.deliveries), [])
