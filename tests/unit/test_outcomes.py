"""Acknowledgements as they stand in Redis: what relays and imports make of them."""

from __future__ import annotations

from typing import Any

import pytest

from producers.outcomes import Outcome, read_acknowledgements

SOURCE = "trading-controller/1"


@pytest.mark.parametrize("outcome", [Outcome("stored", 42), Outcome("duplicate", 7), Outcome("rejected", None, "a:b")])
def test_what_is_written_is_read_again(outcome: Outcome) -> None:
    """From clients that decode answers and from such that do not."""
    assert read_acknowledgements({"3": str(outcome)}, SOURCE) == [(3, outcome)]
    assert read_acknowledgements({b"3": str(outcome).encode()}, SOURCE) == [(3, outcome)]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (b"\xff", b"stored:1"),
        (b"2", b"\xff"),
        (b"x", b"stored:1"),
        (b"-1", b"stored:1"),
        (b"", b"stored:1"),
        (b"9" * 25, b"stored:1"),
        (b"9" * 5000, b"stored:1"),
        (b"2", b"stored:" + b"9" * 25),
        (b"2", b"stored:" + b"9" * 5000),
        (b"2", b"stored:"),
        (b"2", b"rejected"),
        (b"2", b"who knows"),
    ],
)
def test_what_is_none_is_dropped_with_a_word_and_hides_nothing(
    caplog: pytest.LogCaptureFixture, field: bytes, value: bytes
) -> None:
    """What stands before and behind it is read."""
    told: dict[Any, Any] = {b"1": b"stored:42", field: value, b"3": b"rejected:no"}
    found = read_acknowledgements(told, SOURCE)

    assert found == [(1, Outcome("stored", 42)), (3, Outcome("rejected", None, "no"))]
    (record,) = caplog.records
    assert record.getMessage().startswith("dropped an acknowledgement that is none, for sequence ")
    assert len(record.getMessage()) < 100
    assert vars(record)["source"] == SOURCE
