"""The event contract: ids, the JSON text, CloudEvents, and the messages for invalid input."""

from __future__ import annotations

import decimal
import json
import pickle
import random
import time
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import pytest
from cloudevents.core.formats.json import JSONFormat
from jsonschema import Draft7Validator, Draft202012Validator
from jsonschema.validators import validator_for
from pydantic import ValidationError

from producers.errors import InvalidEvent
from producers.events import (
    KINDS,
    MAX_EVENT_BYTES,
    MAX_EVENT_STRUCTURE,
    Event,
    Payload,
    PortfolioSnapshot,
    PortfolioSnapshotEvent,
    SignalArchive,
    SignalArchiveEvent,
    decode,
    encode,
    event_id,
    event_of,
    json_schema,
    unchecked_event_of,
)
from producers.fields import readable
from producers.trace_context import TraceContext
from tests.factories import INSTANT, a_signal, a_snapshot, an_archive

SOURCE = "trading-controller/0f1e2d3c4b5a"
BERLIN_WINTER = timezone(timedelta(hours=1))

# Constants, not computed values: other programs depend on them.
SNAPSHOT_TEXT = (
    '{"specversion":"1.0","id":"7c1f366e-c9c3-5876-873e-6a33c29b098d",'
    '"source":"trading-controller/0f1e2d3c4b5a","sequence":"0000000000000000042",'
    '"time":"2026-11-22T17:02:46.101234+00:00","subject":"portfolio/1","datacontenttype":"application/json",'
    '"type":"trading.portfolio-snapshot.v1","data":{"snapshot_date":"2026-11-22",'
    '"timestamp":"2026-11-22T17:02:46.101234+00:00","balance":"9900.12","total_invested":"100",'
    '"total_profit_loss":"197.25","total_value":"10097.37","open_positions":1,"trade_count":2,"portfolio_id":1}}'
)
ARCHIVE_TEXT = (
    '{"specversion":"1.0","id":"f995c25d-aa1d-52fe-8c8d-91c2447aabd6",'
    '"source":"trading-controller/0f1e2d3c4b5a","sequence":"0000000000000000043",'
    '"time":"2026-12-01T00:30:00.000000+01:00","subject":"signals/2026-12","datacontenttype":"application/json",'
    '"type":"trading.signal-archive.v1","data":{"archived_at":"2026-12-01T00:30:00.000000+01:00",'
    '"signals":[{"market_question":"Öffnet die Brücke? 🌉","target_price":0.455,"amount":120,"event_id":null}]}}'
)


def _snapshot_event(**overrides: Any) -> Event:
    return event_of(a_snapshot(**overrides), source=SOURCE, sequence=42)


def _archive_event(**overrides: Any) -> Event:
    return event_of(an_archive(**overrides), source=SOURCE, sequence=43)


def _changed(text: str, path: str, value: object) -> str:
    """Return the text with the field at the dotted `path` set to `value`; `...` removes the field."""
    document = json.loads(text)
    *parents, name = path.split(".")
    members = document
    for parent in parents:
        members = members[parent]
    if value is ...:
        del members[name]
    else:
        members[name] = value
    return json.dumps(document)


def _archive_text(signals: str) -> str:
    """Return the text of an archive whose signals are this JSON, which Python cannot always write."""
    return encode(_archive_event(signals=[{"x": "here"}])).replace('[{"x":"here"}]', signals)


def _error_of(call: Callable[[], object]) -> InvalidEvent:
    """Return the InvalidEvent that `call` raises. It is one printable line of bounded length and has no cause."""
    with pytest.raises(InvalidEvent) as caught:
        call()
    message = str(caught.value)
    assert (message.isprintable(), len(message) <= 1000, caught.value.__cause__) == (True, True, None)
    return caught.value


def _assert_error(error: InvalidEvent, path: str, reason: str) -> None:
    assert str(error).startswith(f"{path}: ")
    assert reason in str(error)
    assert error.field is not None
    assert path.startswith(error.field)


