"""Queries for signal archives and their signals: pages, months, and bounded reads for a search."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import date, datetime, timedelta
from typing import Any, NamedTuple

from sqlalchemy import Connection, text

from consumers.db.queries import NO_LIMIT, Filter, Query, guessed_bytes, where

ARCHIVE_COLUMNS = (
    "id",
    "event_id",
    "source",
    "sequence",
    "portfolio_id",
    "archived_at",
    "archive_month",
    "signals_count",
    "signals_data",
    "created_at",
)
SIGNAL_COLUMNS = ("archive_id", "portfolio_id", "archived_at", "position", "signal")
ARCHIVE_KEYS = ("archived_at", "id")
SIGNAL_KEYS = ("archived_at", "archive_id", "position")
MOST_MONTHS = 1_200
# A search reads at most this many archives, or bytes of them, at a time.
_MOST_AT_ONCE = 50
_MOST_BYTES = 2**20
_ARCHIVE_ORDER = "archived_at DESC, id DESC"
_SIGNAL_ORDER = "archived_at DESC, archive_id DESC, position"
_MARKETS = "jsonb_path_query_array(signals_data, '$[*].market_id')"  # the expression of the index on it


def archives(wanted: Filter) -> Query:
    """Return the query for signal archives, newest first by archived_at."""
    rows = f"""
        SELECT *, xmin FROM signal_archives {where(_archive_conditions(wanted, "<"))}
        ORDER BY {wanted.order(_ARCHIVE_ORDER)} LIMIT :limit
    """  # noqa: S608  # from the constants here; values are parameters
    return Query(ARCHIVE_COLUMNS, _ARCHIVE_ORDER, ARCHIVE_KEYS, rows, wanted.values(), document="signals_data")


def _archive_conditions(wanted: Filter, behind: str, key: str = "id") -> list[str]:
    conditions = wanted.conditions("archived_at")
    if wanted.after is not None:
        conditions.append(f"(archived_at, id) {behind} (:after_archived_at, :after_{key})")
    return conditions


def market_signals(market_id: str, wanted: Filter) -> Query:
    """Return the query for the archived signals of one market: newest archive first, each in its own order."""
    spellings = _spellings(market_id)
    given = [f"CAST(:market_{n} AS jsonb)" for n in range(len(spellings))]
    has_market = " OR ".join(f"{_MARKETS} @> jsonb_build_array({one})" for one in given)
    signal_conditions = [f"signal -> 'market_id' IN ({', '.join(given)})"]
    if wanted.after is not None:  # in the same archive, only the signals behind that position
        signal_conditions.append(
            "((archived_at, id) < (:after_archived_at, :after_archive_id) OR place > :after_position)"
        )
    rows = f"""
        SELECT id AS archive_id, portfolio_id, archived_at, place AS position, signal, version AS xmin
        FROM (
            SELECT *, xmin AS version FROM signal_archives
            {where([f"({has_market})", *_archive_conditions(wanted, "<=", "archive_id")])}
            ORDER BY {_ARCHIVE_ORDER} LIMIT coalesce(:limit, {NO_LIMIT}) + 1
        ) AS archives CROSS JOIN LATERAL jsonb_array_elements(signals_data) WITH ORDINALITY AS one (signal, place)
        {where(signal_conditions)}
        ORDER BY {_SIGNAL_ORDER} LIMIT :limit
    """  # noqa: S608  # from the constants here; values are parameters
    values = wanted.values() | {f"market_{n}": spelling for n, spelling in enumerate(spellings)}
    return Query(SIGNAL_COLUMNS, _SIGNAL_ORDER, SIGNAL_KEYS, rows, values, document="signal")


def _spellings(market_id: str) -> list[str]:
    """Return the id as JSON text, and also as a JSON number if it can be one: signals contain both."""
    number = re.fullmatch("0|[1-9][0-9]{0,99}", market_id)
    return [json.dumps(market_id), *([market_id] if number else [])]


_MONTHS = text("""
    WITH RECURSIVE months AS (
        (SELECT archive_month FROM signal_archives ORDER BY archive_month DESC LIMIT 1)
        UNION ALL
        SELECT (SELECT archive_month FROM signal_archives WHERE archive_month < months.archive_month
            ORDER BY archive_month DESC LIMIT 1)
        FROM months WHERE archive_month IS NOT NULL
    )
    SELECT archive_month AS month,
        (SELECT count(*) FROM signal_archives WHERE signal_archives.archive_month = months.archive_month) AS archives
    FROM months WHERE archive_month IS NOT NULL LIMIT :limit
