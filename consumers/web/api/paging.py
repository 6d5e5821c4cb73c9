"""One page of a listing: made into JSON by PostgreSQL, bounded in size, tagged by its rows and versions."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from decimal import Decimal
from hashlib import blake2b
from typing import Any

from sqlalchemy import Connection, Row, TextClause, text

from consumers.db.engine import get_reader
from consumers.db.queries import Listing, Narrowing, guessed_bytes, quoted

# What the rows of a page with documents may take as text; the row that passes it is the page's last.
PAGE_BYTES = 4 * 1024 * 1024
_TAG = re.compile(r'(?:W/)?"([^"]*)"')


@dataclass(frozen=True)
class Page:
    """`body` is None when the client has it; `last` are the keys of the last row if more rows follow."""

    body: str | None
    tag: str
    last: dict[str, Any] | None


def read_page(
    ask: Callable[[Narrowing], Listing], narrowing: Narrowing, limit: int, media_type: str, known_tags: str | None
) -> Page:
    """The first `limit` rows of what `ask` makes of `narrowing`.

    The tag is made of the rows' keys and versions, which PostgreSQL changes with each update: a row that came in late
    shows, wherever it stands, and an unchanged page is recognized without reading its documents.

    Raises:
        StoreUnavailable: the database cannot be read now.
    """
    with get_reader() as db:
        if known_tags is not None:
            listing = ask(replace(narrowing, limit=limit + 1))
            rows = db.execute(_keys(listing), listing.values).all()
            for tag in _TAG.findall(known_tags):
                shown = rows[: min(_rows_of(tag), limit)]
                more = len(rows) > len(shown)
                if tag == _tag(listing, media_type, shown, more):
                    return Page(None, tag, _last(listing, shown, more))
        listing, rows, more = _rows(db, ask, narrowing, limit, media_type)
    tag, last = _tag(listing, media_type, rows, more), _last(listing, rows, more)
    if known_tags is not None and known_tags.strip() == "*":
        return Page(None, tag, last)
    return Page(_json_body(rows) if media_type == "application/json" else _csv_body(listing, rows), tag, last)


def _rows(
    db: Connection, ask: Callable[[Narrowing], Listing], narrowing: Narrowing, limit: int, media_type: str
) -> tuple[Listing, Sequence[Row[Any]], bool]:
    """At most `limit` rows and PAGE_BYTES, and whether more follow.

    In steps, as how much text a document is only shows when PostgreSQL has unpacked it: the guess by what it takes in
    the table keeps a step from unpacking hundreds in vain. The usual page is one step.
    """
    rows: list[Row[Any]] = []
    left_bytes = PAGE_BYTES
    step = narrowing
    while True:
        listing = ask(replace(step, limit=limit + 1 - len(rows)))
        read = db.execute(
            _statement(listing, media_type), {**listing.values, "page_bytes": PAGE_BYTES, "left_bytes": left_bytes}
        ).all()
        rows += read
        if len(rows) > limit:
            return listing, rows[:limit], True
        if not read or (read[-1].through < left_bytes and read[-1].guessed < PAGE_BYTES):
            return listing, rows, False
        left_bytes -= read[-1].through
        step = replace(narrowing, after=_place(listing, rows[-1]))
        if left_bytes <= 0:
            following = ask(replace(step, limit=1))
            return listing, rows, bool(db.execute(_keys(following), following.values).all())


def _keys(listing: Listing) -> TextClause:
    return text(f"SELECT {_identity(listing)} FROM ({listing.rows}) AS page ORDER BY {listing.order}")  # noqa: S608  # from the listing's constants; values are parameters


def _identity(listing: Listing) -> str:
    keys = quoted(listing.keys)
    return f"{keys}, CAST(ROW({keys}, xmin) AS text) AS version"


def _statement(listing: Listing, media_type: str) -> TextClause:
    """Keys, version, what is shown, and the bytes so far: guessed, and (`through`) as they are."""
    as_json = media_type == "application/json"
    shown = (_json if as_json else _csv)(listing)
    if listing.document is None:
        return text(f"""
            SELECT {_identity(listing)}, 0 AS through, 0 AS guessed, {shown}
            FROM ({listing.rows}) AS page ORDER BY {listing.order}
        """)  # noqa: S608  # as above
    guess, size = guessed_bytes(listing.document), f"octet_length({'body' if as_json else f'shown_{listing.document}'})"
    so_far = f"OVER (ORDER BY {listing.order} ROWS UNBOUNDED PRECEDING)"
    # Without OFFSET the planner would make each text twice: once to measure it, once to send it.
    return text(f"""
        SELECT * FROM (
            SELECT CAST(sum({size}) {so_far} AS bigint) AS through, *
            FROM (
                SELECT {_identity(listing)}, guessed, {shown}
                FROM (SELECT *, CAST(sum({guess}) {so_far} AS bigint) AS guessed FROM ({listing.rows}) AS narrowed)
                    AS page
                WHERE guessed - {guess} < :page_bytes
                OFFSET 0
            ) AS written
        ) AS measured
        WHERE through - {size} < :left_bytes
        ORDER BY {listing.order}
    """)  # noqa: S608  # as above


def _json(listing: Listing) -> str:
    return f"CAST(row_to_json((SELECT shown FROM (SELECT {quoted(listing.columns)}) AS shown)) AS text) AS body"  # noqa: S608  # as above


def _csv(listing: Listing) -> str:
    return ", ".join(
        f'CAST("{column}" AS text) AS shown_{column}' if column == listing.document else f'"{column}" AS shown_{column}'
        for column in listing.columns
    )


def _tag(listing: Listing, media_type: str, rows: Sequence[Row[Any]], more: bool) -> str:
    what = [repr((listing.columns, media_type, more)), *(row.version for row in rows)]
    return f"{len(rows)}-{blake2b(chr(10).join(what).encode(), digest_size=12).hexdigest()}"


def _rows_of(tag: str) -> int:
    """How many rows a page with this tag has; 0 for one that is none of ours."""
    number = re.match("[0-9]{1,4}(?=-)", tag)
    return int(number[0]) if number else 0


def _last(listing: Listing, rows: Sequence[Row[Any]], more: bool) -> dict[str, Any] | None:
    return _place(listing, rows[-1]) if more and rows else None


def _place(listing: Listing, row: Row[Any]) -> dict[str, Any]:
    return {key: getattr(row, key) for key in listing.keys}


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
