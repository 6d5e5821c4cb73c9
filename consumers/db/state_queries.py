"""What the page asks PostgreSQL about the state of things: what is new, and what was refused."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, text

MOST_REJECTIONS = 20
COUNTED_REJECTIONS = 1_000  # beyond it nobody counts

# Rows become visible in another order than that of their ids: the counters of the statistics tell of those too.
_NEWEST = text("""
    SELECT concat_ws('-', (SELECT max(id) FROM portfolio_history),
            sum(changes) FILTER (WHERE name = 'portfolio_history'))
            AS snapshots,
        concat_ws('-', (SELECT max(id) FROM signal_archives),
            sum(changes) FILTER (WHERE name = 'signal_archives'))
            AS archives
    FROM (SELECT relname AS name, n_tup_ins + n_tup_upd + n_tup_del AS changes FROM pg_stat_user_tables
        WHERE relid IN (CAST('portfolio_history' AS regclass), CAST('signal_archives' AS regclass))) AS tables
""")


def newest(db: Connection) -> dict[str, str]:
    """A word for each table that is another one when its rows have changed."""
    return dict(db.execute(_NEWEST).mappings().one())


_LAST_STORED = text("""
    SELECT created_at AS stored_at, date_part('epoch', created_at - "timestamp") AS seconds
    FROM portfolio_history ORDER BY id DESC LIMIT 1
""")
_REJECTIONS = text("""
    SELECT job_id, reason, created_at FROM event_outcomes WHERE outcome = 'rejected'
    ORDER BY created_at DESC LIMIT :limit
""")
_COUNT_REJECTIONS = text("""
    SELECT count(*) FROM (SELECT FROM event_outcomes WHERE outcome = 'rejected' LIMIT :limit) AS bounded
""")


def last_stored(db: Connection) -> dict[str, Any] | None:
    """When the newest snapshot was stored, and how many seconds after it was taken; None without snapshots."""
    row = db.execute(_LAST_STORED).mappings().one_or_none()
    return None if row is None else dict(row)


def rejections(db: Connection) -> dict[str, Any]:
    """The newest rejections with their reasons, and how many there are; 1,000 means as many or more."""
    newest_ones = db.execute(_REJECTIONS, {"limit": MOST_REJECTIONS}).mappings()
    return {
        "newest": [dict(row) for row in newest_ones],
        "count": db.execute(_COUNT_REJECTIONS, {"limit": COUNTED_REJECTIONS}).scalar_one(),
    }
