"""How many rows there are: exactly, or quickly however many they are."""

from __future__ import annotations

from sqlalchemy import Connection, text

from consumers.db.engine import get_db

EXACT_UP_TO = 100_000  # counted in some hundredths of a second

_ROWS = {
    "portfolio_snapshots": "portfolio_history",
    "signal_archives": "signal_archives",
    "duplicate": "event_outcomes WHERE outcome = 'duplicate'",
    "rejected": "event_outcomes WHERE outcome = 'rejected'",
}
_EXACT = text("SELECT " + ", ".join(f"(SELECT count(*) FROM {rows}) AS {name}" for name, rows in _ROWS.items()))  # noqa: S608  # from constants

# At most so many of each, along an index: from the end where rows are added, not through pages that moved rows left.
# Duplicates have no index: `outcomes` is how many rows are read to count them.
_BOUNDED = text("""
    SELECT
        (SELECT count(*) FROM (
            SELECT FROM portfolio_history ORDER BY id DESC LIMIT :most) AS bounded) AS portfolio_snapshots,
        (SELECT count(*) FROM (
            SELECT FROM signal_archives ORDER BY id DESC LIMIT :most) AS bounded) AS signal_archives,
        (SELECT count(*) FROM (
            SELECT FROM event_outcomes WHERE outcome = 'rejected' ORDER BY created_at DESC LIMIT :most) AS bounded)
            AS rejected,
        outcomes, duplicate
    FROM (SELECT count(*) AS outcomes, count(*) FILTER (WHERE outcome = 'duplicate') AS duplicate
        FROM (SELECT outcome FROM event_outcomes LIMIT :most) AS bounded) AS looked_at
""")


def exact_counts() -> dict[str, int]:
    """Rows of each table, and deliveries that did not become one: every row is read.

    Raises:
        StoreUnavailable: the database cannot be read now.
    """
    with get_db() as db:
        return dict(db.execute(_EXACT).mappings().one())


def quick_counts() -> tuple[dict[str, int], list[str]]:
    """The same by about as much work for a billion rows as for EXACT_UP_TO, and the names of those that are estimates.

    An estimate is the planner's: by the statistics of the last ANALYZE, and by what the tables have grown to since.
    Before the first ANALYZE it is a guess, and may be off by several times.

    Raises:
        StoreUnavailable: the database cannot be read now.
    """
    with get_db() as db:
        counted = dict(db.execute(_BOUNDED, {"most": EXACT_UP_TO + 1}).mappings().one())
        looked_at = counted | {"duplicate": counted["outcomes"]}
        many = [name for name in _ROWS if looked_at[name] > EXACT_UP_TO]
        counts = {name: counted[name] for name in _ROWS}
        return counts | {name: max(counts[name], _estimate(db, _ROWS[name])) for name in many}, many


def _estimate(db: Connection, rows: str) -> int:
    plan = db.exec_driver_sql(f"EXPLAIN (FORMAT JSON) SELECT FROM {rows}").scalar_one()
    return int(plan[0]["Plan"]["Plan Rows"])
