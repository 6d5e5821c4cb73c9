"""All queries of rows, compared with sorting and filtering of the same random rows in Python."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from random import Random
from typing import Any, NamedTuple

import pytest
from sqlalchemy import Connection, event, text

from consumers.db import archive_queries, portfolio_queries
from consumers.db.archive_queries import archives, market_signals
from consumers.db.engine import get_db
from consumers.db.portfolio_queries import closes, snapshots
from consumers.db.queries import Filter, Query, guessed_bytes

BEGIN = datetime(2026, 1, 29, 23, 30, tzinfo=UTC)
PORTFOLIOS = (None, 2, 5, 9)


class Snapshot(NamedTuple):
    """Row of portfolio_history. Two rows may have the same date and time."""

    date: date
    at: datetime
    id: int
    portfolio: int | None


class Archive(NamedTuple):
    """Row of signal_archives."""

    at: datetime
    id: int
    portfolio: int | None
    month: str
    markets: list[Any]


@pytest.fixture
def db(database_url: str) -> Iterator[Connection]:
    with get_db() as connection:
        yield connection


def insert_snapshots(db: Connection, count: int = 150) -> list[Snapshot]:
    """Insert rows of four days. A third has a date that is not that of its time in any offset."""
    random, rows = Random(1), []
    for row_id in range(1, count + 1):
        at = BEGIN + timedelta(hours=random.randrange(96))
        day = at.date() + timedelta(random.choice([-30, -2, -1, 0, 0, 0, 1, 2, 30]))
        rows.append(Snapshot(day, at, row_id, random.choice(PORTFOLIOS)))
    statement = text("""
        INSERT INTO portfolio_history (id, event_id, source, portfolio_id, snapshot_date, "timestamp", balance,
            total_invested, total_profit_loss, total_value, open_positions, trade_count)
        VALUES (:id, gen_random_uuid(), 'x', :portfolio, :date, :at, :id, 1000, 100000, 10000000, 0, 0)
    """)
    db.execute(statement, [row._asdict() for row in rows])
    return rows


def insert_archives(db: Connection, count: int = 300) -> list[Archive]:
    """Insert rows of four days around the end of a month, some in the month of another offset."""
    random, rows = Random(2), []
    for row_id in range(1, count + 1):
        at = BEGIN + timedelta(hours=random.randrange(96))
        month = f"{at + timedelta(hours=random.randrange(-15, 16)):%Y-%m}"
        markets = [random.choice(["7", 7, "8", 8.5, None]) for _ in range(random.randrange(1, 5))]
        rows.append(Archive(at, row_id, random.choice(PORTFOLIOS), month, markets))
    statement = text("""
        INSERT INTO signal_archives (id, event_id, source, portfolio_id, archived_at, archive_month, signals_count,
            signals_data)
        VALUES (:id, gen_random_uuid(), 'x', :portfolio, :at, :month, :count, CAST(:signals AS jsonb))
    """)
    for row in rows:
        signals = json.dumps([{"market_id": one, "n": n} for n, one in enumerate(row.markets)])
        db.execute(statement, row._asdict() | {"count": len(row.markets), "signals": signals})
    return rows


def filters(places: list[dict[str, Any]]) -> Iterator[Filter]:
    """Yield the filter of all rows, and filters of random parts, half of them behind one of the places."""
    yield Filter()
    for seed in range(60):
        random = Random(seed)
        since, until = sorted(BEGIN + timedelta(hours=random.randrange(97)) for _ in range(2))
        yield Filter(
            limit=random.choice([None, 1, 5, 500]),
            portfolio_id=random.choice([None, *PORTFOLIOS[1:], 404]),
            since=random.choice([None, since]),
            until=random.choice([None, until]),
            after=random.choice([None, random.choice(places)]),
        )


def in_filter(wanted: Filter, at: datetime, portfolio: int | None) -> bool:
    if wanted.portfolio_id is not None and portfolio != wanted.portfolio_id:
        return False
    return (wanted.since is None or at >= wanted.since) and (wanted.until is None or at < wanted.until)


def found(db: Connection, query: Query, *names: str) -> list[tuple[Any, ...]]:
    """Return these columns of the rows. Both statements of the query must have the same rows."""
    rows, exact = (
        [tuple(row[name] for name in names) for row in db.execute(statement, dict(query.values)).mappings()]
        for statement in (query.statement(), query.exact_statement())
    )
    assert rows == exact
    return rows


def page(rows: list[Any], wanted: Filter) -> list[Any]:
    return sorted(rows, reverse=True)[: wanted.limit]


def test_a_page_has_the_newest_matching_snapshots_after_the_cursor(db: Connection) -> None:
    """They are ordered by date, then time, then id, whatever date a caller has given."""
    rows = insert_snapshots(db)
    places = [{"snapshot_date": row.date, "timestamp": row.at, "id": row.id} for row in rows]
    for wanted in filters(places):
        chosen = [(row.date, row.at, row.id) for row in rows if in_filter(wanted, row.at, row.portfolio)]
        if wanted.after:
            chosen = [row for row in chosen if row < tuple(wanted.after.values())]
        assert found(db, snapshots(wanted), "snapshot_date", "timestamp", "id") == page(chosen, wanted), wanted


def test_closes_are_the_last_of_each_portfolio_and_date_in_the_period(db: Connection) -> None:
    """Whether a row is a close is decided before the place of the page is."""
    rows = insert_snapshots(db)
    places = [{"snapshot_date": row.date, "timestamp": row.at, "id": row.id} for row in rows]
    for wanted in filters(places):
        among = sorted(row for row in rows if in_filter(wanted, row.at, row.portfolio))
        last = {(row.portfolio, row.date): row[:3] for row in among}
        chosen = [row for row in last.values() if not wanted.after or row < tuple(wanted.after.values())]
        assert found(db, closes(wanted), "snapshot_date", "timestamp", "id") == page(chosen, wanted), wanted


def test_a_page_has_the_newest_matching_archives_after_the_cursor(db: Connection) -> None:
    """They are ordered by time, then id."""
    rows = insert_archives(db)
    places = [{"archived_at": row.at, "id": row.id} for row in rows]
    for wanted in filters(places):
        chosen = [(row.at, row.id) for row in rows if in_filter(wanted, row.at, row.portfolio)]
        if wanted.after:
            chosen = [row for row in chosen if row < tuple(wanted.after.values())]
        assert found(db, archives(wanted), "archived_at", "id") == page(chosen, wanted), wanted


@pytest.mark.parametrize(("market_id", "values"), [("7", ("7", 7)), ("8", ("8",)), ("8.5", ()), ("9", ())])
def test_signals_of_a_market_have_its_id_as_text_or_as_number(
    db: Connection, market_id: str, values: tuple[Any, ...]
) -> None:
    """They are ordered by the time and id of their archive, newest first, and in it as they were recorded."""
    rows = insert_archives(db)
    keys = [(row.at, row.id, n) for row in rows for n in range(1, len(row.markets) + 1)]
    places = [dict(zip(("archived_at", "archive_id", "position"), key, strict=True)) for key in keys]
    for wanted in filters(places):
        chosen = [
            (row.at, row.id, -n)
            for row in rows
            if in_filter(wanted, row.at, row.portfolio)
            for n, market in enumerate(row.markets, 1)
            if market in values
        ]
        if wanted.after:
            at, archive_id, position = wanted.after.values()
            chosen = [one for one in chosen if one < (at, archive_id, -position)]
        expected = [(at, row_id, -n) for at, row_id, n in page(chosen, wanted)]
        assert found(db, market_signals(market_id, wanted), "archived_at", "archive_id", "position") == expected, wanted


def test_portfolios_are_the_lowest_numbers_with_their_first_and_last_time(
    db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows without a number follow, if there are any. First and last are by date, then time."""
    assert portfolio_queries.portfolios(db) == []
    rows = sorted(insert_snapshots(db))
    for most, expected in ((200, [2, 5, 9, None]), (2, [2, 5, None])):
        monkeypatch.setattr(portfolio_queries, "MOST_PORTFOLIOS", most)
        times = {number: [row.at for row in rows if row.portfolio == number] for number in expected}
        assert portfolio_queries.portfolios(db) == [
            (number, times[number][0], times[number][-1]) for number in expected
        ]
        ages = portfolio_queries.newest_snapshot_ages(db, most)
        now = datetime.now(UTC)
        assert [number for number, _ in ages] == expected
        assert all(abs((now - times[number][-1]).total_seconds() - age) < 60 for number, age in ages)
    db.execute(text("DELETE FROM portfolio_history WHERE portfolio_id IS NULL"))
    assert [one.portfolio for one in portfolio_queries.portfolios(db)] == [2, 5]
    assert portfolio_queries.extent(db, None) is None


