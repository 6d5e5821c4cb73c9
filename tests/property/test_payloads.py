"""Any value that the producer accepts is stored and read back equal; any other raises an error that names the field.

The database is real. Each example runs in a transaction that is rolled back, because two examples may be the same fact.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, text

from consumers.db.engine import engine
from consumers.db.inserts import Stored, insert_events
from consumers.worker.deliveries import MAX_JOB_BYTES, ReservedJob, parse_job
from producers.errors import InvalidEvent
from producers.events import (
    MAX_EVENT_BYTES,
    Event,
    Payload,
    PortfolioSnapshot,
    PortfolioSnapshotEvent,
    SignalArchive,
    SignalArchiveEvent,
    decode,
    draft_of,
    encode,
    event_of,
)
from producers.json_values import MAX_SIGNALS
from producers.outbox import Outbox
from producers.rq_queue import job_data
from producers.trace_context import trace_context
from tests.factories import INSTANT, a_snapshot, an_archive

# No deadlines: some examples have 8 MB, and the time to make them depends on the machine.
_PURE = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
# All examples of a test use the same database. Rolling back keeps it empty.
_STORED = settings(_PURE, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])

AMOUNTS = ("balance", "total_invested", "total_profit_loss", "total_value")
COUNTS = ("open_positions", "trade_count")

# ---- valid values

_LIMIT = Decimal("999999999999.99999999")
_decimals = st.one_of(
    st.decimals(-_LIMIT, _LIMIT),
    st.builds(lambda n, places: Decimal(n).scaleb(-places), st.integers(-(10**20) + 1, 10**20 - 1), st.integers(8, 40)),
)
amounts = st.one_of(
    st.integers(-(10**12) + 1, 10**12 - 1),
    st.floats(-999_999_999_999.5, 999_999_999_999.5),
    _decimals,
    _decimals.map(str),
    st.floats(-1e9, 1e9).map(repr),
)
counts = st.integers(0, 2**31 - 1)
portfolio_ids = st.none() | st.integers(-(2**63), 2**63 - 1)
offsets = st.integers(-(24 * 60 - 1), 24 * 60 - 1).map(lambda minutes: timezone(timedelta(minutes=minutes)))
instants = st.datetimes(datetime(1970, 1, 2), datetime(9998, 12, 30), timezones=offsets)
# The codec excludes surrogates.
texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
numbers = st.one_of(
    st.integers(),
    st.integers(-(2**1000), 2**1000),
    st.floats(allow_nan=False, allow_infinity=False),
    st.builds(lambda n, exponent: Decimal(n).scaleb(exponent), st.integers(-(10**27), 10**27), st.integers(-400, 280)),
)
json_values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)
signal_lists = st.lists(st.dictionaries(texts, json_values, max_size=5), min_size=1, max_size=4)

snapshot_values = st.fixed_dictionaries(
    {
        "snapshot_date": st.dates(),
        "timestamp": instants,
        **dict.fromkeys(AMOUNTS, amounts),
        **dict.fromkeys(COUNTS, counts),
        "portfolio_id": portfolio_ids,
    }
)
archive_values = st.fixed_dictionaries(
    {"archived_at": instants, "signals": signal_lists, "portfolio_id": portfolio_ids}
)
snapshots = snapshot_values.map(lambda values: PortfolioSnapshot.checked(**values))
archives = archive_values.map(lambda values: SignalArchive.checked(**values))


def _event(payload: Payload) -> Event:
    return event_of(payload, source="property/1", sequence=1)


def _sent(payload: Payload) -> Event:
    """Return the event as a consumer reads it."""
    wire = encode(_event(payload))
    if isinstance(payload, PortfolioSnapshot):
        return decode(wire, PortfolioSnapshotEvent)
    return decode(wire, SignalArchiveEvent)


def _rounded(amount: Any) -> Fraction:
    """Return the amount rounded half-even to 8 decimals. Python rounds exact fractions half-even."""
    exact = Fraction(repr(amount) if isinstance(amount, float) else amount)
    return Fraction(round(exact * 10**8), 10**8)


def _with_exact_numbers(value: Any) -> Any:
    """Return JSON with exact numbers that do not equal booleans: true is not 1, and 10 is 10.0."""
    if isinstance(value, dict):
        return {name: _with_exact_numbers(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_with_exact_numbers(item) for item in value]
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        return value
    return ("number", Decimal(repr(value)) if isinstance(value, float) else Decimal(value))


@contextmanager
def _rolled_back() -> Iterator[Connection]:
    with engine().connect() as db:
        yield db
        db.rollback()


# ---- stored and read back


def _insert(db: Connection, payload: Payload) -> Stored:
    (result,) = insert_events(db, [_sent(payload)])
    assert isinstance(result, Stored)
    return result


_SNAPSHOT = text("SELECT * FROM portfolio_history WHERE id = :id")
_ARCHIVE = text("SELECT *, signals_data::text AS exact FROM signal_archives WHERE id = :id")


@given(values=snapshot_values)
@example(values=dict(a_snapshot(timestamp=INSTANT.astimezone(timezone(timedelta(hours=16))))))
@_STORED
@pytest.mark.usefixtures("database_url")
def test_any_snapshot_is_stored_and_read_back_equal(values: dict[str, Any]) -> None:
    """Amounts have all 8 decimals, instants have microseconds, and all other values are equal."""
    payload = PortfolioSnapshot.checked(**values)
    with _rolled_back() as db:
        stored = _insert(db, payload)
        row = db.execute(_SNAPSHOT, {"id": stored.row_id}).mappings().one()
        again = _insert(db, payload)

    expected = values | {name: _rounded(values[name]) for name in AMOUNTS}
    assert {name: Fraction(row[name]) if name in AMOUNTS else row[name] for name in expected} == expected
    assert (str(row["event_id"]), stored.created) == (str(payload.event_id), True)
    assert (again.created, again.row_id) == (False, stored.row_id)


@given(values=archive_values)
@example(values=dict(an_archive(archived_at=INSTANT.astimezone(timezone(timedelta(hours=-16))))))
@example(values={"archived_at": INSTANT, "signals": [{"": Decimal("1E-16383")}], "portfolio_id": None})
@example(values={"archived_at": INSTANT, "signals": [{"": Decimal("0E+99999")}], "portfolio_id": None})
@example(values={"archived_at": INSTANT, "signals": [{"": [True, 1, 1.0, "1", -0.0, 5e-324]}], "portfolio_id": 0})
@_STORED
@pytest.mark.usefixtures("database_url")
def test_any_archive_is_stored_and_read_back_equal(values: dict[str, Any]) -> None:
    """JSON is compared by value: JSONB keeps all digits, and a second insert is a duplicate."""
    payload = SignalArchive.checked(**values)
    with _rolled_back() as db:
        stored = _insert(db, payload)
        row = db.execute(_ARCHIVE, {"id": stored.row_id}).mappings().one()
        again = _insert(db, payload)

    read = json.loads(row["exact"], parse_float=Decimal)
    assert _with_exact_numbers(read) == _with_exact_numbers(values["signals"])
    assert (row["archived_at"], row["portfolio_id"]) == (values["archived_at"], values["portfolio_id"])
    assert row["archive_month"] == values["archived_at"].isoformat()[:7]
    assert (row["signals_count"], str(row["event_id"])) == (len(values["signals"]), str(payload.event_id))
    assert (again.created, again.row_id) == (False, stored.row_id)


# ---- the limits of producer and consumer are the same

_edge_texts = st.builds(
    lambda unit, times: unit * times,
    st.sampled_from(["x", "\x7f", "\x01", '"', "\\", "é", "€", "🌉", "\u2028"]),
    st.sampled_from([1, 1000, 100_000]),
)
_edge_numbers = st.one_of(
    st.sampled_from([Decimal("1.7976931348623157E308"), -(2**1023), 10**308, Decimal("0E+99999"), -0.0, 5e-324]),
    st.sampled_from([16383, 16382]).map(lambda places: Decimal(f"1{'0' * 4199}1E-{places}")),
    st.integers(1, 16000).map(lambda digits: Decimal("1." + "7" * digits)),
)
_edge_values = st.one_of(
    _edge_texts,
    _edge_numbers,
    st.integers(40, 49).map(lambda depth: _nested(1, [0] * depth)),
    st.integers(40, 48).map(lambda depth: _nested(1, ["a"] * depth)),
)
_edge_signals = st.one_of(
    st.lists(st.dictionaries(_edge_texts, _edge_values, max_size=2), min_size=1, max_size=2),
    st.just([{}] * MAX_SIGNALS),
    st.integers(-3, 3).map(lambda more: [{"a": "x" * (MAX_EVENT_BYTES - 400 + 100 * more)}]),
    st.integers(-2, 2).map(lambda more: [{"a": "\x7f" * (MAX_EVENT_BYTES - 400 + 100 * more)}]),
)


@given(signals=_edge_signals)
@example(signals=[{"a": "\x7f" * (MAX_EVENT_BYTES - 1000)}])
@settings(_STORED, max_examples=30)
@pytest.mark.usefixtures("database_url")
def test_an_event_that_the_producer_accepts_at_a_limit_is_accepted_and_stored(
    tmp_path: Path, signals: list[dict[str, Any]]
) -> None:
    """Limits of size, number, nesting, digits and length of keys, including those of the job in Redis."""
    with TemporaryDirectory(dir=tmp_path) as folder, Outbox(Path(folder) / "outbox.db") as outbox:
        try:
            outbox.append("property", [an_archive(signals=signals)])
        except InvalidEvent:
            return
        (entry,) = outbox.deliveries.pending(1)
    data = job_data(entry)
    assert len(data) <= MAX_JOB_BYTES
    delivery = parse_job(ReservedJob("x", "usual", data, None))
    assert delivery.model is not None
    with _rolled_back() as db:
        (result,) = insert_events(db, [decode(delivery.text, delivery.model)])
        assert isinstance(result, Stored)
        read = db.execute(_ARCHIVE, {"id": result.row_id}).mappings().one()["exact"]
    assert _with_exact_numbers(json.loads(read, parse_float=Decimal)) == _with_exact_numbers(signals)


# ---- JSON text


@given(payload=snapshots)
@_PURE
def test_decoding_an_encoded_snapshot_gives_an_equal_event(payload: PortfolioSnapshot) -> None:
    """Encoding that again gives the same text, with the same offset."""
    event = _event(payload)
    read = _sent(payload)
    assert (read, encode(read)) == (event, encode(event))


@given(payload=archives)
@_PURE
def test_decoding_an_encoded_archive_gives_an_equal_event(payload: SignalArchive) -> None:
    """Numbers are equal by value. After encoding that again, their types are equal too."""
    event = _event(payload)
    read = _sent(payload)
    assert isinstance(read.data, SignalArchive)
    assert _with_exact_numbers(read.data.signals) == _with_exact_numbers(payload.signals)
    assert read.model_dump(exclude={"data": {"signals"}}) == event.model_dump(exclude={"data": {"signals"}})
    assert decode(encode(read), SignalArchiveEvent) == read


@given(payload=snapshots | archives, sequence=st.integers(1, 2**63 - 1), traced=st.booleans())
@_PURE
def test_a_draft_gives_the_same_text_as_encoding_the_event(payload: Payload, sequence: int, traced: bool) -> None:
    """Signals may contain anything, also what looks like a source and a sequence."""
    placeholder, source = "bot-1/0000", "bot-1/a.~9"
    trace = trace_context("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01") if traced else None
    draft = draft_of(payload, placeholder, trace=trace)
    event = event_of(payload, source=source, sequence=sequence, trace=trace)
    assert draft.text(source, sequence) == encode(event)
    assert (draft.event_id, draft.type, draft.summary) == (event.id, event.type, payload.summary)


@given(payload=snapshots | archives, offset=offsets)
@_PURE
def test_the_same_fact_has_the_same_id_in_any_offset(payload: Payload, offset: timezone) -> None:
    """The JSON text has the same id too."""
    moved = {
        "timestamp" if isinstance(payload, PortfolioSnapshot) else "archived_at": payload.instant.astimezone(offset)
    }
    other = type(payload).checked(**dict(payload) | moved)
    assert (other.event_id, _sent(other).id) == (payload.event_id, payload.event_id)


# ---- invalid at the producer


def _is_not_a_number(value: str) -> bool:
    try:
        return not Decimal(value).is_finite()
    except InvalidOperation:
        return True


_other_types = st.none() | st.booleans() | st.binary(max_size=4) | st.lists(st.integers(), max_size=2)
_too_large = st.one_of(
    st.integers(10**12, 10**400),
    st.floats(1e12, allow_infinity=True),
    st.decimals(10**12, allow_nan=False, allow_infinity=True),
)
wrong_amounts = st.one_of(
    _other_types,
    st.text(max_size=10).filter(_is_not_a_number),
    st.sampled_from([float("nan"), Decimal("NaN"), Decimal("-sNaN")]),
    _too_large,
    _too_large.map(lambda value: -value),
    st.datetimes(),
)
wrong_counts = st.one_of(
    _other_types, st.integers(max_value=-1), st.integers(2**31), st.floats(), st.decimals(), st.text(max_size=5)
)
wrong_portfolio_ids = st.one_of(
    st.booleans(), st.integers(2**63), st.integers(max_value=-(2**63) - 1), st.floats(), st.text(max_size=5)
)
wrong_instants = st.one_of(
    _other_types,
    st.datetimes(),
    st.datetimes(max_value=datetime(1969, 12, 30), timezones=offsets),
    st.datetimes(min_value=datetime(9999, 1, 2), timezones=offsets),
    st.integers(1, 59).map(lambda seconds: INSTANT.replace(tzinfo=timezone(timedelta(seconds=seconds)))),
    instants.map(datetime.isoformat),
    st.dates(),
    st.integers(),
)
wrong_dates = st.one_of(_other_types, st.datetimes(), st.dates().map(date.isoformat), st.integers())


def _nested(value: Any, path: list[str | int]) -> Any:
    """Return `value` inside nested objects (for each name) and arrays (for each number)."""
    for step in reversed(path):
        value = {step: value, "other": 1} if isinstance(step, str) else [*range(step), value]
    return value


_paths = st.lists(st.text("abc", min_size=1, max_size=3) | st.integers(0, 2), max_size=6)
_unstorable_texts = st.builds(
    lambda before, bad, after: before + bad + after,
    texts,
    st.just("\0") | st.characters(min_codepoint=0xD800, max_codepoint=0xDFFF),
    texts,
)
_unstorable_values = st.one_of(
    st.sampled_from([float("nan"), float("inf"), -float("inf"), Decimal("NaN"), Decimal("sNaN"), Decimal("Infinity")]),
    st.integers(2 * 10**308) | st.integers(max_value=-2 * 10**308),
    st.integers(16384, 99999).map(lambda places: Decimal(1).scaleb(-places)),
    _unstorable_texts,
    _unstorable_texts.map(lambda key: {key: 1}),
    st.integers().map(lambda key: {key: 1}),
    st.tuples(st.integers()) | st.sets(st.integers(), max_size=2) | st.binary(max_size=3),
    st.datetimes() | st.dates() | st.uuids() | st.complex_numbers(),
    st.integers(50, 400).map(lambda depth: _nested(1, [0] * depth)),
)
wrong_signals = st.one_of(
    st.just([]),
    _other_types.filter(lambda value: not isinstance(value, list)),
    st.dictionaries(texts, texts, max_size=1),
    st.tuples(st.dictionaries(texts, texts)),
    st.lists(json_values.filter(lambda value: not isinstance(value, dict)), min_size=1, max_size=3),
    st.builds(lambda value, path: [{}, {"a": _nested(value, path)}], _unstorable_values, _paths),
)

_WRONG: dict[str, st.SearchStrategy[Any]] = {
    "snapshot_date": wrong_dates,
    "timestamp": wrong_instants,
    "archived_at": wrong_instants,
    "signals": wrong_signals,
    "portfolio_id": wrong_portfolio_ids,
    **dict.fromkeys(AMOUNTS, wrong_amounts),
    **dict.fromkeys(COUNTS, wrong_counts),
}


@st.composite
def _with_one_wrong_field(draw: st.DrawFn, model: type[Payload]) -> tuple[dict[str, Any], str]:
    """Draw the values of a payload with one invalid field, and the name of that field."""
    values = dict(draw(snapshots if model is PortfolioSnapshot else archives))
    kind = draw(st.sampled_from(["wrong", "wrong", "wrong", "missing", "unknown"]))
    if kind == "unknown":
        name = draw(st.text("abcdefghijklmnop_", min_size=1, max_size=8).filter(lambda name: name not in values))
        return values | {name: draw(json_values)}, name
    name = draw(st.sampled_from(sorted(values.keys() - ({"portfolio_id"} if kind == "missing" else set()))))
    if kind == "missing":
        del values[name]
        return values, name
    return values | {name: draw(_WRONG[name])}, name


def _assert_named(error: InvalidEvent, field: str) -> None:
    """Assert that the message begins with the path of the field and is one printable line."""
    message = str(error)
    assert message.startswith((f"{field}: ", f"{field}."))
    assert (message.isprintable(), len(message) <= 500) == (True, True)


@given(invalid=_with_one_wrong_field(PortfolioSnapshot))
@_PURE
def test_the_producer_names_the_one_wrong_field_of_a_snapshot(invalid: tuple[dict[str, Any], str]) -> None:
    """The error is always InvalidEvent."""
    values, field = invalid
    with pytest.raises(InvalidEvent) as caught:
        PortfolioSnapshot.checked(**values)
    _assert_named(caught.value, field)


@given(invalid=_with_one_wrong_field(SignalArchive))
@_PURE
def test_the_producer_names_the_one_wrong_field_of_an_archive(invalid: tuple[dict[str, Any], str]) -> None:
    """Including values at any depth of its signals."""
    values, field = invalid
    with pytest.raises(InvalidEvent) as caught:
        SignalArchive.checked(**values)
    _assert_named(caught.value, field)


# ---- invalid at the consumer

_wire_texts = st.text(st.characters(codec="utf-8"), max_size=30)
# Hypothesis sometimes generates text that is a valid time or date.
_not_starting_with_a_digit = _wire_texts.filter(lambda value: not value[:1].isdigit())
_not_text: st.SearchStrategy[Any] = st.one_of(
    st.booleans(), st.integers(), st.floats(), st.lists(st.integers(), max_size=2), st.just({})
)
_not_integer = st.one_of(st.none(), st.booleans(), st.floats(), _wire_texts, st.just([]), st.just({}))
_wire_amounts = st.one_of(
    st.none(),
    _not_text,
    _wire_texts.filter(lambda value: not value.isascii() or not value.strip("-").replace(".", "").isdigit()),
    st.from_regex(r"-?[0-9]{13,30}(\.[0-9]{1,8})?", fullmatch=True),
    st.from_regex(r"-?[0-9]{1,12}\.[0-9]{9,30}", fullmatch=True),
    st.from_regex(r"-?[0-9]{1,5}[eE][+-]?[0-9]{1,3}|\+[0-9]{1,5}|[0-9]{1,3}\.|-?\.[0-9]{1,3}", fullmatch=True),
    st.sampled_from(["NaN", "Infinity", "-Infinity", "", "1 ", " 1", "1\n", "1,5", "1_0", "--1"]),
)
_wire_instants = st.one_of(
    st.none(),
    _not_text,
    _not_starting_with_a_digit,
    st.datetimes().map(datetime.isoformat),
    instants.map(lambda moment: moment.isoformat(sep=" ")),
    st.datetimes(max_value=datetime(1969, 12, 30), timezones=offsets).map(datetime.isoformat),
    st.from_regex(r"2026-(0[0-9]|1[3-9]|[2-9][0-9])-3[1-9]T[0-9]{2}:[0-9]{2}:[0-9]{2}Z", fullmatch=True).filter(
        lambda moment: moment[5:7] in ("00", "02", "04", "06", "09") or moment[8:10] > "31" or moment[5:7] > "12"
    ),
    st.from_regex(r"2026-11-22T(2[4-9]|[3-9][0-9]):[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?Z", fullmatch=True),
    st.from_regex(r"2026-11-22T17:02:46\.[0-9]{7,12}Z", fullmatch=True),
    st.from_regex(r"2026-11-22T17:02:46[+-](2[4-9]|[3-9][0-9]):[0-9]{2}", fullmatch=True),
    st.from_regex(r"2026-11-22T17:02:46[+-][01][0-9]:[6-9][0-9]", fullmatch=True),
)
_wire_unstorable_values = st.one_of(
    st.sampled_from([float("nan"), float("inf"), -float("inf")]),
    st.integers(2 * 10**308) | st.integers(max_value=-2 * 10**308),
    texts.map(lambda value: value + "\0"),
    texts.map(lambda value: {"\0" + value: 1}),
    st.integers(50, 120).map(lambda depth: _nested(1, [0] * depth)),
)
_WIRE_WRONG: dict[str, st.SearchStrategy[Any]] = {
    "specversion": st.none() | _not_text | _wire_texts.filter(lambda value: value != "1.0"),
    "id": st.one_of(st.none(), _not_text, _wire_texts, st.builds(lambda: str(uuid4()))),
    "source": st.one_of(st.none(), _not_text, st.from_regex(r"/.*|.*/|.*[^A-Za-z0-9._~/-].*", fullmatch=True)),
    "sequence": st.one_of(
        _not_text,
        st.from_regex(r"[0-9]{1,18}|[0-9]{20,30}|9[3-9][0-9]{17}|-[0-9]{18}", fullmatch=True),
        _wire_texts.filter(lambda value: not value.isdigit()),
    ),
    "time": _wire_instants,
    "datacontenttype": _not_text | _wire_texts,
    "type": st.none() | _not_text | st.from_regex(r"trading\.[a-z-]+\.v[02-9]", fullmatch=True) | _wire_texts,
    "data": st.none() | _not_text.filter(lambda value: value != {}) | _wire_texts,
    "data.snapshot_date": st.one_of(
        st.none(),
        _not_text,
        _not_starting_with_a_digit,
        st.from_regex(r"2026-(02-3[0-9]|1[3-9]-01|00-01|0[1-9]-00|[0-9]{3})|[0-9]{8}", fullmatch=True),
        st.datetimes().map(datetime.isoformat),
    ),
    "data.timestamp": _wire_instants,
    "data.archived_at": _wire_instants,
    "data.portfolio_id": st.one_of(
        _not_integer.filter(lambda value: value is not None),
        st.integers(2**63),
        st.integers(max_value=-(2**63) - 1),
    ),
    "data.signals": st.one_of(
        st.none(),
        _not_text.filter(lambda value: not isinstance(value, list)),
        st.just([]),
        _wire_texts,
        st.lists(_not_integer.filter(lambda value: value != {}) | st.integers(), min_size=1, max_size=3),
        st.builds(lambda value, path: [{}, {"a": _nested(value, path)}], _wire_unstorable_values, _paths),
    ),
    **{f"data.{name}": _wire_amounts for name in AMOUNTS},
    **{f"data.{name}": st.one_of(_not_integer, st.integers(max_value=-1), st.integers(2**31)) for name in COUNTS},
}
_OPTIONAL = {"sequence", "subject", "datacontenttype", "data.portfolio_id"}


@st.composite
def _with_one_wrong_member(draw: st.DrawFn, payload: Payload) -> tuple[str, str]:
    """Draw the text of an event with one invalid member, and the dotted path of that member."""
    document = json.loads(encode(_event(payload)))
    paths = [*document, *(f"data.{name}" for name in document["data"])]
    kind = draw(st.sampled_from(["wrong", "wrong", "wrong", "missing", "unknown"]))
    if kind == "unknown":
        # A name of small letters beside `data` would be that of an extension attribute.
        path = draw(st.sampled_from(["", "data."])) + draw(st.text("XYZ", min_size=1, max_size=5))
    else:
        path = draw(st.sampled_from([p for p in paths if p in _WIRE_WRONG and (kind == "wrong" or p not in _OPTIONAL)]))
    members = document["data"] if path.startswith("data.") else document
    name = path.removeprefix("data.")
    if kind == "missing":
        del members[name]
    else:
        members[name] = draw(_WIRE_WRONG[path] if kind == "wrong" else json_values.filter(_has_no_decimal))
    return json.dumps(document), path


def _has_no_decimal(value: Any) -> bool:
    if isinstance(value, dict | list):
        return all(_has_no_decimal(item) for item in (value.values() if isinstance(value, dict) else value))
    return not isinstance(value, Decimal)


@given(invalid=_with_one_wrong_member(a_snapshot()))
@settings(_PURE, max_examples=300)
def test_the_consumer_names_the_one_wrong_member_of_a_snapshot(invalid: tuple[str, str]) -> None:
    """The error is InvalidEvent and begins with the path of the member."""
    wire, path = invalid
    with pytest.raises(InvalidEvent) as caught:
        decode(wire, PortfolioSnapshotEvent)
    _assert_named(caught.value, path)


@given(invalid=_with_one_wrong_member(an_archive()))
@_PURE
def test_the_consumer_names_the_one_wrong_member_of_an_archive(invalid: tuple[str, str]) -> None:
    """The error is InvalidEvent and begins with the path of the member."""
    wire, path = invalid
    with pytest.raises(InvalidEvent) as caught:
        decode(wire, SignalArchiveEvent)
    _assert_named(caught.value, path)


@given(wire=st.one_of(_wire_texts, st.text(), json_values.filter(_has_no_decimal).map(json.dumps)))
@_PURE
def test_any_other_text_is_invalid_at_the_consumer(wire: str) -> None:
    """The error is always InvalidEvent with a printable reason."""
    for model in (PortfolioSnapshotEvent, SignalArchiveEvent):
        with pytest.raises(InvalidEvent) as caught:
            decode(wire, model)
        assert str(caught.value).isprintable()
