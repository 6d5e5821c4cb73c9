"""The trace context of a recorded event: from the argument or from OpenTelemetry, and in log lines about the event."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fakeredis import FakeRedis
from opentelemetry import trace as opentelemetry
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, TraceState

from consumers.worker.batch import EventLogger, deferred
from consumers.worker.deliveries import Delivery
from producers.errors import InvalidEvent
from producers.events import PortfolioSnapshotEvent
from producers.history_producer import HistoryProducer
from producers.outbox import Outbox
from producers.trace_context import trace_context
from producers.trading_controller import archive_current_signals, create_daily_portfolio_snapshot
from tests.factories import a_portfolio, a_signal, a_snapshot, an_archive

TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
OTHER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"


@pytest.fixture
def producer(tmp_path: Path) -> Iterator[HistoryProducer]:
    with HistoryProducer(FakeRedis(), outbox=tmp_path / "outbox.db") as producer:
        yield producer


def _recorded(folder: Path) -> list[dict[str, Any]]:
    """Return the envelopes in the outbox, as JSON."""
    with Outbox(folder / "outbox.db") as outbox:
        return [json.loads(entry.event) for entry in outbox.entries()]


def _span(trace_id: int = 0x4BF92F3577B34DA6A3CE929D0E0E4736, **state: str) -> NonRecordingSpan:
    members = TraceState(list(state.items()))
    return NonRecordingSpan(SpanContext(trace_id, 0x00F067AA0BA902B7, False, TraceFlags(1), members))


@pytest.mark.parametrize(
    "record",
    [
        lambda producer, **trace: producer.record(a_snapshot(), **trace),
        lambda producer, **trace: producer.record_many([a_snapshot(), an_archive()], **trace),
        lambda producer, **trace: create_daily_portfolio_snapshot(a_portfolio(), producer=producer, **trace),
        lambda producer, **trace: archive_current_signals([a_signal()], producer=producer, **trace),
    ],
    ids=["record", "record_many", "snapshot", "archive"],
)
def test_each_call_takes_a_traceparent(producer: HistoryProducer, tmp_path: Path, record: Callable[..., Any]) -> None:
    """Every event of the call has it. Without it, and without OpenTelemetry's context, the envelope has none."""
    record(producer, traceparent=TRACEPARENT)
    assert {event["traceparent"] for event in _recorded(tmp_path)} == {TRACEPARENT}
    before = len(_recorded(tmp_path))
    record(producer)
    assert [event.get("traceparent") for event in _recorded(tmp_path)[before:]] == [None] * before


def test_two_recordings_that_differ_in_their_traces_are_one_fact(producer: HistoryProducer) -> None:
    first, second = (producer.record(a_snapshot(), traceparent=one) for one in (TRACEPARENT, OTHER))
    assert first.event_id == second.event_id


@pytest.mark.parametrize("traceparent", [TRACEPARENT, OTHER, f"cc{TRACEPARENT[2:]}", f"cc{TRACEPARENT[2:]}-what.next"])
def test_a_traceparent_of_any_version_is_valid(traceparent: str) -> None:
    """Later versions may have more fields."""
    context = trace_context(traceparent)
    assert context is not None
    assert context.attributes() == {"traceparent": traceparent}


@pytest.mark.parametrize(
    "traceparent",
    [
        *("", "1", TRACEPARENT.upper(), TRACEPARENT[:-1], f"{TRACEPARENT}-x", f" {TRACEPARENT}", f"{TRACEPARENT}\n"),
        *(f"ff{TRACEPARENT[2:]}", f"cc{TRACEPARENT[2:]}-a b", f"cc{TRACEPARENT[2:]}x", f"cc{TRACEPARENT[2:]}-\x1b"),
        f"00-{'0' * 32}-00f067aa0ba902b7-01",
        f"00-4bf92f3577b34da6a3ce929d0e0e4736-{'0' * 16}-01",
        f"00-{'٣' * 32}-00f067aa0ba902b7-01",
    ],
)
def test_an_invalid_traceparent_is_an_error_and_nothing_is_recorded(
    producer: HistoryProducer, tmp_path: Path, traceparent: str
) -> None:
    with pytest.raises(InvalidEvent, match=r"^traceparent: must be a W3C traceparent such as '00-") as raised:
        producer.record(a_snapshot(), traceparent=traceparent)
    assert (raised.value.field, _recorded(tmp_path)) == ("traceparent", [])