def _floats_as_decimals(value: Any) -> Any:
    """Return JSON in which each float is the Decimal of its text."""
    if isinstance(value, dict):
        return {name: _floats_as_decimals(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_floats_as_decimals(item) for item in value]
    return Decimal(repr(value)) if isinstance(value, float) else value


# ---- ids and the JSON text


@pytest.mark.parametrize(
    ("payload", "event_id"),
    [
        (a_snapshot(), "7c1f366e-c9c3-5876-873e-6a33c29b098d"),
        (a_snapshot(portfolio_id=None), "fc765872-be5a-5a82-974c-08f640ff19b4"),
        (an_archive(), "df9f8830-1521-5249-968e-c97c829a56a7"),
        (an_archive(portfolio_id=None), "7bb29c27-b009-5985-a37e-f164f16be1ec"),
    ],
    ids=["snapshot", "snapshot without portfolio", "archive", "archive without portfolio"],
)
def test_the_id_of_a_fact_is_constant(payload: Payload, event_id: str) -> None:
    """An id is the UUIDv5 of type, portfolio and instant. It is the same in all versions of the program."""
    assert str(payload.event_id) == event_id


@pytest.mark.parametrize("offset", [timedelta(hours=1), timedelta(hours=-9, minutes=-30), timedelta(hours=14)])
def test_the_same_instant_in_another_offset_has_the_same_id(offset: timedelta) -> None:
    """The UTC offset does not identify the fact."""
    moment = INSTANT.astimezone(timezone(offset))

    assert a_snapshot(timestamp=moment).event_id == a_snapshot().event_id
    assert an_archive(archived_at=moment).event_id == an_archive().event_id


def test_another_portfolio_type_or_microsecond_has_another_id() -> None:
    """All ids differ. Portfolio 0 is not the same as no portfolio."""
    later = timedelta(microseconds=1)
    payloads: list[Payload] = [
        *(a_snapshot(portfolio_id=number) for number in (None, 0, 1, -1)),
        *(an_archive(portfolio_id=number) for number in (None, 0, 1, -1)),
        a_snapshot(after=later),
        an_archive(after=later),
    ]
    assert len({payload.event_id for payload in payloads}) == len(payloads)


def test_different_identities_of_texts_have_different_ids() -> None:
    """Even if they contain separators. An empty text is not None, and a text of digits is not a number."""
    identities = [("a|b", "c"), ("a", "b|c"), ('a"', "c"), ("", "c"), (None, "c"), ("1", "c"), (1, "c"), ("c",)]
    assert len({event_id("t", *identity) for identity in identities}) == len(identities)
    with pytest.raises(TypeError, match="by a value of type decimal.Decimal"):
        event_id("t", Decimal(1))  # type: ignore[arg-type]  # the wrong type is tested


def test_a_snapshot_has_a_fixed_text() -> None:
    """Encoding gives this text, and decoding it gives an equal event."""
    event = _snapshot_event()
    assert encode(event) == SNAPSHOT_TEXT
    assert decode(SNAPSHOT_TEXT, PortfolioSnapshotEvent) == event


def test_an_archive_has_a_fixed_text() -> None:
    """It has no portfolio, its month is that of the local date, and null in a signal is kept."""
    signal = {
        "market_question": "Öffnet die Brücke? 🌉",
        "target_price": Decimal("0.455"),
        "amount": 120,
        "event_id": None,
    }
    moment = datetime(2026, 12, 1, 0, 30, tzinfo=BERLIN_WINTER)
    event = _archive_event(archived_at=moment, signals=[signal], portfolio_id=None)
    assert encode(event) == ARCHIVE_TEXT
    assert decode(ARCHIVE_TEXT, SignalArchiveEvent) == event


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_keys_does_not_matter(seed: int) -> None:
    """Neither in the envelope nor in the payload."""
    document = json.loads(SNAPSHOT_TEXT)

    def shuffled(members: dict[str, Any]) -> dict[str, Any]:
        return dict(random.Random(seed).sample(sorted(members.items()), len(members)))

    text = json.dumps(shuffled(document | {"data": shuffled(document["data"])}))
    assert decode(text, PortfolioSnapshotEvent) == _snapshot_event()


@pytest.mark.parametrize("name", ["sequence", "subject", "datacontenttype"])
@pytest.mark.parametrize("absent", [..., None], ids=["absent", "null"])
def test_optional_attributes_may_be_absent_or_null(name: str, absent: object) -> None:
    """CloudEvents treats null as absent."""
    event = decode(_changed(SNAPSHOT_TEXT, name, absent), PortfolioSnapshotEvent)
    assert (getattr(event, name), event.data) == (None, a_snapshot())


def test_times_on_the_wire_may_end_in_z_and_have_fewer_digits() -> None:
    """RFC 3339 allows these spellings."""
    moment = INSTANT.replace(microsecond=500000)
    text = encode(_snapshot_event(timestamp=moment)).replace(".500000+00:00", ".5Z")
    assert decode(text, PortfolioSnapshotEvent).data.timestamp == moment


def test_the_date_of_a_snapshot_is_not_checked_at_the_consumer() -> None:
    """A program in another zone may name another day than the offset of the instant."""
    text = _changed(encode(_snapshot_event()), "data.snapshot_date", "2026-11-21")
    assert decode(text, PortfolioSnapshotEvent).data.snapshot_date == date(2026, 11, 21)


def test_month_and_date_follow_the_local_date() -> None:
    """23:30 UTC on the last of November is December in Berlin."""
    moment = datetime(2026, 11, 30, 23, 30, tzinfo=UTC)
    months = [an_archive(archived_at=moment.astimezone(zone)).archive_month for zone in (UTC, BERLIN_WINTER)]
    assert months == ["2026-11", "2026-12"]


@pytest.mark.parametrize(
    ("payload", "line"),
    [
        (a_snapshot(), "portfolio 1 · 2026-11-22 · 10 097.37"),
        (a_snapshot(portfolio_id=None, total_value="-1234567.891"), "portfolio · 2026-11-22 · -1 234 567.89"),
        (an_archive(), "portfolio 1 · 2026-11-22 · 2 signals"),
        (an_archive(signals=[a_signal()], portfolio_id=None), "portfolio · 2026-11-22 · 1 signal"),
    ],
)
def test_the_summary_is_one_readable_line(payload: Payload, line: str) -> None:
    """Lists of jobs show it."""
    assert payload.summary == line


@pytest.mark.parametrize(
    ("payload", "subject"),
    [
        (a_snapshot(portfolio_id=-7), "portfolio/-7"),
        (a_snapshot(portfolio_id=0), "portfolio/0"),
        (a_snapshot(portfolio_id=None), "portfolio"),
        (an_archive(archived_at=datetime(2026, 9, 30, tzinfo=UTC)), "signals/2026-09"),
    ],
)
def test_the_subject_is_the_portfolio_or_the_month_of_the_signals(payload: Payload, subject: str) -> None:
    event = event_of(payload, source=SOURCE, sequence=1)
    assert (payload.subject, json.loads(encode(event))["subject"]) == (subject, subject)


@pytest.mark.parametrize("payload", [a_snapshot(portfolio_id=7), an_archive()])
@pytest.mark.parametrize("trace", [None, TraceContext("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")])
def test_an_unchecked_event_is_the_same_as_a_checked_one(payload: Payload, trace: TraceContext | None) -> None:
    """Extension attributes and frozen fields included."""
    unchecked = unchecked_event_of(payload, source="import/x/1", sequence=3, trace=trace)
    checked = event_of(payload, source="import/x/1", sequence=3, trace=trace)
    assert (unchecked, unchecked.trace, encode(unchecked)) == (checked, checked.trace, encode(checked))
    assert encode(decode(encode(unchecked), type(unchecked))) == encode(checked)
    assert unchecked.model_fields_set == checked.model_fields_set
    assert pickle.loads(pickle.dumps(unchecked)) == checked
    with pytest.raises(ValidationError):
        unchecked.sequence = 4


def test_each_field_of_an_event_identifies_it_or_is_compared() -> None:
    """Otherwise other content under a known id would count as a duplicate.

    Nothing else is compared: the month, for example, depends on the zone of the time, so a duplicate may have another.
    """
    for kind in KINDS.values():
        compared = {column.field for column in kind.columns if not column.derived}
        assert compared | set(kind.identity) == set(kind.payload.model_fields), kind.name
        assert compared <= set(kind.payload.model_fields), kind.name


def test_payloads_and_events_are_frozen() -> None:
    """A validated value cannot be changed."""
    event = _snapshot_event()
    for model, name in ((event, "sequence"), (event.data, "balance"), (an_archive(), "archived_at")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(model, name, None)


# ---- extension attributes

_EXTENSIONS = {
    "traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
    "tracestate": "vendor=a%20b",
    "partitionkey": "küche 🌉",
    "sequencetype": "",
    "dataschema": "https://example.com/schema.json",
    "a": 2**31 - 1,
    "b": -(2**31),
    "sampledrate": -3,
    "123": True,
    "a" * 20: "20 characters",
}


@pytest.mark.parametrize("text", [SNAPSHOT_TEXT, ARCHIVE_TEXT], ids=["snapshot", "archive"])
def test_the_envelope_may_have_any_extension_attributes(text: str) -> None:
    """They are no content: the event has the same id and data as without them. Each form of JSON keeps them."""
    model = PortfolioSnapshotEvent if text is SNAPSHOT_TEXT else SignalArchiveEvent
    extended = json.dumps(json.loads(text) | _EXTENSIONS)
    event, plain = decode(extended, model), decode(text, model)
    assert (event.id, event.data, event.source, event.sequence) == (plain.id, plain.data, plain.source, plain.sequence)
    assert json.loads(encode(event)) == json.loads(extended)
    assert Draft202012Validator(json_schema()).is_valid(json.loads(extended))


def test_an_extension_attribute_that_is_null_is_unset() -> None:
    """As in the JSON format of CloudEvents."""
    event = decode(_changed(SNAPSHOT_TEXT, "myext", None), PortfolioSnapshotEvent)
    assert encode(event) == SNAPSHOT_TEXT
    assert Draft202012Validator(json_schema()).is_valid(json.loads(SNAPSHOT_TEXT) | {"myext": None})


def test_an_extension_attribute_with_an_empty_name_is_shown() -> None:
    with pytest.raises(InvalidEvent, match=r"^\(no name\): is not a field of this event$"):
        decode(_changed(SNAPSHOT_TEXT, "", 1), PortfolioSnapshotEvent)


def test_the_cloud_events_sdk_reads_the_trace_context() -> None:
    trace = TraceContext(_EXTENSIONS["traceparent"], "vendor=a%20b")  # type: ignore[arg-type]  # a text
    event = event_of(a_snapshot(), source=SOURCE, sequence=42, trace=trace)
    attributes = JSONFormat().read(None, encode(event)).get_attributes()
    assert {name: attributes[name] for name in trace.attributes()} == trace.attributes()
    assert decode(encode(event), PortfolioSnapshotEvent).trace == event.trace == trace


@pytest.mark.parametrize(
    ("traceparent", "tracestate", "expected"),
    [
        ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "a=b", "a=b"),
        ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "a=\u202e", None),
        ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "a" * 513, None),
        ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", 7, None),
        ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "a=b, t1@v-2=x y ,,c=", "a=b, t1@v-2=x y ,,c="),
        ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "a=b, outcome stored, event_id=zzz", None),
        ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "A=b", None),
        ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "a=b=c", None),
        ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "a=1," * 33, None),
        ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "", None),
        ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-x", "a=b", ...),
        ("spoofed", "a=b", ...),
        (7, "a=b", ...),
    ],
)
def test_an_invalid_trace_context_of_another_program_is_ignored(
    traceparent: object, tracestate: object, expected: object
) -> None:
    """The event is valid."""
    text = json.dumps(json.loads(SNAPSHOT_TEXT) | {"traceparent": traceparent, "tracestate": tracestate})
    trace = decode(text, PortfolioSnapshotEvent).trace
    assert (... if trace is None else trace.tracestate) == expected


