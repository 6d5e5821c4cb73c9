"""Exceptions of the consumers. consumers.web.api and consumers.embedded define a few more.

The root and InvalidEvent are defined in producers.errors.

HistoryError
├── InvalidEvent        permanent: the event breaks the contract, or the database's own constraints
├── EventConflict       permanent: the id is stored already, with other content
├── PoisonEvent         permanent: workers crashed or failed each time they processed it alone
├── UnsupportedJob      permanent: a job that is not ours, or asks RQ for more than to be run
│   └── OversizedJob    permanent: a job that is too large to be read
├── StoreUnavailable    transient: the database is away or cannot execute the statement now; try again later
├── ExportRefused       files are in the way, nothing is selected, or portfolios would be mixed; nothing was written
├── OldSchema           the database has tables of the old shape under our names
├── LoginNotMade        a login role cannot be made or changed
├── AdoptionRefused     tables of the old shape cannot be adopted as things are
└── EmbeddedError       the embedded servers are not installed, do not start or do not stop
"""

from __future__ import annotations

from uuid import UUID

from producers.errors import HistoryError

_LONGEST_DESCRIPTION = 500


def described(error: BaseException) -> str:
    """Return an exception's type and message, of which a very long one is cut."""
    try:
        message = str(error)[:_LONGEST_DESCRIPTION]
    except BaseException:  # its own __str__ may fail too
        message = ""
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type's name; of a database error, the server's message.

    The other lines can contain the values of a row.
    """
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


class PoisonEvent(HistoryError):
    """The event was processed alone `crashes` times, and each time its worker crashed or failed.

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

    def __init__(self, message: str, *, one_statement: bool = False) -> None:
        super().__init__(message)
        self.one_statement = one_statement


class ExportRefused(HistoryError):
    """An export that would overwrite, mix portfolios or be empty; nothing was written."""


class OldSchema(HistoryError):
    """The database has tables of the old shape under our names; nothing was changed."""


class LoginNotMade(HistoryError):
    """A login role cannot be made, changed or let in by this user; the tables are there all the same."""

    def __init__(self, login: str, reason: str) -> None:
        super().__init__(f"the tables are there, but login role {login} was not made or changed: {reason}")


class AdoptionRefused(HistoryError):
    """Tables of the old shape cannot be adopted as things are; nothing was changed."""


class EmbeddedError(HistoryError):
    """The embedded servers are not installed, do not start or do not stop."""