""")


def months(db: Connection) -> list[dict[str, Any]]:
    """Return the newest 1,200 months that have archives, newest first, each with its number of archives."""
    return [dict(row) for row in db.execute(_MONTHS, {"limit": MOST_MONTHS}).mappings()]


# The range of archived_at uses the index signal_archives_newest. It has one more day on each side, because
# archive_month follows the local date.
_ARCHIVES = """
    SELECT id, archived_at, portfolio_id, signals_count {data}
    FROM signal_archives
    WHERE archive_month = :month AND archived_at >= :since AND archived_at < :until
        AND (archived_at, id) {before} (:at, :id)
    ORDER BY archived_at DESC, id DESC LIMIT :limit
"""
_LISTED = text(_ARCHIVES.format(data="", before="<"))
_SEARCHED = text(_ARCHIVES.format(data=f", {guessed_bytes('signals_data')} AS bytes", before="<="))
_DOCUMENTS = text("""
    SELECT id, archived_at, portfolio_id, CAST(signals_data AS text) FROM signal_archives
    WHERE id = ANY(:ids) ORDER BY archived_at DESC, id DESC
""")
_ONE = text("SELECT id, archived_at, portfolio_id, CAST(signals_data AS text) FROM signal_archives WHERE id = :id")


def _around(month: date) -> dict[str, Any]:
    after = (month + timedelta(days=31)).replace(day=1)
    day = timedelta(days=1)
    return {"month": f"{month:%Y-%m}", "since": month - day, "until": after + day}


def archives_of_month(db: Connection, month: date, before: tuple[datetime, int], limit: int) -> list[dict[str, Any]]:
    """Return archives of a month without their signals, newest first, older than the (archived_at, id) `before`.

    `month` is the first day of the month.
    """
    values = _around(month) | {"at": before[0], "id": before[1], "limit": limit}
    return [dict(row) for row in db.execute(_LISTED, values).mappings()]


class Archive(NamedTuple):
    """Archive whose signals are the JSON text of an array."""

    id: int
    archived_at: datetime
    portfolio: int | None
    signals: str


def archives_with_signals(db: Connection, month: date, start: tuple[datetime, int], limit: int) -> Iterator[Archive]:
    """Yield archives of a month, newest first from the (archived_at, id) `start` on.

    It reads a few at a time, because each may be large.
    """
    values = _around(month) | {"at": start[0], "id": start[1], "limit": limit}
    ids: list[int] = []
    read_bytes = 0
    for row in db.execute(_SEARCHED, values).all():
        if ids and (read_bytes + row.bytes > _MOST_BYTES or len(ids) == _MOST_AT_ONCE):
            yield from _documents(db, ids)
            ids, read_bytes = [], 0
        ids.append(row.id)
        read_bytes += row.bytes
    yield from _documents(db, ids)


def _documents(db: Connection, ids: list[int]) -> Iterator[Archive]:
    for row in db.execute(_DOCUMENTS, {"ids": ids}):
        yield Archive(*row)


def archive(db: Connection, archive_id: int) -> Archive | None:
    """Return the archive with this row id, or None."""
    row = db.execute(_ONE, {"id": archive_id}).one_or_none()
    return None if row is None else Archive(*row)
