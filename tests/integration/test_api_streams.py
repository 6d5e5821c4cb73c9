"""All rows as a stream of NDJSON from the API: the rows of the CLI, page by page, and a visible end if one fails."""

from __future__ import annotations

import csv
import io
import json
import re
import socket
from collections.abc import Callable, Iterator
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from httpx2 import Response
from sqlalchemy import text

from consumers.cli import app as cli
from consumers.db.engine import get_db, reader
from consumers.db.portfolio_queries import snapshots
from consumers.db.queries import Filter
from consumers.errors import StoreUnavailable
from consumers.operations import insert_portfolio_history_snapshot, insert_signal_archive
from consumers.web.api import app, create_app, history_endpoints, paging
from tests.factories import INSTANT, a_signal
from tests.nginx import Kind, web_servers
from tests.page_app import serving

HISTORY = "/trading/portfolio-history"
ARCHIVES = "/trading/signal-archives"
NDJSON = "application/x-ndjson"
HOSTILE = '\r\n"},{"id": 1}\u2028\x85\x9b31m ünï🌉 \\u0041'

pytestmark = pytest.mark.usefixtures("database_url")


@pytest.fixture
def client(database_url: str) -> Iterator[TestClient]:
    with TestClient(app) as client:
        yield client


def _store(number: int) -> None:
    for step in range(number):
        moment = INSTANT + timedelta(minutes=step)
        amounts = dict.fromkeys(("total_invested", "total_profit_loss", "total_value"), "-0.00000001")
        counts = {"open_positions": step, "trade_count": 0, "portfolio_id": None if step % 2 else step}
        insert_portfolio_history_snapshot(
            {"timestamp": moment, "balance": Decimal("123456789012.10000001"), **amounts, **counts}
        )
        signals = [a_signal(reason=HOSTILE, price=Decimal("0.10000000000000000001"))]
        insert_signal_archive({"archived_at": moment, "signals": signals, "portfolio_id": counts["portfolio_id"]})


def _ids(answer: Response | httpx.Response) -> list[int]:
    assert (answer.status_code, answer.headers["content-type"]) == (200, NDJSON), answer.text
    return [json.loads(line)["id"] for line in answer.text.splitlines()]


@pytest.mark.parametrize(("url", "command"), [(HISTORY, "history"), (ARCHIVES, "archives")])
def test_a_stream_is_the_output_of_the_command(
    client: TestClient,
    monkeypatch: pytest.MonkeyPatch,
    capfdbinary: pytest.CaptureFixture[bytes],
    url: str,
    command: str,
) -> None:
    """Byte by byte, over several pages, by parameter and by Accept header."""
    monkeypatch.setattr(history_endpoints, "MAX_LIMIT", 3)
    _store(8)
    cli([command, "--ndjson"], standalone_mode=False)
    printed = capfdbinary.readouterr().out

    by_parameter, by_header = client.get(f"{url}?format=ndjson"), client.get(url, headers={"Accept": NDJSON})

    assert by_parameter.content == by_header.content == printed
    assert printed.count(b"\n") == 8
    assert by_parameter.headers["content-type"] == NDJSON
    assert by_parameter.headers["content-disposition"] == f'attachment; filename="{url.rpartition("/")[2]}.ndjson"'
    assert "etag" not in by_parameter.headers


def test_with_a_limit_ndjson_is_a_page_like_the_others(client: TestClient) -> None:
    """It has a tag and a link to the next page."""
    _store(5)
    for url in (HISTORY, ARCHIVES):
        pages = [client.get(f"{url}?format=ndjson&limit=2")]
        while "next" in pages[-1].links:
            pages.append(client.get(pages[-1].links["next"]["url"]))
        assert [len(_ids(page)) for page in pages] == [2, 2, 1]
        tag = pages[0].headers["etag"]
        assert client.get(f"{url}?format=ndjson&limit=2", headers={"If-None-Match": tag}).status_code == 304
        assert client.get(f"{url}?limit=2", headers={"If-None-Match": tag}).status_code == 200
        # A stream can continue behind a page.
        following = pages[0].links["next"]["url"].replace("limit=2", "")
        assert _ids(client.get(following)) == [one["id"] for one in client.get(url).json()][2:]


def test_amounts_and_times_have_one_spelling_in_all_formats(client: TestClient) -> None:
    """The digits are the same in JSON numbers, in CSV and in the strings of NDJSON; times have T and an offset."""
    _store(2)
    in_json = json.loads(client.get(HISTORY).text, parse_float=str, parse_int=str)
    in_csv = list(csv.DictReader(io.StringIO(client.get(f"{HISTORY}?format=csv").text, newline="")))
    in_ndjson = [json.loads(line) for line in client.get(f"{HISTORY}?format=ndjson").text.splitlines()]
    names = ("balance", "total_value", "timestamp")
    expected = ["123456789012.10000001", "-0.00000001"]
    for rows in (in_json, in_csv, in_ndjson):
        assert [[row[name] for name in names] for row in rows] == [
            [*expected, (INSTANT + timedelta(minutes=step)).isoformat()] for step in (1, 0)
        ]
    insert_portfolio_history_snapshot(
        {"timestamp": INSTANT - timedelta(days=1), "open_positions": 0, "trade_count": 0, "balance": 9900}
        | dict.fromkeys(("total_invested", "total_profit_loss", "total_value"), "0.5")
    )
    (of_json,) = re.findall('"balance":([0-9.]+),', client.get(f"{HISTORY}?until=2026-11-22T00:00:00Z").text)
    of_csv = client.get(f"{HISTORY}?until=2026-11-22T00:00:00Z&format=csv").text.splitlines()[1].split(",")
    assert (of_json, of_csv[7:11]) == ("9900", ["9900", "0.5", "0.5", "0.5"])


