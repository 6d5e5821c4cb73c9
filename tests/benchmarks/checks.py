"""What makes a benchmark fail: an event that was lost, a count that is off, a drain that stands still."""

from __future__ import annotations

import time
from collections.abc import Callable

from sqlalchemy import text

from consumers.db.engine import engine

STALL_SECONDS = 60.0
_RECOUNT_SECONDS = 0.2  # without a new row
_NEW_ROWS = text("SELECT count(*), max(id) FROM portfolio_history WHERE id > :last")


def require(condition: bool, otherwise: str) -> None:
    """End the program with status 1 unless `condition` holds."""
    if not condition:
        raise SystemExit(f"benchmark failed: {otherwise}")


def rows(table: str = "portfolio_history") -> int:
    with engine().connect() as db:
        return int(db.execute(text(f"SELECT count(*) FROM {table}")).scalar_one())


def require_rows(expected: int) -> None:
    """Exactly these many snapshots, and no delivery that became something else than a row."""
    found, outcomes = rows(), rows("event_outcomes")
    require(found == expected and not outcomes, f"{found} rows and {outcomes} other outcomes of {expected} events")


class Rows:
    """Counts snapshots again and again, each time only those that are new, from when it was made."""

    def __init__(self) -> None:
        self._last, self._seen, self._recount_at = 0, 0, time.monotonic() + _RECOUNT_SECONDS
        self.count()

    def count(self) -> int:
        now = time.monotonic()
        with engine().connect() as db:
            new, last = db.execute(_NEW_ROWS, {"last": self._last}).one()
            if new:
                self._last, self._seen, self._recount_at = last, self._seen + new, now + _RECOUNT_SECONDS
            elif now > self._recount_at:  # one that was committed after a later one would be missed
                self._seen, last = db.execute(_NEW_ROWS, {"last": 0}).one()
                self._last, self._recount_at = last or 0, now + _RECOUNT_SECONDS
        return int(self._seen)


def wait_for_progress(progress: Callable[[], int], goal: int, pause: float = 0.005) -> int:
    """Return how often it looked when `progress` reaches `goal`; fail when it stands still for STALL_SECONDS."""
    last, moved_at, looks = -1, time.monotonic(), 1
    while (now := progress()) < goal:
        if now != last:
            last, moved_at = now, time.monotonic()
        require(time.monotonic() - moved_at < STALL_SECONDS, f"stands still at {now} of {goal} events")
        time.sleep(pause)
        looks += 1
    return looks
