"""One page of a query as JSON (written by PostgreSQL), CSV or NDJSON, limited in size, with a tag for If-None-Match."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

from sqlalchemy import Connection, Row, TextClause, text

from consumers.db.engine import read_transaction
from consumers.db.queries import Filter, Query, guessed_bytes, quoted
from consumers.row_texts import ndjson_line, plain

# Limit of a page's text for tables with JSON documents. The row that exceeds it is the last row of the page.
PAGE_BYTES = 4 * 1024 * 1024
JSON, CSV, NDJSON = "application/json", "text/csv", "application/x-ndjson"
_TAG = re.compile(r'(?:W/)?"([^"]*)"')


@dataclass(frozen=True)
class Page:
    """Page of rows. `body` is None if the client has it already; `last` has the last row's keys if more rows follow."""

    body: str | None
    tag: str
    last: dict[str, Any] | None


def read_page(
    query_of: Callable[[Filter], Query], wanted: Filter, limit: int, media_type: str, known_tags: str | None
) -> Page:
    """Return the first `limit` rows of the query that `query_of` builds from a filter.

    The tag is a hash of the rows' keys and versions (`xmin`, which PostgreSQL changes with each update). So a late row
    changes the tag wherever it is inserted, and an unchanged page is recognized without reading its documents.

    Raises:
        StoreUnavailable: The database cannot be read now.
    """
    with read_transaction() as db:
        if known_tags is not None:
            query = query_of(replace(wanted, limit=limit + 1))
            rows = db.execute(_keys(query), query.values).all()
            for tag in _TAG.findall(known_tags):
                shown = rows[: min(_rows_of(tag), limit)]
                more = len(rows) > len(shown)
                if tag == _tag(query, media_type, shown, more):
                    return Page(None, tag, _last(query, shown, more))
        query, rows, more = _rows(db, query_of, wanted, limit, media_type)
    tag, last = _tag(query, media_type, rows, more), _last(query, rows, more)
    if known_tags is not None and known_tags.strip() == "*":
        return Page(None, tag, last)
    return Page(_BODIES[media_type](query, rows), tag, last)


def pages(query_of: Callable[[Filter], Query], wanted: Filter, limit: int, media_type: str) -> Iterator[str]:
    """Yield the bodies of all pages of `limit` rows. Each one has its own transaction.

    Between two pages no connection is in use, however slowly the client reads.

    Raises:
        StoreUnavailable: The database cannot be read now.
    """
    page = read_page(query_of, wanted, limit, media_type, None)
    while page.last is not None:
        yield page.body or ""
        page = read_page(query_of, replace(wanted, after=page.last), limit, media_type, None)
    yield page.body or ""


def _rows(
    db: Connection, query_of: Callable[[Filter], Query], wanted: Filter, limit: int, media_type: str
) -> tuple[Query, Sequence[Row[Any]], bool]:
    """Return at most `limit` rows of at most PAGE_BYTES of text, and whether more rows follow.

    The length of a document is known only after PostgreSQL has decompressed it. So each step reads as many rows as fit
    by their stored size, which avoids decompressing hundreds of rows that are then dropped. Most pages need one step.
    """
    rows: list[Row[Any]] = []
    left_bytes = PAGE_BYTES
    step = wanted
    while True:
        query = query_of(replace(step, limit=limit + 1 - len(rows)))
        read = db.execute(
            _statement(query, media_type), {**query.values, "page_bytes": PAGE_BYTES, "left_bytes": left_bytes}
        ).all()
        rows += read
        if len(rows) > limit:
            return query, rows[:limit], True
        if not read or (read[-1].through < left_bytes and read[-1].guessed < PAGE_BYTES):
            return query, rows, False
        left_bytes -= read[-1].through
        step = replace(wanted, after=_place(query, rows[-1]))
        if left_bytes <= 0:
            following = query_of(replace(step, limit=1))
            return query, rows, bool(db.execute(_keys(following), following.values).all())