def test_filters_apply_to_the_whole_stream(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Portfolio, period and daily closes, over several pages; no row is an empty answer."""
    monkeypatch.setattr(history_endpoints, "MAX_LIMIT", 2)
    _store(9)
    since = (INSTANT + timedelta(minutes=2)).isoformat().replace("+", "%2B")
    for options in (f"since={since}", "portfolio_id=4", "daily=last", "portfolio_id=99"):
        expected = [row["id"] for row in client.get(f"{HISTORY}?limit=1000&{options}").json()]
        assert _ids(client.get(f"{HISTORY}?format=ndjson&{options}")) == expected


def test_a_stream_uses_no_connection_between_two_pages(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a client that reads slowly holds up nobody. The first rows are sent before the last ones are read."""
    monkeypatch.setattr(history_endpoints, "MAX_LIMIT", 2)
    _store(6)
    with reader().connect():  # the pool exists
        pass
    in_use = []

    bodies = paging.pages(snapshots, Filter(), 2, NDJSON)
    for number, _ in enumerate(bodies):
        in_use.append(reader().pool.checkedout())  # type: ignore[attr-defined]
        if number == 0:
            with get_db() as db:
                db.execute(text("DELETE FROM portfolio_history WHERE open_positions = 0"))
    assert in_use == [0, 0, 0]
    assert [len(_ids(client.get(f"{HISTORY}?format=ndjson")))] == [5]


def test_head_reads_only_the_first_page(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history_endpoints, "MAX_LIMIT", 1)
    _store(4)
    read: list[object] = []
    read_page = paging.read_page

    def counted(*values: Any) -> paging.Page:
        read.append(values)
        return read_page(*values)

    monkeypatch.setattr(paging, "read_page", counted)
    answer = client.head(f"{HISTORY}?format=ndjson")
    assert (answer.status_code, answer.content, len(read)) == (200, b"", 1)


def test_only_listings_of_rows_are_streams(client: TestClient) -> None:
    """The signals of a market are JSON or CSV."""
    assert client.get("/trading/signals?market_id=1&format=ndjson").status_code == 422
    answer = client.get("/trading/signals?market_id=1", headers={"Accept": f"{NDJSON}, */*;q=0.1"})
    assert answer.headers["content-type"] == "application/json"


def test_an_outage_before_the_first_page_is_a_problem(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paging, "read_page", _failing_from(1))
    answer = client.get(f"{HISTORY}?format=ndjson")
    assert (answer.status_code, answer.headers["content-type"]) == (503, "application/problem+json")


def _failing_from(number: int) -> Callable[..., paging.Page]:
    """Return a `read_page` that fails from the given page on."""
    read_page = paging.read_page
    pages = iter(range(1, 1000))

    def read(*values: object) -> paging.Page:
        if next(pages) >= number:
            raise StoreUnavailable("PostgreSQL: the connection was lost")
        return read_page(*values)  # type: ignore[arg-type]

    return read


def test_a_failure_in_a_stream_is_no_clean_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client has the rows of the first pages, and its library reports an incomplete answer."""
    monkeypatch.setattr(history_endpoints, "MAX_LIMIT", 2)
    _store(6)
    with serving(create_app()) as server:
        url = server.url.rstrip("/")
        assert len(_ids(httpx.get(f"{url}{HISTORY}?format=ndjson"))) == 6
        monkeypatch.setattr(paging, "read_page", _failing_from(3))
        read: list[str] = []
        with pytest.raises(httpx.RemoteProtocolError, match="incomplete chunked read"):
            _read(f"{url}{HISTORY}?format=ndjson", read)
    assert 0 < len(read) <= 4
    assert [json.loads(line)["balance"] for line in read] == ["123456789012.10000001"] * len(read)


def _read(url: str, lines: list[str]) -> None:
    """Append the lines of a stream to `lines`, as far as it comes."""
    with httpx.stream("GET", url) as answer:
        for line in answer.iter_lines():
            lines.append(line)  # noqa: PERF402  # extend would keep no line if the stream breaks off


@pytest.mark.parametrize("kind", ["removes", "keeps"])
def test_a_proxy_passes_the_stream_and_its_end_on(
    redis: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    """With the documented configuration: by default, nginx uses HTTP/1.0 towards a server."""
    monkeypatch.setattr(history_endpoints, "MAX_LIMIT", 2)
    _store(6)
    with web_servers(kind, tmp_path, monkeypatch) as site:
        url = f"{site}history{HISTORY}?format=ndjson"
        assert len(_ids(httpx.get(url))) == 6
        monkeypatch.setattr(paging, "read_page", _failing_from(3))
        with pytest.raises(httpx.RemoteProtocolError, match="incomplete chunked read"):
            _read(url, [])


def test_http_1_0_needs_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """There an answer that breaks off looks complete."""
    _store(2)
    with serving(create_app()) as server:
        url = server.url.rstrip("/")
        answers = [_by_http_1_0(url, f"{HISTORY}?format=ndjson{more}") for more in ("", "&limit=5")]
    assert answers[0].startswith("HTTP/1.1 422 ")
    assert '"detail": "limit: is required with HTTP/1.0' in answers[0]
    assert answers[1].startswith("HTTP/1.1 200 ")
    assert answers[1].count('{"id": ') == 2


def _by_http_1_0(url: str, path: str) -> str:
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"GET {path} HTTP/1.0\r\nHost: {host}\r\n\r\n".encode())
        return b"".join(iter(lambda: connection.recv(65536), b"")).decode()
