"""Queries for the capacity of the database: how many rows were stored in the last minutes, and the size of the tables.

Their cost does not grow with the tables.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, text

from producers.events import KINDS

RATE_SECONDS = 300.0
_PAGE_ROWS = 500
_MOST_PAGES = 100
_SHORTEST_SECONDS = 1.0  # a rate of a shorter time says nothing
_OTHER_TABLES = ("event_outcomes", "withdrawals")

# Read pages of the newest rows, until one has no row of the last minutes. There is no index on created_at; ids grow
# with it, except that transactions overlap. Rows with a later time are from before the server's clock was set back.
_NEWEST = """
WITH RECURSIVE pages (number, first_id, stored, oldest) AS (
    SELECT 0, CAST(9223372036854775807 AS bigint), CAST(1 AS bigint), CAST(NULL AS timestamptz)
    UNION ALL
    SELECT pages.number + 1, page.first_id, page.stored, page.oldest
    FROM pages CROSS JOIN LATERAL (
        SELECT min(id) AS first_id, count(*) FILTER (WHERE recent) AS stored,
            min(created_at) FILTER (WHERE recent) AS oldest
        FROM (
            SELECT id, created_at, created_at > statement_timestamp() - CAST(:seconds AS double precision)
                * interval '1 second' AND created_at <= statement_timestamp() AS recent
            FROM {table} WHERE id < pages.first_id ORDER BY id DESC LIMIT :page_rows) AS newest) AS page
    WHERE pages.number < :most_pages AND pages.stored > 0
)
SELECT coalesce(sum(stored) FILTER (WHERE number > 0), 0) AS stored,
    coalesce(bool_or(number = :most_pages AND stored > 0), false) AS is_cut,
    CAST(extract(epoch FROM statement_timestamp() - min(oldest)) AS double precision) AS seconds
FROM pages
"""
_SIZES = text("""
    SELECT name, pg_total_relation_size(to_regclass(name)) AS bytes FROM unnest(CAST(:tables AS text[])) AS name
""")


@dataclass(frozen=True)
class DatabaseCapacity:
    """Rate of stored events, and the size of each table in bytes, with its indexes and out-of-line values.

    The rate is measured over `rate_seconds`, which is less than RATE_SECONDS if many events were stored. It is None if
    they were stored so quickly that no rate can be given.
    """

    stored_per_second: float | None
    rate_seconds: float
    table_bytes: dict[str, int | None]


def database_capacity(db: Connection) -> DatabaseCapacity:
    """Measure the capacity.

    Raises:
        DBAPIError: a table cannot be read.
    """
    db.exec_driver_sql("SET LOCAL jit = off")  # compiling takes longer than the queries
    tables = [kind.table for kind in KINDS.values()]
    rates = [_stored(db, table) for table in tables]
    known = [rate for rate, _ in rates if rate is not None]
    sizes = db.execute(_SIZES, {"tables": [*tables, *_OTHER_TABLES]})
    return DatabaseCapacity(
        sum(known) if len(known) == len(rates) else None,
        min((seconds for _, seconds in rates), default=RATE_SECONDS),
        {row.name: row.bytes for row in sizes},
    )


def _stored(db: Connection, table: str) -> tuple[float | None, float]:
    """Return the events of one table per second, and the seconds over which they were counted."""
    values = {"seconds": RATE_SECONDS, "page_rows": _PAGE_ROWS, "most_pages": _MOST_PAGES}
    row = db.execute(text(_NEWEST.format(table=table)), values).one()
    seconds = row.seconds if row.is_cut else RATE_SECONDS
    return (float(row.stored) / seconds if seconds >= _SHORTEST_SECONDS else None), seconds
