"""Acknowledgements in Redis: their text, and how a relay reads it."""

from __future__ import annotations

from typing import Any

import pytest

from producers.acknowledgements import Acknowledgement, Outcome, acknowledgement_text, read_acknowledgements
from producers.redis_keys import delivery_of, job_id_of

SOURCE_ID = "0123456789abcdef" * 2
SOURCE = f"trading-controller/{SOURCE_ID}"
NONCE = "00112233445566ff"
EVENT_ID = "8f2b6a3e-9c1d-5e4f-8a7b-0123456789ab"


@pytest.mark.parametrize("nonce", [NONCE, ""])
@pytest.mark.parametrize("event_id", [EVENT_ID, None])
@pytest.mark.parametrize(
    "outcome", [Outcome("stored", 42), Outcome("duplicate", 7), Outcome("rejected", None, "a:b c")]
)
def test_an_acknowledgement_is_read_as_it_was_written(outcome: Outcome, event_id: str | None, nonce: str) -> None:
    """With and without `decode_responses`."""
    field = job_id_of(SOURCE_ID, 3, nonce)
    text = acknowledgement_text(1_700_000_000, event_id, outcome)
    expected = Acknowledgement(SOURCE_ID, 3, nonce, event_id, outcome, at=1_700_000_000)

    assert read_acknowledgements({field: text}, SOURCE) == {field: expected}
    assert read_acknowledgements({field.encode(): text.encode()}, SOURCE) == {field.encode(): expected}


def test_the_largest_numbers_that_a_database_can_store_are_read() -> None:
    """A sequence and a row id have 63 bits, a time has 18 digits."""
    largest = 2**63 - 1
    field = f"{SOURCE_ID}-{largest}-{NONCE}"
    found = read_acknowledgements({field: f"{'9' * 18} - stored:{largest}"}, SOURCE)
    assert found == {field: Acknowledgement(SOURCE_ID, largest, NONCE, None, Outcome("stored", largest), 10**18 - 1)}


def test_an_acknowledgement_has_its_documented_text() -> None:
    """Workers and relays of different releases must agree on it."""
    assert job_id_of("ab", 2, NONCE) == f"ab-2-{NONCE}"
    assert job_id_of("ab", 2) == "ab-2"
    assert acknowledgement_text(17, EVENT_ID, Outcome("stored", 4)) == f"17 {EVENT_ID} stored:4"
    assert acknowledgement_text(17, None, Outcome("rejected", reason="no")) == "17 - rejected:no"


@pytest.mark.parametrize(
    "job_id", ["", "ab", "ab-", "ab-1-", "ab-1-2", f"ab-x-{NONCE}", f"AB-1-{NONCE}", f"ab-1-{NONCE}0"]
)
def test_other_job_ids_name_no_delivery(job_id: str) -> None:
    """They belong to another program's jobs."""
    assert delivery_of(job_id) is None


_FIELD = f"{SOURCE_ID}-2-{NONCE}".encode()
_TEXT = b"17 - stored:1"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (b"\xff", _TEXT),
        (_FIELD, b"\xff"),
        (b"x", _TEXT),
        (b"2", _TEXT),
        (b"", _TEXT),
        (f"{SOURCE_ID}--1".encode(), _TEXT),
        (f"{SOURCE_ID}-{2**63}".encode(), _TEXT),
        (f"{SOURCE_ID}-{'9' * 19}".encode(), _TEXT),
        (f"{SOURCE_ID}-{'9' * 25}".encode(), _TEXT),
        (b"9" * 5000, _TEXT),
        (_FIELD, b"stored:1"),
        (_FIELD, b"17 - stored:-1"),
        (_FIELD, b"17 - stored:-" + b"9" * 25),
        (_FIELD, b"- - stored:1"),
        (_FIELD, b"9" * 19 + b" - stored:1"),
        (_FIELD, b"9" * 25 + b" - stored:1"),
        (_FIELD, b"9" * 5000 + b" - stored:1"),
        (_FIELD, f"17 - stored:{2**63}".encode()),
        (_FIELD, b"17 - stored:" + b"9" * 25),
        (_FIELD, b"17 - stored:" + b"9" * 5000),
        (_FIELD, b"17 - stored:"),
        (_FIELD, b"17 - rejected"),
        (_FIELD, b"17 - who knows"),
        (_FIELD, b"17"),
        (_FIELD, b""),
    ],
)
def test_an_unreadable_acknowledgement_is_removed_and_logged(
    caplog: pytest.LogCaptureFixture, field: bytes, value: bytes
) -> None:
    """The fields before and after it are read."""
    first, last = f"{SOURCE_ID}-1-{NONCE}".encode(), f"{SOURCE_ID}-3-{NONCE}".encode()
    fields: dict[Any, Any] = {first: b"17 - stored:42", field: value, last: b"17 - rejected:no"}
    found = read_acknowledgements(fields, SOURCE)

    assert found[field] is None
    assert [one.outcome for one in (found[first], found[last]) if one] == [
        Outcome("stored", 42),
        Outcome("rejected", None, "no"),
    ]
    (record,) = caplog.records
    assert record.getMessage().startswith("removed field ")
    assert len(record.getMessage()) < 200
    assert vars(record)["source"] == SOURCE