def test_a_traceparent_of_another_type_is_an_error(producer: HistoryProducer) -> None:
    with pytest.raises(InvalidEvent, match=r"^traceparent: must be text, not bytes$"):
        producer.record(a_snapshot(), traceparent=TRACEPARENT.encode())  # type: ignore[arg-type]


def test_the_current_span_of_opentelemetry_is_the_default(producer: HistoryProducer, tmp_path: Path) -> None:
    """Its state too. An argument takes precedence, and has no state."""
    with opentelemetry.use_span(_span(vendor="a%b", other="1")):
        producer.record(a_snapshot())
        producer.record(a_snapshot(after=timedelta(1)), traceparent=OTHER)
    first, second = _recorded(tmp_path)
    assert (first["traceparent"], first["tracestate"]) == (TRACEPARENT, "vendor=a%b,other=1")
    assert (second["traceparent"], "tracestate" in second) == (OTHER, False)


def test_a_span_without_state_gives_no_tracestate(producer: HistoryProducer, tmp_path: Path) -> None:
    with opentelemetry.use_span(_span()):
        producer.record(a_snapshot())
    (event,) = _recorded(tmp_path)
    assert (event["traceparent"], "tracestate" in event) == (TRACEPARENT, False)


def _broken() -> Any:
    raise RuntimeError("no context")


@pytest.mark.parametrize(
    "current",
    [lambda: _span(trace_id=0), _broken, lambda: SimpleNamespace(get_span_context=lambda: None)],
    ids=["no span", "raises", "of another shape"],
)
def test_an_invalid_context_of_opentelemetry_is_ignored(
    producer: HistoryProducer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, current: Callable[[], Any]
) -> None:
    """A defect of the tracing must not cost an event."""
    monkeypatch.setitem(sys.modules, "opentelemetry.trace", SimpleNamespace(get_current_span=current))
    producer.record(a_snapshot())
    (event,) = _recorded(tmp_path)
    assert "traceparent" not in event


def test_opentelemetry_is_not_imported(producer: HistoryProducer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that has not imported it has no current span."""
    monkeypatch.delitem(sys.modules, "opentelemetry.trace")
    producer.record(a_snapshot())
    assert "opentelemetry.trace" not in sys.modules


def test_a_log_line_about_a_deferred_delivery_has_the_trace_context(caplog: pytest.LogCaptureFixture) -> None:
    """In its text and as fields, though the event is not valid."""
    text = json.dumps({"source": "a/b", "traceparent": TRACEPARENT, "tracestate": "vendor=a%s"})
    line = EventLogger(
        logging.getLogger("x"), deferred(Delivery("j-1", text, PortfolioSnapshotEvent), ValueError("why"))
    )
    line.warning("job %s failed", "j-1")
    (record,) = caplog.records
    assert record.getMessage() == f"job j-1 failed (traceparent {TRACEPARENT}, tracestate 'vendor=a%s')"
    names = ("job_id", "source", "event_id", "traceparent", "tracestate")
    assert [getattr(record, name) for name in names] == ["j-1", "a/b", None, TRACEPARENT, "vendor=a%s"]


def test_a_log_line_about_an_event_without_trace_context_has_no_suffix(caplog: pytest.LogCaptureFixture) -> None:
    EventLogger(logging.getLogger("x"), deferred(Delivery("j-1", "{}", None), ValueError("why"))).warning("job %s", "j")
    (record,) = caplog.records
    assert (record.getMessage(), hasattr(record, "traceparent")) == ("job j", False)