# ---- other readers

EVENTS = {
    "snapshot": _snapshot_event(),
    "snapshot without portfolio": _snapshot_event(portfolio_id=None, timestamp=INSTANT.astimezone(BERLIN_WINTER)),
    "archive": _archive_event(),
    "archive without portfolio": _archive_event(portfolio_id=None, signals=[{"a": [1, {"b": 0.5}]}]),
    "without sequence": event_of(a_snapshot(), source="direct", sequence=None),
}


@pytest.mark.parametrize("event", EVENTS.values(), ids=EVENTS.keys())
def test_every_event_is_a_cloud_event(event: Event) -> None:
    """The CloudEvents SDK reads it and agrees on every attribute and on the data."""
    text = encode(event)
    expected = {
        "specversion": "1.0",
        "id": str(event.id),
        "source": event.source,
        "time": event.time,
        "subject": event.subject,
        "datacontenttype": "application/json",
        "type": event.type,
    }
    if event.sequence is not None:
        expected["sequence"] = f"{event.sequence:019d}"

    read = JSONFormat().read(None, text)

    assert read.get_attributes() == expected
    assert read.get_data() == json.loads(text)["data"]


@pytest.mark.parametrize("event", EVENTS.values(), ids=EVENTS.keys())
def test_every_event_follows_the_json_schema(event: Event) -> None:
    """The published schema accepts the texts that `encode` writes."""
    assert list(Draft202012Validator(json_schema()).iter_errors(json.loads(encode(event)))) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("id", ...),
        ("type", "trading.portfolio-snapshot.v2"),
        ("sequence", "1" * 18),
        ("Surprise", 1),
        ("a-b", 1),
        ("a" * 21, 1),
        ("surprise", 1.5),
        ("surprise", []),
        ("surprise", {}),
        ("surprise", "a\nb"),
        ("surprise", 2**31),
        ("surprise", -(2**31) - 1),
        ("data.surprise", 1),
        ("data.balance", 9900.12),
        ("data.balance", "9900.123456789"),
        ("data.open_positions", -1),
        ("data.trade_count", True),
        ("data.timestamp", "2026-11-22T17:02:46"),
        ("data.snapshot_date", ...),
    ],
)
def test_the_json_schema_does_not_accept_an_invalid_event(path: str, value: object) -> None:
    """It is as strict as JSON Schema allows."""
    schema = json_schema()
    Draft202012Validator.check_schema(schema)
    assert not Draft202012Validator(schema).is_valid(json.loads(_changed(SNAPSHOT_TEXT, path, value)))


def test_the_json_schema_names_its_version() -> None:
    """A program that validates with it finds the right rules."""
    assert validator_for(json_schema(), default=Draft7Validator) is Draft202012Validator
    assert json_schema()["title"] == "trading-history events"


@pytest.mark.parametrize("signals", ["[]", "[1]", "{}"])
def test_the_json_schema_requires_an_array_of_signals(signals: str) -> None:
    """It has at least one item, and each item is an object."""
    assert not Draft202012Validator(json_schema()).is_valid(json.loads(_archive_text(signals)))


# ---- money


