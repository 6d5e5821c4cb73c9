"""The HTTP API with a real database: rows, pages, formats, errors, the token and the headers."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from httpx2 import Response
from psycopg2.errors import ReadOnlySqlTransaction
from sqlalchemy import text

from consumers.db.engine import engine, get_db, read_transaction
from consumers.errors import StoreUnavailable
from consumers.operations import (
    get_market_signals,
    get_portfolio_history,
    get_recent_signal_archives,
    insert_portfolio_history_snapshot,
    insert_signal_archive,
)
from consumers.web.api import app, router
from consumers.web.api import paging as api_pages
from tests.factories import INSTANT, a_signal

HISTORY = "/trading/portfolio-history"
ARCHIVES = "/trading/signal-archives"
SIGNALS = "/trading/signals"
_PROBLEM = "application/problem+json"


@pytest.fixture
def client(database_url: str) -> Iterator[TestClient]:
    with TestClient(app) as client:
        yield client


def _store_snapshot(moment: datetime, **overrides: object) -> int:
    amounts = {"balance": 9900.5, "total_invested": 0.1, "total_profit_loss": -3.25, "total_value": 9897.25}
    counts = {"open_positions": 1, "trade_count": 4}
    return insert_portfolio_history_snapshot({"timestamp": moment, **amounts, **counts, **overrides})


def _store_archive(moment: datetime, *signals: dict[str, Any], **overrides: object) -> int:
    return insert_signal_archive({"archived_at": moment, "signals": list(signals) or [a_signal()], **overrides})


def _as_json(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows of the operations with dates and times as ISO text."""
    return [
        {name: value.isoformat() if isinstance(value, date) else value for name, value in row.items()} for row in rows
    ]


