"""Memory of Redis, and of the keys of this project and of its jobs in RQ.

The work is bounded: the size of many jobs is estimated from a sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from redis import Redis, RedisError, ResponseError
from rq import Queue
from rq.job import Job
from rq.results import Result
from rq.serializers import JSONSerializer

from consumers.ops.redis_errors import is_wrong_type
from producers.redis_keys import acknowledgement_key, owners_key, reserved_key
from producers.redis_url import redis_reason
from producers.settings import TransportSettings

_SAMPLED_JOBS = 20  # of each state
_SAMPLED_ITEMS = 100  # of a large key
_MOST_OWNERS = 100
_MOST_SOURCES = 100
_FEW_KEYS = 10_000  # in a larger database, the keys of the acknowledgements are not searched
_SCANNED_KEYS = 1000


@dataclass(frozen=True)
class RedisMemory:
    """Memory in bytes. `max_bytes` is None if there is no limit, `used_bytes` and `key_bytes` if they are not known.

    `key_bytes` has `queue`, `jobs` (waiting, reserved, finished and failed ones with their results), `registries`,
    `reservations` and `acknowledgements`; None for one that is not known. `not_read` says why.
    """

    used_bytes: int | None = None
    max_bytes: int | None = None
    key_bytes: dict[str, int | None] | None = None
    not_read: dict[str, str] = field(default_factory=dict)


def redis_memory_of_settings() -> RedisMemory | None:
    """Read the memory of the Redis of the settings. Returns None without REDIS_URL.

    Raises:
        RedisError: Redis cannot be read now.
        SettingsError: a setting is invalid.
    """
    settings = TransportSettings.from_environment()
    if settings.redis_url is None:
        return None
    with settings.redis() as redis:
        return read_memory(redis, settings.queue)


def read_memory(redis: Redis, name: str) -> RedisMemory:
    """Read the memory in a few round trips. A forbidden command is named in `not_read`.

    Raises:
        RedisError: Redis cannot be read now.
    """
    not_read: dict[str, str] = {}
    used, most, sizes = None, None, None
    try:
        info: Any = redis.info("memory")
        used, most = info.get("used_memory"), info.get("maxmemory") or None
    except ResponseError as error:
        not_read["Redis memory"] = redis_reason(error)
    try:
        sizes = _key_bytes(redis, Queue(name, connection=redis, serializer=JSONSerializer))
    except ResponseError as error:
        not_read["Redis keys"] = redis_reason(error)
    return RedisMemory(used, most, sizes, not_read)


def _key_bytes(redis: Redis, queue: Queue) -> dict[str, int | None]:
    """Return the bytes by group of keys. Raises ResponseError if a command is forbidden."""
    (queue_bytes,) = _sizes(redis, [queue.key])  # first, because servers that forbid a command forbid this one
    registries = [queue.failed_job_registry.key, queue.finished_job_registry.key]
    waiting, failed, finished, owners = _answers(
        redis, [("LLEN", queue.key), *(("ZCARD", key) for key in registries), ("HKEYS", owners_key(queue.name))]
    )
    lists = [reserved_key(queue.name, _text(owner)) for owner in (owners or ())[:_MOST_OWNERS]]
    lengths = _answers(redis, [("LLEN", key) for key in lists])
    too_many = owners is None or len(owners) > _MOST_OWNERS or None in lengths
    reserved = None if too_many else sum(lengths)
    filled = [key for key, length in zip(lists, lengths, strict=True) if length]
    jobs = [
        _jobs(redis, waiting, [("LINDEX", queue.key, place) for place in _places(waiting)]),
        _jobs(redis, reserved, [("LINDEX", key, 0) for key in filled[:_SAMPLED_JOBS]]),
        *(
            _jobs(redis, count, [("ZRANGE", key, place, place) for place in _places(count)])
            for key, count in zip(registries, (failed, finished), strict=True)
        ),
    ]
    return {
        "queue": queue_bytes,
        "jobs": _sum(jobs),
        "registries": _sum(_sizes(redis, registries)),
        "reservations": None if too_many else _sum(_sizes(redis, lists)),
        "acknowledgements": _acknowledgements(redis),
    }


def _jobs(redis: Redis, count: int | None, samples: Sequence[tuple[Any, ...]]) -> int | None:
    """Return the estimated bytes of `count` jobs; the commands of `samples` return the ids of some of them."""
    if not count:
        return count
    found = [one[0] if isinstance(one, list) and one else one for one in _answers(redis, samples)]
    ids = [_text(one) for one in found if isinstance(one, bytes)]
    if not ids:
        return None
    # All fields are measured: one of them, the event, is much larger than the others.
    keys = [key for job_id in ids for key in (Job.key_for(job_id), Result.get_key(job_id))]  # type: ignore[no-untyped-call]  # RQ's annotations are incomplete
    total = _sum(_sizes(redis, keys, items=0))
    return None if total is None else round(count * total / len(ids))


def _places(count: int | None) -> list[int]:
    """Return positions that are spread over a list of this length."""
    if not count:
        return []
    sampled = min(count, _SAMPLED_JOBS)
    return [number * count // sampled for number in range(sampled)]


def _acknowledgements(redis: Redis) -> int | None:
    """Return the bytes of all acknowledgements; None if there are too many keys to search for them."""
    (count,) = _answers(redis, [("DBSIZE",)])
    if count is None or count > _FEW_KEYS:
        return None
    prefix, cursor, keys = acknowledgement_key(""), 0, list[str]()
    for _ in range(2 * _FEW_KEYS // _SCANNED_KEYS):
        cursor, page = redis.scan(cursor, count=_SCANNED_KEYS)
        keys += [key for key in map(_text, page) if key.startswith(prefix)]
        if cursor == 0:
            break
    keys = sorted(set(keys))
    return None if cursor != 0 or len(keys) > _MOST_SOURCES else _sum(_sizes(redis, keys))


def _sizes(redis: Redis, keys: Sequence[str], *, items: int = _SAMPLED_ITEMS) -> list[int | None]:
    """Return the bytes of each key, 0 if it does not exist, estimated from `items` of its items; 0 means all."""
    return [size or 0 for size in _answers(redis, [("MEMORY USAGE", key, "SAMPLES", items) for key in keys])]


def _answers(redis: Redis, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Run the commands in one round trip. The reply of a key of the wrong type is None. Raises RedisError."""
    if not commands:
        return []
    with redis.pipeline(transaction=False) as pipe:
        for command in commands:
            pipe.execute_command(*command)  # type: ignore[no-untyped-call]  # redis-py's annotations are incomplete
        replies: list[Any] = pipe.execute(raise_on_error=False)
    for reply in replies:
        if isinstance(reply, RedisError) and not is_wrong_type(reply):
            raise reply
    return [None if isinstance(reply, RedisError) else reply for reply in replies]


def _sum(numbers: Iterable[int | None]) -> int | None:
    listed = list(numbers)
    return None if None in listed else sum(number or 0 for number in listed)


def _text(value: bytes | str) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value