@pytest.mark.parametrize(
    ("given", "rendered"),
    [
        (0.1 + 0.2, "0.3"),
        (0.000000005, "0"),
        (0.000000015, "0.00000002"),
        (Decimal("0.000000025"), "0.00000002"),
        ("-0.000000035", "-0.00000004"),
        (-0.0, "0"),
        (-1e-9, "0"),
        (1e-30, "0"),
        (Decimal("1E-99999"), "0"),
        (9987.350000000001, "9987.35"),
        (Decimal("1E+2"), "100"),
        (Decimal("0E+9"), "0"),
        ("12.50", "12.5"),
        (1_000_000, "1000000"),
        (0.00000001, "0.00000001"),
        (-1, "-1"),
        ("999999999999.999999994", "999999999999.99999999"),
        (-999_999_999_999, "-999999999999"),
    ],
)
def test_an_amount_is_rounded_half_even_and_written_without_an_exponent(given: object, rendered: str) -> None:
    """It has at most 8 decimals, no trailing zeros and no minus before zero. Decoding gives an equal amount."""
    event = _snapshot_event(balance=given)
    text = encode(event)
    assert json.loads(text)["data"]["balance"] == rendered
    assert decode(text, PortfolioSnapshotEvent).data.balance == event.data.balance == Decimal(rendered)  # type: ignore[attr-defined]  # a snapshot


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (float("nan"), "must be finite"),
        (float("-inf"), "must be finite"),
        (Decimal("sNaN"), "must be finite"),
        ("Infinity", "is text that is not a number"),
        (True, "must be a number, not bool"),
        (None, "must be a number, not NoneType"),
        ([1], "must be a number, not list"),
        ("much", "is text that is not a number"),
        ("", "is text that is not a number"),
        ("1\0", "is text that is not a number"),
        ("\ud800", "is text that is not a number"),
        (10**12, "has more than 12 digits before the decimal point"),
        pytest.param(-(10**5000), "has more than 12 digits before the decimal point", id="-10^5000"),
        (1e300, "has more than 12 digits before the decimal point"),
        ("999999999999.999999995", "has more than 12 digits before the decimal point"),
    ],
    ids=ascii,
)
def test_a_value_that_is_not_an_amount_is_invalid_at_the_producer(given: object, reason: str) -> None:
    _assert_error(_error_of(lambda: a_snapshot(total_value=given)), "total_value", reason)


@pytest.mark.parametrize(
    "context",
    [
        decimal.Context(prec=6),
        decimal.Context(prec=6, traps=[decimal.Inexact]),
        decimal.Context(traps=[decimal.FloatOperation]),
    ],
    ids=["6 digits", "inexact forbidden", "floats forbidden"],
)
def test_the_callers_decimal_context_makes_no_difference(context: decimal.Context) -> None:
    """A controller may set another precision or other traps for its own calculations."""
    amount, signal = Decimal("999999999999.5"), {"price": Decimal("0.12345678901"), "size": 0.1}
    with decimal.localcontext(context):
        snapshot, archive = _snapshot_event(balance=amount), _archive_event(signals=[signal])
        texts = encode(snapshot), encode(archive)
        read = decode(texts[0], PortfolioSnapshotEvent), decode(texts[1], SignalArchiveEvent)

    assert (read[0].data.balance, _floats_as_decimals(read[1].data.signals)) == (amount, _floats_as_decimals([signal]))


# ---- signals


def test_numbers_in_signals_keep_every_digit() -> None:
    """Decimals and integers beyond the precision of a double are exact, at any depth."""
    signal = {
        "long": Decimal("0.1234567890123456789012345678901234567890"),
        "many": Decimal("12345678901234567890.123456789"),
        "large": Decimal("1.5E+300"),
        "tiny": Decimal("1E-400"),
        "integer": 2**200 + 1,
        "deep": [{"negative": -(2**63) - 1}, [Decimal("-0.000000000000000000000001")]],
        "shortest": [0.1, 1e-7, 5e-324],
        "largest": [1.7976931348623157e308, -1.7976931348623157e308],
        "most decimals": Decimal("1E-16383"),
        "zero": Decimal("0E+100000"),
    }
    text = encode(_archive_event(signals=[signal]))
    event = decode(text, SignalArchiveEvent)
    assert _floats_as_decimals(event.data.signals) == _floats_as_decimals([signal])
    assert decode(encode(event), SignalArchiveEvent) == event


class _Float(float):
    """A float with another repr, like NumPy's float64."""

    def __repr__(self) -> str:
        return "odd(1.5)"

    __str__ = __repr__


class _Integer(int):
    def __repr__(self) -> str:
        return "odd(7)"

    __str__ = __repr__


def test_an_archive_whose_signals_were_changed_after_their_validation_is_not_written_with_nan() -> None:
    """The text would not be JSON."""
    archive = an_archive(signals=[{"price": 1.5}])
    archive.signals[0]["price"] = float("nan")
    with pytest.raises(ValueError, match="not JSON compliant"):
        encode(event_of(archive, source=SOURCE, sequence=1))


def test_numbers_with_another_repr_are_written_as_numbers() -> None:
    """In amounts and in signals."""
    archive = json.loads(encode(_archive_event(signals=[{"float": _Float(1.5), "integer": _Integer(7)}])))
    snapshot = json.loads(encode(_snapshot_event(balance=_Float(1.5), total_value=_Integer(7))))

    assert archive["data"]["signals"] == [{"float": 1.5, "integer": 7}]
    assert (snapshot["data"]["balance"], snapshot["data"]["total_value"]) == ("1.5", "7")


def _nested(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels - 1):
        value = [value]
    return value


def _containing_itself() -> dict[str, Any]:
    signal: dict[str, Any] = {}
    signal["again"] = signal
    return signal


def test_a_signal_may_have_50_levels() -> None:
    """The signal itself counts as one level."""
    signals = [{"deep": _nested(49)}]
    assert decode(encode(_archive_event(signals=signals)), SignalArchiveEvent).data.signals == signals


