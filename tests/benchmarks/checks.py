"""Checks that fail a benchmark: a lost event, a wrong count, a drain without progress."""

from __future__ import annotations

import time
from collections.abc import Callable

from sqlalchemy import text

from consumers.db.engine import engine

STALL_SECONDS = 60.0
_RECOUNT_SECONDS = 0.2  # time without a new row after which all rows are counted again
_NEW_ROWS = text("SELECT count(*), max(id) FROM portfolio_history WHERE id > :last")


def require(condition: bool, otherwise: str) -> None:
    """End the program with status 1 unless `condition` holds."""
    if not condition:
        raise SystemExit(f"benchmark failed: {otherwise}")


def rows(table: str = "portfolio_history") -> int:
    with engine().connect() as db:
        return int(db.execute(text(f"SELECT count(*) FROM {table}")).scalar_one())


def require_rows(expected: int) -> None:
    """Fail unless there are exactly `expected` snapshots and no delivery without a row."""
    found, outcomes = rows(), rows("event_outcomes")
    require(found == expected and not outcomes, f"{found} rows and {outcomes} other outcomes of {expected} events")


class Rows:
    """Incremental count of the snapshots: each call reads only the new rows."""

    def __init__(self) -> None:
        self._last, self._seen, self._recount_at = 0, 0, time.monotonic() + _RECOUNT_SECONDS
        self.count()

    def count(self) -> int:
        now = time.monotonic()
        with engine().connect() as db:
            new, last = db.execute(_NEW_ROWS, {"last": self._last}).one()
            if new:
                self._last, self._seen, self._recount_at = last, self._seen + new, now + _RECOUNT_SECONDS
            elif now > self._recount_at:  # a row with a lower id may have been committed later
                self._seen, last = db.execute(_NEW_ROWS, {"last": 0}).one()
                self._last, self._recount_at = last or 0, now + _RECOUNT_SECONDS
        return int(self._seen)


def wait_for_progress(progress: Callable[[], int], goal: int, pause: float = 0.005) -> int:
    """Wait until `progress` reaches `goal`; fail if it does not change for STALL_SECONDS.

    Returns:
        The number of calls of `progress`.
    """
    last, moved_at, calls = -1, time.monotonic(), 1
    while (now := progress()) < goal:
        if now != last:
            last, moved_at = now, time.monotonic()
        require(time.monotonic() - moved_at < STALL_SECONDS, f"no progress at {now} of {goal} events")
        time.sleep(pause)
        calls += 1
    return calls
