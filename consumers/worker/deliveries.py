"""Parsing of jobs into deliveries, within limits of memory.

Any client of Redis can put any job into the queue. Only a call of one of our job functions, with one text as its
argument, is accepted; every other job is unsupported and is rejected. The parser imports nothing that a job names,
unpickles nothing, and does not read a job that is larger than any of ours can be.
"""

from __future__ import annotations

import json
import re
import zlib
from typing import Any, NamedTuple

from pydantic_core import from_json

from consumers.errors import OversizedJob, PoisonEvent, UnsupportedJob
from producers.errors import HistoryError
from producers.events import KINDS, MAX_EVENT_BYTES, Event, encode
from producers.fields import readable

# In the call, the event's text is a JSON string, where one character can become an escape of six.
_MAX_CALL_BYTES = 6 * MAX_EVENT_BYTES + 1000
# A job's data in Redis may be a little larger, since compression can make it longer.
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
    """The event of one job: its text, and the model that validates it. If `error` is set, it is rejected unread.

    A caller that has made the event itself passes it as `event`: it is not decoded again. `text` may then be empty.
    """

    job_id: str
    text: Any
    model: type[Event] | None
    error: HistoryError | None = None
    event: Event | None = None

    @property
    def event_text(self) -> Any:
        """The text, which may be anything if it comes from a job; of a passed event, the text that encodes it."""
        return self.text if self.text or self.event is None else encode(self.event)


def parse_job(job: ReservedJob, crashes: int = 0) -> Delivery:
    """Return the delivery that a job carries, with an error if the job is unsupported or has crashed workers.

    `crashes` is the number of crashes counted against the job.
    """
    if crashes > POISON_CRASHES:  # rejecting it has crashed a worker too: do not even read its text
        return Delivery(job.job_id, "", None, PoisonEvent(crashes))
    text: Any = ""
    try:
        text, model = _call(job)
        if job.state != "usual":
            raise UnsupportedJob(f"it asks RQ for {_UNSUPPORTED.get(job.state, job.state)}, which is not supported")
    except UnsupportedJob as error:
        return Delivery(job.job_id, text, None, error)
    return Delivery(job.job_id, text, model, PoisonEvent(crashes) if crashes == POISON_CRASHES else None)


def unreadable_delivery(job: ReservedJob) -> Delivery:
    """Return a delivery for a job that `parse_job` fails on; its text is the first argument if that is text."""
    try:
        text = json.loads(decompressed_call(job.data))[2][0]
    except KeyboardInterrupt:
        raise
    except BaseException:
        text = ""
    return Delivery(job.job_id, text if isinstance(text, str) else "", None)


def _call(job: ReservedJob) -> tuple[Any, type[Event]]:
    """Return the argument of the call, of any type, and the model for it. Raises UnsupportedJob."""
    if job.state == "unreadable":
        raise UnsupportedJob("it cannot be read")
    if job.state == "oversized":
        raise OversizedJob(MAX_JOB_BYTES)
    function, instance, arguments, keywords = _split_call(job.data)
    kind = KINDS.of_job(function) if isinstance(function, str) else None
    if kind is None:
        name = f": {readable(function, 100)}" if isinstance(function, str) else ""
        raise UnsupportedJob(f"it calls a function other than our job functions{name}")
    if not isinstance(arguments, list) or len(arguments) != 1 or keywords or instance is not None:
        raise UnsupportedJob("its call must have one argument, the event's text")
    return arguments[0], kind.model


def _split_call(data: bytes) -> tuple[Any, Any, Any, Any]:
    """Return the four parts of RQ's call: function, instance, arguments, keywords. Raises UnsupportedJob."""
    call = decompressed_call(data)
    try:
        if len(call) <= _UNCHECKED_CALL_BYTES:
            function, instance, arguments, keywords = from_json(call)
        else:
            parts = _LARGE_CALL.fullmatch(call)
            if parts is None:
                raise UnsupportedJob(
                    "its call is larger than 64 KiB and does not have the form [function, null, [text], {}]"
                )
            function, instance, arguments, keywords = (
                parts["function"].decode(), None, [from_json(parts["text"])], {}
            )  # fmt: skip
    except (TypeError, ValueError):
        raise UnsupportedJob("its data cannot be read as JSON") from None
    return function, instance, arguments, keywords


def decompressed_call(data: bytes) -> bytes:
    """Return the call, decompressed if it is compressed. Raises UnsupportedJob, or OversizedJob beyond the limit."""
    if data.startswith(b"["):
        if len(data) > _MAX_CALL_BYTES:
            raise OversizedJob(MAX_JOB_BYTES)
        return data
    decompressor = zlib.decompressobj()
    try:
        text = decompressor.decompress(data, _MAX_CALL_BYTES)
    except zlib.error:
        raise UnsupportedJob("its data cannot be read as JSON") from None
    if decompressor.unconsumed_tail:
        raise OversizedJob(MAX_JOB_BYTES)
    return text


def displayable_call(data: bytes) -> bytes | None:
    """Return the call of a rejected job for RQ's dashboards, or None if parsing it could exhaust their memory."""
    try:
        call = decompressed_call(data)
    except OversizedJob:
        return None
    except UnsupportedJob:
        call = data
    return call if len(call) <= _UNCHECKED_CALL_BYTES or _LARGE_CALL.fullmatch(call) else None
