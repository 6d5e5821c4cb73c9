"""One page of a listing: read with one statement, made into JSON by PostgreSQL, tagged by its rows and versions."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from hashlib import blake2b
from typing import Any

from sqlalchemy import Row, TextClause, text

from consumers.connection import get_reader
from consumers.listings import Listing, quoted

# What the documents of one page may take in the table; the row that passes it is the page's last.
PAGE_BYTES = 4 * 1024 * 1024
_TAG = re.compile(r'(?:W/)?"([^"]*)"')


@dataclass(frozen=True)
class Page:
    """`body` is None when the client has it; `last` are the keys of the last row if more rows follow."""

    body: str | None
    tag: str
    last: dict[str, Any] | None


def read_page(listing: Listing, limit: int, media_type: str, known_tags: str | None) -> Page:
    """The first `limit` rows of `listing`, which must have been asked for one more.

    The tag is made of the rows' keys and versions, which PostgreSQL changes with each update: a row that came in late
    shows, wherever it stands, and an unchanged page is recognized without reading its documents.

    Raises:
        StoreUnavailable: the database cannot be read now.
    """
    shown = (_json if media_type == "application/json" else _csv)(listing)
    with get_reader() as db:
        if known_tags is not None:
            rows, more = _cut(db.execute(_statement(listing, ""), _values(listing)).all(), limit)
            tag = _tag(listing, media_type, rows, more)
            if tag in _TAG.findall(known_tags) or known_tags.strip() == "*":
                return Page(None, tag, _last(listing, rows, more))
        rows, more = _cut(db.execute(_statement(listing, f", {shown}"), _values(listing)).all(), limit)
    body = _json_body(rows) if media_type == "application/json" else _csv_body(listing, rows)
    return Page(body, _tag(listing, media_type, rows, more), _last(listing, rows, more))


def _statement(listing: Listing, shown: str) -> TextClause:
    """Keys, version, bytes so far, and what is `shown`."""
    rows, through, within, keys = listing.rows, "0", "", quoted(listing.keys)
    if listing.document is not None:
        size = f"pg_column_size({listing.document})"
        window = f"OVER (ORDER BY {listing.order} ROWS UNBOUNDED PRECEDING)"
        rows = f"SELECT *, CAST(sum({size}) {window} AS bigint) AS through FROM ({rows}) AS narrowed"  # noqa: S608  # as below
        through, within = "through", f"WHERE through - {size} < :page_bytes"
    return text(f"""
        SELECT {keys}, CAST(ROW({keys}, xmin) AS text) AS version, {through} AS through {shown}
        FROM ({rows}) AS page {within}
        ORDER BY {listing.order}
    """)  # noqa: S608  # from the listing's constants; values are parameters


def _values(listing: Listing) -> dict[str, Any]:
    return {**listing.values, "page_bytes": PAGE_BYTES}


def _json(listing: Listing) -> str:
    return f"CAST(row_to_json((SELECT shown FROM (SELECT {quoted(listing.columns)}) AS shown)) AS text) AS body"  # noqa: S608  # as above


def _csv(listing: Listing) -> str:
    return ", ".join(
        f'CAST("{column}" AS text) AS shown_{column}' if column == listing.document else f'"{column}" AS shown_{column}'
        for column in listing.columns
    )


def _cut(rows: Sequence[Row[Any]], limit: int) -> tuple[Sequence[Row[Any]], bool]:
    """At most `limit` rows, and whether more follow."""
    return rows[:limit], len(rows) > limit or (bool(rows) and rows[-1].through >= PAGE_BYTES)


def _tag(listing: Listing, media_type: str, rows: Iterable[Row[Any]], more: bool) -> str:
    what = [repr((listing.columns, media_type, more)), *(row.version for row in rows)]
    return blake2b("\n".join(what).encode(), digest_size=12).hexdigest()


def _last(listing: Listing, rows: Sequence[Row[Any]], more: bool) -> dict[str, Any] | None:
    return {key: getattr(rows[-1], key) for key in listing.keys} if more and rows else None


def _json_body(rows: Iterable[Row[Any]]) -> str:
    return "[" + ",\n".join([row.body for row in rows]) + "]"


def _csv_body(listing: Listing, rows: Iterable[Row[Any]]) -> str:
    written = io.StringIO()
    writer = csv.writer(written)
    writer.writerow(listing.columns)
    writer.writerows([_cell(value) for value in row[-len(listing.columns) :]] for row in rows)
    return written.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, Decimal):
        return format(value, "f")
    if isinstance(value, date):
        return value.isoformat()
    # A spreadsheet takes text that begins like this for a formula, and runs it.
    if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")):
        return "'" + value
    return value
