"""Error texts for readers of the API and of the page, without details.

Drivers' messages name hosts, users and files. They go to the log, under a reference that the answer contains.
"""

from __future__ import annotations

import logging
import secrets
from hashlib import blake2b

from redis import RedisError
from sqlalchemy.exc import DBAPIError

from consumers.errors import StoreUnavailable
from producers.errors import OutboxError, SettingsError

logger = logging.getLogger(__name__)

Unreadable = StoreUnavailable | RedisError | OutboxError | SettingsError | TimeoutError

_NO_SUCH_TABLE = "42P01"
# The same reason has the same reference as long as the process runs, so that a repeated request shows no new problem.
# Without the key, a reader could check whether a reference stands for a reason that they have guessed.
_KEY = secrets.token_bytes(16)


def disclosed(error: Unreadable) -> str:
    """A text without details; `error` is logged in full under the reference at the end of the text."""
    reason = f"{type(error).__name__}: {error}"
    reference = blake2b(reason.encode("utf-8", "replace"), key=_KEY, digest_size=4).hexdigest()
    logger.warning("cannot read (reference %s): %s", reference, reason)
    return f"{_summary(error)} The log has the reason, reference {reference}."


def _summary(error: Unreadable) -> str:
    if isinstance(error, RedisError):
        return "Redis cannot be read now."
    if isinstance(error, OutboxError):
        return "The outbox cannot be read now."
    if isinstance(error, SettingsError):
        return "A setting is missing or wrong."
    if isinstance(error.__cause__, DBAPIError) and getattr(error.__cause__.orig, "pgcode", None) == _NO_SUCH_TABLE:
        return "The database has no tables yet: trading-history init-db makes them."
    if isinstance(error, TimeoutError) or error.one_statement:
        return "This took too long; ask for less, or later."
    return "The database cannot be read now."