@pytest.mark.parametrize(
    ("signals", "path", "reason"),
    [
        ([], "signals", "must not be empty"),
        ({"a": 1}, "signals", "list"),
        (None, "signals", "list"),
        (({"a": 1},), "signals", "list"),
        ([{}, 1], "signals.1", "dictionary"),
        ([None], "signals.0", "dictionary"),
        ([{"a": float("nan")}], "signals.0.a", "must be finite"),
        ([{"a": Decimal("-Infinity")}], "signals.0.a", "must be finite"),
        ([{"a": [1, {"b": Decimal("sNaN")}]}], "signals.0.a.1.b", "must be finite"),
        ([{"a": 10**309}], "signals.0.a", "must be finite and within"),
        ([{"a": Decimal("1E-16384")}], "signals.0.a", "too many decimals"),
        ([{"a": Decimal("0E+100001")}], "signals.0.a", "must be finite and within"),
        ([{"a": "\0"}], "signals.0.a", "NUL character or a lone surrogate"),
        ([{"a": ["\udfff"]}], "signals.0.a.0", "NUL character or a lone surrogate"),
        ([{"a\0": 1}], "signals.0", "a key contains a NUL character or a lone surrogate"),
        ([{"\ud800": 1}], "signals.0", "a key contains a NUL character or a lone surrogate"),
        ([{"a": {"\ud800": 1}}], "signals.0.a", "a key contains a NUL character or a lone surrogate"),
        ([{"a": {5: 1}}], "signals.0.a", "has a key of type int; keys must be text"),
        ([{"a": {"b": 1, 5: 1}}], "signals.0.a", "has a key of type int; keys must be text"),
        ([{"a": (1,)}], "signals.0.a", "is of type tuple, which JSON cannot represent"),
        ([{"a": INSTANT}], "signals.0.a", "is of type datetime.datetime, which JSON cannot represent"),
        ([{"a": b"x"}], "signals.0.a", "is of type bytes, which JSON cannot represent"),
        ([{"a\n\x1b[31m\u202e": float("nan")}], r"signals.0.a\n\x1b[31m\u202e", "must be finite"),
        ([{"{reason}": float("nan")}], "signals.0.{reason}", "must be finite"),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_signals_that_cannot_be_stored_are_invalid_at_the_producer(signals: object, path: str, reason: str) -> None:
    """The message begins with the path of the value, for any keys."""
    _assert_error(_error_of(lambda: an_archive(signals=signals)), path, reason)


@pytest.mark.parametrize(
    ("signals", "path", "reason"),
    [
        ("[]", "data.signals", "must not be empty"),
        ("null", "data.signals", "array"),
        ("[{},1]", "data.signals.1", "object"),
        ('[{"a":NaN}]', "data.signals.0.a", "must be finite"),
        ('[{"a":-Infinity}]', "data.signals.0.a", "must be finite"),
        ('[{"a":1e309}]', "data.signals.0.a", "must be finite and within"),
        (f'[{{"a":{"1" * 310}}}]', "data.signals.0.a", "must be finite and within"),
        ('[{"a":1e-16384}]', "data.signals.0.a", "too many decimals"),
        (f'[{{"a":0.{"0" * 16383}1}}]', "data.signals.0.a", "too many decimals"),
        (r'[{"a":"\u0000"}]', "data.signals.0.a", "NUL character or a lone surrogate"),
        (r'[{"a":{"\u0000":1}}]', "data.signals.0.a", "a key contains a NUL character or a lone surrogate"),
    ],
    ids=lambda value: value[:40],
)
def test_signals_that_cannot_be_stored_are_invalid_at_the_consumer(signals: str, path: str, reason: str) -> None:
    """The limits are those of the producer. They apply to events of other programs too."""
    _assert_error(_error_of(lambda: decode(_archive_text(signals), SignalArchiveEvent)), path, reason)


@pytest.mark.parametrize(
    ("make", "start"),
    [
        (lambda: an_archive(signals=[{"a": _nested(50)}]), "signals.0.a.0.0"),
        (lambda: an_archive(signals=[_containing_itself()]), "signals.0.again.again"),
        (
            lambda: decode(_archive_text(f'[{{"a":{"[" * 50}{"]" * 50}}}]'), SignalArchiveEvent),
            "data.signals.0.a.0.0",
        ),
    ],
    ids=["producer", "contains itself", "consumer"],
)
def test_signals_with_more_than_50_levels_are_invalid(make: Callable[[], object], start: str) -> None:
    """No recursion limit is reached, even if a signal contains itself."""
    error = _error_of(make)
    assert str(error).startswith(start)
    assert str(error).endswith(": is nested deeper than 50 levels")


@pytest.mark.parametrize("number", ["1e-99999999999999999999", "0e99999999999999999999"])
def test_an_exponent_that_a_decimal_cannot_have_is_invalid(number: str) -> None:
    """The number is not rounded to a binary float instead."""
    error = _error_of(lambda: decode(_archive_text(f'[{{"a":{number}}}]'), SignalArchiveEvent))
    assert str(error).startswith("data.signals")


@pytest.mark.parametrize(
    "name",
    ["k" * 1000, "\x1b" * 1000],
    ids=["long", "long when escaped"],
)
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda name: an_archive(signals=[{name: float("nan")}]), "must be finite"),
        (
            lambda name: decode(_changed(SNAPSHOT_TEXT, f"data.{name}", 1), PortfolioSnapshotEvent),
            "is not a field",
        ),
    ],
    ids=["key of a signal", "unknown field"],
)
def test_a_message_shortens_a_long_name_and_keeps_the_reason(
    make: Callable[[str], object], name: str, reason: str
) -> None:
    assert reason in str(_error_of(lambda: make(name)))


def test_a_message_shows_60_characters_of_a_key_and_200_of_a_path() -> None:
    """The rest is replaced by an ellipsis."""
    too_long, longest, value = "k" * 61, "k" * 60, float("nan")
    text = _changed(SNAPSHOT_TEXT, f"data.{'k' * 200}", 1)
    for call, path in [
        (lambda: decode(text, PortfolioSnapshotEvent), f"data.{'k' * 194}…"),
        (lambda: an_archive(signals=[{longest: value}]), f"signals.0.{longest}"),
        (lambda: an_archive(signals=[{too_long: value}]), f"signals.0.{'k' * 59}…"),
        (
            lambda: an_archive(signals=[{longest: {longest: {longest: {"k" * 15: value}}}}]),
            f"signals.0.{f'{longest}.' * 3}{'k' * 15}",
        ),
        (
            lambda: an_archive(signals=[{longest: {longest: {longest: {"k" * 16: value}}}}]),
            f"signals.0.{f'{longest}.' * 3}{'k' * 14}…",
        ),
    ]:
        assert str(_error_of(call)).partition(": ")[0] == path


