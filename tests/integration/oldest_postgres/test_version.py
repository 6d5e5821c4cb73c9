"""Which server the tests of this folder really meet, and what only `status` asks of it."""

from __future__ import annotations

import pytest
from sqlalchemy import text

from consumers.db import row_counts
from consumers.db.engine import get_db
from tests.histories import store_many


def test_these_tests_meet_an_old_server(database_url: str) -> None:
    """Not the newest one of the wheels, by an error in a fixture."""
    with get_db() as db:
        assert int(db.execute(text("SHOW server_version_num")).scalar_one()) // 10000 in (14, 15)


def test_status_counts_there(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and outcomes; many by the planner's estimate."""
    counts = {"portfolio_snapshots": 0, "signal_archives": 0, "duplicate": 0, "rejected": 0}
    assert row_counts.quick_counts() == (counts, [])
    monkeypatch.setattr(row_counts, "EXACT_UP_TO", 100)
    store_many(1000)
    assert row_counts.quick_counts() == (counts | {"portfolio_snapshots": 1000}, ["portfolio_snapshots"])