def _comparable(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    times = ("timestamp", "archived_at", "created_at")
    return [
        {name: datetime.fromisoformat(value) if name in times else value for name, value in row.items()} for row in rows
    ]


def _pages(client: TestClient, url: str, at_most: int = 100) -> Iterator[list[dict[str, Any]]]:
    """Yield each page, following the Link headers."""
    for _ in range(at_most):
        answer = client.get(url)
        assert answer.status_code == 200, answer.text
        yield answer.json()
        if "next" not in answer.links:
            return
        url = answer.links["next"]["url"]
    raise AssertionError("the pages do not end")


def _all(client: TestClient, url: str) -> list[dict[str, Any]]:
    return [row for page in _pages(client, url) for row in page]


def _require_problem(answer: Response, status: int, *words: str) -> None:
    assert (answer.status_code, answer.headers["content-type"]) == (status, _PROBLEM), answer.text
    body = answer.json()
    assert (body["status"], body["type"]) == (status, "about:blank")
    assert [word for word in words if word not in body["detail"]] == []


def test_bodies_have_the_rows_of_the_operations(client: TestClient) -> None:
    """With the same columns in the same order and the same values; amounts are floats."""
    for number in range(5):
        moment = INSTANT + timedelta(hours=number)
        _store_snapshot(moment, portfolio_id=number, balance=0.1 + 0.2, total_value=123456789012.12345678)
        _store_archive(moment, a_signal(yes_price=0.1, amount=10**25), portfolio_id=None)

    for url, rows in ((HISTORY, get_portfolio_history(3)), (ARCHIVES, get_recent_signal_archives(3))):
        answer = client.get(url, params={"limit": 3})
        assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
        assert _comparable(answer.json()) == _comparable(_as_json(rows))
        assert [list(row) for row in answer.json()] == [list(row) for row in rows]
    assert {type(row["total_invested"]) for row in client.get(HISTORY).json()} == {float}


def test_pages_together_have_every_row_once(client: TestClient) -> None:
    """Also if dates and times are equal and only the ids of the rows differ."""
    for number in range(23):
        _store_snapshot(INSTANT + timedelta(minutes=number // 3), portfolio_id=number)
        _store_archive(INSTANT + timedelta(minutes=number // 3), portfolio_id=number)

    for url, rows in ((HISTORY, get_portfolio_history()), (ARCHIVES, get_recent_signal_archives())):
        pages = list(_pages(client, f"{url}?limit=5"))
        assert [len(page) for page in pages] == [5, 5, 5, 5, 3]
        assert [row["id"] for page in pages for row in page] == [row["id"] for row in rows]


def test_a_full_last_page_has_no_next(client: TestClient) -> None:
    for number in range(4):
        _store_snapshot(INSTANT + timedelta(minutes=number))
    assert [len(page) for page in _pages(client, f"{HISTORY}?limit=2")] == [2, 2]


def test_rows_inserted_between_two_pages_neither_repeat_nor_hide_others(client: TestClient) -> None:
    """New rows at the head, and old rows of an import, before and after the current page."""
    stored_before = {_store_snapshot(INSTANT + timedelta(minutes=2 * number)) for number in range(20)}
    seen: list[int] = []
    for number, page in enumerate(_pages(client, f"{HISTORY}?limit=3")):
        seen += [row["id"] for row in page]
        _store_snapshot(INSTANT + timedelta(days=1, minutes=number))
        _store_snapshot(INSTANT + timedelta(minutes=2 * number + 1))
        _store_snapshot(INSTANT + timedelta(minutes=39 - 2 * number), portfolio_id=7)

    assert len(seen) == len(set(seen))
    assert stored_before <= set(seen)


def test_operations_continue_after_the_last_row_of_a_page(database_url: str) -> None:
    """`after` takes the last dict of the previous page."""
    for number in range(7):
        _store_snapshot(INSTANT + timedelta(minutes=number))
        _store_archive(INSTANT + timedelta(minutes=number))
    for get in (
        get_portfolio_history,
        get_recent_signal_archives,
        lambda n, **rest: get_market_signals("510372", n, **rest),
    ):
        first = get(4)
        assert first + get(4, after=first[-1]) == get(None)


@pytest.mark.parametrize(
    "spelling", ["2025-10-26T02:30:00%2B01:00", "2025-10-26T02:30:00 01:00", "2025-10-26T01:30:00Z"]
)
def test_since_and_until_are_exact_in_the_repeated_hour_of_a_clock_change(client: TestClient, spelling: str) -> None:
    """In Berlin there were two times 02:30 on that day. A + that the client did not encode is accepted."""
    moments = [datetime(2025, 10, 26, 0, 30, tzinfo=UTC) + timedelta(minutes=30 * step) for step in range(4)]
    ids = [_store_snapshot(moment) for moment in moments]

    assert [row["id"] for row in client.get(f"{HISTORY}?since={spelling}").json()] == [ids[3], ids[2]]
    assert [row["id"] for row in client.get(f"{HISTORY}?until={spelling}").json()] == [ids[1], ids[0]]


def test_a_time_without_an_offset_is_in_the_servers_zone(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """The zone is HISTORY_TIMEZONE, as in the operations."""
    monkeypatch.setenv("HISTORY_TIMEZONE", "Asia/Tokyo")
    row_id = _store_snapshot(datetime(2025, 10, 20, 1))
    assert [row["id"] for row in client.get(f"{HISTORY}?since=2025-10-20T01:00&until=2025-10-20T01:00:01").json()] == [
        row_id
    ]


@pytest.mark.parametrize("daily", ["", "&daily=last"])
def test_since_and_until_find_snapshots_with_another_snapshot_date(client: TestClient, daily: str) -> None:
    """Rows are ordered by snapshot_date, which the caller may set, but filtered by their time."""
    day = timedelta(days=1)
    dates = [INSTANT.date() + days * day for days in (-30, -1, 0, 1, 30)]
    ids = [_store_snapshot(INSTANT, snapshot_date=dated, portfolio_id=number) for number, dated in enumerate(dates)]
    _store_snapshot(INSTANT + 3 * day)
    _store_snapshot(INSTANT - 3 * day)

    found = client.get(HISTORY + "?since=2026-11-22T12:00:00Z&until=2026-11-22T18:00:00Z" + daily).json()
    paged = _all(client, HISTORY + "?limit=2&since=2026-11-22T12:00:00Z&until=2026-11-22T18:00:00Z" + daily)

    assert [row["id"] for row in found] == ids[::-1]
    assert paged == found


def test_daily_lists_the_last_snapshot_of_each_portfolio_and_date(client: TestClient) -> None:
    """Also for rows without a portfolio, page by page, and with `until` at noon."""
    day, hour = timedelta(days=1), timedelta(hours=1)
    start = datetime(2026, 3, 1, 8, tzinfo=UTC)
    for number in range(10):
        for portfolio_id in (None, 1, 2, 7):
            if portfolio_id == 7 and number > 3:
                continue
            for step in range(3):
                _store_snapshot(start + number * day + step * 4 * hour, portfolio_id=portfolio_id)
    with get_db() as db:
        closes = text("""
            SELECT id FROM (
                SELECT DISTINCT ON (portfolio_id, snapshot_date) * FROM portfolio_history WHERE "timestamp" < :until
                ORDER BY portfolio_id, snapshot_date, "timestamp" DESC, id DESC) AS c
            ORDER BY snapshot_date DESC, "timestamp" DESC, id DESC
        """)
        expected = db.execute(closes, {"until": datetime(9000, 1, 1, tzinfo=UTC)}).scalars().all()
        before = db.execute(closes, {"until": start + 5 * day + 5 * hour}).scalars().all()

    assert len(expected) == 34
    assert [row["id"] for row in _all(client, f"{HISTORY}?daily=last")] == expected
    assert [row["id"] for row in _all(client, f"{HISTORY}?daily=last&limit=3")] == expected
    assert [row["id"] for row in _all(client, f"{HISTORY}?daily=last&limit=4&until=2026-03-06T13:00:00Z")] == before
    assert [row["id"] for row in _all(client, f"{HISTORY}?daily=last&limit=1&portfolio_id=7")] == [
        row["id"] for row in get_portfolio_history(daily="last", portfolio_id=7)
    ]
    assert len(get_portfolio_history(daily="last", portfolio_id=7)) == 4


def test_every_signal_of_a_market_is_found_newest_first(client: TestClient) -> None:
    """Several per archive, with a numeric market_id too, in the order of the archive, by the index."""
    for number in range(6):
        moment = INSTANT + timedelta(minutes=number)
        same = a_signal(market_id="77", reason=str(number))
        _store_archive(moment, same, a_signal(market_id="770"), same | {"market_id": 77}, same, portfolio_id=number % 2)

    found = client.get(f"{SIGNALS}?market_id=77").json()

    assert [(row["signal"]["reason"], row["position"]) for row in found] == [
        (str(number), position) for number in range(5, -1, -1) for position in (1, 3, 4)
    ]
    assert _all(client, f"{SIGNALS}?market_id=77&limit=4") == found
    assert _comparable(found) == _comparable(_as_json(get_market_signals("77")))
    assert {row["portfolio_id"] for row in client.get(f"{SIGNALS}?market_id=77&portfolio_id=1").json()} == {1}
    assert client.get(f"{SIGNALS}?market_id=7").json() == []
    with get_db() as db:
        db.execute(text("SET LOCAL enable_seqscan = off"))
        db.execute(text("SET LOCAL enable_indexscan = off"))
        plan = (
            "SELECT 1 FROM signal_archives WHERE jsonb_path_query_array(signals_data, '$[*].market_id') @> '[\"77\"]'"
        )
        assert "signal_archives_of_market" in str(db.execute(text(f"EXPLAIN {plan}")).scalars().all())


@pytest.mark.parametrize(
    "market_id", ["'; DROP TABLE signal_archives; --", '"] || true', "%", "Ünï🌉", "01", "1e2", "9" * 200]
)
def test_a_market_id_is_compared_as_text(client: TestClient, market_id: str) -> None:
    _store_archive(INSTANT, a_signal(market_id=market_id), a_signal(market_id="1"))
    found = client.get(SIGNALS, params={"market_id": market_id}).json()
    assert [row["signal"]["market_id"] for row in found] == [market_id]


def test_a_page_of_large_archives_ends_early(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each page has at least one row and, unless it is the last, a Link to the next one."""
    monkeypatch.setattr(api_pages, "PAGE_BYTES", 2500)
    for number in range(6):
        _store_archive(INSTANT + timedelta(minutes=number), *(a_signal(market_id="5", number=n) for n in range(3)))
    archives = list(_pages(client, f"{ARCHIVES}?limit=100"))
    signals = list(_pages(client, f"{SIGNALS}?market_id=5&limit=100"))

    assert 1 < len(archives) <= 7
    assert 1 < len(signals) <= 19
    assert [row["id"] for page in archives for row in page] == [row["id"] for row in get_recent_signal_archives()]
    assert len({(row["archive_id"], row["position"]) for page in signals for row in page}) == 18


@pytest.mark.parametrize("form", ["json", "csv"])
def test_a_page_is_limited_by_its_text_and_not_by_its_stored_size(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """Repetitive signals take a hundredth in the table. Only the last row of a page may exceed the limit."""
    monkeypatch.setattr(api_pages, "PAGE_BYTES", 160_000)
    for number in range(6):
        reasons = [a_signal(market_id="5", reason="x" * 40_000) for _ in range(3 if number % 2 else 1)]
        _store_archive(INSTANT + timedelta(minutes=number), *reasons)
    for url, row_bytes in ((f"{ARCHIVES}?limit=100", 125_000), (f"{SIGNALS}?market_id=5&limit=100", 50_000)):
        seen: list[str] = []
        following: str | None = f"{url}&format={form}"
        while following is not None:
            answer = client.get(following)
            assert len(answer.content) < 160_000 + row_bytes
            unchanged = client.get(following, headers={"If-None-Match": answer.headers["etag"]})
            assert (unchanged.status_code, unchanged.headers.get("link")) == (304, answer.headers.get("link"))
            rows = answer.json() if form == "json" else list(csv.DictReader(io.StringIO(answer.text)))
            assert rows
            seen += [str((row.get("id") or row["archive_id"], row.get("position"))) for row in rows]
            following = answer.links["next"]["url"] if "next" in answer.links else None
        assert len(set(seen)) == len(seen) == (6 if url.startswith(ARCHIVES) else 12)


def test_a_page_that_is_read_in_steps_is_the_same_page(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows with a large stored size are read in several steps and returned as one page."""
    for number in range(9):
        _store_archive(INSTANT + timedelta(minutes=number), a_signal(reason="x" * 4_000))
    whole = client.get(f"{ARCHIVES}?limit=7")
    monkeypatch.setattr(api_pages, "guessed_bytes", lambda _: f"({api_pages.PAGE_BYTES} / 2)")
    in_steps = client.get(f"{ARCHIVES}?limit=7")
    assert (in_steps.text, in_steps.headers["etag"], in_steps.links) == (whole.text, whole.headers["etag"], whole.links)
    assert len(in_steps.json()) == 7


def test_an_unchanged_page_is_304_and_any_change_is_not(client: TestClient) -> None:
    """A late row in the middle, a changed row, a deleted row, and a row that begins the next page change the tag."""
    for number in range(4):
        _store_snapshot(INSTANT + timedelta(hours=number))
    url = f"{HISTORY}?limit=4"

    def tag_after(statement: str | None = None) -> str:
        if statement is not None:
            with get_db() as db:
                db.execute(text(statement))
        return str(client.get(url).headers["etag"])

    first = tag_after()
    unchanged = client.get(url, headers={"If-None-Match": f'"x", {first}'})
    tags = [first]
    _store_snapshot(INSTANT + timedelta(minutes=90))
    tags.append(tag_after())
    tags.append(tag_after("UPDATE portfolio_history SET balance = 1 WHERE id = 3"))
    tags.append(tag_after("DELETE FROM portfolio_history WHERE id = 1"))
    tags.append(tag_after("DELETE FROM portfolio_history WHERE id = 2"))

    assert (unchanged.status_code, unchanged.text, unchanged.headers["etag"]) == (304, "", first)
    assert len(set(tags)) == len(tags)
    for old in tags[:-1]:
        assert client.get(url, headers={"If-None-Match": old}).status_code == 200
    for known in (tags[-1], "*"):
        unchanged = client.get(url, headers={"If-None-Match": known})
        assert (unchanged.status_code, unchanged.text, unchanged.headers["etag"]) == (304, "", tags[-1])
    assert client.get(f"{url}&format=csv", headers={"If-None-Match": tags[-1]}).status_code == 200


def test_a_304_reads_no_documents_and_keeps_the_link(client: TestClient) -> None:
    for number in range(3):
        _store_archive(INSTANT + timedelta(hours=number))
    first = client.get(f"{ARCHIVES}?limit=2")
    again = client.get(f"{ARCHIVES}?limit=2", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.headers["link"]) == (304, first.headers["link"])


@pytest.mark.parametrize(
    ("accept", "parameters", "media_type"),
    [
        ("text/csv", {}, "text/csv"),
        ("text/csv;q=0.5, application/json;q=0.4", {}, "text/csv"),
        ("application/json, text/csv;q=0.9", {}, "application/json"),
        ("*/*", {}, "application/json"),
        ("text/*", {}, "text/csv"),
        ("text/html,application/xml;q=0.9,*/*;q=0.8", {}, "application/json"),
        ("text/csv", {"format": "json"}, "application/json"),
        ("application/json", {"format": "csv"}, "text/csv"),
        (";;,q=,text/csv;q=x", {}, "text/csv"),
    ],
)
def test_the_accept_header_chooses_between_json_and_csv(
    client: TestClient, accept: str, parameters: dict[str, str], media_type: str
) -> None:
    """The parameter `format` overrides it."""
    answer = client.get(HISTORY, params=parameters, headers={"Accept": accept})
    assert answer.headers["content-type"].partition(";")[0] == media_type
    assert "Accept" in answer.headers["vary"]


def test_csv_has_the_same_rows_and_no_formulas(client: TestClient) -> None:
    """Amounts are exact. Text that a spreadsheet would run as a formula is quoted, a negative number is not."""
    for number in range(3):
        _store_snapshot(INSTANT + timedelta(hours=number), total_profit_loss="-0.00000001")
        _store_archive(INSTANT + timedelta(hours=number))
    with get_db() as db:
        db.execute(text("UPDATE portfolio_history SET source = '=HYPERLINK(\"http://x\")' WHERE id = 3"))
    answer = client.get(f"{HISTORY}?format=csv&limit=2")
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    archives = list(csv.DictReader(io.StringIO(client.get(f"{ARCHIVES}?format=csv").text)))

    expected = get_portfolio_history(2)
    assert [(int(row["id"]), float(row["balance"])) for row in rows] == [
        (row["id"], row["balance"]) for row in expected
    ]
    assert (rows[0]["source"], rows[0]["total_profit_loss"], rows[0]["sequence"]) == (
        '\'=HYPERLINK("http://x")',
        "-0.00000001",
        "",
    )
    assert "format=csv" in answer.links["next"]["url"]
    assert answer.headers["content-disposition"] == 'attachment; filename="portfolio-history.csv"'
    assert json.loads(archives[0]["signals_data"]) == [a_signal()]


@pytest.mark.parametrize(
    ("url", "status", "words"),
    [
        (f"{HISTORY}?limit=0", 422, ["limit: ", "greater than or equal to 1"]),
        (f"{HISTORY}?limit=1001", 422, ["limit: ", "1000"]),
        (f"{HISTORY}?limit=ten", 422, ["limit: "]),
        (f"{HISTORY}?limti=10", 422, ["limti: "]),
        (f"{HISTORY}?portfolio_id=9223372036854775808", 422, ["portfolio_id: "]),
        (f"{HISTORY}?since=yesterday", 422, ["since: is not a time such as"]),
        (f"{HISTORY}?since=1700000000", 422, ["since: "]),
        (f"{HISTORY}?until=" + "9" * 300, 422, ["until: "]),
        (f"{HISTORY}?daily=first", 422, ["daily: "]),
        (f"{HISTORY}?since=9999-12-31T23:59:59-12:00", 422, ["since: is too close"]),
        (f"{HISTORY}?daily=last&until=0001-01-01T00:00%2B00:01", 422, ["until: is too close"]),
        (f"{ARCHIVES}?until=9999-12-31T23:59:59-12:00", 422, ["until: is too close"]),
        (f"{SIGNALS}?market_id=1&since=0001-01-01T00:00%2B00:01", 422, ["since: is too close"]),
        (f"{HISTORY}?limit=1&limit=2", 422, ["limit: is given more than once"]),
        (f"{HISTORY}?=1&=2", 422, ["(no name): is given more than once"]),
        (f"{HISTORY}?=1", 422, ["(no name): Extra inputs are not permitted"]),
        ("/page/daily?portfolio=1&portfolio=2", 422, ["portfolio: is given more than once"]),
        (f"{HISTORY}?cursor=" + "A" * 201, 422, ["cursor: "]),
        (f"{SIGNALS}", 422, ["market_id: "]),
        (f"{SIGNALS}?market_id=%00", 422, ["market_id: "]),
        (f"{SIGNALS}?market_id=" + "9" * 201, 422, ["market_id: "]),
        (f"{HISTORY}?x=" + "9" * 5000, 414, ["4096 bytes"]),
        (f"{HISTORY}/", 404, []),
        ("/docs", 404, []),
    ],
)
def test_errors_are_answered_with_problem_details(client: TestClient, url: str, status: int, words: list[str]) -> None:
    _require_problem(client.get(url), status, *words)


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
def test_nothing_can_be_written(client: TestClient, method: str) -> None:
    """Other methods get 405, and the API's database sessions are read-only."""
    answer = client.request(method, HISTORY)
    _require_problem(answer, 405)
    assert answer.headers["allow"] == "GET"
    with pytest.raises(StoreUnavailable) as caught, read_transaction() as db:
        db.execute(text("INSERT INTO event_outcomes (job_id, outcome) VALUES ('x', 'duplicate')"))
    assert isinstance(getattr(caught.value.__cause__, "orig", None), ReadOnlySqlTransaction)


def test_head_is_get_without_the_body(client: TestClient) -> None:
    _store_snapshot(INSTANT)
    for url in ("/healthz", "/readyz", HISTORY, f"{HISTORY}?limit=0", "/", "/openapi.json", "/nowhere"):
        get, head = client.get(url), client.head(url)
        assert (head.status_code, head.content) == (get.status_code, b"")
        assert head.headers == get.headers


def test_on_loopback_without_a_token_only_addresses_and_localhost_are_accepted(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a token, or on another address, any host name is accepted."""
    for address, host, status in (
        ("127.0.0.1", "evil.example", 421),
        ("127.0.0.1", "localhost:8000", 200),
        ("[::1]", "evil.example", 421),
        ("192.0.2.1", "history.example", 200),
    ):
        with TestClient(app, base_url=f"http://{address}") as client:
            assert client.get("/healthz", headers={"Host": host}).status_code == status
    monkeypatch.setenv("HISTORY_API_TOKEN", "s3cret-token")
    with TestClient(app, base_url="http://127.0.0.1") as client:
        assert client.get("/healthz", headers={"Host": "history.example"}).status_code == 200


def _tampered(cursor: str) -> list[str]:
    flipped = [cursor[:n] + ("A" if cursor[n] != "A" else "B") + cursor[n + 1 :] for n in range(len(cursor))]
    return [*flipped, cursor[:-1], cursor + "A", cursor[1:], "", "=", "%00", "🌉", "e30", "../..", "null"]


def test_a_changed_cursor_is_an_error(client: TestClient) -> None:
    """Each change of one character, and a cursor of another endpoint or another value of daily."""
    for number in range(3):
        _store_snapshot(INSTANT + timedelta(hours=number))
        _store_archive(INSTANT + timedelta(hours=number))
    link = client.get(f"{HISTORY}?limit=1").links["next"]["url"]
    cursor = link.partition("cursor=")[2]

    statuses = {client.get(HISTORY, params={"cursor": one}).status_code for one in _tampered(cursor)}

    assert statuses == {422}
    for url in (f"{HISTORY}?daily=last", f"{ARCHIVES}?limit=1", f"{SIGNALS}?market_id=1"):
        _require_problem(client.get(f"{url}&cursor={cursor}"), 422, "cursor: belongs to another endpoint")


def test_answers_have_security_headers(client: TestClient) -> None:
    """Errors too. No other origin may read them by default."""
    for url in ("/healthz", HISTORY, f"{HISTORY}?limit=0", "/nowhere"):
        headers = client.get(url, headers={"Origin": "https://evil.example"}).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"
        assert "access-control-allow-origin" not in headers
    assert client.get(HISTORY).headers["cache-control"] == "private, no-cache"


def test_the_origins_of_the_setting_may_read_the_api(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HISTORY_API_CORS_ORIGINS", "https://a.example, https://b.example")
    with TestClient(app) as client:
        allowed = client.get(HISTORY, headers={"Origin": "https://b.example"}).headers
        preflight = client.options(
            HISTORY,
            headers={
                "Origin": "https://a.example",
                "Access-Control-Request-Method": "GET",
                "Access-Control-Request-Headers": "authorization",
            },
        )
        other = client.get(HISTORY, headers={"Origin": "https://c.example"}).headers
    assert allowed["access-control-allow-origin"] == "https://b.example"
    assert "Link" in allowed["access-control-expose-headers"]
    assert preflight.status_code == 200
    assert "access-control-allow-origin" not in other


@pytest.mark.parametrize(
    "given",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer wrong",
        "Basic czNjcmV0",
        "Bearer s3cret-token2",
        "Bearer s3cret-toke",
        "Bearer \xe9",
    ],
)
def test_a_missing_or_wrong_token_gives_401(
    database_url: str, monkeypatch: pytest.MonkeyPatch, given: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """It is checked before the parameters. The health paths need no token."""
    monkeypatch.setenv("HISTORY_API_TOKEN", "s3cret-token")
    headers: dict[bytes, bytes] = {} if given is None else {b"Authorization": given.encode("latin-1")}
    with TestClient(app) as client:
        for url in (HISTORY, f"{ARCHIVES}?limit=0", SIGNALS):
            answer = client.get(url, headers=headers)
            _require_problem(answer, 401)
            assert answer.headers["www-authenticate"] == "Bearer"
            assert "s3cret" not in answer.text
        assert [client.get(url).status_code for url in ("/healthz", "/readyz")] == [200, 200]
        assert client.get(HISTORY, headers={"Authorization": "Bearer s3cret-token"}).status_code == 200
    assert "s3cret" not in caplog.text


def test_the_app_does_not_start_with_a_token_that_no_header_can_contain(monkeypatch: pytest.MonkeyPatch) -> None:
    from producers.errors import SettingsError

    monkeypatch.setenv("HISTORY_API_TOKEN", "two words")
    with (
        pytest.raises(SettingsError, match="^HISTORY_API_TOKEN: must be ASCII without blanks") as caught,
        TestClient(app),
    ):
        pass
    assert "two" not in str(caught.value)


def test_another_app_can_include_the_router(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a prefix; pages, problem details and the token work there too."""
    host = FastAPI()
    host.include_router(router, prefix="/bot")
    for number in range(3):
        _store_snapshot(INSTANT + timedelta(hours=number))
    with TestClient(host) as client:
        assert len(_all(client, f"/bot{HISTORY}?limit=2")) == 3
        _require_problem(client.get(f"/bot{HISTORY}?limit=0"), 422)
        monkeypatch.setenv("HISTORY_API_TOKEN", "s3cret-token")
        _require_problem(client.get(f"/bot{HISTORY}"), 401)


@pytest.mark.parametrize(
    ("url", "failing"),
    [
        (HISTORY, "consumers.web.api.history_endpoints.read_page"),
        ("/readyz", "consumers.db.state_queries.check_tables_readable"),
        ("/page/health", "consumers.db.state_queries.last_stored"),
    ],
)
def test_an_unexpected_error_is_answered_without_details(
    database_url: str, monkeypatch: pytest.MonkeyPatch, url: str, failing: str
) -> None:
    """It is a defect, and not a server that cannot be read. The server's log gets it unchanged."""

    def fail(*_: object) -> None:
        raise RuntimeError("the password is s3cret")

    monkeypatch.setattr(failing, fail)
    with TestClient(app, raise_server_exceptions=False) as client:
        answer = client.get(url)
    _require_problem(answer, 500)
    assert "s3cret" not in answer.text
    with TestClient(app) as client, pytest.raises(RuntimeError, match="^the password is s3cret$"):
        client.get(url)


def test_healthz_and_readyz_report_the_process_and_its_servers(
    client: TestClient, redis: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """/readyz needs the tables, and Redis only if it is set."""
    ready = client.get("/readyz").json()
    monkeypatch.setenv("REDIS_URL", "redis://me:s3cret@127.0.0.1:1")
    without_redis = client.get("/readyz")
    monkeypatch.delenv("REDIS_URL")
    assert (ready, client.get("/readyz").json()) == (
        {"status": "ok", "database": "ok", "redis": "ok"},
        {"status": "ok", "database": "ok"},
    )
    _require_problem(without_redis, 503, "redis")
    assert "s3cret" not in without_redis.text
    with engine().begin() as db:
        db.execute(text("DROP TABLE signal_archives"))
    _require_problem(client.get("/readyz"), 503, "database")
    _require_problem(client.get(ARCHIVES), 503)
    assert client.get("/healthz").json() == {"status": "ok"}


def test_the_api_needs_the_select_privilege_only(
    client: TestClient, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the two history tables."""
    from sqlalchemy import make_url

    from consumers.db import engine

    _store_snapshot(INSTANT)
    _store_archive(INSTANT)
    with get_db() as db:
        db.execute(text("CREATE ROLE only_selects LOGIN"))
        db.execute(text("GRANT SELECT ON portfolio_history, signal_archives TO only_selects"))
    try:
        url = make_url(database_url).set(username="only_selects").render_as_string(hide_password=False)
        monkeypatch.setenv("DATABASE_URL", url)
        engine.engine().dispose()
        engine.engine.cache_clear()
        urls = (HISTORY, f"{HISTORY}?daily=last", ARCHIVES, f"{SIGNALS}?market_id=510372")
        assert [len(client.get(one).json()) for one in urls] == [1, 1, 1, 1]
        assert client.get("/readyz").status_code == 200
    finally:
        engine.reader().dispose()
        engine.engine().dispose()
        engine.engine.cache_clear()
        monkeypatch.setenv("DATABASE_URL", database_url)
        with get_db() as db:
            db.execute(text("DROP OWNED BY only_selects"))
            db.execute(text("DROP ROLE only_selects"))
