"""The two calls of a trading cycle: the dict of a controller, and the sources of signals."""

from __future__ import annotations

import copy
import decimal
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, date, datetime, timedelta, timezone, tzinfo
from decimal import Decimal
from enum import Enum, IntEnum, StrEnum
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from numbers import Real
from pathlib import Path
from typing import Any, NoReturn

import numpy
import pytest
import trustme

from producers import current_signals
from producers.errors import InvalidEvent, SettingsError, SignalsUnreadable
from producers.events import PortfolioSnapshot, SignalArchive
from producers.testing import FakeHistory
from producers.trading_controller import archive_current_signals, create_daily_portfolio_snapshot, shared_producer
from tests.factories import INSTANT, a_portfolio, a_signal, a_snapshot, an_archive


@pytest.fixture
def local_zone() -> Iterator[None]:
    """Set this machine's zone to Kathmandu, 5:45 hours ahead of UTC all year."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TZ", "Asia/Kathmandu")
        time.tzset()
        yield
    time.tzset()


@pytest.fixture
def snapshot_of(trading_history: FakeHistory) -> Callable[..., PortfolioSnapshot]:
    """A function that records a portfolio and returns the snapshot that workers receive."""

    def record(portfolio: Any, portfolio_id: int | None = None, **options: Any) -> PortfolioSnapshot:
        create_daily_portfolio_snapshot(portfolio, portfolio_id, **options)
        return trading_history.snapshots[-1]

    return record


@pytest.fixture
def archive_of(trading_history: FakeHistory) -> Callable[..., SignalArchive]:
    """A function that archives signals and returns the archive that workers receive."""

    def record(*signals: Any, **options: Any) -> SignalArchive:
        assert archive_current_signals(*signals, **options) is not None
        return trading_history.archives[-1]

    return record


_NO_NUMBERS = {"snapshot_date", "timestamp", "portfolio_id"}


def _portfolio_without(*names: str) -> dict[str, Any]:
    return {name: value for name, value in a_portfolio().items() if name not in names}


# ---- snapshots


def test_the_dict_of_a_controller_becomes_a_snapshot(snapshot_of: Callable[..., PortfolioSnapshot]) -> None:
    """Amounts are rounded, total_value is derived, open positions are counted, other keys are ignored."""
    assert snapshot_of(a_portfolio(), 7, timestamp=INSTANT) == a_snapshot(
        balance=9900, total_invested=100, total_profit_loss="87.35", total_value="9987.35", portfolio_id=7
    )


def test_a_receipt_has_the_attributes_of_the_recorded_event(trading_history: FakeHistory) -> None:
    """Its id, source and sequence are those in the outbox, for both calls."""
    snapshot = create_daily_portfolio_snapshot(a_portfolio(), 1, timestamp=INSTANT)
    archive = archive_current_signals([a_signal()], portfolio_id=1, archived_at=INSTANT)
    assert archive is not None

    assert (snapshot.event_id, archive.event_id) == (a_snapshot().event_id, an_archive().event_id)
    received = [(receipt.event_id, receipt.source, receipt.sequence) for receipt in (snapshot, archive)]
    assert received == [(event.id, event.source, event.sequence) for event in trading_history.events]
    assert (snapshot.sequence, archive.sequence) == (1, 2)


@pytest.mark.parametrize("balance", ["balance", "current_balance"])
def test_other_missing_numbers_than_the_balance_are_0(
    snapshot_of: Callable[..., PortfolioSnapshot], balance: str
) -> None:
    zeros: dict[str, Any] = dict.fromkeys(PortfolioSnapshot.model_fields.keys() - _NO_NUMBERS, 0)
    assert snapshot_of({balance: 0}, timestamp=INSTANT) == a_snapshot(**zeros, portfolio_id=None)


class _Unprintable:
    """A key that can be neither printed nor sorted."""

    def __repr__(self) -> str:
        raise ValueError

    __str__ = __repr__


@pytest.mark.parametrize(
    ("portfolio", "keys"),
    [
        ({}, "(none)"),
        ({"detail": "internal error"}, "'detail'"),
        ({"portfolio": {"balance": 100.0}}, "'portfolio'"),
        ({"total_portfolio": 682.49, "usdc_balance": 586.91}, "'total_portfolio', 'usdc_balance'"),
        ({"ballance": 1000}, "'ballance'"),
        ({"Balance": 1000}, "'Balance'"),
        (_portfolio_without("balance", "created_at", "last_updated", "positions"), None),
        ({"\x1b[31m\n": 1, "\ud800": 2, "k" * 1000: 3}, f"'\\x1b[31m\\n', '\\ud800', '{'k' * 39}…'"),
        ({None: 1, 10**5000: 2, b"balance": 3, Decimal(4): 5}, "(NoneType), (int), (bytes), (decimal.Decimal)"),
        ({_Unprintable(): 1}, f"({__name__}._Unprintable)"),
        (dict.fromkeys(range(5000), 0), f"{', '.join(['(int)'] * 10)} and 4990 more"),
        ({f"k{n}": n for n in range(11)}, ", ".join(f"'k{n}'" for n in range(10)) + " and 1 more"),
    ],
    ids=["empty", "error", "nested", "other names", "typo", "case", "all but the balance", *"abcde"],
)
def test_a_mapping_without_a_balance_is_invalid(
    trading_history: FakeHistory, portfolio: dict[Any, Any], keys: str | None
) -> None:
    """An API's error response must not become a row of zeros. The message lists the keys, and no value."""
    with pytest.raises(InvalidEvent) as caught:
        create_daily_portfolio_snapshot(portfolio)
    keys = keys or "'total_invested', 'total_profit_loss', 'trade_count'"
    assert str(caught.value) == f"portfolio_data: must have 'balance' or 'current_balance'; its keys are {keys}"
    assert caught.value.field == "portfolio_data"
    assert trading_history.events == []