@pytest.mark.parametrize("name", ["T" * 80, "T" * 81])
def test_a_message_shows_80_characters_of_the_name_of_a_type(name: str) -> None:
    value = type(name, (), {"__module__": "builtins"})()
    shown = name if len(name) == 80 else f"{'T' * 79}…"
    assert str(_error_of(lambda: a_snapshot(balance=value))) == f"balance: must be a number, not {shown}"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: an_archive(signals=[{"": float("nan")}]), "signals.0.(no name): must be finite"),
        (lambda: an_archive(signals=[{"": {"": [float("nan")]}}]), "signals.0.(no name).(no name).0: must be finite"),
        (lambda: decode(_changed(SNAPSHOT_TEXT, "", 1), PortfolioSnapshotEvent), "(no name): is not a field"),
        (lambda: decode(_changed(SNAPSHOT_TEXT, "data.", 1), PortfolioSnapshotEvent), "data.(no name): is not a field"),
    ],
)
def test_a_message_shows_an_empty_name(make: Callable[[], object], message: str) -> None:
    assert str(_error_of(make)).startswith(message)


# ---- other invalid input


@pytest.mark.parametrize(
    ("changes", "path", "reason"),
    [
        ({"surprise": 1}, "surprise", "is not a field of this event"),
        ({"timestamp": INSTANT.replace(tzinfo=None)}, "timestamp", "has no UTC offset"),
        ({"timestamp": "2026-11-22T17:02:46Z"}, "timestamp", "must be a datetime, not str"),
        ({"timestamp": 1795366966}, "timestamp", "must be a datetime, not int"),
        ({"timestamp": date(2026, 11, 22)}, "timestamp", "must be a datetime, not date"),
        ({"timestamp": datetime(1969, 12, 31, tzinfo=UTC)}, "timestamp", "between the years 1970 and 9998"),
        ({"timestamp": datetime(9999, 1, 1, tzinfo=UTC)}, "timestamp", "between the years 1970 and 9998"),
        (
            {"timestamp": INSTANT.replace(tzinfo=timezone(timedelta(seconds=1)))},
            "timestamp",
            "offset with seconds",
        ),
        ({"open_positions": -1}, "open_positions", "greater than or equal to 0"),
        ({"trade_count": 2**31}, "trade_count", "less than or equal to 2147483647"),
        ({"trade_count": True}, "trade_count", "integer"),
        ({"trade_count": "2"}, "trade_count", "integer"),
        ({"trade_count": 2.0}, "trade_count", "integer"),
        ({"portfolio_id": True}, "portfolio_id", "integer"),
        ({"portfolio_id": "1"}, "portfolio_id", "integer"),
        ({"portfolio_id": 2**63}, "portfolio_id", "less than or equal to 9223372036854775807"),
        ({"portfolio_id": -(2**63) - 1}, "portfolio_id", "greater than or equal to -9223372036854775808"),
    ],
)
def test_the_producer_reports_the_invalid_field_of_a_snapshot(changes: dict[str, Any], path: str, reason: str) -> None:
    """The message begins with the field and has the reason."""
    _assert_error(_error_of(lambda: a_snapshot(**changes)), path, reason)


def test_the_message_says_how_to_make_a_date_of_a_datetime() -> None:
    """It names any other type only."""
    values = {INSTANT: "datetime.datetime: pass its .date()", "2026-11-22": "str", 20261122: "int"}
    for value, rest in values.items():
        error = _error_of(lambda value=value: a_snapshot(snapshot_date=value))  # type: ignore[misc]  # called in the same iteration
        assert str(error) == f"snapshot_date: must be a date, not {rest}"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("portfolio_id", -(2**63)),
        ("portfolio_id", 2**63 - 1),
        ("trade_count", 0),
        ("trade_count", 2**31 - 1),
        ("timestamp", datetime(1970, 1, 1, tzinfo=UTC)),
        ("timestamp", datetime(9998, 12, 31, 23, 59, 59, 999999, tzinfo=UTC)),
    ],
)
def test_the_largest_and_smallest_values_of_a_column_are_accepted(name: str, value: Any) -> None:
    for sequence in (0, 2**63 - 1):
        event = event_of(a_snapshot(**{name: value}), source=SOURCE, sequence=sequence)
        read = decode(encode(event), PortfolioSnapshotEvent)
        assert (getattr(read.data, name), read.sequence) == (value, sequence)


@pytest.mark.parametrize("payload", [a_snapshot(), an_archive()])
def test_a_missing_field_is_named(payload: Payload) -> None:
    """For each field without a default."""
    values = dict(payload)
    for name in values.keys() - {"portfolio_id"}:
        rest = {other: value for other, value in values.items() if other != name}
        _assert_error(_error_of(lambda rest=rest: type(payload).checked(**rest)), name, "is missing")  # type: ignore[misc]  # the lambda is called in the same iteration


def test_a_message_has_three_problems_and_the_number_of_the_others() -> None:
    three = "archived_at: is missing; signals: is missing; a: is not a field of this event"
    assert str(_error_of(lambda: SignalArchive.checked(a=1))) == three
    assert str(_error_of(lambda: SignalArchive.checked(a=1, b=2))) == f"{three}; and 1 more"


@pytest.mark.parametrize(
    ("source", "sequence", "path"),
    [
        ("", 1, "source"),
        ("a b", 1, "source"),
        ("a\n", 1, "source"),
        ("/a", 1, "source"),
        ("a" * 251, 1, "source"),
        ("a/b", -1, "sequence"),
        ("a/b", 2**63, "sequence"),
        ("a/b", True, "sequence"),
    ],
)
def test_a_wrong_source_or_sequence_is_invalid(source: str, sequence: int, path: str) -> None:
    """Both are stored in the tables, and the source is part of the name of a Redis key."""
    _assert_error(_error_of(lambda: event_of(a_snapshot(), source=source, sequence=sequence)), path, "")


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("id", "7c1f366e-c9c3-5876-873e-6a33c29b098d", "must be a UUID, not str"),
        ("source", b"trading-controller/0f1e2d3c4b5a", "should be a valid string"),
        ("subject", b"portfolio/1", "should be a valid string"),
    ],
)
def test_an_attribute_of_an_event_made_in_python_has_its_type(name: str, value: object, reason: str) -> None:
    """Another type with the same value is invalid: in Python, nothing is converted."""
    event = _snapshot_event()
    values = {name: getattr(event, name) for name in PortfolioSnapshotEvent.model_fields}
    _assert_error(_error_of(lambda: PortfolioSnapshotEvent.checked(**values | {name: value})), name, reason)


