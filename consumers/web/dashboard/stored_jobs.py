"""Jobs as Redis has them, in whatever state: a harmed one is shown as far as it can be read.

RQ's own reading gives up on a whole page for one bad field, and takes what it cannot find out of the queue. Nothing
here changes anything, and nothing is read that is too large to be shown.
"""

from __future__ import annotations

import zlib
from base64 import b64decode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from redis import Redis
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

from consumers.web.dashboard.bounded import FIELD_BYTES, PAGE_BYTES, StoredHash, read_hashes
from consumers.worker.deliveries import MAX_JOB_BYTES

REGISTRIES: Mapping[str, type[BaseRegistry]] = {
    "started": StartedJobRegistry,
    "finished": FinishedJobRegistry,
    "failed": FailedJobRegistry,
    "deferred": DeferredJobRegistry,
    "scheduled": ScheduledJobRegistry,
    "canceled": CanceledJobRegistry,
}
LINE = 300  # characters of what stands in a list
_MAX_ERROR_BYTES = 1024 * 1024  # of an error, decompressed; its end is what counts
_SHOWN = ("status", "origin", "description", "created_at", "enqueued_at", "started_at", "ended_at", "worker_name")

_NO_REASON = "no reason is kept"


@dataclass(frozen=True)
class StoredJob:
    """One job, as far as it is shown. `harm` says why it cannot be read at all."""

    id: str
    stored: StoredHash
    result: Mapping[str, bytes] = field(default_factory=dict)
    harm: str | None = None

    @property
    def exists(self) -> bool:
        return self.stored.exists or self.harm is not None

    def text(self, name: str) -> str | None:
        if name in self.stored.oversized:
            return f"{self.stored.oversized[name]:,} bytes, too many to be shown"
        value = self.stored.fields.get(name)
        return None if not value else shown(value)

    @property
    def error(self) -> str | None:
        """Why it failed last: a line, or a traceback. None when it did not fail, or goes through again."""
        if self.text("status") != "failed":
            return None
        try:
            text = opening(b64decode(self.result["exc_string"]), _MAX_ERROR_BYTES)
            return text.decode(errors="replace").strip()[-PAGE_BYTES:] or _NO_REASON
        except (KeyError, ValueError, zlib.error):
            return "its failure cannot be read" if self.result else _NO_REASON

    @property
    def reason(self) -> str | None:
        """The last line of the error."""
        return self.error and self.error.splitlines()[-1][:2000]

    @property
    def return_value(self) -> str | None:
        try:
            return b64decode(self.result["return_value"]).decode(errors="replace")[:LINE]
        except (KeyError, ValueError):
            return None


def shown(value: bytes) -> str:
    return value[:PAGE_BYTES].decode(errors="backslashreplace")


def opening(data: bytes, most: int) -> bytes:
    """So many bytes at most of what is compressed or not, as RQ writes both. Raises zlib.error."""
    return data[:most] if data[:1] != b"\x78" else zlib.decompressobj().decompress(data, most)


def read_job(redis: Redis, job_id: str, *, data_bytes: int = MAX_JOB_BYTES) -> StoredJob:
    """With its call, if it has no more bytes than that."""
    return _read_jobs(redis, [job_id.encode(errors="surrogateescape")], data_bytes)[0]


def _read_jobs(redis: Redis, job_ids: Sequence[bytes], data_bytes: int) -> list[StoredJob]:
    """Each with its newest result."""
    keys = [Job.redis_job_namespace_prefix.encode() + job_id for job_id in job_ids]
    streams = [Result.get_key("").encode() + job_id for job_id in job_ids]
    limits = dict.fromkeys(_SHOWN, FIELD_BYTES) | {"data": data_bytes}
    hashes, results = read_hashes(redis, keys, limits, results=streams)
    harm = "it is no hash, and cannot be read"
    return [
        StoredJob(shown(job_id), one or StoredHash(False), result, None if one else harm)
        for job_id, one, result in zip(job_ids, hashes, results, strict=True)
    ]


def listed(
    redis: Redis, queue_name: str, registry_name: str, *, offset: int, count: int, newest_first: bool
) -> tuple[int, list[StoredJob]]:
    """How many jobs the queue or one of its registries has, and those of one page, without large calls."""
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
    job_ids = [one.split(b":")[0] for one in found] if registry_name == "started" else found
    return total, _read_jobs(redis, job_ids, PAGE_BYTES)


def registry_key(queue_name: str, registry_name: str) -> str:
    return str(REGISTRIES[registry_name].key_template.format(queue_name))