@pytest.mark.parametrize(
    ("names", "balance"),
    [
        ({"current_balance": 5}, 5),
        ({"balance": 6, "current_balance": 5}, 6),
        ({"balance": 0, "current_balance": 5}, 0),
    ],
)
def test_the_balance_may_be_called_current_balance(
    snapshot_of: Callable[..., PortfolioSnapshot], names: dict[str, int], balance: int
) -> None:
    """`balance` takes precedence, even if it is 0."""
    assert snapshot_of(_portfolio_without("balance") | names).balance == balance


@pytest.mark.parametrize(
    ("portfolio", "total"),
    [
        ({"balance": 0.1, "total_profit_loss": 0.2}, "0.3"),
        ({"balance": 10, "total_profit_loss": "-10.5"}, "-0.5"),
        ({"balance": 10, "total_profit_loss": 1, "total_value": 99}, "99"),
        ({"balance": 10, "total_profit_loss": 1, "total_value": 0}, "0"),
        (
            {"balance": "999999999999.99999998", "total_profit_loss": Decimal("0.00000001")},
            "999999999999.99999999",
        ),
    ],
)
def test_a_missing_total_value_is_balance_plus_profit_loss(
    snapshot_of: Callable[..., PortfolioSnapshot], portfolio: dict[str, Any], total: str
) -> None:
    """The sum is exact. A given total_value is not changed."""
    assert snapshot_of(portfolio).total_value == Decimal(total)


def test_the_sum_is_exact_in_any_decimal_context(snapshot_of: Callable[..., PortfolioSnapshot]) -> None:
    """A controller may set a lower precision for its own calculations."""
    with decimal.localcontext(decimal.Context(prec=6)):
        snapshot = snapshot_of({"balance": Decimal("123456.78"), "total_profit_loss": Decimal("0.33")})
    assert snapshot.total_value == Decimal("123457.11")


@pytest.mark.parametrize(
    ("statuses", "count"),
    [(["open", "closed", "open"], 2), (["closed", "OPEN", "Open", None], 2), (["opened", "", " open"], 0), ([], 0)],
)
@pytest.mark.parametrize("kind", [list, tuple])
def test_open_positions_are_counted_by_their_status(
    snapshot_of: Callable[..., PortfolioSnapshot], kind: type, statuses: list[str | None], count: int
) -> None:
    """Only `open` counts, in upper or lower case. A position without a status, or with None, is not open."""
    positions = kind({} if status is None else {"status": status} for status in statuses)
    assert snapshot_of(a_portfolio(positions=[*positions, {"status": None}])).open_positions == count
    assert snapshot_of(a_portfolio(positions=positions)).open_positions == count


class _Status(Enum):
    OPEN = "open"


class _TextStatus(StrEnum):
    OPEN = "open"


def test_a_status_may_be_a_subclass_of_str(snapshot_of: Callable[..., PortfolioSnapshot]) -> None:
    """For example a member of a StrEnum, or NumPy's str_."""
    positions = [{"status": _TextStatus.OPEN}, {"status": numpy.str_("open")}]
    assert snapshot_of(a_portfolio(positions=positions)).open_positions == 2


# ---- numbers of other types


@pytest.mark.parametrize(
    ("amount", "exact"),
    [
        (numpy.int8(-5), "-5"),
        (numpy.int64(2**39), str(2**39)),
        (numpy.uint64(7), "7"),
        (numpy.float16(0.1), "0.1"),
        (numpy.float32(0.1), "0.1"),
        (numpy.float32(1e-8), "0.00000001"),
        (numpy.float32(167772.17), "167772.17"),
        (numpy.float64(0.1), "0.1"),
        (numpy.longdouble("0.1"), "0.1"),
        (Fraction(1, 3), "0.33333333"),
        (Fraction(-2, 3), "-0.66666667"),
        (Fraction(5, 10**9), "0"),
        (Fraction(15, 10**9), "0.00000002"),
        (Fraction(25, 10**9) + Fraction(1, 10**60), "0.00000003"),
        (Fraction(10**12) - Fraction(1, 10**8), "999999999999.99999999"),
    ],
    ids=repr,
)
def test_an_amount_may_be_any_real_number(
    snapshot_of: Callable[..., PortfolioSnapshot], amount: Any, exact: str
) -> None:
    """A NumPy float is the shortest decimal that converts back to it. A fraction is rounded half-even, once."""
    for name in ("balance", "total_invested", "total_profit_loss", "total_value"):
        assert getattr(snapshot_of({"balance": 0, "total_value": 0, name: amount}), name) == Decimal(exact)
    assert snapshot_of({"current_balance": amount}).balance == Decimal(exact)


class _Cents:
    """A real number that is made from cents and not from text."""

    def __init__(self, cents: int) -> None:
        self._cents = cents + 0  # a TypeError for text

    def __float__(self) -> float:
        return self._cents / 100

    def __str__(self) -> str:
        return f"{self._cents / 100:.1f}"


Real.register(_Cents)


def test_an_amount_may_be_of_a_type_that_cannot_be_made_from_its_text(
    snapshot_of: Callable[..., PortfolioSnapshot],
) -> None:
    """Its text may leave digits out, so its float counts."""
    assert snapshot_of({"balance": _Cents(1_234)}).balance == Decimal("12.34")


def test_numpys_print_options_do_not_change_an_amount(snapshot_of: Callable[..., PortfolioSnapshot]) -> None:
    """The legacy mode omits digits."""
    with numpy.printoptions(legacy="1.13"):
        assert str(numpy.float32(167772.17)) == "167772.0"
        assert snapshot_of({"balance": numpy.float32(167772.17)}).balance == Decimal("167772.171875")


def test_counts_and_ids_may_be_any_integral_number(
    snapshot_of: Callable[..., PortfolioSnapshot], archive_of: Callable[..., SignalArchive]
) -> None:
    """They are stored as Python's int."""
    snapshot = snapshot_of(a_portfolio(trade_count=numpy.uint16(3)), numpy.int64(2))
    archive = archive_of([a_signal()], portfolio_id=numpy.int64(2))
    built = a_snapshot(open_positions=numpy.int32(1), portfolio_id=numpy.int64(2))
    counted = (snapshot.trade_count, snapshot.portfolio_id, archive.portfolio_id, built.open_positions)
    assert counted == (3, 2, 2, 1)
    assert {type(one) for one in (*counted, built.portfolio_id)} == {int}