@pytest.mark.parametrize("portfolio", [None, 5])
def test_daily_closes_are_the_newest_dates_in_the_period_oldest_first(
    db: Connection, monkeypatch: pytest.MonkeyPatch, portfolio: int | None
) -> None:
    """The first and the last date of the period are included."""
    last = {row.date: row.id for row in sorted(insert_snapshots(db)) if row.portfolio == portfolio}
    dates = sorted(last)
    for most, (first, end) in ((5000, (dates[1], dates[-2])), (3, portfolio_queries.ALL_DATES)):
        monkeypatch.setattr(portfolio_queries, "MOST_DAYS", most)
        expected = [(last[day], day) for day in dates if first <= day <= end][-most:]
        rows = portfolio_queries.daily_closes(db, portfolio, "equity", (first, end))
        assert [(row.id, row.snapshot_date) for row in rows] == expected
        assert [row.worth for row in rows] == [row.id + 1000 + 100000 for row in rows]
        assert [row.balance for row in rows] == [row.id for row in rows]


def test_months_are_newest_first_with_their_number_of_archives(db: Connection) -> None:
    """A month without archives is left out."""
    assert archive_queries.months(db) == []
    rows = insert_archives(db)
    db.execute(text("UPDATE signal_archives SET archive_month = '2025-11' WHERE id = 1"))
    months = ["2025-11", *(row.month for row in rows[1:])]
    expected = [{"month": one, "archives": months.count(one)} for one in sorted(set(months), reverse=True)]
    assert len(expected) == 3
    assert archive_queries.months(db) == expected


