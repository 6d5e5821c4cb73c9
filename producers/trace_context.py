"""Trace context of an event (https://www.w3.org/TR/trace-context/).

It links the caller's trace to the worker's log lines. It is in the envelope, as the attributes `traceparent` and
`tracestate`, and is not content.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from producers.errors import InvalidEvent
from producers.fields import type_name

logger = logging.getLogger(__name__)

_TRACEPARENT = re.compile(
    r"(?P<version>[0-9a-f]{2})-(?P<trace_id>[0-9a-f]{32})-(?P<parent_id>[0-9a-f]{16})-[0-9a-f]{2}"
    r"(?P<more>-[!-~]{0,200})?"
)
# https://www.w3.org/TR/trace-context/#tracestate-header: at most 32 members, with blanks around them; some are empty.
_KEY = r"(?:[a-z][_0-9a-z*/-]{0,255}|[a-z0-9][_0-9a-z*/-]{0,240}@[a-z][_0-9a-z*/-]{0,13})"
_MEMBER = re.compile(rf"[ \t]*(?:{_KEY}=[!-+\--<>-~ ]{{0,256}}?)?[ \t]*")
_MOST_MEMBERS = 32
_MOST_CHARACTERS = 512
_EXAMPLE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


class TraceContext(NamedTuple):
    """A valid `traceparent`, and the tracing systems' own `tracestate`, if there is one."""

    traceparent: str
    tracestate: str | None = None

    def __str__(self) -> str:
        # Quoted, because a tracestate may have blanks, commas and brackets.
        state = "" if self.tracestate is None else f", tracestate {self.tracestate!r}"
        return f"traceparent {self.traceparent}{state}"

    def attributes(self) -> dict[str, str]:
        """Return the attributes of the envelope."""
        return {name: value for name, value in self._asdict().items() if value is not None}


def trace_context(traceparent: str | None) -> TraceContext | None:
    """Return the context of a call: that of its argument, else OpenTelemetry's current one, else None.

    Raises:
        InvalidEvent: the argument is not a W3C traceparent.
    """
    if traceparent is None:
        return _current_context()
    if not isinstance(traceparent, str):
        raise InvalidEvent.at("traceparent", f"must be text, not {type_name(traceparent)}")
    if not _is_traceparent(traceparent):
        raise InvalidEvent.at("traceparent", f"must be a W3C traceparent such as '{_EXAMPLE}'")
    return TraceContext(traceparent)


def trace_of(attributes: Mapping[str, Any]) -> TraceContext | None:
    """Return the context in an envelope. Invalid values are ignored, as the specification says."""
    traceparent, tracestate = attributes.get("traceparent"), attributes.get("tracestate")
    if not isinstance(traceparent, str) or not _is_traceparent(traceparent):
        return None
    is_valid = isinstance(tracestate, str) and _is_tracestate(tracestate)
    return TraceContext(traceparent, tracestate if is_valid else None)


def _is_tracestate(text: str) -> bool:
    members = text.split(",")
    if not text.strip() or len(text) > _MOST_CHARACTERS or len(members) > _MOST_MEMBERS:
        return False
    return all(map(_MEMBER.fullmatch, members))


def _is_traceparent(text: str) -> bool:
    found = _TRACEPARENT.fullmatch(text)
    if found is None or found["version"] == "ff" or _is_zero(found["trace_id"]) or _is_zero(found["parent_id"]):
        return False
    return found["more"] is None or found["version"] != "00"  # later versions may have more fields


def _is_zero(digits: str) -> bool:
    return not digits.strip("0")


def _current_context() -> TraceContext | None:
    # A program that has not imported OpenTelemetry has no current span.
    opentelemetry: Any = sys.modules.get("opentelemetry.trace")
    if opentelemetry is None:
        return None
    try:
        span = opentelemetry.get_current_span().get_span_context()
        traceparent = f"00-{span.trace_id:032x}-{span.span_id:016x}-{span.trace_flags:02x}"
        return trace_of({"traceparent": traceparent, "tracestate": span.trace_state.to_header()})
    except Exception as error:  # a defect of the tracing must not cost an event
        logger.debug("cannot read OpenTelemetry's current context: %s", type(error).__name__)
        return None