_NOT_REAL_NUMBERS = [
    (numpy.bool_(True), "numpy.bool"),
    (numpy.complex64(1), "numpy.complex64"),
    (numpy.timedelta64(5, "s"), "numpy.timedelta64"),
    (numpy.timedelta64("NaT", "s"), "numpy.timedelta64"),
    (numpy.datetime64("2026-11-22"), "numpy.datetime64"),
    (numpy.array(1.0), "numpy.ndarray"),
    (numpy.array([1.0]), "numpy.ndarray"),
    (1j, "complex"),
]


@pytest.mark.parametrize(("value", "kind"), _NOT_REAL_NUMBERS, ids=repr)
def test_the_message_names_the_type_of_a_value_that_is_not_a_real_number(
    trading_history: FakeHistory, value: Any, kind: str
) -> None:
    """In amounts, counts, ids and signals. In signals, NumPy's boolean is a valid boolean."""
    with pytest.raises(InvalidEvent, match=rf"^balance: must be a number, not {kind}_?$"):
        create_daily_portfolio_snapshot(a_portfolio(balance=value))
    with pytest.raises(InvalidEvent, match=rf"^trade_count: must be an integer, not {kind}_?$"):
        create_daily_portfolio_snapshot(a_portfolio(trade_count=value))
    with pytest.raises(InvalidEvent, match=rf"^portfolio_id: must be an integer, not {kind}_?$"):
        create_daily_portfolio_snapshot(a_portfolio(), value)
    if not isinstance(value, numpy.bool_):
        with pytest.raises(
            InvalidEvent, match=rf"^signals\.0\.amount: is of type {kind}, which JSON cannot represent: pass "
        ):
            archive_current_signals([a_signal(amount=value)])
    assert trading_history.events == []


_NOT_FINITE = [
    make(text)
    for make in (float, Decimal, numpy.float16, numpy.float32, numpy.longdouble)
    for text in ("nan", "inf", "-inf")
]


@pytest.mark.parametrize("value", _NOT_FINITE, ids=repr)
def test_a_number_that_is_not_finite_is_invalid_for_any_type(trading_history: FakeHistory, value: Any) -> None:
    """In amounts, counts and signals."""
    with pytest.raises(InvalidEvent, match=r"^total_value: must be finite, not NaN or Infinity$"):
        create_daily_portfolio_snapshot(a_portfolio(total_value=value))
    with pytest.raises(InvalidEvent, match=r"^trade_count: must be an integer"):
        create_daily_portfolio_snapshot(a_portfolio(trade_count=value))
    with pytest.raises(InvalidEvent, match=r"^signals\.0\.deep\.1: must be finite"):
        archive_current_signals([a_signal(deep=[1, value])])
    assert trading_history.events == []


@pytest.mark.parametrize(
    "amount", [Fraction(10**12), Fraction(-(10**4000), 3), numpy.float32(1e30), numpy.uint64(10**13)]
)
def test_an_amount_of_any_type_has_at_most_12_integer_digits(trading_history: FakeHistory, amount: Any) -> None:
    """Even if rounding adds the 13th digit."""
    for one in (amount, Fraction(10**12) - Fraction(1, 10**9)):
        with pytest.raises(InvalidEvent, match="^balance: has more than 12 digits before the decimal point$"):
            create_daily_portfolio_snapshot({"balance": one})
    assert trading_history.events == []


@pytest.mark.parametrize(
    ("portfolio", "message"),
    [
        (None, "^portfolio_data: must be a mapping, not NoneType$"),
        ([("balance", 1)], "^portfolio_data: must be a mapping, not list$"),
        (a_portfolio(balance=True), "^balance: must be a number, not bool$"),
        (a_portfolio(balance=None), "^balance: must be a number, not NoneType$"),
        ({"balance": None, "current_balance": 5}, "^balance: must be a number, not NoneType$"),
        ({"current_balance": None}, "^current_balance: must be a number, not NoneType$"),
        (a_portfolio(total_invested=INSTANT), r"^total_invested: must be a number, not datetime\.datetime$"),
        (a_portfolio(balance=float("nan")), "^balance: must be finite"),
        (a_portfolio(balance=_Status.OPEN), r"^balance: must be a number, not .*_Status: pass its \.value$"),
        (a_portfolio(total_invested="a lot"), "^total_invested: is text that is not a number$"),
        (a_portfolio(total_invested="1e99999999999999999999"), "^total_invested: is text that is not a number$"),
        (a_portfolio(total_profit_loss=[1]), "^total_profit_loss: must be a number, not list$"),
        (a_portfolio(total_value={}), "^total_value: must be a number, not dict$"),
        (a_portfolio(trade_count="2"), "^trade_count: .*integer"),
        (a_portfolio(trade_count=2.0), "^trade_count: .*integer"),
        (a_portfolio(trade_count=True), "^trade_count: .*integer"),
        (a_portfolio(trade_count=-1), "^trade_count: .*greater than or equal to 0"),
        (a_portfolio(positions=None), "^positions: must be a list, not NoneType$"),
        (a_portfolio(positions={"t-1": {}}), "^positions: must be a list, not dict$"),
        (a_portfolio(positions="open"), "^positions: must be a list, not str$"),
        (a_portfolio(positions=[{}, "open"]), r"^positions\.1: must be a mapping, not str$"),
        (a_portfolio(positions=[{}, {"status": 1}]), r"^positions\.1\.status: must be text, not int$"),
        (a_portfolio(positions=[{"status": True}]), r"^positions\.0\.status: must be text, not bool$"),
        (
            a_portfolio(positions=[{"status": _Status.OPEN}]),
            rf"^positions\.0\.status: must be text, not {__name__}\._Status: pass its \.value$",
        ),
        (a_portfolio(positions=numpy.array([])), r"^positions: must be a list, not numpy\.ndarray$"),
        ({"balance": 999_999_999_999, "total_profit_loss": 1}, "^total_value: has more than 12 digits"),
    ],
)
def test_the_message_names_a_wrong_value_and_nothing_is_recorded(
    trading_history: FakeHistory, portfolio: Any, message: str
) -> None:
    """A value of a wrong type does not become 0."""
    with pytest.raises(InvalidEvent, match=message):
        create_daily_portfolio_snapshot(portfolio)
    assert trading_history.events == []


