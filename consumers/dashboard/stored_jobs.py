"""Jobs and workers as Redis has them, in whatever state: a harmed one is shown as far as it can be read.

RQ's own reading gives up on a whole page for one bad field, and takes what it cannot find out of the queue. Nothing
here changes anything, and no text is longer than what fits a page.
"""

from __future__ import annotations

import re
import zlib
from base64 import b64decode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import simplejson
from redis import Redis, ResponseError
from rq import Queue
from rq.job import Job
from rq.registry import (
    BaseRegistry,
    CanceledJobRegistry,
    DeferredJobRegistry,
    FailedJobRegistry,
    FinishedJobRegistry,
    ScheduledJobRegistry,
    StartedJobRegistry,
)
from rq.results import Result
from rq.serializers import JSONSerializer

REGISTRIES: Mapping[str, type[BaseRegistry]] = {
    "started": StartedJobRegistry,
    "finished": FinishedJobRegistry,
    "failed": FailedJobRegistry,
    "deferred": DeferredJobRegistry,
    "scheduled": ScheduledJobRegistry,
    "canceled": CanceledJobRegistry,
}
_MAX_CALL_BYTES = 16 * 1024 * 1024  # of a call, decompressed; the largest event has 8 MiB
_LINE, _PAGE = 300, 64 * 1024  # characters of what stands in a list, and of what has a page to itself

_NO_REASON = "no reason is kept"
# What RQ makes of a call whose sender described nothing: the event within quotes within quotes.
_CALL = re.compile(r"[\w.]+\(")

Fields = dict[str, bytes]


@dataclass(frozen=True)
class StoredJob:
    """One job. `fields` is empty when Redis has no job of this id; `harm` says why it cannot be read."""

    id: str
    fields: Fields
    result: Fields
    harm: str | None = None

    @property
    def exists(self) -> bool:
        return bool(self.fields) or self.harm is not None

    def text(self, name: str) -> str | None:
        value = self.fields.get(name)
        return None if not value else shown(value)

    @cached_property
    def call(self) -> tuple[str, Any] | None:
        """The function and its first argument; None when its data cannot be read as JSON."""
        try:
            function, _, arguments, _ = JSONSerializer.loads(_inflated(self.fields["data"]))
            return str(function), arguments[0] if arguments else None
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, RecursionError, zlib.error):
            return None

    @cached_property
    def event(self) -> dict[str, Any] | None:
        """The event's document, valid or not, its numbers as they were written."""
        text = self.call[1] if self.call else None
        try:
            document = simplejson.loads(text, use_decimal=True, allow_nan=True) if isinstance(text, str) else None
        except (ValueError, ArithmeticError, RecursionError):
            return None
        return document if isinstance(document, dict) else None

    @property
    def description(self) -> str:
        """What a person wants to read in a list."""
        if self.harm is not None or not self.fields:
            return self.harm or "Redis has no such job any more"
        told = self.text("description")
        if told is not None and not _CALL.match(told):
            return told[:_LINE]
        event = self.event or {}
        known = " · ".join(str(event[name]) for name in ("subject", "time") if name in event)
        return (known or (self.call[0] if self.call else "its data cannot be read as JSON"))[:_LINE]

    @property
    def error(self) -> str | None:
        """Why it failed last: a line, or a traceback. None when it did not fail, or goes through again."""
        if self.text("status") != "failed":
            return None
        try:
            return (
                _inflated(b64decode(self.result["exc_string"])).decode(errors="replace").strip()[-_PAGE:] or _NO_REASON
            )
        except (KeyError, ValueError, zlib.error):
            return "its failure cannot be read" if self.result else _NO_REASON

    @property
    def reason(self) -> str | None:
        """The last line of the error."""
        return self.error and self.error.splitlines()[-1][:2000]

    @property
    def return_value(self) -> str | None:
        try:
            return b64decode(self.result["return_value"]).decode(errors="replace")[:_LINE]
        except (KeyError, ValueError):
            return None


def shown(value: bytes) -> str:
    return value.decode(errors="backslashreplace")[:_PAGE]


def _inflated(data: bytes) -> bytes:
    """Compressed or not, as RQ writes both."""
    if data[:1] != b"\x78":
        return data[:_MAX_CALL_BYTES]
    return zlib.decompressobj().decompress(data, _MAX_CALL_BYTES)


def read_job(redis: Redis, job_id: str) -> StoredJob:
    return read_jobs(redis, [job_id.encode(errors="surrogateescape")])[0]


def read_jobs(redis: Redis, job_ids: Sequence[bytes]) -> list[StoredJob]:
    """Each with its newest result; one round trip for all."""
    with redis.pipeline(transaction=False) as pipe:
        for job_id in job_ids:
            pipe.hgetall(Job.redis_job_namespace_prefix.encode() + job_id)
            pipe.xrevrange(Result.get_key("").encode() + job_id, count=1)
        answers = pipe.execute(raise_on_error=False)
    return [_job(shown(one), *answers[2 * n : 2 * n + 2]) for n, one in enumerate(job_ids)]


def _job(job_id: str, found: Any, results: Any) -> StoredJob:
    for answer in (found, results):
        if isinstance(answer, Exception) and not isinstance(answer, ResponseError):
            raise answer
    result = {} if isinstance(results, Exception) or not results else _fields(results[0][1])
    if isinstance(found, Exception):
        return StoredJob(job_id, {}, result, "it is no hash, and cannot be read")
    return StoredJob(job_id, _fields(found), result)


def _fields(found: Mapping[bytes, bytes]) -> Fields:
    return {shown(name): value for name, value in found.items()}


def listed(
    redis: Redis, queue_name: str, registry_name: str, *, offset: int, count: int, newest_first: bool
) -> tuple[int, list[StoredJob]]:
    """How many jobs the queue or one of its registries has, and those of one page."""
    if registry_name == "queued":
        key = Queue.redis_queue_namespace_prefix + queue_name
        total, every = redis.llen(key), redis.lrange
    else:
        key = registry_key(queue_name, registry_name)
        total, every = redis.zcard(key), redis.zrange  # type: ignore[assignment]  # both take a range
    first = max(total - offset - count, 0) if newest_first else offset
    last = total - offset - 1 if newest_first else offset + count - 1
    found: list[bytes] = list(every(key, first, last)) if last >= 0 else []  # type: ignore[arg-type]  # not awaited
    if newest_first:
        found.reverse()
    # What is started is listed by job and execution.
    return total, read_jobs(redis, [one.split(b":")[0] for one in found] if registry_name == "started" else found)


def registry_key(queue_name: str, registry_name: str) -> str:
    return str(REGISTRIES[registry_name].key_template.format(queue_name))
