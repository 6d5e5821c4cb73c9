"""What a job asks for, read within limits: the calls of two functions with one text, and nothing else.

Whoever can write to Redis can put any job into the queue. Nothing that it names is imported, nothing of it is
unpickled, and what is larger than any job of ours is not read.
"""

from __future__ import annotations

import json
import re
import zlib
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, NamedTuple

from pydantic_core import from_json
from rq.job import Job, validate_job_id

from consumers.errors import OversizedJob, RefusedJob
from producers.events import KINDS, MAX_EVENT_BYTES, Event
from producers.fields import readable

# An event's text as a JSON string inside the call; every character of it can be six there.
_MAX_CALL_BYTES = 6 * MAX_EVENT_BYTES + 1000
# Of a job as Redis has it: what cannot be compressed becomes a little larger by that.
MAX_JOB_BYTES = _MAX_CALL_BYTES + _MAX_CALL_BYTES // 1000
# Of a job's other fields together: RQ's own take some hundred, and what is read as JSON may become thirty times larger.
MAX_BESIDE_BYTES = 64 * 1024
# A document of this size, whatever it has in it, takes little memory. A larger one (48 MiB of brackets would take
# gigabytes) is looked at only when it has the one shape that is ours.
_ANY_CALL_BYTES = 64 * 1024
_LARGE_CALL = re.compile(
    rb"""\s*+\["(?P<function>[\w.]++)",\s*+null,\s*+\[(?P<text>"[^"\\]*+(?:\\.[^"\\]*+)*+")\],\s*+\{\}\]\s*+""",
    re.DOTALL,
)


class ReservedJob(NamedTuple):
    """A job that is held now. `deaths` counts the holders that died with it alone; None for no suspect.

    `delays` counts how often it went to the tail since it alone timed out. `data` is what RQ calls so: the serialized
    call. `result_ttl` is the job's own wish in seconds, if it has one.
    """

    job_id: str
    deaths: int | None
    delays: int
    state: Literal["usual", "unusual", "unreadable", "oversized", "gone"]
    data: bytes
    result_ttl: int | None


@dataclass(frozen=True)
class Run:
    """One batch's run, as RQ tells it of a job."""

    worker: str
    started_at: datetime
    ended_at: datetime
    default_result_ttl: int

    def result_ttl_of(self, job: ReservedJob) -> int:
        """For how many seconds the job's result is to be kept; below 0: for ever."""
        return self.default_result_ttl if job.result_ttl is None else job.result_ttl


def read_call(reserved: ReservedJob) -> tuple[Any, type[Event]]:
    """The argument of the call, which may be anything yet, and the model that it must fit. Raises RefusedJob."""
    if reserved.state == "unreadable":
        raise RefusedJob("its job cannot be read")
    if reserved.state == "oversized":
        raise OversizedJob.in_all(MAX_JOB_BYTES)
    function, instance, arguments, keywords = _parsed(reserved.data)
    kind = KINDS.of_job(function) if isinstance(function, str) else None
    if kind is None:
        name = f": {readable(function, 100)}" if isinstance(function, str) else ""
        raise RefusedJob(f"it names a function that is not one of ours{name}")
    if not isinstance(arguments, list) or len(arguments) != 1 or keywords or instance is not None:
        raise RefusedJob("it must have one argument, the event's text")
    return arguments[0], kind.event


def text_in(reserved: ReservedJob) -> str:
    """The event's text if it can be had in the plainest way, else nothing; for a job that `read_call` fails on."""
    try:
        text = json.loads(inflated(reserved.data))[2][0]
    except KeyboardInterrupt:
        raise
    except BaseException:
        return ""
    return text if isinstance(text, str) else ""


def _parsed(data: bytes) -> tuple[Any, Any, Any, Any]:
    """What RQ calls function, instance, arguments and keywords."""
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
    """As RQ reads it, compressed or not, but not without limit. Raises RefusedJob."""
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
    """The call of a job that was refused, for those who look at it; None when to read it could harm them."""
    try:
        call = inflated(data)
    except OversizedJob:
        return None
    except RefusedJob:
        call = data
    return call if len(call) <= _ANY_CALL_BYTES or _LARGE_CALL.fullmatch(call) else None


class BoundedJob(Job):
    """A job that does not inflate without limit, and names only jobs as dependencies: RQ's own takes what it finds."""

    def restore(self, raw_data: Any) -> Any:
        for name in (b"data", b"exc_info"):
            try:
                inflated(raw_data.get(name, b"["))
            except OversizedJob:
                raise
            except RefusedJob:
                pass  # what is not compressed RQ takes as it is
        restored = super().restore(raw_data)
        # What is none of this RQ could read, but not write again.
        if not isinstance(self._dependency_ids, list):
            raise RefusedJob("its job cannot be read")
        for dependency_id in self._dependency_ids:
            validate_job_id(dependency_id)
        return restored


def check_wishes(job: Job | None) -> None:
    """Raises RefusedJob when the job asks for more than to be run."""
    if job is None:
        raise RefusedJob("its job cannot be read")
    if job._success_callback_name or job._failure_callback_name or job._stopped_callback_name or job.webhooks:
        raise RefusedJob("it has a callback or a webhook")
