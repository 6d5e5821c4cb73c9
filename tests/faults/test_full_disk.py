"""The disk under the outbox is full: the call says so, and what was accepted before is not lost."""

from __future__ import annotations

from pathlib import Path

import pytest
from redis import Redis

from tests.faults.test_each_step import judge, retire, run_producer, settle_the_rest, started

pytestmark = pytest.mark.usefixtures("database_url", "redis")


def test_a_full_disk_refuses_new_events_and_loses_none(redis: Redis, tmp_path: Path) -> None:
    """No file of the producer may grow beyond a limit, its marks included; with room again everything is settled."""
    outbox = tmp_path / "outbox.db"
    with started("worker") as worker:
        status, accepted = run_producer(tmp_path, "--seed", "9", "--count", "100000", FAULT_FILE_BYTES="4000000")
        assert status == 1  # of OutboxError
        assert len(accepted.deliveries) > 100
        settle_the_rest(redis, [outbox], worker)
        retire(worker)

    judged = judge(accepted, outbox)
    assert (judged.accepted, judged.breaches) == (len(accepted.deliveries), [])
