"""Target `decode`: bytes as a job's data, and as an event's text, through the code by which a worker reads them.

Invariants: a text is decoded, or it is rejected with one printable line. A decoded event encodes, decodes again as an
equal event with the same text, and has only values that PostgreSQL can store. A stored batch decides its delivery, and
a new row has the values of its event.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator
from decimal import Decimal
from typing import Any
from uuid import UUID

from sqlalchemy import text as sql

from consumers.db.engine import get_db
from consumers.worker.batch import Result, process_batch
from consumers.worker.deliveries import Delivery, ReservedJob, displayable_call, parse_job, unreadable_delivery
from producers.errors import InvalidEvent
from producers.events import KINDS, Event, SignalArchive, decode, encode, event_of
from tests.factories import a_snapshot, an_archive
from tests.fuzz.invariants import require

_MAX_MESSAGE = 1200
_MAX_NUMBER = Decimal("1.7976931348623157E308")
_EXTENSION = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}


def seeds() -> Iterator[bytes]:
    """Yield events of both kinds, with edge values and wrong ones, and jobs that carry them."""
    texts = [encode(event_of(payload, source="fuzz/1", sequence=7)) for payload in (a_snapshot(), an_archive())]
    texts.append(encode(event_of(a_snapshot(portfolio_id=None, balance="-0.00000001"), source="a", sequence=None)))
    values = [0, -0.0, 1e300, 5e-324, Decimal("1E-16383"), Decimal("0E+99999"), True, None, "é\u2028\x7f🌉", [], {}]
    texts.append(
        encode(event_of(an_archive(signals=[{str(n): one} for n, one in enumerate(values)]), source="a/b", sequence=0))
    )
    small = encode(event_of(an_archive(signals=[{"a": 1}]), source="a", sequence=1))
    texts += [small, json.dumps(json.loads(small) | _EXTENSION), json.dumps(json.loads(texts[0]) | _EXTENSION)]
    for value in (
        '"\\u0000"',
        '"\\ud800"',
        "NaN",
        "-Infinity",
        "1e309",
        "1e-400",
        "[" * 49 + "]" * 49,
        '{"":{"\\u0000":1}}',
        "1E+99999999999999999999",
        "9" * 400,
    ):
        texts.append(small.replace('{"a":1}', f'{{"a":{value}}}'))
    texts += [small.replace('"a":1', '"a":1,"a":2'), small.replace('"data":', '"data":1,"data":')]
    for old, new in (
        ("9900.12", "999999999999.99999999"),
        ("+00:00", "Z"),
        ("+00:00", "+23:59"),
        ("2026-11-22T", "9998-12-31T"),
        ("2026-11-22", "0001-01-01"),
    ):
        texts.append(texts[0].replace(old, new))
    for one in texts:
        yield one.encode()
    for one in texts[:3]:
        for kind in KINDS.values():
            call = json.dumps([kind.job_function, None, [one], {}]).encode()
            yield call
        yield zlib.compress(call)
    yield b"\x80\x04\x95pickle"
    yield json.dumps(["os.system", None, ["true"], {}]).encode()


def check(data: bytes, *, store: bool) -> None:
    """Read `data` as a job and as an event of each kind."""
    job = ReservedJob("fuzz", "usual", data, None)
    delivery = parse_job(job)
    require(delivery.model is not None or delivery.error is not None, "a delivery has neither a model nor an error")
    displayable_call(data)  # these two must not raise
    unreadable_delivery(job)
    text = data.decode("utf-8", "surrogateescape") if delivery.model is None else delivery.text
    for kind in KINDS.values():
        _check_text(text, kind.model, store)
    if store and delivery.error is not None:
        _process_one(delivery)


def _check_text(text: Any, model: type[Event], store: bool) -> None:
    try:
        event = decode(text, model)
    except InvalidEvent as error:
        check_message(error)
        if store:
            _process_one(Delivery("fuzz", text, model))
        corrected = _with_its_id(text, model) if error.field == "id" else None
        if corrected is not None:
            _check_text(corrected, model, store)
        return
    _check_event(event, text)
    if store:
        _check_row(event, _process_one(Delivery("fuzz", text, model)))


def check_message(error: InvalidEvent) -> None:
    message = str(error)
    require(message and message.isprintable(), f"the message is not one printable line: {message!a}")
    require(not re.match(": |is not a field", message) and "; is not a field" not in message, f"no name: {message}")
    require(len(message) <= _MAX_MESSAGE, f"the message has {len(message)} characters")


def _with_its_id(text: str, model: type[Event]) -> str | None:
    """Return the text of an event with the id that belongs to its fact, so that the fuzzer may change the fact."""
    try:
        document = json.loads(text)
        payload = KINDS[document["type"]].payload.model_validate_json(json.dumps(document["data"]))
        corrected = text.replace(str(UUID(document["id"])), str(payload.event_id))
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
        return None
    return corrected if corrected != text else None


def _check_event(event: Event, text: str) -> None:
    try:
        again = encode(event)
    except InvalidEvent:
        require(len(text) > type(event).max_characters // 2, "a decoded event cannot be encoded")
        return
    decoded = decode(again, type(event))
    require(exact(decoded.model_dump()) == exact(event.model_dump()), "an event changes when it is encoded and decoded")
    require(encode(decoded) == again, "an event's text changes when it is decoded and encoded")
    require(decoded.id == decoded.data.event_id == event.id, "the id is not that of the fact")
    require(event.data.summary.isprintable(), "the summary is not one printable line")
    if isinstance(event.data, SignalArchive):
        require(event.data.signals == json.loads(text, parse_float=Decimal)["data"]["signals"], "signals differ")
        _check_storable(event.data.signals)


def _check_storable(value: Any) -> None:
    """Check the rules of JSONB by other means than the product's."""
    if isinstance(value, str):
        require("\0" not in value, "a text has a NUL character")
        value.encode()  # raises for a lone surrogate
    elif isinstance(value, dict):
        for name, item in value.items():
            _check_storable(name)
            _check_storable(item)
    elif isinstance(value, list):
        for item in value:
            _check_storable(item)
    elif not isinstance(value, bool | None):
        number = Decimal(value)
        require(number.is_finite() and abs(number) <= _MAX_NUMBER, "a number is out of range")
        require(int(number.as_tuple().exponent) >= -16383, "a number has too many decimals")