@pytest.mark.parametrize("portfolio_id", [True, "1", 1.0, 2**63])
def test_the_message_names_a_wrong_portfolio_id(trading_history: FakeHistory, portfolio_id: Any) -> None:
    """In both calls."""
    with pytest.raises(InvalidEvent, match=r"^portfolio_id: "):
        create_daily_portfolio_snapshot(a_portfolio(), portfolio_id)
    with pytest.raises(InvalidEvent, match=r"^portfolio_id: "):
        archive_current_signals([a_signal()], portfolio_id=portfolio_id)


# ---- times


@pytest.mark.usefixtures("local_zone")
@pytest.mark.parametrize(
    ("setting", "offset"),
    [(None, timedelta(hours=5, minutes=45)), ("America/New_York", timedelta(hours=-5))],
    ids=["this machine's zone", "HISTORY_TIMEZONE"],
)
def test_a_naive_time_is_in_the_local_zone(
    monkeypatch: pytest.MonkeyPatch,
    trading_history: FakeHistory,
    setting: str | None,
    offset: timedelta,
) -> None:
    """The zone is HISTORY_TIMEZONE or the machine's. Date and month are local."""
    if setting is not None:
        monkeypatch.setenv("HISTORY_TIMEZONE", setting)
    naive = datetime(2026, 11, 30, 23, 59, 59, 101234)
    create_daily_portfolio_snapshot(a_portfolio(), timestamp=naive)
    archive_current_signals([a_signal()], archived_at=naive)

    (snapshot,), (archive,) = trading_history.snapshots, trading_history.archives

    assert (snapshot.timestamp.replace(tzinfo=None), snapshot.timestamp.utcoffset()) == (naive, offset)
    assert (archive.archived_at, archive.archive_month) == (snapshot.timestamp, "2026-11")
    assert snapshot.snapshot_date == date(2026, 11, 30)


@pytest.mark.parametrize(
    ("moment", "utc"),
    [
        (datetime(2026, 10, 25, 2, 30), datetime(2026, 10, 25, 0, 30, tzinfo=UTC)),
        (datetime(2026, 10, 25, 2, 30, fold=1), datetime(2026, 10, 25, 1, 30, tzinfo=UTC)),
        (datetime(2026, 7, 1, 12), datetime(2026, 7, 1, 10, tzinfo=UTC)),
    ],
    ids=["first", "second", "summer"],
)
def test_fold_distinguishes_the_hour_that_occurs_twice(
    monkeypatch: pytest.MonkeyPatch,
    trading_history: FakeHistory,
    moment: datetime,
    utc: datetime,
) -> None:
    """When summer time ends in Berlin, 02:30 occurs twice."""
    monkeypatch.setenv("HISTORY_TIMEZONE", "Europe/Berlin")
    create_daily_portfolio_snapshot(a_portfolio(), timestamp=moment)
    assert trading_history.snapshots[0].timestamp == utc


def test_an_aware_time_keeps_its_offset(monkeypatch: pytest.MonkeyPatch, trading_history: FakeHistory) -> None:
    """The local zone applies to naive times only."""
    monkeypatch.setenv("HISTORY_TIMEZONE", "Asia/Tokyo")
    create_daily_portfolio_snapshot(a_portfolio(), timestamp=INSTANT)
    snapshot = trading_history.snapshots[0]
    assert (snapshot.timestamp, snapshot.timestamp.utcoffset()) == (INSTANT, timedelta(0))
    assert snapshot.snapshot_date == INSTANT.date()


class _Nanoseconds(datetime):
    """A time whose text has more digits than a datetime's, like pandas' Timestamp."""

    def isoformat(self, sep: str = "T", timespec: str = "auto") -> str:
        return "2026-05-01T10:00:00.123456789+02:00"

    __str__ = isoformat

    def astimezone(self, tz: tzinfo | None = None) -> NoReturn:
        raise TypeError("pandas' method requires an argument")


class _NotATime(datetime):
    """A value like pandas' NaT."""

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = None  # type: ignore[assignment]


@pytest.mark.usefixtures("local_zone")
def test_a_time_of_a_subclass_becomes_a_datetime(
    snapshot_of: Callable[..., PortfolioSnapshot], archive_of: Callable[..., SignalArchive]
) -> None:
    """Digits below the microsecond are left out. A naive time is in this machine's zone."""
    moment = _Nanoseconds(2026, 5, 1, 10, 0, 0, 123456, timezone(timedelta(hours=2)))
    found = [
        snapshot_of(a_portfolio(), timestamp=moment).timestamp,
        archive_of([a_signal()], archived_at=moment).archived_at,
        a_snapshot(timestamp=moment).timestamp,
    ]
    assert [str(one) for one in found] == ["2026-05-01 10:00:00.123456+02:00"] * 3
    assert {type(one) for one in found} == {datetime}
    naive = snapshot_of(a_portfolio(), timestamp=_Nanoseconds(2026, 5, 1, 10)).timestamp
    assert str(naive) == "2026-05-01 10:00:00+05:45"


