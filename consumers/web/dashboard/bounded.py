"""Hashes and results of jobs as Redis has them, but nothing of them that is larger than its reader wants.

The size is asked on the server, in the same step: a field of hundreds of megabytes never comes here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from redis import Redis

from consumers.errors import is_wrong_type

FIELD_BYTES = 4 * 1024  # of a name, a time or a description; RQ's own have some hundred
PAGE_BYTES = 64 * 1024  # of what has a page to itself

# KEYS a hash; ARGV names of fields, each with the bytes it may have. Its length, then for each field its value, or its
# size when that is more.
_FIELDS = """
local found = {redis.call('HLEN', KEYS[1])}
for n = 1, #ARGV, 2 do
    local size = redis.call('HSTRLEN', KEYS[1], ARGV[n])
    if size > tonumber(ARGV[n + 1]) then
        found[#found + 1] = size
    else
        found[#found + 1] = redis.call('HGET', KEYS[1], ARGV[n])
    end
end
return found
"""

# KEYS results of a job; ARGV bytes. Names and values of the newest, without what has more bytes.
_NEWEST = """
local newest = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1]
local found = {}
for n = 1, newest and #newest[2] or 0, 2 do
    if #newest[2][n] + #newest[2][n + 1] <= tonumber(ARGV[1]) then
        found[#found + 1] = newest[2][n]
        found[#found + 1] = newest[2][n + 1]
    end
end
return found
"""

# KEYS a hash; ARGV bytes, names. Every field but these, of which only whether they are there; false when the others
# have more bytes together.
_WITHOUT = """
if redis.call('HLEN', KEYS[1]) > 1000 then return false end
local left, bytes, found = {}, 0, {}
for n = 2, #ARGV do left[ARGV[n]] = true end
for _, name in ipairs(redis.call('HKEYS', KEYS[1])) do
    bytes = bytes + #name + (left[name] and 0 or redis.call('HSTRLEN', KEYS[1], name))
    if bytes > tonumber(ARGV[1]) then return false end
    found[#found + 1] = name
    found[#found + 1] = left[name] and '' or redis.call('HGET', KEYS[1], name)
end
return found
"""


@dataclass(frozen=True)
class StoredHash:
    """What was asked for of it. `oversized` has the bytes of each field that was too large to be read."""

    exists: bool
    fields: Mapping[str, bytes] = field(default_factory=dict)
    oversized: Mapping[str, int] = field(default_factory=dict)


def read_hashes(
    redis: Redis, keys: Sequence[bytes], limits: Mapping[str, int], *, results: Sequence[bytes] = ()
) -> tuple[list[StoredHash | None], list[Mapping[str, bytes]]]:
    """Each hash, None for what is none; and the newest of each stream of results. One round trip for all.

    `limits` has the bytes that each wanted field may have.
    """
    fields, newest = redis.register_script(_FIELDS), redis.register_script(_NEWEST)
    wanted = [part for limit in limits.items() for part in limit]
    with redis.pipeline(transaction=False) as pipe:
        for key in keys:
            fields(keys=[key], args=wanted, client=pipe)
        for key in results:
            newest(keys=[key], args=[PAGE_BYTES], client=pipe)
        answers = pipe.execute(raise_on_error=False)
    for answer in answers:
        if isinstance(answer, Exception) and not is_wrong_type(answer):
            raise answer
    hashes, streams = answers[: len(keys)], answers[len(keys) :]
    return [_hash(one, limits) for one in hashes], [_pairs(one) for one in streams]


def read_hash(redis: Redis, key: bytes, limits: Mapping[str, int]) -> StoredHash | None:
    """None for what is no hash."""
    return read_hashes(redis, [key], limits)[0][0]


def _hash(answer: Any, limits: Mapping[str, int]) -> StoredHash | None:
    if isinstance(answer, Exception):
        return None
    found = dict(zip(limits, answer[1:], strict=True))
    return StoredHash(
        answer[0] > 0,
        {name: value for name, value in found.items() if isinstance(value, bytes)},
        {name: value for name, value in found.items() if isinstance(value, int)},
    )


def _pairs(answer: Any) -> dict[str, bytes]:
    if isinstance(answer, Exception):
        return {}
    names = (name.decode(errors="backslashreplace") for name in answer[::2])
    return dict(zip(names, answer[1::2], strict=True))


def read_without(redis: Redis, key: str, *names: str) -> dict[bytes, bytes] | None:
    """The whole hash, but these fields empty; None when it has more than PAGE_BYTES all the same."""
    found: Any = redis.register_script(_WITHOUT)(keys=[key], args=[PAGE_BYTES, *names])
    return None if found is None else dict(zip(found[::2], found[1::2], strict=True))