def exact(value: Any) -> Any:
    """Return a document whose numbers are exact and do not equal booleans: true is not 1, and 10 is 10.0."""
    if isinstance(value, dict):
        return {name: exact(item) for name, item in value.items()}
    if isinstance(value, list):
        return [exact(item) for item in value]
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        return value
    return ("number", Decimal(repr(value)) if isinstance(value, float) else Decimal(value))


def _process_one(delivery: Delivery) -> Result:
    """Process one delivery as a worker does. Raise unless it is decided."""
    results = [result for batch in process_batch([delivery]) for result in batch]
    require(len(results) == 1, f"{len(results)} results of one delivery")
    (result,) = results
    if not isinstance(result, Result):
        raise result.error
    require(
        result.label in ("stored", "duplicate", "conflict", "invalid", "unsupported"), f"a delivery is {result.label}"
    )
    return result


def _check_row(event: Event, result: Result) -> None:
    if result.error is not None:
        require(result.label == "conflict", f"a decoded event is {result.label}: {result.error}")
        return
    kind = KINDS[event.type]
    names = [column.name for column in kind.columns]
    shown = ", ".join(
        f'CAST("{name}" AS text) AS "{name}"' if name == "signals_data" else f'"{name}"' for name in names
    )
    with get_db() as db:
        query = sql(f"SELECT {shown} FROM {kind.table} WHERE id = :id")
        row = db.execute(query, {"id": result.outcome.row_id}).mappings().one()
    for column in kind.columns:
        expected, found = getattr(event.data, column.attribute or column.name), row[column.name]
        if column.type == "jsonb":
            found = json.loads(found, parse_float=Decimal)
        require(exact(found) == exact(expected), f"{column.name} of the row differs from the event")
