"""Row counts: exact ones, and quick ones that are estimates for large tables."""

from __future__ import annotations

from sqlalchemy import Connection, text

from consumers.db.engine import get_db

EXACT_UP_TO = 100_000  # counting them takes a few hundredths of a second

_ROWS = {
    "portfolio_snapshots": "portfolio_history",
    "signal_archives": "signal_archives",
    "duplicate": "event_outcomes WHERE outcome = 'duplicate'",
    "rejected": "event_outcomes WHERE outcome = 'rejected'",
}
_EXACT = text("SELECT " + ", ".join(f"(SELECT count(*) FROM {rows}) AS {name}" for name, rows in _ROWS.items()))  # noqa: S608  # from constants

# Count at most :most rows of each, from the new end of an index: at the old end, pages of moved rows may be empty.
# Duplicates have no index, so `outcomes` is the number of rows that are read to count them.
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
        FROM (SELECT outcome FROM event_outcomes LIMIT :most) AS bounded) AS counted
""")


def exact_counts() -> dict[str, int]:
    """Return the number of rows of each table and of deliveries that made no row; it reads every row.

    Raises:
        StoreUnavailable: the database cannot be read now.
    """
    with get_db() as db:
        return dict(db.execute(_EXACT).mappings().one())


def quick_counts() -> tuple[dict[str, int], list[str]]:
    """Return the same numbers, and the names of those that are estimates.

    A table of a billion rows takes about as long as one of EXACT_UP_TO rows. An estimate is the planner's, from the
    last ANALYZE and the present size of the table. Before the first ANALYZE it may be wrong by a factor of several.

    Raises:
        StoreUnavailable: the database cannot be read now.
    """
    with get_db() as db:
        counted = dict(db.execute(_BOUNDED, {"most": EXACT_UP_TO + 1}).mappings().one())
        read = counted | {"duplicate": counted["outcomes"]}
        many = [name for name in _ROWS if read[name] > EXACT_UP_TO]
        counts = {name: counted[name] for name in _ROWS}
        return counts | {name: max(counts[name], _estimate(db, _ROWS[name])) for name in many}, many


def _estimate(db: Connection, rows: str) -> int:
    plan = db.exec_driver_sql(f"EXPLAIN (FORMAT JSON) SELECT FROM {rows}").scalar_one()
    return int(plan[0]["Plan"]["Plan Rows"])
