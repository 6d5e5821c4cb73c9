"""The four history operations on a real PostgreSQL: inserts, and reads in the documented order."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from fractions import Fraction

import numpy
import pytest

from consumers.errors import EventConflict
from consumers.operations import (
    get_portfolio_history,
    get_recent_signal_archives,
    insert_portfolio_history_snapshot,
    insert_signal_archive,
)
from producers.errors import InvalidEvent
from tests.factories import INSTANT, a_signal

pytestmark = pytest.mark.usefixtures("database_url")


def _plain_snapshot(moment: datetime, /, **overrides: object) -> dict[str, object]:
    """Return a plain dict with a naive local time, like those of the old code."""
    return {
        "snapshot_date": moment.date(),
        "timestamp": moment,
        "balance": 9900.5,
        "total_invested": 100,
        "total_profit_loss": -3.25,
        "total_value": 9897.25,
        "open_positions": 1,
        "trade_count": 4,
    } | overrides


def test_snapshots_are_read_newest_first_by_date_and_time() -> None:
    """The order is snapshot_date DESC, timestamp DESC, independent of the order of the inserts."""
    noon = datetime(2025, 10, 20, 12)
    times = [noon, noon + timedelta(days=1), noon - timedelta(days=1), noon + timedelta(hours=1)]
    ids = {time: insert_portfolio_history_snapshot(_plain_snapshot(time)) for time in times}

    rows = get_portfolio_history()

    assert [row["id"] for row in rows] == [ids[time] for time in sorted(times, reverse=True)]
    assert [row["id"] for row in get_portfolio_history(limit=2)] == [row["id"] for row in rows[:2]]
    assert get_portfolio_history(limit=0) == []


def test_a_snapshot_is_read_with_native_types_and_equal_values() -> None:
    """Floats, ints, dates and aware times have the inserted values, to the microsecond."""
    moment = datetime(2025, 10, 20, 17, 2, 46, 101234)
    row_id = insert_portfolio_history_snapshot(_plain_snapshot(moment, portfolio_id=3))

    (row,) = get_portfolio_history()

    expected = _plain_snapshot(moment.astimezone(), portfolio_id=3) | {
        "id": row_id,
        "source": "direct",
        "sequence": None,
    }
    assert {name: row[name] for name in expected} == expected
    assert {name: type(row[name]) for name in ("balance", "trade_count", "snapshot_date", "id")} == {
        "balance": float,
        "trade_count": int,
        "snapshot_date": date,
        "id": int,
    }


def test_archives_are_read_newest_first() -> None:
    """The order is archived_at DESC, independent of the order of the inserts."""
    noon = datetime(2025, 10, 20, 12)
    times = [noon, noon + timedelta(days=40), noon - timedelta(days=1)]
    ids = {time: insert_signal_archive({"archived_at": time, "signals": [a_signal()]}) for time in times}

    rows = get_recent_signal_archives()

    assert [row["id"] for row in rows] == [ids[time] for time in sorted(times, reverse=True)]
    assert [row["archive_month"] for row in rows] == ["2025-11", "2025-10", "2025-10"]
    assert [row["id"] for row in get_recent_signal_archives(limit=1)] == [rows[0]["id"]]


def test_an_archive_keeps_its_signals_and_their_count() -> None:
    """signals_data is the same JSON; month and count are derived from the event."""
    signals = [a_signal(), a_signal(market_id="2", event_id=None)]
    insert_signal_archive(
        {"archived_at": INSTANT, "signals_data": signals, "signals_count": 2, "archive_month": "2026-11"}
    )

    (row,) = get_recent_signal_archives()

    assert (row["signals_data"], row["signals_count"], row["archive_month"]) == (signals, 2, "2026-11")


def test_inserting_the_same_event_again_returns_the_same_row() -> None:
    """The same instant and amounts in another notation are the same event."""
    first = insert_portfolio_history_snapshot(_plain_snapshot(INSTANT, balance=10))
    again = insert_portfolio_history_snapshot(
        _plain_snapshot(INSTANT.astimezone(), balance="10.00", snapshot_date=INSTANT.date())
    )
    archive = {"archived_at": INSTANT, "signals": [a_signal(amount=120)]}
    first_archive = insert_signal_archive(archive)
    archive_again = insert_signal_archive(archive | {"signals": [a_signal(amount=120.0)]})

    assert (again, archive_again) == (first, first_archive)
    assert (len(get_portfolio_history()), len(get_recent_signal_archives())) == (1, 1)


def test_inserting_other_content_for_an_event_raises_and_overwrites_nothing() -> None:
    """The same portfolio and instant with other amounts or signals raise EventConflict."""
    row_id = insert_portfolio_history_snapshot(_plain_snapshot(INSTANT))
    insert_signal_archive({"archived_at": INSTANT, "signals": [a_signal()]})

    with pytest.raises(EventConflict, match=f"stored already as row {row_id} of portfolio_history, with other content"):
        insert_portfolio_history_snapshot(_plain_snapshot(INSTANT, balance=9900.51))
    with pytest.raises(EventConflict, match="signal_archives"):
        insert_signal_archive({"archived_at": INSTANT, "signals": [a_signal(reason="another")]})

    assert [row["balance"] for row in get_portfolio_history()] == [9900.5]
    assert [row["signals_data"] for row in get_recent_signal_archives()] == [[a_signal()]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"balance": "much"}, "^balance: is text that is not a number"),
        ({"trade_count": -1}, "^trade_count: "),
        ({"timestamp": "yesterday"}, "^timestamp: must be an ISO 8601 time"),
        ({"surprise": 1}, "^surprise: is not a field of this event"),
        ({"timestamp": ...}, "^timestamp: is missing"),
    ],
)
def test_inserting_an_invalid_snapshot_raises_with_the_field_and_the_reason(
    change: dict[str, object], message: str
) -> None:
    """No row is inserted. Here, `...` leaves a field out."""
    values = {name: value for name, value in _plain_snapshot(INSTANT, **change).items() if value is not ...}
    with pytest.raises(InvalidEvent, match=message):
        insert_portfolio_history_snapshot(values)
    assert get_portfolio_history() == []


def test_the_inserts_accept_epoch_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """The date is the local one."""
    monkeypatch.setenv("HISTORY_TIMEZONE", "Asia/Tokyo")
    snapshot = _plain_snapshot(INSTANT, timestamp=numpy.int64(1777672800))
    del snapshot["snapshot_date"]
    insert_portfolio_history_snapshot(snapshot)
    insert_signal_archive({"archived_at": 1777672800.5, "signals": [a_signal()]})

    (row,), (archive,) = get_portfolio_history(), get_recent_signal_archives()

    moment = datetime(2026, 5, 1, 22, tzinfo=UTC)
    assert (row["timestamp"], row["snapshot_date"]) == (moment, date(2026, 5, 2))
    assert archive["archived_at"] == moment + timedelta(seconds=0.5)


def test_inserting_an_archive_with_a_wrong_count_or_month_raises() -> None:
    """Count and month are derived; if they are given too, they must agree."""
    archive = {"archived_at": INSTANT, "signals": [a_signal()]}
    with pytest.raises(InvalidEvent, match="^signals_count: must be 1, which follows from the other values"):
        insert_signal_archive(archive | {"signals_count": 2})
    with pytest.raises(InvalidEvent, match="^archive_month: must be 2026-11, which follows from the other values"):
        insert_signal_archive(archive | {"archive_month": "2026-10"})


def test_a_naive_time_means_the_same_in_inserts_and_in_filters(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is in HISTORY_TIMEZONE, by default the local zone."""
    monkeypatch.setenv("HISTORY_TIMEZONE", "Asia/Tokyo")
    moment = datetime(2025, 10, 20, 1)
    insert_portfolio_history_snapshot(_plain_snapshot(moment))
    insert_signal_archive({"archived_at": moment, "signals": [a_signal()]})

    second = timedelta(seconds=1)
    assert len(get_portfolio_history(since=moment, until=moment + second)) == 1
    assert len(get_recent_signal_archives(since=moment, until=moment + second)) == 1
    assert get_portfolio_history(since=moment + second) == []