_TIME = "must be an RFC 3339 time with its offset"
_MONEY = "must be a decimal string with at most 12 integer digits and 8 decimals"
_SEQUENCE = "must be a string of 19 digits, at most 9223372036854775807"
_EXTENSION = "must be a string, an integer or a boolean"


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("specversion", "0.3", "1.0"),
        ("specversion", 1.0, "1.0"),
        ("type", "trading.portfolio-snapshot.v2", "trading.portfolio-snapshot.v1"),
        ("type", "trading.signal-archive.v1", "trading.portfolio-snapshot.v1"),
        ("type", ..., "is missing"),
        ("id", ..., "is missing"),
        ("id", "7c1f366e", "UUID"),
        ("id", "df9f8830-1521-5249-968e-c97c829a56a7", "does not match type, portfolio_id and timestamp"),
        ("source", "a b", "is empty or has a character that is not allowed"),
        ("subject", "a\0", "is empty or has a character that is not allowed"),
        ("subject", "a" * 251, "at most 250 characters"),
        ("datacontenttype", "text/plain", "application/json"),
        ("Surprise", 1, "is not a field of this event"),
        ("data_base64", "e30=", "is not a field of this event"),
        ("Surprise", None, "is not a field of this event"),
        ("a" * 21, 1, "is not a field of this event"),
        ("überraschung", 1, "is not a field of this event"),
        ("٣", 1, "is not a field of this event"),
        ("surprise", 1.5, _EXTENSION),
        ("surprise", 1.0, _EXTENSION),
        ("surprise", [1], _EXTENSION),
        ("surprise", {"a": 1}, _EXTENSION),
        ("traceparent", ["00"], _EXTENSION),
        ("surprise", "a\0", "contains a control character"),
        ("surprise", "a\nb", "contains a control character"),
        ("surprise", "a\x7f", "contains a control character"),
        ("surprise", "a\x85", "contains a control character"),
        ("surprise", 2**31, "must be an integer of 32 bits"),
        ("surprise", -(2**31) - 1, "must be an integer of 32 bits"),
        ("subject", "a\x85", "is empty or has a character that is not allowed"),
        ("sequence", "1" * 18, _SEQUENCE),
        ("sequence", "1" * 20, _SEQUENCE),
        ("sequence", "9223372036854775808", _SEQUENCE),
        ("sequence", "-000000000000000001", _SEQUENCE),
        ("sequence", "٠" * 19, _SEQUENCE),
        ("sequence", 42, _SEQUENCE),
        ("time", "2026-11-22T17:02:46.101234", _TIME),
        ("time", "2026-11-22T17:02:46.101234+01:60", _TIME),
        ("data", None, "object"),
        ("data.surprise", 1, "is not a field of this event"),
        ("data.timestamp", "2026-11-22T17:02:46.101234", _TIME),
        ("data.timestamp", "2026-11-22T17:02:46.1012345Z", _TIME),
        ("data.timestamp", "2026-02-30T17:02:46Z", _TIME),
        ("data.timestamp", "2026-11-22T24:00:00Z", _TIME),
        ("data.timestamp", "2026-11-22T17:02:60Z", _TIME),
        ("data.timestamp", "2026-11-22T17:02:46+24:00", _TIME),
        ("data.timestamp", "1969-12-31T23:59:59Z", _TIME),
        ("data.timestamp", "20261122T170246Z", _TIME),
        ("data.timestamp", 1795366966, _TIME),
        ("data.timestamp", "1795366966", _TIME),
        ("data.snapshot_date", "2026-02-30", "must be a date such as '2026-11-22'"),
        ("data.snapshot_date", "20261122", "must be a date such as '2026-11-22'"),
        ("data.snapshot_date", 20261122, "must be a date such as '2026-11-22'"),
        ("data.balance", 9900.12, _MONEY),
        ("data.balance", 9900, _MONEY),
        ("data.balance", True, _MONEY),
        ("data.balance", None, _MONEY),
        ("data.balance", "NaN", _MONEY),
        ("data.balance", "-Infinity", _MONEY),
        ("data.balance", "1.123456789", _MONEY),
        ("data.balance", "1234567890123", _MONEY),
        ("data.balance", "1e3", _MONEY),
        ("data.balance", "1\n", _MONEY),
        ("data.balance", "١", _MONEY),
        ("data.open_positions", -1, "greater than or equal to 0"),
        ("data.open_positions", True, "must be an integer"),
        ("data.trade_count", "2", "must be an integer"),
        ("data.trade_count", 2**31, "less than or equal to 2147483647"),
        ("data.portfolio_id", True, "must be an integer"),
        ("data.portfolio_id", 2**63, "less than or equal to 9223372036854775807"),
    ],
)
def test_the_consumer_reports_the_invalid_field_of_an_event(path: str, value: object, reason: str) -> None:
    """JSON text has one spelling for each value. The message begins with the field."""
    text = _changed(SNAPSHOT_TEXT, path, value)
    _assert_error(_error_of(lambda: decode(text, PortfolioSnapshotEvent)), path, reason)


@pytest.mark.parametrize("value", [[], {}, "x", 1, None], ids=str)
@pytest.mark.parametrize("path", ["data", "data.signals"])
def test_the_consumer_reports_data_or_signals_of_another_type(path: str, value: object) -> None:
    """An empty array of signals and data without fields are invalid too."""
    error = _error_of(lambda: decode(_changed(ARCHIVE_TEXT, path, value), SignalArchiveEvent))
    assert str(error).startswith(path)


def test_an_archive_has_at_most_20000_signals() -> None:
    """For the producer and for the consumer."""
    archive = an_archive(signals=[{}] * 20_000)
    assert archive.signals_count == 20_000
    text = encode(event_of(archive, source=SOURCE, sequence=1))
    assert decode(text, SignalArchiveEvent).data == archive
    _assert_error(_error_of(lambda: an_archive(signals=[{}] * 20_001)), "signals", "has more than 20000 items")
    too_many = text.replace('"signals":[', '"signals":[{},')
    error = _error_of(lambda: decode(too_many, SignalArchiveEvent))
    _assert_error(error, "data.signals", "has more than 20000 items")


