"""The data endpoints of the history page with a real database."""

from __future__ import annotations

import json
import random
import re
import tracemalloc
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from psycopg2.errors import ReadOnlySqlTransaction
from redis import Redis
from rq import Queue
from rq.serializers import JSONSerializer
from sqlalchemy import TextClause, text

from consumers.db import archive_queries, curve_queries, portfolio_queries, state_queries
from consumers.db.engine import engine, get_db, read_transaction
from consumers.errors import StoreUnavailable
from consumers.web.api import create_app
from consumers.web.page import curve as curves
from consumers.web.page import signal_search
from producers.history_producer import HistoryProducer
from tests.factories import a_signal, a_snapshot
from tests.histories import START, store_amounts, store_archive, store_many, store_rejection, store_values


@pytest.fixture
def client(database_url: str) -> Iterator[TestClient]:
    with TestClient(create_app()) as client:
        yield client


def _get(client: TestClient, path: str, **values: Any) -> Any:
    response = client.get(f"/page/{path}", params=values)
    assert response.status_code == 200, response.text
    return response.json()


def _iso(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat()


def test_amounts_are_exact_and_times_are_utc_with_offset(client: TestClient) -> None:
    """Amounts never become floats and have no added zeros."""
    store_values(["999999999999.12345678", "10.10"])
    body = _get(client, "curve", portfolio=1)
    assert body["worth"] == ["999999999999.12345678", "10.1"]
    assert body["at"] == [_iso(START), _iso(START + timedelta(days=1))]
    assert body["at"][0].endswith("+00:00")


def test_a_reduced_curve_keeps_the_exact_extremes(client: TestClient) -> None:
    """The highest and lowest value and the deepest drawdown are those of all rows, and every point is a row."""
    dice = random.Random(7)
    values: list[Decimal] = [Decimal(10_000)]
    for _ in range(2_999):
        values.append(max(values[-1] + Decimal(dice.randint(-4_000, 4_000)) / 100, Decimal(1)))
    values[1_234] = Decimal(60_000)  # a single high snapshot
    values[2_345] = Decimal("0.5")  # a single low snapshot
    with get_db() as db:
        db.execute(
            text("""INSERT INTO portfolio_history (event_id, source, portfolio_id, snapshot_date, "timestamp", balance,
                total_invested, total_profit_loss, total_value, open_positions, trade_count)
                SELECT gen_random_uuid(), 'x', 1, CAST(at AS date), at, 1, 1, 1, value, 1, 1
                FROM (SELECT CAST(:start AS timestamptz) + number * interval '1 minute' AS at, value
                    FROM unnest(CAST(:values AS numeric[])) WITH ORDINALITY AS given (value, number)) AS timed"""),
            {"start": START, "values": values},
        )
    body = _get(client, "curve", portfolio=1, buckets=50)

    peak, deepest = Decimal(0), 0.0
    for value in values:
        peak = max(peak, value)
        deepest = min(deepest, float(value / peak - 1))
    drawn = [Decimal(one) for one in body["worth"]]
    assert body["snapshots"] == 3_000
    assert len(drawn) <= 250
    assert (max(drawn), min(drawn)) == (max(values), min(values))
    assert min(body["drawdown"]) == pytest.approx(deepest, abs=1e-6)
    minutes = [(datetime.fromisoformat(at) - START) // timedelta(minutes=1) for at in body["at"]]
    assert minutes == sorted(set(minutes))
    assert [values[minute - 1] for minute in minutes] == drawn

    # A part of it starts with the drawdown from the peak before it, and has one neighbour on either side.
    since, until = START + timedelta(minutes=2_000), START + timedelta(minutes=2_010)
    zoomed = _get(client, "curve", portfolio=1, since=_iso(since), until=_iso(until), buckets=1000)
    assert zoomed["snapshots"] == 11
    assert [Decimal(one) for one in zoomed["worth"]] == values[1_998:2_011]
    assert zoomed["drawdown"][1] == pytest.approx(float(values[1_999] / 60_000 - 1), abs=1e-6)


def test_with_parts_the_curve_keeps_the_extremes_of_the_balance(client: TestClient) -> None:
    """Although the total value is constant."""
    store_many(500, step="1 minute")
    with get_db() as db:
        db.execute(
            text("UPDATE portfolio_history SET total_value = 5, balance = CASE sequence WHEN 225 THEN 77 ELSE 1 END")
        )
    assert "77" not in _get(client, "curve", portfolio=1, buckets=10)["balance"]
    assert "77" in _get(client, "curve", portfolio=1, buckets=10, parts=True)["balance"]


def test_gaps_are_reported_and_have_no_values(client: TestClient) -> None:
    """A whole day without a snapshot is a gap; so is an outage of minutes between cycles of one minute."""
    store_values([100, 101, None, 103, 104])
    assert _get(client, "curve", portfolio=1)["after_gap"] == [2]
    store_values([100] * 30 + [None] * 30 + [100] * 30, step=timedelta(minutes=1), portfolio=2)
    body = _get(client, "curve", portfolio=2, buckets=1000)
    assert body["after_gap"] == [30]
    assert "0" not in body["worth"]


def test_a_daily_change_is_between_closes_with_the_number_of_days(client: TestClient) -> None:
    """The close of a date is its last snapshot; a date without snapshots has no entry."""
    store_values([100, 90, "110.25"], step=timedelta(hours=1))
    store_values([None, "105.05", None, 120])
    assert _get(client, "daily", portfolio=1) == {
        "date": ["2026-06-01", "2026-06-02", "2026-06-04"],
        "measure": "value",
        "close": ["110.25", "105.05", "120"],
        "change": [None, "-5.20", "14.95"],
        "days": [None, 1, 2],
    }


def test_a_fully_invested_portfolio_under_the_old_formula_is_shown_by_its_equity(client: TestClient) -> None:
    """10,000 are invested and there is no cash: the recorded value is the profit alone."""
    store_amounts(("10000", "0", "0", "10000"), ("0", "10000", "0.35", "0.35"), ("0", "10000", "-100", "-100"))
    body = _get(client, "curve", portfolio=1)
    assert (body["measure"], body["default_measure"]) == ("equity", "equity")
    assert body["worth"] == ["10000", "10000.35", "9900"]
    assert body["drawdown"] == [0, 0, pytest.approx(9900 / 10000.35 - 1, abs=1e-6)]
    daily = _get(client, "daily", portfolio=1)
    assert (daily["measure"], daily["change"]) == ("equity", [None, "0.35", "-100.35"])


@pytest.mark.parametrize(
    ("amounts", "reason"),
    [
        ([("100", "0", "5", "105")], "no money was invested"),
        ([("100", "50", "5", "105"), ("100", "50", "5", "155")], "one value has all three parts"),
    ],
)
def test_otherwise_a_portfolio_is_shown_by_its_recorded_value(
    client: TestClient, amounts: list[tuple[str, str, str, str]], reason: str
) -> None:
    store_amounts(*amounts)
    body = _get(client, "curve", portfolio=1)
    assert (body["measure"], body["default_measure"]) == ("value", "value"), reason
    assert body["worth"] == [value for *_, value in amounts]


def test_the_reader_chooses_the_measure(client: TestClient) -> None:
    """A deposit of 500 changes the value, but not the profit or loss."""
    store_amounts(("1000", "0", "5", "1005"), ("1010", "0", "5", "1015"), ("1510", "0", "5", "1515"))
    expected = {"value": ["10", "500"], "equity": ["10", "500"], "profit_loss": ["0", "0"]}
    for measure, changes in expected.items():
        daily = _get(client, "daily", portfolio=1, measure=measure)
        curve = _get(client, "curve", portfolio=1, measure=measure)
        assert (daily["measure"], daily["change"]) == (measure, [None, *changes])
        assert (curve["measure"], curve["default_measure"]) == (measure, "value")
        assert curve["worth"] == daily["close"]
        assert (curve["drawdown"] == [None] * 3) is (measure == "profit_loss")  # its peak is no invested money
    for path in ("curve", "daily"):
        assert client.get(f"/page/{path}", params={"portfolio": 1, "measure": "worth"}).status_code == 422


def test_portfolios_are_listed_with_and_without_a_number(client: TestClient) -> None:
    """Ordered by number; rows without a portfolio are last."""
    assert _get(client, "portfolios") == []
    for portfolio, value in ((7, 1), (None, 2), (-3, 3)):
        store_values([value], portfolio=portfolio)
    body = _get(client, "portfolios")
    assert [one["portfolio"] for one in body] == ["-3", "7", "none"]
    assert _get(client, "curve", portfolio="none")["worth"] == ["2"]
    assert _get(client, "curve", portfolio=-3)["worth"] == ["3"]
    assert client.get("/page/curve", params={"portfolio": 4}).status_code == 404


def test_too_many_snapshots_are_drawn_as_closes_unless_the_range_is_short(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`closes_only` says so. The drawdown of a short range includes the peak of earlier closes."""
    monkeypatch.setattr(curves, "MOST_SNAPSHOTS", 400)
    store_values([1000], start=START - timedelta(days=30))
    store_values([100] * 500, step=timedelta(hours=1))
    whole = _get(client, "curve", portfolio=1)
    assert (whole["closes_only"], whole["snapshots"], len(whole["at"])) == (True, None, 23)
    assert min(whole["drawdown"]) == -0.9
    since = START + timedelta(days=10)
    short = _get(client, "curve", portfolio=1, since=_iso(since), until=_iso(since + timedelta(hours=5)))
    assert (short["closes_only"], short["snapshots"]) == (False, 6)
    assert set(short["drawdown"]) == {-0.9}


def test_archives_are_listed_by_month_and_page(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Months have counts, and each archive is listed once, newest first."""
    monkeypatch.setattr("consumers.web.page.routes.ARCHIVES_AT_ONCE", 3)
    ids = [store_archive([a_signal()], at=START + timedelta(hours=hour)) for hour in range(7)]
    store_archive([a_signal()], at=datetime(2026, 7, 1, tzinfo=UTC), portfolio=None)
    assert _get(client, "months") == [{"month": "2026-07", "archives": 1}, {"month": "2026-06", "archives": 7}]
    seen: list[int] = []
    before: dict[str, Any] = {}
    while True:
        body = _get(client, "archives", month="2026-06", **before)
        seen += [one["id"] for one in body["archives"]]
        if not body["more"]:
            break
        before = {"before_at": body["archives"][-1]["archived_at"], "before_id": body["archives"][-1]["id"]}
    assert seen == ids[::-1]


def test_an_archive_is_in_the_month_of_its_local_time(client: TestClient) -> None:
    """Its UTC time may be in another month."""
    local = datetime.fromisoformat("2026-07-01T03:00:00+05:00")
    store_archive([a_signal()], at=local)
    assert _get(client, "months") == [{"month": "2026-07", "archives": 1}]
    assert len(_get(client, "archives", month="2026-07")["archives"]) == 1


def test_a_search_continues_through_the_whole_month(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each match is found once, newest archive first, whether a request ends by matches or by archives read."""
    monkeypatch.setattr(signal_search, "MOST_FOUND", 2)
    monkeypatch.setattr("consumers.web.page.routes.MOST_ARCHIVES", 3)
    monkeypatch.setattr(signal_search, "MOST_ARCHIVES", 3)
    for hour in range(10):
        store_archive(
            [a_signal(market_question=f"ÖFFNET {hour}/{number}?") for number in range(3)]
            + [a_signal(market_question="nothing")]
            if hour % 4 == 0
            else [a_signal(market_question="nothing")],
            at=START + timedelta(hours=hour),
        )
    found: list[str] = []
    after: dict[str, Any] | None = {}
    requests = 0
    while after is not None and requests < 20:
        body = _get(client, "signals", month="2026-06", q="öffnet", **after)
        found += [one["fields"]["market_question"] for one in body["signals"]]
        after = body["after"]
        requests += 1
    assert found == [f"ÖFFNET {hour}/{number}?" for hour in (8, 4, 0) for number in range(3)]


def test_signals_keep_their_digits_and_long_ones_are_cut(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers have all their digits; long texts and surplus fields are cut."""
    archive = store_archive([a_signal(yes_price=Decimal("0.30000000000000000004"), reason="x" * 5_000, event_id=None)])
    (one,) = _get(client, f"archives/{archive}")["signals"]
    assert one["fields"]["yes_price"] == "0.30000000000000000004"
    assert len(one["fields"]["reason"]) == 2_001
    assert one["fields"]["event_id"] is None
    monkeypatch.setattr(signal_search, "MOST_FIELDS", 3)
    assert len(_get(client, f"archives/{archive}")["signals"][0]["fields"]) == 3


def test_numbers_in_nested_values_are_shown_and_found(client: TestClient) -> None:
    """With all their digits. Text that JSON escapes is found too."""
    nested = {"y": [Decimal(1), Decimal("2.00000000000000000003"), True, None], "z": {"Ä": 'say "no"\n'}}
    archive = store_archive([a_signal(nested=nested), a_signal()])
    (one,) = _get(client, f"archives/{archive}", q='NULL], "z": {"ä"')["signals"]
    shown = '{"y": [1, 2.00000000000000000003, true, null], "z": {"Ä": "say \\"no\\"\\n"}}'
    assert one["fields"]["nested"] == shown
    for wanted, found in (
        ("2.00000000000000000003, TRUE", 1),
        ("say", 1),
        ('say \\"no', 1),
        ("510372", 2),
        ("absent", 0),
    ):
        assert len(_get(client, f"archives/{archive}", q=wanted)["signals"]) == found, wanted


def test_a_search_keeps_few_large_archives_in_memory(client: TestClient) -> None:
    """Even if they are small in the table, because they are compressed."""
    for number in range(4):
        store_archive([a_signal(reason="x" * 1_000_000)] * 8, at=START + timedelta(hours=number))
    tracemalloc.start()
    try:
        body = _get(client, "signals", month="2026-06", q="absent")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (body["signals"], body["after"] is not None) == ([], True)
    assert peak < 90 * 2**20


def test_each_wrong_request_is_answered_with_a_reason(client: TestClient) -> None:
    store_values([1])
    backwards = "curve?portfolio=1&since=2026-01-02T00:00:00Z&until=2026-01-01T00:00:00Z"
    for path, status, detail in (
        (backwards, 422, "until is before since"),
        ("curve?portfolio=2", 404, "this portfolio has no snapshots"),
        ("archives/7", 404, "there is no archive with this id"),
        ("static/nothing.js", 404, "Nothing matches the given URI"),
    ):
        answer = client.get(f"/page/{path}")
        assert (answer.status_code, answer.json()["detail"]) == (status, detail)


@pytest.mark.parametrize(
    "path",
    [
        "curve", "curve?portfolio=x", "curve?portfolio=99999999999999999999", "curve?portfolio=1&buckets=100000",
        "curve?portfolio=1&since=2026-01-01T00:00:00", "curve?portfolio=1&since=0001-01-01T00:00:00Z",
        "curve?portfolio=1&since=2026-01-02T00:00:00Z&until=2026-01-01T00:00:00Z",
        "archives?month=2026-13", "archives?month=0000-01", "signals?month=2026-06&q=%00",
        "signals?month=2026-06&archive=-1",
        f"signals?month=2026-06&q={'x' * 101}", "archives/99999999999999999999",
    ],
)  # fmt: skip
def test_invalid_parameters_are_client_errors(client: TestClient, path: str) -> None:
    """They get 422, never a server error."""
    store_values([1])
    assert client.get(f"/page/{path}").status_code == 422


def test_an_unchanged_answer_is_not_sent_again(client: TestClient) -> None:
    """The tag gives 304. Large answers are compressed."""
    store_values([1])
    first = client.get("/page/newest")
    again = client.get("/page/newest", headers={"If-None-Match": first.headers["ETag"]})
    assert (again.status_code, again.content) == (304, b"")
    store_many(200, portfolio=2)
    assert client.get("/page/curve?portfolio=2").headers["Content-Encoding"] == "gzip"
    assert (
        "Content-Encoding" not in client.get("/page/curve?portfolio=2", headers={"Accept-Encoding": "identity"}).headers
    )


def test_newest_changes_with_a_late_row(client: TestClient) -> None:
    """Also with a row that has a lower id than the newest one and is committed after it."""
    store_many(3)
    before = _get(client, "newest")
    with get_db() as db:
        db.execute(text("UPDATE portfolio_history SET id = -id WHERE id = 1"))
        db.execute(text("SELECT pg_stat_force_next_flush()"))
    after = _get(client, "newest")
    assert after["snapshots"] != before["snapshots"]
    assert after["archives"] == before["archives"]


def test_without_tables_or_a_database_the_data_is_503_with_one_readable_line(
    empty_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The problem has no details of the server, and the page itself is still served."""
    with TestClient(create_app()) as client:
        response = client.get("/page/portfolios")
        assert (response.status_code, response.headers["Content-Type"]) == (503, "application/problem+json")
        assert "trading-history init-db" in response.json()["detail"]
        engine.cache_clear()
        monkeypatch.setenv("DATABASE_URL", "postgresql://someone:s3cret@127.0.0.1:1/x")
        response = client.get("/page/portfolios")
        assert response.status_code == 503
        assert not re.search("s3cret|someone|127[.]0|PostgreSQL", response.text)
        assert client.get("/").status_code == 200


def test_the_page_uses_read_only_transactions(client: TestClient) -> None:
    """A DELETE fails."""
    with pytest.raises(StoreUnavailable) as caught, read_transaction() as db:
        db.execute(text("DELETE FROM portfolio_history"))
    assert isinstance(getattr(caught.value.__cause__, "orig", None), ReadOnlySqlTransaction)


def test_health_has_the_queue_the_outbox_and_the_rejections(
    client: TestClient, redis: Redis, producer: HistoryProducer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest 20 rejections have their reasons."""
    monkeypatch.setenv("HISTORY_OUTBOX", "outbox.db")
    monkeypatch.setenv("HISTORY_DASHBOARD_URL", "https://rq.example/")
    producer.record(a_snapshot())
    producer.flush(10)
    store_values([1])
    for number in range(25):
        store_rejection(f"job-{number}", f"reason {number}")
    body = _get(client, "health")
    assert body["redis"] | {"oldest_age_seconds": None} == {
        "queued": 1, "reserved": 0, "oldest_age_seconds": None, "failed": 0, "workers": 0, "state": "ok",
    }  # fmt: skip
    assert 0 <= body["redis"]["oldest_age_seconds"] < 60
    assert [body["outbox"][name] for name in ("pending", "sent", "state")] == [0, 1, "ok"]
    assert body["database"]["rejections"]["count"] == 25
    assert len(body["database"]["rejections"]["newest"]) == 20
    assert body["database"]["last_stored"]["seconds"] > 0
    assert body["dashboard_url"] == "https://rq.example/"


def test_health_distinguishes_redis_not_set_from_redis_not_reachable(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link to RQ Dashboard that would run as a script is a wrong setting."""
    assert _get(client, "health")["redis"] is None
    monkeypatch.setenv("REDIS_URL", "redis://:s3cret@127.0.0.1:1/0")
    body = _get(client, "health")
    assert body["redis"]["error"].startswith("Redis cannot be read now. The API's log has the reason (reference ")
    assert not re.search("s3cret|127[.]0", json.dumps(body))
    monkeypatch.setenv("HISTORY_DASHBOARD_URL", "javascript:alert(1)")
    assert client.get("/page/health").status_code == 503


def test_health_says_that_the_outbox_cannot_be_read_and_not_where_it_is(
    client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox = tmp_path / "outbox.db"
    outbox.write_text("not a database")
    monkeypatch.setenv("HISTORY_OUTBOX", str(outbox))
    body = _get(client, "health")
    assert body["outbox"]["error"].startswith("The outbox cannot be read now. The API's log has the reason (reference ")
    assert str(tmp_path) not in json.dumps(body)


def test_an_unreadable_first_job_does_not_hide_the_number_of_jobs(client: TestClient, redis: Redis) -> None:
    """Only its age is unknown."""
    redis.rpush(Queue("history", connection=redis, serializer=JSONSerializer).key, "no-such-job")
    body = _get(client, "health")["redis"]
    assert (body["queued"], body["oldest_age_seconds"]) == (1, None)


def test_every_query_uses_an_index(client: TestClient) -> None:
    """No query reads a whole table, so rows of other portfolios do not slow down the page."""
    for portfolio in range(20):
        store_many(2_000, portfolio=portfolio)
    with get_db() as db:
        db.execute(
            text("""INSERT INTO signal_archives (event_id, source, archived_at, archive_month, signals_count,
                    signals_data)
                SELECT gen_random_uuid(), 'x', at, to_char(at, 'YYYY-MM'), 1, '[{"a": 1}]'
                FROM (SELECT CAST(:start AS timestamptz) + number * interval '30 minutes' AS at
                    FROM generate_series(1, 20000) AS number) AS timed"""),
            {"start": START},
        )
        db.execute(
            text("""INSERT INTO event_outcomes (job_id, outcome, reason) SELECT 'j' || number,
                CASE WHEN number % 1000 = 0 THEN 'rejected' ELSE 'duplicate' END, 'x'
                FROM generate_series(1, 50000) AS number""")
        )
    with engine().connect().execution_options(isolation_level="AUTOCOMMIT") as db:
        db.exec_driver_sql("VACUUM ANALYZE")
    of = portfolio_queries.for_one_portfolio
    dates = {"since": date(2026, 6, 2), "until": date(2026, 6, 5), "limit": 10, "portfolio_id": 3}
    closes = {"first_date": dates["since"], "last_date": dates["until"], "limit": 10, "portfolio_id": 3}
    month = archive_queries._around(date(2026, 7, 1)) | {"at": START + timedelta(days=90), "id": 5, "limit": 50}
    bucket = {
        "from_date": date.min,
        "to_date": date.max,
        "peak": None,
        "start": 0,
        "width": 1,
        "buckets": 9,
        "portfolio_id": 3,
    }
    statements: list[tuple[TextClause, dict[str, Any]]] = [
        (portfolio_queries._PORTFOLIOS, {"most": 9}),
        (portfolio_queries._NEWEST_AGES, {"most": 9}),
        (of(3, portfolio_queries._EXTENT), {"portfolio_id": 3}),
        (of(3, curve_queries._COUNT), dates),
        (portfolio_queries._DAILY_CLOSES["equity"], closes),
        (portfolio_queries._DEFAULT_MEASURE, closes),
        (of(3, curve_queries._BUCKETS.replace("{parts}", "").replace("{worth}", "total_value")), bucket),
        (curve_queries._SNAPSHOTS["equity"], {"ids": [1, 2]}),
        (archive_queries._MONTHS, {"limit": 9}),
        (archive_queries._LISTED, month),
        (archive_queries._SEARCHED, month),
        (archive_queries._DOCUMENTS, {"ids": [1, 2]}),
        (archive_queries._ONE, {"id": 1}),
        (state_queries._LAST_STORED, {}),
        (state_queries._REJECTIONS, {"limit": 9}),
        (state_queries._COUNT_REJECTIONS, {"limit": 9}),
        (state_queries._CHANGE_TOKENS, {}),
    ]
    with read_transaction() as db:
        for statement, values in statements:
            plan = "\n".join(db.execute(text(f"EXPLAIN {statement.text}"), values).scalars())
            for table in ("portfolio_history", "signal_archives", "event_outcomes"):
                assert f"Seq Scan on {table}" not in plan, plan
