"""Parsing of jobs: which calls are accepted, what is said about the others, and within which limits."""

from __future__ import annotations

import json
import zlib
from typing import Any

import pytest

from consumers.errors import OversizedJob, PoisonEvent, UnsupportedJob
from consumers.worker.deliveries import (
    MAX_JOB_BYTES,
    Delivery,
    ReservedJob,
    decompressed_call,
    displayable_call,
    parse_job,
    unreadable_delivery,
)
from producers.events import MAX_EVENT_BYTES, PortfolioSnapshotEvent, SignalArchiveEvent, encode, event_of
from tests.factories import a_snapshot

SNAPSHOT, ARCHIVE = "consumers.handlers.record_portfolio_snapshot", "consumers.handlers.record_signal_archive"
LARGEST_CALL = 6 * MAX_EVENT_BYTES + 1000  # each character of the event as an escape of six
UNCHECKED = 64 * 1024


def a_job(call: Any, *, state: str = "usual") -> ReservedJob:
    return ReservedJob("job", state, call if isinstance(call, bytes) else json.dumps(call).encode(), None)


def a_call(length: int, *, form: str = '["{function}", null, ["{text}"], {{}}]') -> bytes:
    """Return a call of this length in bytes."""
    empty = form.format(function=SNAPSHOT, text="")
    return form.format(function=SNAPSHOT, text="x" * (length - len(empty))).encode()


def reason_of(delivery: Delivery) -> str:
    assert isinstance(delivery.error, UnsupportedJob)
    return str(delivery.error)


@pytest.mark.parametrize(("function", "model"), [(SNAPSHOT, PortfolioSnapshotEvent), (ARCHIVE, SignalArchiveEvent)])
@pytest.mark.parametrize("compress", [bytes, zlib.compress])
def test_a_call_of_a_job_function_gives_its_text_and_model(function: str, model: type, compress: Any) -> None:
    """RQ compresses a call with zlib, or does not."""
    call = compress(json.dumps([function, None, ["text"], {}]).encode())
    assert parse_job(a_job(call)) == Delivery("job", "text", model)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (["os.system", None, ["x"], {}], "it calls a function other than our job functions: os.system"),
        ([7, None, ["x"], {}], "it calls a function other than our job functions"),
        ([["f"], None, ["x"], {}], "it calls a function other than our job functions"),
        (["f" * 101, None, ["x"], {}], "it calls a function other than our job functions: " + "f" * 99 + "…"),
        ([SNAPSHOT, "instance", ["x"], {}], "its call must have one argument, the event's text"),
        ([SNAPSHOT, None, [], {}], "its call must have one argument, the event's text"),
        ([SNAPSHOT, None, ["x", "y"], {}], "its call must have one argument, the event's text"),
        ([SNAPSHOT, None, "x", {}], "its call must have one argument, the event's text"),
        ([SNAPSHOT, None, ["x"], {"at": 1}], "its call must have one argument, the event's text"),
        ([SNAPSHOT, None, ["x"]], "its data cannot be read as JSON"),
        ({}, "its data cannot be read as JSON"),
        (7, "its data cannot be read as JSON"),
        (b"\x80\x04garbage", "its data cannot be read as JSON"),
        (b"", "its data cannot be read as JSON"),
    ],
)
def test_any_other_call_is_unsupported_with_a_reason(call: Any, reason: str) -> None:
    """A job of another program, or one that a person has enqueued."""
    delivery = parse_job(a_job(call))
    assert reason_of(delivery).endswith(reason)
    assert (delivery.text, delivery.model) == ("", None)


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ("unreadable", "it cannot be read"),
        ("success_callback_name", "it asks RQ for a callback, which is not supported"),
        ("failure_callback_name", "it asks RQ for a callback, which is not supported"),
        ("stopped_callback_name", "it asks RQ for a callback, which is not supported"),
        ("webhooks", "it asks RQ for a webhook, which is not supported"),
        ("repeats_left", "it asks RQ for repetitions, which is not supported"),
        ("rate_limit_key", "it asks RQ for a rate limit, which is not supported"),
        ("another_field", "it asks RQ for another_field, which is not supported"),
    ],
)
def test_a_job_that_asks_rq_for_more_is_unsupported(state: str, reason: str) -> None:
    """Its text is kept for the record of the rejection, if it can be read."""
    delivery = parse_job(a_job([SNAPSHOT, None, ["text"], {}], state=state))
    assert reason_of(delivery).endswith(reason)
    assert delivery.text == ("" if state == "unreadable" else "text")


