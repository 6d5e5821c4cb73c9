"""Classification of Redis errors: no answer, an outage, a key of the wrong type, a value that cannot be sent."""

from __future__ import annotations

from redis.exceptions import AuthenticationError, DataError, RedisError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from consumers.errors import StoreUnavailable, first_line
from producers.errors import SettingsError
from producers.redis_url import is_forbidden

CHECK_REDIS = "check that Redis runs, and host and port in REDIS_URL"


def redis_problem(error: RedisError) -> str:
    """Return in one line what failed and what to do about it, as far as that is known."""
    if isinstance(error, AuthenticationError):
        advice = "correct user and password in REDIS_URL"
    elif is_unreachable(error):
        advice = CHECK_REDIS
    else:
        return first_line(error)
    return f"{first_line(error).rstrip('.')}: {advice}"


def is_unreachable(error: Exception) -> bool:
    """Return whether Redis did not answer at all: the next command would probably time out too."""
    return isinstance(error, RedisConnectionError | RedisTimeoutError)


def is_wrong_type(error: object) -> bool:
    """Return whether a Redis command or script failed because a key has the wrong type."""
    return isinstance(error, RedisError) and "WRONGTYPE" in str(error)


def is_redis_outage(error: BaseException) -> bool:
    """Return whether Redis itself failed.

    False for a key of the wrong type, a value that redis-py cannot encode, and a command that this user may not run.
    """
    if not isinstance(error, RedisError) or isinstance(error, DataError):
        return False
    return not is_wrong_type(error) and not is_forbidden(error)


def is_caused_by_job(error: BaseException) -> bool:
    """Return whether the job caused the error. False for a server failure, a missing setting or Ctrl-C."""
    if isinstance(error, RedisError):
        return isinstance(error, DataError)
    return not isinstance(error, StoreUnavailable | SettingsError | KeyboardInterrupt)
