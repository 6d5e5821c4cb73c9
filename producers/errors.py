"""The errors that a producer can raise.

HistoryError
├── SettingsError          a setting is missing or wrong; names it
├── InvalidEvent           permanent: this input is not, and will never be, an event
│   └── SignalsUnreadable  the signals' file or URL does not hold JSON signals
├── FileNotWritten         a file of the old format, or its folder, could not be written
├── OutboxError            the outbox file cannot be read or written; a call that raises it recorded nothing
│   ├── OutboxDamaged      its content cannot be read: a producer or relay moves the file away and makes a new one
│   └── OutboxOutdated     an earlier release has made it; it was opened only to look, and a producer upgrades it
├── RelayRefused           the outbox belongs to another Redis or queue
├── ProducerClosed         the producer was closed; nothing was recorded
└── EventRejected          a consumer refused the event for good; raised by Receipt.wait
"""

from __future__ import annotations

from pathlib import Path


class HistoryError(Exception):
    """Root of everything this project raises on purpose."""


class SettingsError(HistoryError):
    """A setting is missing or wrong; the message names it and never shows a secret value."""


class InvalidEvent(HistoryError, ValueError):
    """The input breaks the event contract; the message names the field and the reason, not the payload.

    `field` is the dotted path of the first offending field, or None when there is no event at all.
    """

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field

    @classmethod
    def at(cls, field: str, reason: str) -> InvalidEvent:
        return cls(f"{field}: {reason}", field)


class SignalsUnreadable(InvalidEvent):
    """The signals' file or URL could not be read as JSON signals; the message names it and the position."""


class FileNotWritten(HistoryError):
    """A file or folder could not be written; the message names it and the system's reason."""

    def __init__(self, path: Path, error: OSError) -> None:
        super().__init__(f"{path}: {error.strerror or error}")


class OutboxError(HistoryError):
    """The outbox could not be read or written; an event whose call raised this was not accepted."""


class OutboxDamaged(OutboxError):
    """The outbox file is damaged, or holds no outbox; a producer moves a damaged one away and makes a new one."""


class OutboxOutdated(OutboxError):
    """An earlier release has made the outbox, and its controller may still run: a producer or relay upgrades it."""


class RelayRefused(HistoryError):
    """The outbox says that its entries go to another Redis or queue; the message names both."""


class ProducerClosed(HistoryError):
    """The producer was closed; nothing was recorded."""


class EventRejected(HistoryError):
    """A consumer refused the event for good; `reason` says why.

    The outbox keeps the event for the days of HISTORY_OUTBOX_KEEP, or fewer when it is half full.
    """

    def __init__(self, event_id: str, reason: str) -> None:
        super().__init__(f"event {event_id} was rejected: {reason}")
        self.event_id = event_id
        self.reason = reason
