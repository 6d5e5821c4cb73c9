"""What a stored job asks for, as far as it is worth its memory: parsed for one line or one page, and not kept.

A few kilobytes can become gigabytes of nested lists. What is large is parsed only as a worker would, in the one shape
that is ours.
"""

from __future__ import annotations

import re
import zlib
from typing import Any, NamedTuple

import simplejson
from rq.serializers import JSONSerializer

from consumers.errors import RefusedJob
from consumers.web.dashboard.stored_jobs import LINE, StoredJob, opening
from consumers.worker.deliveries import ReservedJob, _call

_SMALL_BYTES = 64 * 1024
_FUNCTION = re.compile(rb'\s*\["([\w.]{1,200})"')
# What RQ makes of a call whose sender described nothing: the event within quotes within quotes.
_CALL = re.compile(r"[\w.]+\(")
_UNREADABLE = "its data cannot be read as JSON"
# Lists, objects and members of an event: an archive of ours has fewer, and each can take some hundred bytes.
_MAX_PIECES = 1_000_000


class Call(NamedTuple):
    """`harm` says why there is no argument; the function may be known all the same."""

    function: str | None
    argument: Any = None
    harm: str | None = None


def call_of(job: StoredJob, *, whole: bool) -> Call:
    """The function and its first argument; of a large call only the function unless it is wanted as a `whole`."""
    if size := job.stored.oversized.get("data"):
        return Call(None, harm=f"its data has {size:,} bytes")
    data = job.stored.fields.get("data", b"")
    try:
        start = opening(data, _SMALL_BYTES + 1)
        if len(start) <= _SMALL_BYTES:
            function, _, arguments, _ = JSONSerializer.loads(start)
            return Call(str(function), arguments[0] if arguments else None)
    except (IndexError, KeyError, TypeError, ValueError, RecursionError, zlib.error):
        return Call(None, harm=_UNREADABLE)
    named = _FUNCTION.match(start)
    function = named and named[1].decode(errors="replace")
    if not whole:
        return Call(function, harm="its data is large")
    try:
        return Call(function, _call(ReservedJob(job.id, None, 0, "usual", data, None))[0])
    except RefusedJob as refusal:
        return Call(function, harm=str(refusal))


def event_of(call: Call) -> dict[str, Any] | None:
    """The event's document, valid or not, its numbers as they were written."""
    text = call.argument
    if not isinstance(text, str) or sum(map(text.count, "[{,")) > _MAX_PIECES:
        return None
    try:
        document = simplejson.loads(text, use_decimal=True, allow_nan=True)
    except (ValueError, ArithmeticError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def line_of(job: StoredJob) -> str:
    """What a person wants to read in a list."""
    if told := _told(job):
        return told
    call = call_of(job, whole=False)
    return title_of(job, call, event_of(call))


def title_of(job: StoredJob, call: Call, event: dict[str, Any] | None) -> str:
    """The same of a job that is parsed already."""
    if told := _told(job):
        return told
    known = " · ".join(str(event[name]) for name in ("subject", "time") if name in event) if event else ""
    return (known or call.function or call.harm or _UNREADABLE)[:LINE]


def _told(job: StoredJob) -> str | None:
    if not job.stored.exists:
        return job.harm or "Redis has no such job any more"
    told = None if "description" in job.stored.oversized else job.text("description")
    return None if told is None or _CALL.match(told) else told[:LINE]
