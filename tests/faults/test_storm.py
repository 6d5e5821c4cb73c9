"""A short storm of faults at random; `python -m tests.faults --minutes 20` is the long one."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import pytest

from tests.faults.storm import run_storm


@pytest.mark.timeout(600)
def test_nothing_is_lost_or_doubled_in_a_storm(capsys: pytest.CaptureFixture[str]) -> None:
    """Accepted = stored + rejected, each once, and the audit agrees; the seed of a failure is printed."""
    seed = random.randrange(10**6)
    with capsys.disabled():
        print(f"\nseed {seed}")  # noqa: T201  # to repeat it: python -m tests.faults --minutes 0.5 --seed N
    with tempfile.TemporaryDirectory(prefix="th-", dir="/tmp") as folder:
        storm, judged = run_storm(Path(folder), seconds=30, seed=seed)

    assert (judged.breaches, storm.faults.total() > 5, judged.accepted > 100) == ([], True, True)
    assert storm.worst_queue_entries <= 3
