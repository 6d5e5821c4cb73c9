"""What somebody has put in the place of a key that the workers need: moved away, told of, and done without.

Such a key holds nothing of ours any more; what it stood for is found again or was of use for a moment only.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Literal

from redis import Redis, RedisError
from redis.exceptions import DataError

from consumers.errors import StoreUnavailable
from producers.errors import SettingsError

logger = logging.getLogger(__name__)

Kind = Literal["list", "hash", "zset"]

# KEYS; ARGV the type that each should have. Those that were moved.
_PUT_ASIDE = """
local moved = {}
for n, key in ipairs(KEYS) do
    local kind = redis.call('TYPE', key).ok
    if kind ~= 'none' and kind ~= ARGV[n] then
        redis.call('RENAME', key, key .. ':harmed')
        moved[#moved + 1] = key
    end
end
return moved
"""


def is_wrong_type(error: object) -> bool:
    """A command met a key of another type; a script's error has more words around that one."""
    return isinstance(error, RedisError) and "WRONGTYPE" in str(error)


def is_redis_trouble(error: BaseException) -> bool:
    """It is the server's, and may pass; not what somebody put there, nor what redis-py would not even send."""
    return isinstance(error, RedisError) and not isinstance(error, DataError) and not is_wrong_type(error)


def is_caused_by_job(error: BaseException) -> bool:
    """Whether processing a job raised `error`, and not an outage of a server, a missing setting or Ctrl-C."""
    if isinstance(error, RedisError):
        return not is_redis_trouble(error) and not is_wrong_type(error)
    return not isinstance(error, StoreUnavailable | SettingsError | KeyboardInterrupt)


def put_aside(redis: Redis, kinds: Mapping[str, Kind]) -> list[str]:
    """Rename each key that is not of its type to `...:harmed`; those keys.

    Raises:
        RedisError: Redis cannot be asked now.
    """
    found: Any = redis.eval(_PUT_ASIDE, len(kinds), *kinds, *kinds.values())
    moved = [key.decode(errors="replace") for key in found]
    for key in moved:
        logger.error("somebody has put something else in the place of %s: moved to %s:harmed", key, key)
    return moved