@pytest.mark.parametrize("month", [date(2026, 1, 1), date(2026, 2, 1)])
def test_archives_of_a_month_are_newest_first_before_the_cursor_or_from_it_on(db: Connection, month: date) -> None:
    """A listing begins after the cursor, a search at it. The search reads its documents in the same order."""
    rows = insert_archives(db)
    of_month = sorted(((row.at, row.id) for row in rows if row.month == f"{month:%Y-%m}"), reverse=True)
    for n in (0, 3, len(of_month) - 2):
        for limit in (2, 100):
            listed = archive_queries.archives_of_month(db, month, of_month[n], limit)
            assert [(row["archived_at"], row["id"]) for row in listed] == of_month[n + 1 :][:limit]
            searched = list(archive_queries.archives_with_signals(db, month, of_month[n], limit))
            assert [(row.archived_at, row.id) for row in searched] == of_month[n:][:limit]
    one = searched[0]
    row = rows[one.id - 1]
    assert (one.portfolio, json.loads(one.signals)[0]["market_id"]) == (row.portfolio, row.markets[0])
    assert archive_queries.archive(db, one.id) == one
    assert archive_queries.archive(db, 404) is None


def test_a_search_reads_at_most_50_archives_or_about_a_mebibyte_of_them_at_a_time(db: Connection) -> None:
    """Its memory does not grow with the number of archives. An archive that is larger than that is read alone."""
    characters = [2_000_000] * 5 + [10] * 60 + [2_000_000, 10_000_000, 10]
    statement = text("""
        INSERT INTO signal_archives (id, event_id, source, archived_at, archive_month, signals_count, signals_data)
        VALUES (:id, gen_random_uuid(), 'x', :at, '2026-02', 1,
            jsonb_build_array(jsonb_build_object('text', repeat('x', :characters))))
    """)
    newest = datetime(2026, 2, 10, tzinfo=UTC)
    for row_id, count in enumerate(characters):
        db.execute(statement, {"id": row_id, "at": newest - timedelta(minutes=row_id), "characters": count})
    sizes = text(f"SELECT {guessed_bytes('signals_data')} FROM signal_archives ORDER BY id")
    expected: list[list[int]] = [[]]
    for size in db.scalars(sizes):
        if expected[-1] and (len(expected[-1]) == 50 or sum(expected[-1]) + size > 2**20):
            expected.append([])
        expected[-1].append(size)
    read: list[list[int]] = []

    def note(_db: Any, _cursor: Any, _statement: str, parameters: Any, *_: Any) -> None:
        if "ids" in parameters:
            read.append(parameters["ids"])

    event.listen(db, "before_cursor_execute", note)
    found = list(archive_queries.archives_with_signals(db, date(2026, 2, 1), (newest, 0), 1000))
    assert [one.id for one in found] == [*range(len(characters))]
    assert [len(ids) for ids in read] == [len(sizes) for sizes in expected]
    assert 50 in map(len, read)
    assert [len(characters) - 2] in read


def test_the_exact_statement_gives_the_document_as_text_with_every_digit(db: Connection) -> None:
    """As a number it would lose digits."""
    row = insert_archives(db, 1)[0]
    number = "0.12345678901234567890123"
    db.execute(text(f"""UPDATE signal_archives SET signals_data = '[{{"market_id": "7", "price": {number}}}]'"""))
    for query, name in ((archives(Filter()), "signals_data"), (market_signals("7", Filter()), "signal")):
        (found,) = db.execute(query.exact_statement(), dict(query.values)).mappings()
        assert isinstance(found[name], str)
        assert number in found[name]
        assert found["archived_at"] == row.at