@pytest.mark.parametrize(
    ("moment", "message"),
    [
        ("2026-05-01T10:00:00Z", "not str: pass datetime.fromisoformat(value)"),
        (1777629600.5, "not float: pass datetime.fromtimestamp(value, timezone.utc), in seconds"),
        (numpy.int64(5), "not numpy.int64: pass datetime.fromtimestamp(value, timezone.utc), in seconds"),
        (
            numpy.datetime64("2026-05-01"),
            "not numpy.datetime64: pass value.astype('datetime64[us]').item(), with its time zone",
        ),
        (_NotATime(2026, 5, 1), f"not {__name__}._NotATime"),
        (True, "not bool"),
    ],
    ids=repr,
)
def test_the_message_says_how_to_make_a_datetime(trading_history: FakeHistory, moment: Any, message: str) -> None:
    """In both calls, and in a snapshot that the caller builds."""
    with pytest.raises(InvalidEvent, match=f"^timestamp: must be a datetime, {re.escape(message)}$"):
        create_daily_portfolio_snapshot(a_portfolio(), timestamp=moment)
    with pytest.raises(InvalidEvent, match=f"^archived_at: must be a datetime, {re.escape(message)}$"):
        archive_current_signals([a_signal()], archived_at=moment)
    with pytest.raises(InvalidEvent, match=f"^timestamp: must be a datetime, {re.escape(message)}$"):
        a_snapshot(timestamp=moment)
    assert trading_history.events == []


@pytest.mark.usefixtures("local_zone")
@pytest.mark.parametrize(
    ("setting", "offset"),
    [(None, timedelta(hours=5, minutes=45)), ("Asia/Tokyo", timedelta(hours=9))],
    ids=["this machine's zone", "HISTORY_TIMEZONE"],
)
def test_the_default_time_is_now_in_the_local_zone(
    monkeypatch: pytest.MonkeyPatch,
    trading_history: FakeHistory,
    setting: str | None,
    offset: timedelta,
) -> None:
    """The snapshot has the local date."""
    if setting is not None:
        monkeypatch.setenv("HISTORY_TIMEZONE", setting)

    before = datetime.now(UTC)
    create_daily_portfolio_snapshot(a_portfolio())
    archive_current_signals([a_signal()])
    after = datetime.now(UTC)

    (snapshot,), (archive,) = trading_history.snapshots, trading_history.archives
    assert before <= snapshot.timestamp <= archive.archived_at <= after
    assert (snapshot.timestamp.utcoffset(), archive.archived_at.utcoffset()) == (offset, offset)
    assert snapshot.snapshot_date == snapshot.timestamp.date()


@pytest.mark.parametrize(
    "moment",
    [
        "2026-11-22T17:02:46Z",
        1795366966,
        date(2026, 11, 22),
        datetime(1, 1, 1),
        datetime(9999, 12, 31, 23),
        datetime(1969, 7, 20),
    ],
    ids=repr,
)
@pytest.mark.usefixtures("local_zone")
def test_a_wrong_or_distant_time_is_invalid(trading_history: FakeHistory, moment: Any) -> None:
    """In both calls. The message names the argument."""
    with pytest.raises(InvalidEvent, match=r"^timestamp: must "):
        create_daily_portfolio_snapshot(a_portfolio(), timestamp=moment)
    with pytest.raises(InvalidEvent, match=r"^archived_at: must "):
        archive_current_signals([a_signal()], archived_at=moment)
    assert trading_history.events == []


# ---- signals as an argument


def test_numbers_of_other_types_in_signals_keep_their_value(archive_of: Callable[..., SignalArchive]) -> None:
    """At any depth. The caller's signals are not changed."""
    inner = [numpy.float32(0.1), {"yes": numpy.bool_(True), "no": numpy.bool_(False)}, "text"]
    given = a_signal(
        int64=numpy.int64(-(2**62)),
        uint64=numpy.uint64(2**64 - 1),
        float64=numpy.float64(0.1),
        longdouble=numpy.longdouble("0.1"),
        half=Fraction(1, 2),
        long=Fraction(1, 2**572),  # it has 400 digits
        text=numpy.str_("Zürich"),
        deep=[inner],
    )
    before = copy.deepcopy(given)

    (signal,) = archive_of([given]).signals

    assert given == before
    assert given["deep"][0] is inner
    assert [type(value) for value in inner[:1]] == [numpy.float32]
    assert (signal["int64"], signal["uint64"]) == (-(2**62), 2**64 - 1)
    assert (signal["float64"], signal["longdouble"]) == (Decimal("0.1"), Decimal("0.1"))
    assert (signal["half"], signal["text"]) == (Decimal("0.5"), "Zürich")
    assert (signal["long"], len(signal["long"].as_tuple().digits)) == (Fraction(1, 2**572), 400)
    assert signal["deep"] == [[Decimal("0.1"), {"yes": True, "no": False}, "text"]]
    assert [type(flag) for flag in signal["deep"][0][1].values()] == [bool, bool]


class _Days(IntEnum):
    TWO = 2


class _Price(Decimal, Enum):
    HALF = Decimal("0.5")


class _Ratio(float, Enum):
    HALF = 0.5


def test_members_of_an_enum_that_are_numbers_or_text_have_their_value(
    snapshot_of: Callable[..., PortfolioSnapshot], archive_of: Callable[..., SignalArchive]
) -> None:
    """In signals, amounts, counts and ids."""
    (signal,) = archive_of([{"t": _TextStatus.OPEN, "n": [_Days.TWO, _Price.HALF, _Ratio.HALF]}]).signals
    assert signal == {"t": "open", "n": [2, Decimal("0.5"), Decimal("0.5")]}
    amounts = {"balance": _Days.TWO, "total_invested": _Price.HALF, "total_profit_loss": _Ratio.HALF}
    snapshot = snapshot_of(amounts | {"trade_count": _Days.TWO}, _Days.TWO)
    stored = [snapshot.balance, snapshot.total_invested, snapshot.total_profit_loss]
    assert stored == [Decimal(2), Decimal("0.5"), Decimal("0.5")]
    assert (snapshot.trade_count, snapshot.portfolio_id) == (2, 2)


@pytest.mark.parametrize(
    ("value", "instead"),
    [
        (_Status.OPEN, "pass its .value"),
        (INSTANT, "pass its .isoformat()"),
        (INSTANT.date(), "pass its .isoformat()"),
        ((1, 2), "pass a list"),
        ({1}, "pass a list"),
        (numpy.datetime64("2026-05-01"), "pass its text, str(value)"),
        (numpy.array([1.5]), "pass its .tolist()"),
        (b"x", "pass text, or None"),
    ],
    ids=repr,
)
def test_the_message_says_what_to_pass_in_place_of_a_value_that_json_cannot_represent(
    trading_history: FakeHistory, value: Any, instead: str
) -> None:
    with pytest.raises(InvalidEvent, match=rf"which JSON cannot represent: {re.escape(instead)}$"):
        archive_current_signals([{"x": [value]}])
    assert trading_history.events == []


