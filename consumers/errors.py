"""Exceptions of the consumers. consumers.web.api and consumers.embedded define a few more.

The root and InvalidEvent are defined in producers.errors.

HistoryError
├── InvalidEvent        permanent: the event violates the contract or a constraint of the database
├── EventConflict       permanent: the id is already stored with other content
├── EventWithdrawn      permanent: a row with this id and content was withdrawn
├── PoisonEvent         permanent: workers crashed or failed each time they processed it alone
├── UnsupportedJob      permanent: a job that is not ours, or asks RQ for more than to be run
│   └── OversizedJob    permanent: a job that is too large to be read
├── StoreUnavailable    transient: the database is away or cannot execute the statement now; try again later
├── ExportRefused       no folder, files already exist, no rows match, or portfolios would be mixed; nothing was written
├── WithdrawalRefused   the event has no row, or the role may not withdraw it; nothing was changed
├── OldSchema           the database has tables of the old shape, or others, under our names
├── LoginNotMade        a login role cannot be created or changed
├── PingNotDelivered    a monitoring service did not accept a ping
├── SealError           a seal cannot be read or written
├── AdoptionRefused     tables of the old shape cannot be adopted in their present state
└── EmbeddedError       the embedded servers are not installed, do not start or do not stop
"""

from __future__ import annotations

import sys
from uuid import UUID

from producers.errors import HistoryError

_LONGEST_DESCRIPTION = 500


def described(error: BaseException) -> str:
    """Return the type and message of an exception; the message is cut after 500 characters."""
    try:
        message = str(error)[:_LONGEST_DESCRIPTION]
    except BaseException:  # its own __str__ may fail too
        message = ""
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type if the message is empty.

    A database error gives the server's primary message. The other lines can contain the values of a row.
    """
    if "redis" in sys.modules:  # otherwise it is no error of Redis, and importing redis takes time
        from redis import RedisError

        from producers.redis_url import redis_reason

        if isinstance(error, RedisError):
            return redis_reason(error)
    original = getattr(error, "orig", None) or error  # SQLAlchemy's error contains the driver's
    diagnostics = getattr(original, "diag", None)
    message = getattr(diagnostics, "message_primary", None) or str(original)
    return (message.strip().splitlines() or [type(original).__name__])[0]


class EventConflict(HistoryError):
    """The event's id is already stored with other content; the stored row is not changed."""

    def __init__(self, event_id: UUID, table: str, row_id: int) -> None:
        super().__init__(f"event {event_id} is stored already as row {row_id} of {table}, with other content")
        self.event_id = event_id
        self.row_id = row_id


class EventWithdrawn(HistoryError):
    """A row with the event's id and content was withdrawn; the content is not stored again.

    `own` is true if the same delivery had made that row: its source and sequence are the event's. Then the withdrawal
    is the record of the delivery.
    """

    def __init__(self, event_id: UUID, by: str, *, own: bool) -> None:
        super().__init__(f"withdrawn: event {event_id} with this content was {by}")
        self.event_id = event_id
        self.own = own


class PoisonEvent(HistoryError):
    """The event was processed alone `crashes` times, and its worker crashed or failed each time.

    `cause` is the last exception, if there was one. The database keeps the message, and `legacy import` recognises its
    first words.
    """

    def __init__(self, crashes: int, cause: BaseException | None = None) -> None:
        reason = "" if cause is None else f"; last error: {described(cause)}"
        super().__init__(f"poison event: {crashes} workers crashed or failed while processing it alone{reason}")


class UnsupportedJob(HistoryError):
    """A job in our queue that is not a plain call of one of our job functions; nothing of it was run."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"unsupported job: {reason}")


class OversizedJob(UnsupportedJob):
    """A job that is larger than any of ours can be, compressed or decompressed; it was not read."""

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(f"it is larger than {limit_bytes // 2**20} MiB")


class StoreUnavailable(HistoryError):
    """The database is away or cannot execute the statement now; the same call may succeed later.

    `one_statement` is true if only this statement failed, by a timeout, a deadlock or a trigger: other statements may
    succeed.
    """

    def __init__(self, message: str, *, one_statement: bool = False, advice: str = "") -> None:
        super().__init__(message)
        self.one_statement = one_statement
        self.advice = advice


class ExportRefused(HistoryError):
    """The export would overwrite files, mix portfolios or be empty; nothing was written."""


class WithdrawalRefused(HistoryError):
    """The event has no row, or the role lacks the rights to withdraw it. Nothing was changed."""


class OldSchema(HistoryError):
    """The database has tables of the old shape, or tables of another program, under our names; nothing was changed."""


class LoginNotMade(HistoryError):
    """This user may not create or change a login role; the tables exist nevertheless.

    `remedy` has the statements with which an administrator of the server gives this user the missing privilege.
    """

    def __init__(self, login: str, reason: str, remedy: str = "") -> None:
        advice = f". As an administrator of the server, run {remedy}" if remedy else ""
        super().__init__(f"the tables exist, but login role {login} was not created or changed: {reason}{advice}")


class AdoptionRefused(HistoryError):
    """Tables of the old shape cannot be adopted in their present state; nothing was changed."""


class SealError(HistoryError):
    """A file with the digests of an outbox cannot be read or written; an existing one is not changed."""


class PingNotDelivered(HistoryError):
    """A monitoring service did not accept a ping. The message does not contain its URL."""


class EmbeddedError(HistoryError):
    """The embedded servers are not installed, do not start or do not stop."""
