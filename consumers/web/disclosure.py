"""Error texts for users of the API and of the page, without details of the servers.

Driver errors name hosts, users and files. They go to the log only, under a reference that the answer contains.
"""

from __future__ import annotations

import logging
import secrets
from hashlib import blake2b

from redis import RedisError
from sqlalchemy.exc import DBAPIError

from consumers.errors import StoreUnavailable, first_line
from producers.errors import OutboxError, SettingsError

logger = logging.getLogger(__name__)

Unreadable = StoreUnavailable | RedisError | OutboxError | SettingsError | TimeoutError

_NO_SUCH_TABLE = "42P01"
# Within a process, the same reason has the same reference: a repeated request does not look like a new problem.
# Without the key, a client could guess a reason and check the guess against the reference.
_KEY = secrets.token_bytes(16)


def disclosed(error: Unreadable) -> str:
    """Log `error` in full, and return a text without details that ends with the reference of the log line."""
    reason = f"{type(error).__name__}: {first_line(error) if isinstance(error, RedisError) else error}"
    reference = blake2b(reason.encode("utf-8", "replace"), key=_KEY, digest_size=4).hexdigest()
    logger.warning("a read failed (reference %s): %s", reference, reason)
    return f"{_summary(error)} The API's log has the reason (reference {reference})."


def _summary(error: Unreadable) -> str:
    if isinstance(error, RedisError):
        return "Redis cannot be read now."
    if isinstance(error, OutboxError):
        return "The outbox cannot be read now."
    if isinstance(error, SettingsError):
        return "A setting is missing or wrong."
    if isinstance(error.__cause__, DBAPIError) and getattr(error.__cause__.orig, "pgcode", None) == _NO_SUCH_TABLE:
        return "The database has no tables yet: run trading-history init-db."
    if isinstance(error, TimeoutError) or error.one_statement:
        return "Reading took too long: ask for less, or try again later."
    return "The database cannot be read now."
