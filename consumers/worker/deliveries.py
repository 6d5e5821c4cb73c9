"""The delivery that a job carries, parsed within limits.

Anybody who can write to Redis can put any job into the queue. Only calls of our own job functions with one text are
accepted: nothing that a job names is imported, nothing of it is unpickled, and a job that is larger than any of ours is
not read.
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

# An event's text as a JSON string inside the call; every character of it can be six there.
_MAX_CALL_BYTES = 6 * MAX_EVENT_BYTES + 1000
# Of a job as Redis has it: what cannot be compressed becomes a little larger by that.
MAX_JOB_BYTES = _MAX_CALL_BYTES + _MAX_CALL_BYTES // 1000
# A document of this size, whatever it has in it, takes little memory. A larger one (48 MiB of brackets would take
# gigabytes) is looked at only when it has the one shape that is ours.
_ANY_CALL_BYTES = 64 * 1024
_LARGE_CALL = re.compile(
    rb"""\s*+\["(?P<function>[\w.]++)",\s*+null,\s*+\[(?P<text>"[^"\\]*+(?:\\.[^"\\]*+)*+")\],\s*+\{\}\]\s*+""",
    re.DOTALL,
)

POISON_CRASHES = 3
_WISHES = {
    "success_callback_name": "a callback",
    "failure_callback_name": "a callback",
    "stopped_callback_name": "a callback",
    "webhooks": "a webhook",
    "repeats_left": "repetitions",
    "rate_limit_key": "a rate limit",
}


class ReservedJob(NamedTuple):
    """A job as Redis has it.

    `state` is `usual`, `unreadable`, `oversized` or `gone`, or the field by which the job asks RQ for more than to be
    run. `data` is the call as RQ serialized it. `result_ttl` is the job's own setting in seconds, if it has one.
    """

    job_id: str
    state: str
    data: bytes
    result_ttl: int | None


class Delivery(NamedTuple):
    """One job's event as text and the model that it must fit, or the reason for refusing it without reading it."""

    job_id: str
    text: Any
    model: type[Event] | None
    refusal: HistoryError | None = None


def parse(job: ReservedJob, crashes: int = 0) -> Delivery:
    """Return the delivery that a job carries; `crashes` of it are counted. A job that is not ours is refused."""
    if crashes > POISON_CRASHES:  # refusing it crashed too: do not even read its text
        return Delivery(job.job_id, "", None, PoisonEvent(crashes))
    text: Any = ""
    try:
        text, model = _call(job)
        if job.state != "usual":
            raise RefusedJob(f"RQ is asked for more than to run it: {_WISHES.get(job.state, job.state)}")
    except RefusedJob as refusal:
        return Delivery(job.job_id, text, None, refusal)
    return Delivery(job.job_id, text, model, PoisonEvent(crashes) if crashes == POISON_CRASHES else None)


def unparsed(job: ReservedJob) -> Delivery:
    """Return a delivery of a job that `parse` fails on, with its text if it stands in the usual place."""
    try:
        text = json.loads(inflated(job.data))[2][0]
    except KeyboardInterrupt:
        raise
    except BaseException:
        text = ""
    return Delivery(job.job_id, text if isinstance(text, str) else "", None)


def _call(job: ReservedJob) -> tuple[Any, type[Event]]:
    """The argument of the call, of any type, and the model that it must fit. Raises RefusedJob."""
    if job.state == "unreadable":
        raise RefusedJob("its job cannot be read")
    if job.state == "oversized":
        raise OversizedJob.in_all(MAX_JOB_BYTES)
    function, instance, arguments, keywords = _parsed(job.data)
    kind = KINDS.of_job(function) if isinstance(function, str) else None
    if kind is None:
        name = f": {readable(function, 100)}" if isinstance(function, str) else ""
        raise RefusedJob(f"it names a function that is not one of ours{name}")
    if not isinstance(arguments, list) or len(arguments) != 1 or keywords or instance is not None:
        raise RefusedJob("it must have one argument, the event's text")
    return arguments[0], kind.model


def _parsed(data: bytes) -> tuple[Any, Any, Any, Any]:
    """RQ's four parts of a call: function, instance, arguments, keywords."""
    call = inflated(data)
    try:
        if len(call) <= _ANY_CALL_BYTES:
            function, instance, arguments, keywords = from_json(call)
        else:
            shape = _LARGE_CALL.fullmatch(call)
            if shape is None:
                raise RefusedJob("its data is large, and not the call of a function with one text")
            function, instance, arguments, keywords = (
                shape["function"].decode(), None, [from_json(shape["text"])], {}
            )  # fmt: skip
    except (TypeError, ValueError):
        raise RefusedJob("its data cannot be read as JSON") from None
    return function, instance, arguments, keywords


def inflated(data: bytes) -> bytes:
    """Return the call as RQ reads it, compressed or not, but within a limit. Raises RefusedJob."""
    if data.startswith(b"["):
        if len(data) > _MAX_CALL_BYTES:
            raise OversizedJob.in_all(MAX_JOB_BYTES)
        return data
    inflating = zlib.decompressobj()
    try:
        text = inflating.decompress(data, _MAX_CALL_BYTES)
    except zlib.error:
        raise RefusedJob("its data cannot be read as JSON") from None
    if inflating.unconsumed_tail:
        raise OversizedJob.in_all(MAX_JOB_BYTES)
    return text


def shown_call(data: bytes) -> bytes | None:
    """Return the call of a refused job for people to look at, or None if reading it could use up memory."""
    try:
        call = inflated(data)
    except OversizedJob:
        return None
    except RefusedJob:
        call = data
    return call if len(call) <= _ANY_CALL_BYTES or _LARGE_CALL.fullmatch(call) else None
