"""Parsing of jobs into deliveries, within limits of memory.

Any client of Redis can put any job into the queue. Only a call of one of our job functions, with one text as its
argument, is accepted. The parser imports nothing that a job names and unpickles nothing, and it does not read a job
that is larger than any of ours can be.
"""

from __future__ import annotations

import json
import re
import zlib
from typing import Any, NamedTuple

from pydantic_core import from_json

from consumers.errors import OversizedJob, PoisonEvent, RefusedJob
from producers.errors import HistoryError
from producers.events import KINDS, MAX_EVENT_BYTES, Event
from producers.fields import readable

# The call holds the event's text as a JSON string, where a character can become an escape of six.
_MAX_CALL_BYTES = 6 * MAX_EVENT_BYTES + 1000
# Of a job's data in Redis: compression makes incompressible data a little larger.
MAX_JOB_BYTES = _MAX_CALL_BYTES + _MAX_CALL_BYTES // 1000
# Any JSON document up to this size takes little memory. A larger one is parsed only if it has the form of our calls:
# 48 MiB of brackets would take gigabytes.
_UNCHECKED_CALL_BYTES = 64 * 1024
_LARGE_CALL = re.compile(
    rb"""\s*+\["(?P<function>[\w.]++)",\s*+null,\s*+\[(?P<text>"[^"\\]*+(?:\\.[^"\\]*+)*+")\],\s*+\{\}\]\s*+""",
    re.DOTALL,
)

POISON_CRASHES = 3
_UNSUPPORTED = {
    "success_callback_name": "a callback",
    "failure_callback_name": "a callback",
    "stopped_callback_name": "a callback",
    "webhooks": "a webhook",
    "repeats_left": "repetitions",
    "rate_limit_key": "a rate limit",
}


class ReservedJob(NamedTuple):
    """A job that a worker thread has reserved.

    `state` is `usual`, `unreadable`, `oversized` or `deleted`, or the name of the field that makes the job unsupported.
    `data` is the call as RQ serialized it. `result_ttl` is the job's own setting in seconds, if it has one.
    """

    job_id: str
    state: str
    data: bytes
    result_ttl: int | None


class Delivery(NamedTuple):
    """The event of one job: its text, and the model that validates it.

    `error` is the reason to reject it unread.
    """

    job_id: str
    text: Any
    model: type[Event] | None
    error: HistoryError | None = None


def parse_job(job: ReservedJob, crashes: int = 0) -> Delivery:
    """Return the delivery that a job carries, with an error if the job is not ours or has crashed workers.

    `crashes` is the number of crashes counted against the job.
    """
    if crashes > POISON_CRASHES:  # rejecting it crashed too: do not even read its text
        return Delivery(job.job_id, "", None, PoisonEvent(crashes))
    text: Any = ""
    try:
        text, model = _call(job)
        if job.state != "usual":
            raise RefusedJob(f"its job asks RQ for {_UNSUPPORTED.get(job.state, job.state)}, which is not supported")
    except RefusedJob as error:
        return Delivery(job.job_id, text, None, error)
    return Delivery(job.job_id, text, model, PoisonEvent(crashes) if crashes == POISON_CRASHES else None)


def unreadable_delivery(job: ReservedJob) -> Delivery:
    """Return the delivery of a job that `parse_job` fails on, with the first argument of its call if that is a text."""
    try:
        text = json.loads(decompressed_call(job.data))[2][0]
    except KeyboardInterrupt:
        raise
    except BaseException:
        text = ""
    return Delivery(job.job_id, text if isinstance(text, str) else "", None)


def _call(job: ReservedJob) -> tuple[Any, type[Event]]:
    """Return the argument of the call, of any type, and the model for it. Raises RefusedJob."""
    if job.state == "unreadable":
        raise RefusedJob("its job cannot be read")
    if job.state == "oversized":
        raise OversizedJob(MAX_JOB_BYTES)
    function, instance, arguments, keywords = _split_call(job.data)
    kind = KINDS.of_job(function) if isinstance(function, str) else None
    if kind is None:
        name = f": {readable(function, 100)}" if isinstance(function, str) else ""
        raise RefusedJob(f"it names a function that is not one of ours{name}")
    if not isinstance(arguments, list) or len(arguments) != 1 or keywords or instance is not None:
        raise RefusedJob("it must have one argument, the event's text")
    return arguments[0], kind.model


def _split_call(data: bytes) -> tuple[Any, Any, Any, Any]:
    """Return the four parts of RQ's call: function, instance, arguments, keywords. Raises RefusedJob."""
    call = decompressed_call(data)
    try:
        if len(call) <= _UNCHECKED_CALL_BYTES:
            function, instance, arguments, keywords = from_json(call)
        else:
            parts = _LARGE_CALL.fullmatch(call)
            if parts is None:
                raise RefusedJob(
                    "its call is larger than 64 KiB and does not have the form [function, null, [text], {}]"
                )
            function, instance, arguments, keywords = (
                parts["function"].decode(), None, [from_json(parts["text"])], {}
            )  # fmt: skip
    except (TypeError, ValueError):
        raise RefusedJob("its data cannot be read as JSON") from None
    return function, instance, arguments, keywords


def decompressed_call(data: bytes) -> bytes:
    """Return the call, decompressed if it is compressed. Raises RefusedJob, or OversizedJob beyond the limit."""
    if data.startswith(b"["):
        if len(data) > _MAX_CALL_BYTES:
            raise OversizedJob(MAX_JOB_BYTES)
        return data
    decompressor = zlib.decompressobj()
    try:
        text = decompressor.decompress(data, _MAX_CALL_BYTES)
    except zlib.error:
        raise RefusedJob("its data cannot be read as JSON") from None
    if decompressor.unconsumed_tail:
        raise OversizedJob(MAX_JOB_BYTES)
    return text


def displayable_call(data: bytes) -> bytes | None:
    """Return the call of a rejected job for RQ's dashboards, or None if parsing it could exhaust their memory."""
    try:
        call = decompressed_call(data)
    except OversizedJob:
        return None
    except RefusedJob:
        call = data
    return call if len(call) <= _UNCHECKED_CALL_BYTES or _LARGE_CALL.fullmatch(call) else None