def _keys(query: Query) -> TextClause:
    return text(f"SELECT {_identity(query)} FROM ({query.rows}) AS page ORDER BY {query.order}")  # noqa: S608  # from the query's constants; values are parameters


def _identity(query: Query) -> str:
    keys = quoted(query.keys)
    return f"{keys}, CAST(ROW({keys}, xmin) AS text) AS version"


def _statement(query: Query, media_type: str) -> TextClause:
    """Select keys, version, shown columns, and running sums of bytes: estimated (`guessed`), exact (`through`)."""
    as_json = media_type == JSON
    shown = (_json if as_json else _values)(query)
    if query.document is None:
        return text(f"""
            SELECT {_identity(query)}, 0 AS through, 0 AS guessed, {shown}
            FROM ({query.rows}) AS page ORDER BY {query.order}
        """)  # noqa: S608  # as above
    guess, size = guessed_bytes(query.document), f"octet_length({'body' if as_json else f'shown_{query.document}'})"
    so_far = f"OVER (ORDER BY {query.order} ROWS UNBOUNDED PRECEDING)"
    # OFFSET 0 keeps the planner from building each text twice: once to measure it, once to return it.
    return text(f"""
        SELECT * FROM (
            SELECT CAST(sum({size}) {so_far} AS bigint) AS through, *
            FROM (
                SELECT {_identity(query)}, guessed, {shown}
                FROM (SELECT *, CAST(sum({guess}) {so_far} AS bigint) AS guessed FROM ({query.rows}) AS filtered)
                    AS page
                WHERE guessed - {guess} < :page_bytes
                OFFSET 0
            ) AS written
        ) AS measured
        WHERE through - {size} < :left_bytes
        ORDER BY {query.order}
    """)  # noqa: S608  # as above


def _json(query: Query) -> str:
    columns = (f'trim_scale("{one}") AS "{one}"' if one in query.amounts else f'"{one}"' for one in query.columns)
    return f"CAST(row_to_json((SELECT shown FROM (SELECT {', '.join(columns)}) AS shown)) AS text) AS body"  # noqa: S608  # as above


def _values(query: Query) -> str:
    return ", ".join(
        f'CAST("{column}" AS text) AS shown_{column}' if column == query.document else f'"{column}" AS shown_{column}'
        for column in query.columns
    )


def _tag(query: Query, media_type: str, rows: Sequence[Row[Any]], more: bool) -> str:
    what = [repr((query.columns, media_type, more)), *(row.version for row in rows)]
    return f"{len(rows)}-{blake2b(chr(10).join(what).encode(), digest_size=12).hexdigest()}"


def _rows_of(tag: str) -> int:
    """Return the number of rows of the page with this tag; 0 if the tag is not from this API."""
    number = re.match("[0-9]{1,4}(?=-)", tag)
    return int(number[0]) if number else 0


def _last(query: Query, rows: Sequence[Row[Any]], more: bool) -> dict[str, Any] | None:
    return _place(query, rows[-1]) if more and rows else None


def _place(query: Query, row: Row[Any]) -> dict[str, Any]:
    return {key: getattr(row, key) for key in query.keys}


def _json_body(_: Query, rows: Iterable[Row[Any]]) -> str:
    return "[" + ",\n".join([row.body for row in rows]) + "]"


def _csv_body(query: Query, rows: Iterable[Row[Any]]) -> str:
    written = io.StringIO()
    writer = csv.writer(written)
    writer.writerow(query.columns)
    writer.writerows([_cell(value) for value in row[-len(query.columns) :]] for row in rows)
    return written.getvalue()


def _ndjson_body(query: Query, rows: Iterable[Row[Any]]) -> str:
    return "".join([ndjson_line(query.columns, row[-len(query.columns) :], query.document) for row in rows])


_BODIES: Mapping[str, Callable[[Query, Iterable[Row[Any]]], str]] = {
    JSON: _json_body,
    CSV: _csv_body,
    NDJSON: _ndjson_body,
}


def _cell(value: Any) -> Any:
    # A spreadsheet runs text that begins like this as a formula.
    if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")):
        return "'" + value
    return plain(value)
