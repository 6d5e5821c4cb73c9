"""Query plans of pages and of the audit: they use the indexes, so their cost does not grow with the tables."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, date, datetime
from typing import Any

import pytest
from sqlalchemy import Connection, text

from consumers.db.archive_queries import archives
from consumers.db.engine import get_db
from consumers.db.portfolio_queries import closes, snapshots
from consumers.db.queries import Filter, Query
from consumers.ops import audit

pytestmark = pytest.mark.usefixtures("database_url")

_MANY = """
    INSERT INTO portfolio_history (event_id, source, sequence, portfolio_id, snapshot_date, "timestamp", balance,
        total_invested, total_profit_loss, total_value, open_positions, trade_count)
    SELECT gen_random_uuid(), 'many/x', n, n % 3, CAST(at AT TIME ZONE 'UTC' AS date), at, n, 0, 0, n, 0, 0
    FROM generate_series(1, {rows}) AS n,
        LATERAL (SELECT timestamptz '2026-01-01Z' + n * interval '10 minutes' AS at) AS moment
"""


def _execute(statement: str) -> None:
    with get_db() as db:
        db.execute(text(statement))


def _plan(db: Connection, statement: Any, values: Any) -> list[dict[str, Any]]:
    """Run the statement and return every node of its plan."""
    explained = text(f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}")
    nodes = [db.execute(explained, values).scalar_one()[0]["Plan"]]
    for node in nodes:
        nodes += node.get("Plans", [])
    return nodes


_QUERIES: tuple[Callable[[Filter], Query], ...] = (snapshots, closes, archives)
_SINCE, _UNTIL = datetime(2026, 3, 1, tzinfo=UTC), datetime(2026, 6, 1, tzinfo=UTC)


def test_pages_read_only_a_few_rows_of_large_tables() -> None:
    """No step of any page reads more than 500 of the 20,000 rows."""
    rows, limit = 20_000, 50  # one row per 10 minutes, until the middle of May
    _execute(_MANY.format(rows=rows))
    _execute("""
        INSERT INTO signal_archives (event_id, source, sequence, portfolio_id, archived_at, archive_month,
            signals_count, signals_data)
        SELECT gen_random_uuid(), 'archiver/x', n, n % 3, at, to_char(at AT TIME ZONE 'UTC', 'YYYY-MM'), 1, '[{}]'
        FROM generate_series(1, 5000) AS n,
            LATERAL (SELECT timestamptz '2026-01-01Z' + n * interval '40 minutes' AS at) AS moment
    """)
    _execute("ANALYZE")
    last = {"snapshot_date": date(2026, 4, 1), "timestamp": datetime(2026, 4, 1, tzinfo=UTC), "id": 10**9}
    places: list[dict[str, Any]] = [
        {},
        {"portfolio_id": 1},
        {"since": _SINCE, "until": _UNTIL},
        {"portfolio_id": 1, "until": datetime(2026, 3, 31, tzinfo=UTC)},
        {"after": last | {"archived_at": last["timestamp"]}},
        {"after": last | {"archived_at": last["timestamp"]}, "portfolio_id": 2},
    ]
    with get_db() as db:
        for query_of in _QUERIES:
            for place in places:
                query = query_of(Filter(limit=limit, **place))
                nodes = _plan(db, query.statement(), query.values)
                most = max(node["Actual Rows"] + node.get("Rows Removed by Filter", 0) for node in nodes)
                assert most <= 500, (
                    query_of,
                    place,
                    most,
                )  # a period is searched by date, two days wider


def test_audit_reads_sequences_in_order_without_sorting() -> None:
    """It merges the sorted indexes of the three tables."""
    _execute(_MANY.format(rows=15_000))
    _execute("ANALYZE")
    with get_db() as db:
        db.exec_driver_sql("SET LOCAL enable_sort = off")  # with so few rows, sorting would be as fast
        gaps = audit._GAPS.format(numbers=audit._of_all_tables(audit._NUMBERS))
        nodes = _plan(db, gaps, {"source": "many/x", "first": 1})
    assert sum(node["Actual Rows"] for node in nodes if "Sort" in node["Node Type"]) == 0
    assert max(node["Actual Rows"] for node in nodes) == 15_000
