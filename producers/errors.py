"""Errors of `producers`.

HistoryError
├── SettingsError          a setting is missing or wrong
├── InvalidEvent           the input breaks the event contract; the same input always fails
│   └── SignalsUnreadable  the signals' file or URL does not contain JSON signals
├── FileNotWritten         a file of the old format, or its folder, cannot be written
├── OutboxError            the outbox file cannot be read or written; a call that raises this recorded nothing
│   └── OutboxDamaged      the file's content cannot be read; a producer or relay moves it away and makes a new one
├── RelayRefused           the outbox belongs to another Redis or queue
├── ProducerClosed         the producer is closed; nothing was recorded
└── EventRejected          the event was rejected; raised by Receipt.wait
"""

from __future__ import annotations

from pathlib import Path


class HistoryError(Exception):
    """Base class of all errors that this project raises on purpose.

    `advice` is what an operator can do, for a terminal or a log; empty if the message says it.
    """

    advice = ""

    def with_advice(self) -> str:
        """Return the message and the advice."""
        return f"{self}: {self.advice}" if self.advice else str(self)


class SettingsError(HistoryError):
    """A setting is missing or wrong. The message names it and never shows its value."""


class InvalidEvent(HistoryError, ValueError):
    """The input breaks the event contract. The message names the field and the reason, never the value.

    `field` is the dotted path of the first invalid field, or None if the input is not an event at all.
    """

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field

    @classmethod
    def at(cls, field: str, reason: str) -> InvalidEvent:
        """Return the error for one field, given its dotted path."""
        return cls(f"{field}: {reason}", field)


class SignalsUnreadable(InvalidEvent):
    """The signals' file or URL does not contain JSON signals. The message names it and the position."""


class FileNotWritten(HistoryError):
    """A file or folder cannot be written. The message names it and the operating system's reason."""

    def __init__(self, path: Path, error: OSError) -> None:
        super().__init__(f"{path}: {error.strerror or error}")


class OutboxError(HistoryError):
    """The outbox cannot be read or written. A call that raises this recorded nothing."""


class OutboxDamaged(OutboxError):
    """The file is damaged, or is not an outbox. A producer or relay moves a damaged file away and makes a new one."""

    advice = (
        "start the controller or trading-history relay: either quarantines the file and salvages its entries. By hand:"
        " stop both, move the file away and run trading-history outbox salvage FILE"
    )


class RelayRefused(HistoryError):
    """A relay for another Redis or queue was started on the outbox. The message names both destinations."""


class ProducerClosed(HistoryError):
    """The producer is closed. Nothing was recorded."""


class EventRejected(HistoryError):
    """The event was rejected and is not stored. `reason` says why.

    The outbox keeps the event for HISTORY_OUTBOX_KEEP days, or less if the outbox is half full.
    """

    def __init__(self, event_id: str, reason: str) -> None:
        super().__init__(f"event {event_id} was rejected: {reason}")
        self.event_id = event_id
        self.reason = reason