@pytest.mark.parametrize(
    "fraction", [Fraction(1, 3), Fraction(1, 2**573), Fraction(10**401 + 1)], ids=["1/3", "401 digits", "large"]
)
def test_a_fraction_in_a_signal_must_have_an_exact_decimal_value(
    trading_history: FakeHistory, fraction: Fraction
) -> None:
    """Values of signals are not rounded, and JSON has no fractions."""
    with pytest.raises(InvalidEvent, match=r"^signals\.0\.x: is a fraction without an exact decimal value"):
        archive_current_signals([{"x": fraction}])
    assert trading_history.events == []


@pytest.mark.parametrize(
    "shape", [lambda s: s, tuple, lambda s: {"signals": s, "count": 2}], ids=["list", "tuple", "object"]
)
def test_signals_may_be_a_list_or_an_object_with_a_list(
    archive_of: Callable[..., SignalArchive], shape: Callable[[Any], Any]
) -> None:
    """Then neither the URL nor the file is read."""
    signals = [a_signal(target_price=Decimal("0.455")), {"market_id": "2"}]
    options = {"signals_url": "http://127.0.0.1:1/", "signals_path": "/nowhere"}
    archive = archive_of(shape(signals), archived_at=INSTANT, portfolio_id=3, **options)
    assert archive.archived_at == INSTANT
    assert (archive.signals_count, archive.portfolio_id) == (2, 3)
    assert archive.signals[1] == {"market_id": "2"}
    assert archive.signals[0]["target_price"] == Decimal("0.455")


@pytest.mark.parametrize("signals", [[], (), {"signals": []}])
def test_an_empty_list_of_signals_is_not_archived(trading_history: FakeHistory, signals: Any) -> None:
    """The call returns None and does not read the file instead."""
    Path("data/trades").mkdir(parents=True)
    Path("data/trades/current_signals.json").write_text('[{"market_id": "1"}]', "utf-8")
    assert archive_current_signals(signals) is None
    assert trading_history.events == []


@pytest.mark.parametrize(
    ("signals", "message"),
    [
        ("[]", "^signals: must be a list of signals, not str$"),
        ({"results": []}, "^signals: must be a list, or an object with the key 'signals'$"),
        ({"signals": None}, "^signals: 'signals': must be a list of signals, not NoneType$"),
        ([a_signal(), 1], r"^signals\.1: "),
        ([a_signal(amount=float("nan"))], r"^signals\.0\.amount: must be finite"),
        ([a_signal(reason="\0")], r"^signals\.0\.reason: contains a NUL"),
        ([a_signal(timestamp=INSTANT)], r"^signals\.0\.timestamp: is of type datetime"),
    ],
)
def test_the_message_names_a_wrong_signal_and_nothing_is_recorded(
    trading_history: FakeHistory, signals: Any, message: str
) -> None:
    with pytest.raises(InvalidEvent, match=message):
        archive_current_signals(signals)
    assert trading_history.events == []


# ---- signals of a URL


class _Responses(BaseHTTPRequestHandler):
    """A server whose response, if any, depends on the path."""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        bodies = {
            "/array": '[{"price": 0.12345678901234567890}]',
            "/object": '{"signals": [{"price": 0.12345678901234567890}]}',
            "/empty": "",
            "/none": "[]",
            "/broken": '[\n  {"price": 0.5},\n  {"price": }\n]',
            "/text": '"no signals"',
            "/large": "[" + " " * (8 * 1024 * 1024) + "]",
        }
        if path == "/hang-up":
            self.close_connection = True
            return
        if path == "/half":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"[{")
            return
        if path in ("/moved", "/round"):
            time.sleep(0.3 if path == "/round" else 0.0)
            self.send_response(302)
            self.send_header("Location", "/array" if path == "/moved" else "/round")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if path in _SLOW:
            self._be_slow(*_SLOW[path])
            return
        body = bodies.get(path, "").encode()
        self.send_response(200 if path in bodies else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _be_slow(self, beginning: bytes, drop: bytes) -> None:
        """Send `drop` every 0.1 s until the client disconnects, for at most 10 s."""
        self.wfile.write(beginning)
        self.close_connection = True
        self.connection.settimeout(0.1)
        for _ in range(100):
            with suppress(TimeoutError):
                if not self.connection.recv(1):
                    return
            self.wfile.write(drop)

    def log_message(self, *_: object) -> None:
        """Log nothing."""


# By path: the beginning of the response, and the bytes that follow every 0.1 s.
_SLOW = {
    "/silent": (b"", b""),
    "/drip-status": (b"", b"H"),
    "/drip-headers": (b"HTTP/1.1 200 OK\r\n", b"X-Header: 1\r\n"),
    "/drip-body": (b"HTTP/1.1 200 OK\r\n\r\n[", b" "),
    "/drip-hints": (b"", b"HTTP/1.1 103 Early Hints\r\n\r\n"),
}


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = False  # closing waits for the last response

    def handle_error(self, *_: object) -> None:
        """Ignore clients that disconnect: the tests do that."""


@pytest.fixture
def url() -> Iterator[str]:
    """The URL of a local server. Its query string stands for a secret token."""
    with _QuietServer(("127.0.0.1", 0), _Responses) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/{{}}?token=pa55"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("path", ["array", "object", "moved"])
def test_signals_are_read_from_a_url(archive_of: Callable[..., SignalArchive], url: str, path: str) -> None:
    """As an array or an object. Numbers keep all digits, and redirects are followed."""
    archive = archive_of(signals_url=url.format(path), archived_at=INSTANT)
    assert archive.signals == [{"price": Decimal("0.12345678901234567890")}]


@pytest.mark.parametrize("path", ["empty", "none"])
def test_a_url_without_signals_records_nothing(trading_history: FakeHistory, url: str, path: str) -> None:
    """The file is not read instead."""
    Path("signals.json").write_text('[{"market_id": "1"}]', "utf-8")
    assert archive_current_signals(signals_url=url.format(path), signals_path="signals.json") is None
    assert trading_history.events == []


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing", "signals_url returned HTTP status 404"),
        ("broken", "the response of signals_url: line 3 column 13: Expecting value"),
        ("text", "the response of signals_url: must be a list of signals, not str"),
        ("large", "the response of signals_url is larger than 8 MiB"),
        ("hang-up", "signals_url cannot be read: RemoteProtocolError"),
        ("half", "signals_url cannot be read: RemoteProtocolError"),
    ],
)
def test_an_error_of_a_url_does_not_show_the_url(
    trading_history: FakeHistory, url: str, path: str, message: str
) -> None:
    """The URL may contain a token, so neither the message nor the cause shows it."""
    with pytest.raises(SignalsUnreadable) as caught:
        archive_current_signals(signals_url=url.format(path))
    assert (str(caught.value), caught.value.__cause__) == (message, None)
    assert trading_history.events == []


