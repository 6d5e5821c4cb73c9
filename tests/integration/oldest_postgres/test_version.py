"""The version of the server that these tests use, and the counts of `status` on it."""

from __future__ import annotations

import pytest
from sqlalchemy import text

from consumers.db import row_counts
from consumers.db.engine import get_db
from tests.histories import store_many


def test_server_is_an_old_version(database_url: str) -> None:
    """An error in a fixture could use the newest version, that of the wheels."""
    with get_db() as db:
        assert int(db.execute(text("SHOW server_version_num")).scalar_one()) // 10000 in (14, 15)


def test_quick_counts_work_on_an_old_server(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are exact, or the planner's estimates for large tables."""
    counts = {"portfolio_snapshots": 0, "signal_archives": 0, "duplicate": 0, "rejected": 0}
    assert row_counts.quick_counts() == (counts, [])
    monkeypatch.setattr(row_counts, "EXACT_UP_TO", 100)
    store_many(1000)
    assert row_counts.quick_counts() == (counts | {"portfolio_snapshots": 1000}, ["portfolio_snapshots"])
