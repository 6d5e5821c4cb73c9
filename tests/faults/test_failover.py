"""Failover of Redis behind Sentinel, with real processes. `python -m tests.faults failover` is the longer run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.failover import run_failovers


@pytest.mark.timeout(100)
def test_a_killed_master_delays_rows_by_seconds_and_loses_no_event(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Producer and workers find the new master through Sentinel."""
    monkeypatch.setenv("REDIS_URL", "")  # so that monkeypatch restores it afterwards
    found = run_failovers(tmp_path, ["killed"])
    assert found.judged is not None
    assert found.judged.breaches == []
    assert found.judged.accepted == found.judged.rows > 0
    assert found.longest_call < 1.0
    assert 0.5 < found.pauses["killed"] < 20.0