@pytest.mark.parametrize("path", ["silent", "drip-status", "drip-headers", "drip-hints", "drip-body", "round"])
def test_a_slow_server_blocks_the_caller_for_at_most_the_time_limit(
    trading_history: FakeHistory, url: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if it sends something within the limit of each read. The thread of the request ends soon after."""
    monkeypatch.setattr(current_signals, "URL_TIMEOUT_SECONDS", 0.5)
    began = time.monotonic()
    with pytest.raises(SignalsUnreadable, match=r"^signals_url took longer than 0\.5 s$") as caught:
        archive_current_signals(signals_url=url.format(path))
    assert time.monotonic() - began < 1.5
    assert caught.value.__cause__ is None
    while any(thread.name == "signals-url" for thread in threading.enumerate()):
        assert time.monotonic() - began < 3
        time.sleep(0.01)


_HANGING_LOOKUP = """
import socket, time
from pathlib import Path
from producers import current_signals
from producers.errors import SignalsUnreadable

current_signals.URL_TIMEOUT_SECONDS = 0.5
socket.getaddrinfo = lambda *_, **__: time.sleep(600)
began = time.monotonic()
try:
    current_signals.read_signals(None, signals_url="http://current_signals.example/", signals_path=Path("signals.json"))
except SignalsUnreadable as error:
    print(error, time.monotonic() - began < 1.5)
"""


def test_a_hanging_name_lookup_blocks_neither_the_caller_nor_the_exit() -> None:
    """httpx has no limit for it, and nothing can end it, so its thread is abandoned."""
    line = [sys.executable, "-c", _HANGING_LOOKUP]
    ended = subprocess.run(line, capture_output=True, text=True, timeout=30, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "signals_url took longer than 0.5 s True\n", "")


def test_a_url_is_unreadable_if_no_thread_can_start(
    trading_history: FakeHistory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example while the interpreter shuts down. The caller's own thread must not wait for a server."""

    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    with pytest.raises(SignalsUnreadable, match=r"^signals_url cannot be read: cannot start a thread$"):
        archive_current_signals(signals_url="http://127.0.0.1:1/")


def test_a_url_whose_certificate_is_not_trusted_is_unreadable(trading_history: FakeHistory) -> None:
    """The message has the reason of the TLS library."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    with socket.create_server(("127.0.0.1", 0)) as listening, ThreadPoolExecutor(1) as thread:

        def serve() -> None:
            client, _ = listening.accept()
            with client, suppress(OSError):
                context.wrap_socket(client, server_side=True)

        served = thread.submit(serve)
        with pytest.raises(SignalsUnreadable, match="^signals_url cannot be read: TLS: .*certificate") as caught:
            archive_current_signals(signals_url=f"https://127.0.0.1:{listening.getsockname()[1]}/?token=pa55")
        served.result()
    assert "pa55" not in str(caught.value)


def test_a_connection_that_is_made_after_the_time_limit_sends_nothing(
    trading_history: FakeHistory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name lookup took too long. The caller has continued, and the server sees the connection end."""
    monkeypatch.setattr(current_signals, "URL_TIMEOUT_SECONDS", 0.2)
    found, looked_up = threading.Event(), socket.getaddrinfo

    def slow(*arguments: Any, **named: Any) -> Any:
        found.wait(10)
        return looked_up(*arguments, **named)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        with pytest.raises(SignalsUnreadable, match=r"^signals_url took longer than 0\.2 s$"):
            archive_current_signals(signals_url=f"http://127.0.0.1:{listening.getsockname()[1]}/")
        found.set()
        listening.settimeout(10)
        client, _ = listening.accept()
        with client:
            client.settimeout(10)
            assert client.recv(1000) == b""


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1:1/?token=pa55", "cannot be read: Connection refused; check its host and port"),
        *(
            (url, "is not a valid http:// or https:// URL")
            for url in ("nonsense", "file:///etc/hosts", "http://[::1", f"http://{'a' * 64}.example/", "")
        ),
    ],
)
def test_a_url_that_is_invalid_or_unreachable_is_unreadable(
    trading_history: FakeHistory, url: str, message: str
) -> None:
    """All cases raise the same kind of error, with the reason and without the URL."""
    with pytest.raises(SignalsUnreadable) as caught:
        archive_current_signals(signals_url=url)
    assert str(caught.value) == f"signals_url {message}"


