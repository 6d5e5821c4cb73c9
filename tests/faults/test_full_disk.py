"""The disk under the outbox is full: the call says so, and what was accepted before is not lost."""

from __future__ import annotations

from pathlib import Path

import pytest
from redis import Redis

from tests.faults.test_each_step import _retire, _settle_the_rest, _started, _told
from tests.faults.verdict import verdict

pytestmark = pytest.mark.usefixtures("database_url", "redis")


def test_a_full_disk_refuses_new_events_and_loses_none(redis: Redis, tmp_path: Path) -> None:
    """No file of the producer may grow beyond a limit, its marks included; with room again everything is settled."""
    outbox = tmp_path / "outbox.db"
    with _started("worker") as worker:
        with _started("producer", str(outbox), "9", "100000", "0.0", FAULT_FILE_BYTES="4000000") as producer:
            output, _ = producer.communicate(timeout=60)
        assert producer.returncode == 1  # of OutboxError
        assert len(_told(output)) > 100
        _settle_the_rest(redis, outbox, "producer-9", worker)
        _retire(worker)

    judged = verdict([outbox], _told(output))
    assert (judged.accepted, judged.breaches) == (len(_told(output)), [])