def test_a_negative_limit_raises_value_error() -> None:
    """It is an error of the caller, not invalid data."""
    with pytest.raises(ValueError, match="^limit must not be negative$"):
        get_portfolio_history(limit=-1)


def test_reads_filter_by_portfolio_and_period() -> None:
    """`since` is inclusive, `until` is exclusive."""
    days = [INSTANT + timedelta(days=day) for day in range(4)]
    for day in days:
        for portfolio_id in (1, 2):
            insert_portfolio_history_snapshot(_plain_snapshot(day, portfolio_id=portfolio_id))
            insert_signal_archive({"archived_at": day, "signals": [a_signal()], "portfolio_id": portfolio_id})

    snapshots = get_portfolio_history(portfolio_id=2, since=days[1], until=days[3])
    archives = get_recent_signal_archives(portfolio_id=2, since=days[1], until=days[3])

    assert [(row["portfolio_id"], row["timestamp"]) for row in snapshots] == [(2, days[2]), (2, days[1])]
    assert [(row["portfolio_id"], row["archived_at"]) for row in archives] == [(2, days[2]), (2, days[1])]


def test_the_inserts_accept_numpy_numbers_and_fractions() -> None:
    """The rows have their values."""
    moment = datetime(2025, 10, 20, 17)
    insert_portfolio_history_snapshot(
        _plain_snapshot(
            moment,
            balance=numpy.float32(0.1),
            total_invested=numpy.int64(100),
            total_value=Fraction(1, 3),
            trade_count=numpy.int32(4),
            portfolio_id=numpy.int64(3),
        )
    )
    signal = {"f32": numpy.float32(0.1), "f64": numpy.float64(0.2), "i": numpy.int64(2**62), "b": [numpy.bool_(True)]}
    archive = {"archived_at": moment, "signals": [signal], "signals_count": numpy.int64(1)}
    row_id = insert_signal_archive(archive)

    (row,), (stored,) = get_portfolio_history(), get_recent_signal_archives()

    names = ("balance", "total_invested", "total_value", "trade_count", "portfolio_id")
    assert [row[name] for name in names] == [0.1, 100, 0.33333333, 4, 3]
    assert stored["signals_data"] == [{"f32": 0.1, "f64": 0.2, "i": 2**62, "b": [True]}]
    assert insert_signal_archive(archive) == row_id
    with pytest.raises(InvalidEvent, match=r"^balance: must be a number, not numpy\.bool"):
        insert_portfolio_history_snapshot(_plain_snapshot(moment, balance=numpy.bool_(True)))
