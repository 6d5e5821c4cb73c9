"""Queries for the state of the database: the server, the newest rows, and the rejections."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Row, text

NEWEST_REJECTIONS = 20
COUNTED_REJECTIONS = 1_000  # more are not counted

# Transactions do not commit in the order of their row ids, so max(id) alone can stay the same when a row becomes
# visible. The statistics' counters change then.
_CHANGE_TOKENS = text("""
    SELECT concat_ws('-', (SELECT max(id) FROM portfolio_history),
            sum(changes) FILTER (WHERE name = 'portfolio_history'))
            AS snapshots,
        concat_ws('-', (SELECT max(id) FROM signal_archives),
            sum(changes) FILTER (WHERE name = 'signal_archives'))
            AS archives
    FROM (SELECT relname AS name, n_tup_ins + n_tup_upd + n_tup_del AS changes FROM pg_stat_user_tables
        WHERE relid IN (CAST('portfolio_history' AS regclass), CAST('signal_archives' AS regclass))) AS tables
""")


def change_tokens(db: Connection) -> dict[str, str]:
    """Return a token per history table that changes whenever its rows change."""
    return dict(db.execute(_CHANGE_TOKENS).mappings().one())


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
    """Return when the newest snapshot was stored, and how many seconds after its own time; None without snapshots."""
    row = db.execute(_LAST_STORED).mappings().one_or_none()
    return None if row is None else dict(row)


def newest_rejections(db: Connection) -> dict[str, Any]:
    """Return the newest 20 rejections with their reasons, and the number of all; 1,000 means 1,000 or more."""
    rows = db.execute(_REJECTIONS, {"limit": NEWEST_REJECTIONS}).mappings()
    return {
        "newest": [dict(row) for row in rows],
        "count": db.execute(_COUNT_REJECTIONS, {"limit": COUNTED_REJECTIONS}).scalar_one(),
    }


# Grouped by the reason without its ids and numbers; the example is the newest.
_REJECTED = text("""
    SELECT count(*) AS events, (array_agg(reason ORDER BY created_at DESC))[1] AS example FROM event_outcomes
    WHERE outcome = 'rejected' AND created_at > now() - interval '1 day'
    GROUP BY regexp_replace(reason, '[0-9a-f]{8}-[0-9a-f-]{27}|[0-9]+', '', 'g')
    ORDER BY count(*) DESC, example
""")


def rejections_of_last_day(db: Connection) -> list[tuple[int, str]]:
    """Return (number of events, example) for each reason of the last 24 hours' rejections, the most frequent first."""
    return [(row.events, row.example) for row in db.execute(_REJECTED)]


_HAS_TABLES = text("SELECT (SELECT 1 FROM portfolio_history LIMIT 1), (SELECT 1 FROM signal_archives LIMIT 1)")


def check_tables_readable(db: Connection) -> None:
    """Read at most one row of each history table. A driver error means that a table cannot be read."""
    db.execute(_HAS_TABLES)


_SERVER = text("""
    SELECT CAST(current_setting('server_version_num') AS integer) AS version_number,
        current_setting('server_version') AS version, current_user AS role, current_schema() AS schema,
        pg_is_in_recovery() AS replica, current_setting('transaction_read_only') = 'on' AS read_only,
        current_setting('default_transaction_read_only') = 'on' AS read_only_by_default,
        current_setting('synchronous_commit') AS synchronous_commit, current_setting('fsync') AS fsync,
        current_setting('full_page_writes') AS full_page_writes, current_setting('server_encoding') AS encoding,
        quote_ident(current_database() || '_utf8') AS another,
        CAST(extract(epoch FROM clock_timestamp()) AS double precision) AS seconds
""")


def server_state(db: Connection) -> Row[Any]:
    """Return the server's version and clock, the role of this session, and the durability settings."""
    return db.execute(_SERVER).one()