@pytest.mark.parametrize(
    ("text", "shown"),
    [("four", "four"), ("fives", "fiv…"), ("a\n", "a\\n"), ("ab\n", "ab\\n"), ("abc\n", "abc…"), ("", "")],
)
def test_text_in_a_message_is_escaped_and_shortened(text: str, shown: str) -> None:
    assert readable(text, 4) == shown


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Invalid JSON"),
        (SNAPSHOT_TEXT[:-1], "Invalid JSON"),
        (SNAPSHOT_TEXT + "x", "Invalid JSON"),
        ("[" * 100_000, "Invalid JSON: recursion limit exceeded"),
        (_archive_text(r'[{"a":"\ud800"}]'), "Invalid JSON"),
        (_archive_text(r'[{"\udfff":1}]'), "Invalid JSON"),
        (_archive_text(f'[{{"a":{"1" * 5000}}}]'), "Invalid JSON: number out of range"),
        (_archive_text('[{"a":"\ud800"}]'), "unicode"),
        ("[]", "object"),
        ("null", "object"),
        (SNAPSHOT_TEXT.encode(), "event: must be one JSON string, not bytes"),
        (None, "event: must be one JSON string, not NoneType"),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_a_text_that_is_not_a_json_object_is_invalid(text: Any, reason: str) -> None:
    """The reason is that of the JSON reader, because there are no fields."""
    error = _error_of(lambda: decode(text, SignalArchiveEvent))
    assert reason in str(error)
    assert str(error)[0].isalpha()  # there is no separator without a field before it
    assert error.field is None


def _of_size(size_bytes: int, filler: str) -> SignalArchive:
    empty = len(encode(_archive_event(signals=[{"x": ""}])).encode())
    wide = len(filler.encode())
    count, rest = divmod(size_bytes - empty, wide)
    return an_archive(signals=[{"x": filler * count + "." * rest}])


@pytest.mark.parametrize("filler", ["x", "🌉"], ids=["one byte", "four bytes"])
def test_an_event_has_at_most_8_mib(filler: str) -> None:
    """The limit is in bytes, not characters, and is the same for encoding and decoding."""
    largest = event_of(_of_size(MAX_EVENT_BYTES, filler), source=SOURCE, sequence=43)
    larger = event_of(_of_size(MAX_EVENT_BYTES + 1, filler), source=SOURCE, sequence=43)

    text = encode(largest)

    assert len(text.encode()) == MAX_EVENT_BYTES == 8 * 1024 * 1024
    assert decode(text, SignalArchiveEvent) == largest
    _assert_error(_error_of(lambda: encode(larger)), "event", "is larger than 8 MiB")
    _assert_error(_error_of(lambda: decode(text + " ", SignalArchiveEvent)), "event", "is larger than 8 MiB")


@pytest.mark.parametrize("filler", ["", '"'], ids=["numbers", "in a text"])
def test_an_event_has_at_most_1048576_brackets_colons_and_commas(filler: str) -> None:
    """The limit is the same for encoding and decoding, and includes those inside texts."""
    rest = sum(map(_archive_text('[{"a":[]}]').count, "{[:,"))

    def signals(commas: int) -> list[Any]:
        return [{"a": ["," * commas]}] if filler else [{"a": [1] * (commas + 1)}]

    largest = _archive_event(signals=signals(MAX_EVENT_STRUCTURE - rest))
    larger = _archive_event(signals=signals(MAX_EVENT_STRUCTURE - rest + 1))
    text = encode(largest)

    reason = "has more than 1048576 brackets, colons and commas"
    assert decode(text, SignalArchiveEvent) == largest
    _assert_error(_error_of(lambda: encode(larger)), "event", reason)
    _assert_error(_error_of(lambda: decode(text.replace(",", ",,", 1), SignalArchiveEvent)), "event", reason)


def test_a_snapshot_has_at_most_16_kib() -> None:
    """The longest valid texts take a quarter of that."""
    longest = SNAPSHOT_TEXT + " " * (16 * 1024 - len(SNAPSHOT_TEXT))
    assert decode(longest, PortfolioSnapshotEvent) == _snapshot_event()
    _assert_error(_error_of(lambda: decode(longest + " ", PortfolioSnapshotEvent)), "event", "is larger than 16 KiB")


@pytest.mark.parametrize(("start", "path", "own"), [("{", "event", 9), ('"data":{', "data", 3)])
def test_more_than_100_fields_are_invalid_and_not_listed(start: str, path: str, own: int) -> None:
    """Up to 100, unknown fields are listed and counted."""
    text, unknown = _archive_text("[{}]"), 100 - own
    few, many = (
        text.replace(start, start + "".join(f'"U{n}":0,' for n in range(count)), 1) for count in (unknown, unknown + 1)
    )
    assert str(_error_of(lambda: decode(few, SignalArchiveEvent))).endswith(f"and {unknown - 3} more")
    _assert_error(_error_of(lambda: decode(many, SignalArchiveEvent)), path, "has more than 100 fields")


def test_wrong_signals_are_reported_together_with_other_problems() -> None:
    """One message lists them all or counts them."""
    text = _changed(_archive_text("[1,{},[2],null,{}]"), "source", "a b")
    error = _error_of(lambda: decode(text, SignalArchiveEvent))
    assert [part.split(":")[0] for part in str(error).split("; ")] == [
        *("source", "data.signals.0", "data.signals.2", "and 1 more")
    ]


_SECRET = "\x1b[2Jpa55word\r\n"


@pytest.mark.parametrize("value", [_SECRET, [_SECRET], {"value": _SECRET}], ids=["text", "list", "object"])
@pytest.mark.parametrize("path", ["", "data."], ids=["envelope", "data"])
def test_a_message_never_shows_a_value(path: str, value: object) -> None:
    """Neither the message nor the chain of the error repeats it, in any field."""
    document = json.loads(SNAPSHOT_TEXT)
    for name in document["data"] if path else document.keys() - {"subject"}:
        text = _changed(SNAPSHOT_TEXT, path + name, value)
        error = _error_of(lambda text=text: decode(text, PortfolioSnapshotEvent))  # type: ignore[misc]  # called in the same iteration
        assert ("pa55" in repr(error), error.__suppress_context__) == (False, True)


@pytest.mark.parametrize("name", sorted(PortfolioSnapshot.model_fields))
def test_a_message_of_the_producer_never_shows_a_value(name: str) -> None:
    """Nor if the value is a Python object, nor does Pydantic's own error."""
    values: dict[str, Any] = {name: _SECRET}
    error = _error_of(lambda: a_snapshot(**values))
    assert (error.field, "pa55" in repr(error)) == (name, False)
    with pytest.raises(ValidationError) as caught:
        PortfolioSnapshot(**dict(a_snapshot()) | values)
    assert "pa55" not in str(caught.value)


def test_a_large_document_under_a_long_key_is_validated_in_linear_time() -> None:
    """Paths become text only in messages: making one for each value would take minutes here."""
    leaves = [0] * 200_000
    started = time.perf_counter()
    SignalArchive.checked(archived_at=INSTANT, signals=[{"k" * 1_000_000: leaves}])
    assert time.perf_counter() - started < 5
