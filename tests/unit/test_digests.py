"""The digest of an event's content is made of its values, and any change of a value changes it."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from hashlib import sha256
from typing import Any
from uuid import uuid4

import pytest

from producers.digests import canonical_text, columns_of, digest_of, digest_of_text
from producers.events import ARCHIVE_TYPE, SNAPSHOT_TYPE, Payload, encode, event_of
from producers.segments import CHAIN_START, next_head
from tests.documents import block, text_of
from tests.factories import INSTANT, a_snapshot, an_archive

SNAPSHOT_TEXT = (
    '["trading.portfolio-snapshot.v1","7c1f366e-c9c3-5876-873e-6a33c29b098d",{"balance":9900.12,"open_positions":1,'
    '"portfolio_id":1,"snapshot_date":"2026-11-22","timestamp":"2026-11-22T17:02:46.101234+00:00","total_invested":100,'
    '"total_profit_loss":-0.00000001,"total_value":10097.37,"trade_count":0}]'
)


def _canonical(payload: Payload) -> str:
    return canonical_text(payload.type, payload.event_id, columns_of(payload))


def _digest(payload: Payload, *, source: str = "trading-controller/x", sequence: int = 1) -> bytes:
    digest = digest_of_text(payload.type, encode(event_of(payload, source=source, sequence=sequence)))
    assert digest is not None
    return digest


def test_a_snapshot_has_one_canonical_text() -> None:
    snapshot = a_snapshot(total_profit_loss="-0.00000001", trade_count=0)
    assert _canonical(snapshot) == SNAPSHOT_TEXT
    assert _digest(snapshot) == sha256(SNAPSHOT_TEXT.encode()).digest()
    document = text_of("consumers/ops/CONTENT.md")
    assert block("consumers/ops/CONTENT.md", "canonical text").strip() == SNAPSHOT_TEXT
    assert f"`{_digest(snapshot).hex()}`" in document
    assert _digest(snapshot).hex() == "7d8d03397290eb9b52668b924035c74aac35ca7d72f9fac57b49ea4e7628a6ca"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Decimal("1.50"), "1.5"),
        (Decimal("1E+3"), "1000"),
        (Decimal("100.0"), "100"),
        (100, "100"),
        (-5, "-5"),
        (Decimal("-0.0"), "0"),
        (Decimal("0E-7"), "0"),
        (Decimal("1E-7"), "0.0000001"),
        (Decimal("12345678901234567890.123456789012345678901"), "12345678901234567890.123456789012345678901"),
        (True, "true"),
        ("Öl 🌉", '"Öl 🌉"'),
        ('"\\\n\x1f/', r'"\"\\\n\u001f/"'),
        ("1.50", '"1.50"'),
        ({"b": 1, "a": [None, {}], "ä": 2, "B": Decimal("2.0")}, '{"B":2,"a":[null,{}],"b":1,"ä":2}'),
        (INSTANT, '"2026-11-22T17:02:46.101234+00:00"'),
        (INSTANT.astimezone(timezone(timedelta(hours=14))), '"2026-11-22T17:02:46.101234+00:00"'),
        (datetime(2026, 1, 1, tzinfo=UTC), '"2026-01-01T00:00:00.000000+00:00"'),
        (INSTANT.date(), '"2026-11-22"'),
    ],
)
def test_each_value_has_one_canonical_text(value: Any, text: str) -> None:
    snapshot = a_snapshot()
    expected = f'["{SNAPSHOT_TYPE}","{snapshot.event_id}",{{"x":{text}}}]'
    assert canonical_text(SNAPSHOT_TYPE, snapshot.event_id, {"x": value, "absent": None}) == expected


def test_a_value_of_another_type_has_no_canonical_text() -> None:
    with pytest.raises(TypeError, match="a value of type bytes has no canonical text"):
        canonical_text(SNAPSHOT_TYPE, a_snapshot().event_id, {"x": b""})


def test_the_text_of_an_event_may_differ_while_its_digest_is_the_same() -> None:
    """Source, number, spelling of numbers, order of keys and the offset of the time are not content."""
    archive = an_archive(signals=[{"a": Decimal("1.0"), "b": 100}])
    other = an_archive(
        signals=[{"b": Decimal("1E2"), "a": 1}], archived_at=INSTANT.astimezone(timezone(timedelta(hours=2)))
    )
    assert _digest(archive) == _digest(other, source="other/y", sequence=99)


def test_a_column_of_another_type_has_no_canonical_text() -> None:
    """A new kind of event may have one. Decide first which text stands for it."""
    with pytest.raises(TypeError, match="a value of type UUID has no canonical text"):
        digest_of(SNAPSHOT_TYPE, uuid4(), {"position_id": uuid4()})


@pytest.mark.parametrize("payload", [a_snapshot(), an_archive()])
def test_each_column_is_part_of_the_digest(payload: Payload) -> None:
    """Another type, another event id, another value and a missing value change it."""
    columns = columns_of(payload)
    of_columns = [{**columns, name: other} for name in columns for other in (None, "other")]
    digests = {digest_of(payload.type, payload.event_id, one) for one in [columns, *of_columns]}
    digests |= {digest_of("other", payload.event_id, columns), digest_of(payload.type, uuid4(), columns)}
    assert len(digests) == 1 + len(of_columns) + 2
    assert digest_of(payload.type, payload.event_id, columns) == _digest(payload)


def test_a_derived_month_is_part_of_the_digest() -> None:
    """The month follows the local date. Two deliveries of one archive may have different months."""
    new_year = datetime(2026, 12, 31, 23, 30, tzinfo=UTC)
    in_berlin = new_year.astimezone(timezone(timedelta(hours=1)))
    first, second = an_archive(archived_at=new_year), an_archive(archived_at=in_berlin)
    assert first.event_id == second.event_id
    assert _digest(first) != _digest(second)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", json.dumps({"type": SNAPSHOT_TYPE}), '{"type": "unknown"}', "[" * 100_000]
)
def test_a_text_that_is_not_an_event_has_no_digest(text: str) -> None:
    """Another version of the program may have recorded it; its row cannot be compared."""
    assert {digest_of_text(event_type, text) for event_type in (SNAPSHOT_TYPE, ARCHIVE_TYPE, "unknown")} == {None}


def test_the_head_of_a_chain_depends_on_each_event_its_number_and_whether_it_was_rejected() -> None:
    digest = sha256(b"").digest()
    head = next_head(CHAIN_START, 1, False, digest)
    assert head == sha256(bytes(32) + (1).to_bytes(8, "big") + b"\0" + digest).digest()
    others = (
        next_head(head, 1, False, digest),
        next_head(CHAIN_START, 2, False, digest),
        next_head(CHAIN_START, 1, True, digest),
        next_head(CHAIN_START, 1, False, sha256(b" ").digest()),
    )
    assert len({head, *others}) == 5