def test_a_url_with_an_unknown_host_is_unreadable(
    trading_history: FakeHistory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(SignalsUnreadable, match=r"^signals_url cannot be read: its host name is not known$"):
        archive_current_signals(signals_url="http://nowhere.example/?token=pa55")


# ---- signals of the file


@pytest.fixture
def signals_file() -> Path:
    """The path of the file that the trading system writes, in the working folder."""
    path = Path("data/trades/current_signals.json")
    path.parent.mkdir(parents=True)
    return path


@pytest.mark.parametrize(
    "content",
    [
        '[{"price": 0.12345678901234567890, "question": "🌉"}]',
        '{"signals": [{"price": 0.12345678901234567890, "question": "\\ud83c\\udf09"}]}',
        '\ufeff\r\n[{"price": 0.12345678901234567890, "question": "🌉"}]\r\n',
    ],
    ids=["array", "object", "byte order mark"],
)
def test_signals_are_read_from_the_file_which_is_not_changed(
    archive_of: Callable[..., SignalArchive], signals_file: Path, content: str
) -> None:
    """By default, the file is data/trades/current_signals.json."""
    signals_file.write_bytes(content.encode())
    signals_file.chmod(0o444)
    before = signals_file.stat()

    archive = archive_of(archived_at=INSTANT)

    assert archive.signals == [{"price": Decimal("0.12345678901234567890"), "question": "🌉"}]
    after = signals_file.stat()
    assert (signals_file.read_bytes(), after.st_mtime_ns) == (content.encode(), before.st_mtime_ns)
    assert [path.name for path in signals_file.parent.iterdir()] == [signals_file.name]


@pytest.mark.parametrize("content", [None, b"", b" \n\t", b"\xef\xbb\xbf", b"[]", b' {"signals": []} '])
def test_a_file_without_signals_records_nothing(
    trading_history: FakeHistory, signals_file: Path, content: bytes | None
) -> None:
    """Missing or empty: the call returns None."""
    if content is not None:
        signals_file.write_bytes(content)
    assert archive_current_signals() is None
    assert archive_current_signals(signals_path="no/such/folder/current_signals.json") is None
    assert trading_history.events == []


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'[\n  {"a": 1},\n  {"a":', "line 3 column 8: Expecting value"),
        (b'[{"a": "unfinished', "line 1 column 8: Unterminated string starting at"),
        (b'[{"a": 1}] x', "line 1 column 12: Extra data"),
        (b'[{"a": "\xff"}]', "not UTF-8 at byte 8"),
        ('[{"a": 1}]'.encode("utf-16"), "not UTF-8 at byte 0"),
        (b"[" * 100_000, "nested too deeply, or a number has too many digits"),
        (b'[{"a": ' + b"1" * 5000 + b"}]", "nested too deeply, or a number has too many digits"),
        (b'{"signal": []}', "must be a list, or an object with the key 'signals'"),
        (b"null", "must be a list of signals, not NoneType"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_an_error_of_a_file_has_its_name_and_the_position(
    trading_history: FakeHistory, signals_file: Path, content: bytes, reason: str
) -> None:
    """A half-written file is an error and does not count as empty."""
    signals_file.write_bytes(content)
    with pytest.raises(SignalsUnreadable) as caught:
        archive_current_signals()
    assert str(caught.value) == f"data/trades/current_signals.json: {reason}"
    assert (signals_file.read_bytes(), trading_history.events) == (content, [])


def test_a_folder_in_place_of_the_file_is_unreadable(trading_history: FakeHistory, signals_file: Path) -> None:
    """Only a missing file means that there are no signals."""
    with pytest.raises(SignalsUnreadable, match=r"^data/trades: Is a directory$"):
        archive_current_signals(signals_path=signals_file.parent)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"a": 1}, {"price": NaN}]', r"signals\.1\.price: must be finite"),
        ('[{"price": 1e999}]', r"signals\.0\.price: must be finite"),
        (r'[{"a": "\ud800"}]', r"signals\.0\.a: contains a NUL character or a lone surrogate"),
        ("[1]", r"signals\.0: "),
        (f'[{{"a": {"[" * 50}{"]" * 50}}}]', r"signals\.0\.a[.0]*: is nested deeper than 50 levels"),
        ('[{"price": 1e-99999999999999999999}]', "signals"),
        ('[{"price": 1e99999999999999999999}]', "signals"),
    ],
    ids=lambda value: value[:30],
)
def test_a_file_with_values_that_cannot_be_stored_is_invalid(
    trading_history: FakeHistory, signals_file: Path, content: str, message: str
) -> None:
    """Python can read this JSON, but nothing is recorded."""
    signals_file.write_text(content, "utf-8")
    with pytest.raises(InvalidEvent, match=message):
        archive_current_signals()
    assert trading_history.events == []


# ---- the shared producer


def test_calls_without_a_producer_share_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is made from the settings at the first call, and again after it was closed."""
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:1/0")
    monkeypatch.setenv("HISTORY_OUTBOX", str(tmp_path / "outbox.db"))

    snapshot = create_daily_portfolio_snapshot(a_portfolio())
    first = shared_producer()
    archive = archive_current_signals([a_signal()])
    assert archive is not None
    assert shared_producer() is first
    assert (snapshot.sequence, archive.sequence, archive.source) == (1, 2, snapshot.source)

    first.close(timeout=0)
    assert create_daily_portfolio_snapshot(a_portfolio()).sequence == 3
    assert shared_producer() is not first
    shared_producer().close(timeout=0)


def test_changed_settings_count_after_the_shared_producer_was_closed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As in a notebook. Until then, the shared producer keeps the settings of the first call."""
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:1/0")
    monkeypatch.setenv("HISTORY_OUTBOX", str(tmp_path / "first.db"))
    create_daily_portfolio_snapshot(a_portfolio())

    monkeypatch.setenv("HISTORY_OUTBOX", str(tmp_path / "second.db"))
    assert create_daily_portfolio_snapshot(a_portfolio()).sequence == 2
    assert not (tmp_path / "second.db").exists()

    shared_producer().close(timeout=0)
    assert create_daily_portfolio_snapshot(a_portfolio()).sequence == 1
    assert (tmp_path / "second.db").exists()
    shared_producer().close(timeout=0)


def test_calls_without_redis_url_raise_an_error_that_names_it() -> None:
    """Nothing is written."""
    with pytest.raises(SettingsError, match=r"^REDIS_URL is not set"):
        create_daily_portfolio_snapshot(a_portfolio())
    with pytest.raises(SettingsError, match=r"^REDIS_URL is not set"):
        archive_current_signals([a_signal()])
    assert list(Path().iterdir()) == []