@pytest.mark.parametrize(
    ("crashes", "text", "is_poison"),
    [
        (0, "text", False),
        (2, "text", False),
        (3, "text", True),
        (4, "", True),
    ],
)
def test_a_job_that_crashed_three_workers_is_poison_and_then_is_not_read_at_all(
    crashes: int, text: str, is_poison: bool
) -> None:
    """Recording the rejection with its text has crashed the fourth worker."""
    delivery = parse_job(a_job([SNAPSHOT, None, ["text"], {}]), crashes)
    assert (delivery.text, isinstance(delivery.error, PoisonEvent)) == (text, is_poison)
    assert delivery.model == (PortfolioSnapshotEvent if text else None)
    assert not is_poison or f"{crashes} workers" in str(delivery.error)


def test_a_larger_call_is_accepted_only_in_the_form_that_needs_little_memory() -> None:
    """Up to 64 KiB, a call may have any form, such as an argument without text."""
    nested = '["{function}", null, [["{text}"]], {{}}]'
    assert parse_job(a_job(a_call(UNCHECKED, form=nested))).error is None
    assert "larger than 64 KiB" in reason_of(parse_job(a_job(a_call(UNCHECKED + 1, form=nested))))
    call = a_call(UNCHECKED + 1, form='["{function}", null, ["\\"{text}"], {{}}]')
    assert parse_job(a_job(call)).text == '"' + "x" * (len(call) - len(a_call(0)) - 2)
    spaced = a_call(UNCHECKED + 1, form=' ["{function}",  null, ["{text}"],  {{}}] ')
    assert parse_job(a_job(zlib.compress(spaced))).model is PortfolioSnapshotEvent


def test_a_call_may_be_as_long_as_the_largest_event_written_in_escapes() -> None:
    """A longer one is not read, whether it is compressed or not."""
    largest = a_call(LARGEST_CALL)
    assert decompressed_call(largest) == decompressed_call(zlib.compress(largest, 1)) == largest
    for longer in (largest + b" ", zlib.compress(largest + b" ", 1)):
        with pytest.raises(OversizedJob):
            decompressed_call(longer)
        assert isinstance(parse_job(a_job(longer)).error, OversizedJob)
        assert displayable_call(longer) is None
    assert LARGEST_CALL < MAX_JOB_BYTES < 1.01 * LARGEST_CALL
    assert isinstance(parse_job(a_job(b"", state="oversized")).error, OversizedJob)


@pytest.mark.parametrize(
    ("call", "text"),
    [(["f", None, ["text"], {}], "text"), (["f", None, [7], {}], ""), (["f", None, [], {}], ""), (b"garbage", "")],
)
def test_the_text_of_a_job_that_the_parser_cannot_handle_is_its_first_argument(call: Any, text: str) -> None:
    """It is empty if there is no such text."""
    assert unreadable_delivery(a_job(call)) == Delivery("job", text, None)


def test_a_keyboard_interrupt_while_a_job_is_read_is_raised_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any other exception there makes the text empty."""

    def interrupted(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    job = a_job(["f", None, ["text"], {}])
    monkeypatch.setattr(json, "loads", interrupted)
    with pytest.raises(KeyboardInterrupt):
        unreadable_delivery(job)


def test_a_dashboard_gets_only_calls_that_it_can_parse_in_little_memory() -> None:
    """Data that is not compressed is shown as it is, up to 64 KiB; a large call only in the form of ours."""
    large, brackets = a_call(UNCHECKED + 1), b"[" * (UNCHECKED + 1)
    assert displayable_call(zlib.compress(large)) == displayable_call(large) == large
    assert displayable_call(b"x" * UNCHECKED) == b"x" * UNCHECKED
    assert displayable_call(brackets[1:]) == brackets[1:]
    assert displayable_call(b"x" * (UNCHECKED + 1)) is displayable_call(brackets) is None


def test_the_text_of_a_passed_event_is_its_encoding() -> None:
    """A text that is given with it is kept."""
    event = event_of(a_snapshot(), source="other/1", sequence=1)
    assert Delivery("job", "", PortfolioSnapshotEvent, None, event).event_text == encode(event)
    assert Delivery("job", "text", PortfolioSnapshotEvent, None, event).event_text == "text"
    assert Delivery("job", "", None).event_text == ""
