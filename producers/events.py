"""The event contract: CloudEvents 1.0 envelopes around portfolio snapshots and signal archives.

The same fact always has the same id, wherever and however often it is produced: a UUIDv5 of the event's type and of the
fields that identify the fact. Producers and workers check the contract with the same models. Everything that differs
between the kinds of events is defined here or named in the table KINDS.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, ClassVar, Literal, NamedTuple, Self, TypeVar, Union
from uuid import UUID

import simplejson
from pydantic import TypeAdapter, ValidationError

from producers.errors import InvalidEvent
from producers.event_kinds import (
    Column,
    Event,
    EventKind,
    EventKinds,
    Payload,
    Source,
    SourceName,
    event_id,
    invalid,
)
from producers.fields import Count, Instant, LocalDate, Money, PortfolioId, type_name
from producers.json_values import Signals, exact_signals, outline
from producers.trace_context import TraceContext

__all__ = [
    "ARCHIVE_TYPE",
    "KINDS",
    "MAX_EVENT_BYTES",
    "MAX_EVENT_STRUCTURE",
    "SNAPSHOT_TYPE",
    "Event",
    "Payload",
    "PortfolioSnapshot",
    "PortfolioSnapshotEvent",
    "SignalArchive",
    "SignalArchiveEvent",
    "Source",
    "SourceName",
    "decode",
    "draft_of",
    "encode",
    "event_id",
    "event_of",
    "has_bounded_structure",
    "json_schema",
]

SnapshotType = Literal["trading.portfolio-snapshot.v1"]
ArchiveType = Literal["trading.signal-archive.v1"]
SNAPSHOT_TYPE: SnapshotType = "trading.portfolio-snapshot.v1"
ARCHIVE_TYPE: ArchiveType = "trading.signal-archive.v1"

IMPORT_PREFIX = "import/"  # begins the source of imported history: import/<file>/<digest>

MAX_EVENT_BYTES = 8 * 1024 * 1024
# Number of brackets, colons and commas. The largest realistic archive has 620,000, and those inside its texts. A text
# with a million takes about 150 MiB of memory to read; 8 MiB of nothing but brackets would take gigabytes.
MAX_EVENT_STRUCTURE = 2**20


class PortfolioSnapshot(Payload):
    """State of one portfolio at one instant. Amounts are Decimals with at most 12 integer digits and 8 decimals."""

    type: ClassVar[str] = SNAPSHOT_TYPE
    identity: ClassVar[tuple[str, ...]] = ("portfolio_id", "timestamp")

    snapshot_date: LocalDate
    timestamp: Instant
    balance: Money
    total_invested: Money
    total_profit_loss: Money
    total_value: Money
    open_positions: Count
    trade_count: Count
    portfolio_id: PortfolioId | None = None

    @property
    def instant(self) -> datetime:
        return self.timestamp

    @property
    def subject(self) -> str:
        return "portfolio" if self.portfolio_id is None else f"portfolio/{self.portfolio_id}"

    @property
    def summary(self) -> str:
        """`portfolio 1 · 2026-11-22 · 10 097.37`."""
        value = f"{self.total_value:z,.2f}".replace(",", " ")
        return f"{_portfolio_label(self.portfolio_id)} · {self.snapshot_date} · {value}"


class PortfolioSnapshotEvent(Event):
    """Envelope of a portfolio snapshot. Its text has about 500 characters, at most about 4,000."""

    type: SnapshotType
    data: PortfolioSnapshot


class SignalArchive(Payload):
    """Signals of one trading cycle. The month and the count are derived, so they cannot contradict the signals."""

    type: ClassVar[str] = ARCHIVE_TYPE
    identity: ClassVar[tuple[str, ...]] = ("portfolio_id", "archived_at")

    archived_at: Instant
    signals: Signals
    portfolio_id: PortfolioId | None = None

    @property
    def instant(self) -> datetime:
        return self.archived_at

    @property
    def archive_month(self) -> str:
        """`YYYY-MM` of the date of `archived_at` in its own UTC offset."""
        return f"{self.archived_at.year:04d}-{self.archived_at.month:02d}"

    @property
    def signals_count(self) -> int:
        return len(self.signals)

    @property
    def subject(self) -> str:
        return f"signals/{self.archive_month}"

    @property
    def summary(self) -> str:
        """`portfolio 1 · 2026-11-22 · 3 signals`."""
        noun = "signal" if self.signals_count == 1 else "signals"
        day = self.archived_at.date()
        return f"{_portfolio_label(self.portfolio_id)} · {day} · {self.signals_count} {noun}"


# Decimals in signals are written as JSON numbers with all digits. Amounts are already text here.
_ENCODER = simplejson.JSONEncoder(ensure_ascii=False, separators=(",", ":"), use_decimal=True, allow_nan=False)


class SignalArchiveEvent(Event):
    """Envelope of a signal archive. Numbers in signals keep all digits, which Pydantic's JSON reader would lose."""

    max_characters: ClassVar[int] = MAX_EVENT_BYTES

    type: ArchiveType
    data: SignalArchive

    @classmethod
    def from_text(cls, text: str) -> Self:
        # To bound the memory, Pydantic reads only an outline: it takes 300 bytes for each empty list, and 1 to 2 kB for
        # the error of each unknown key.
        event = cls.model_validate_json(outline(text))
        return event.model_copy(update={"data": event.data.model_copy(update={"signals": exact_signals(text)})})

    def to_text(self) -> str:
        text: str = _ENCODER.encode(self.model_dump(exclude_none=True))
        return text


def _portfolio_label(portfolio_id: int | None) -> str:
    return "portfolio" if portfolio_id is None else f"portfolio {portfolio_id}"


# All kinds of events. tests/README.md describes how to add one.
KINDS = EventKinds(
    EventKind(
        name="snapshot",
        model=PortfolioSnapshotEvent,
        job_function="consumers.handlers.record_portfolio_snapshot",
        table="portfolio_history",
        columns=(
            Column("portfolio_id", "bigint", derived=True),
            Column("snapshot_date", "date"),
            Column("timestamp", "timestamptz"),
            Column("balance", "numeric"),
            Column("total_invested", "numeric"),
            Column("total_profit_loss", "numeric"),
            Column("total_value", "numeric"),
            Column("open_positions", "integer"),
            Column("trade_count", "integer"),
        ),
    ),
    EventKind(
        name="archive",
        model=SignalArchiveEvent,
        job_function="consumers.handlers.record_signal_archive",
        table="signal_archives",
        columns=(
            Column("portfolio_id", "bigint", derived=True),
            Column("archived_at", "timestamptz"),
            Column("archive_month", "text", derived=True),
            Column("signals_count", "integer", derived=True),
            Column("signals_data", "jsonb", attribute="signals"),
        ),
    ),
)
AnyEvent = TypeVar("AnyEvent", bound=Event)


def event_of(payload: Payload, *, source: str, sequence: int | None, trace: TraceContext | None = None) -> Event:
    """Return `payload` in its envelope; the event's time is the payload's instant.

    Raises:
        InvalidEvent: the source or the sequence breaks the contract.
    """
    extensions = trace.attributes() if trace else {}
    return KINDS[payload.type].model.checked(**_attributes(payload, source, sequence), **extensions)


def unchecked_event_of(payload: Payload, *, source: str, sequence: int, trace: TraceContext | None = None) -> Event:
    """Return the same as `event_of`, in half the time. The source and the sequence must be valid."""
    extensions = trace.attributes() if trace else {}
    return KINDS[payload.type].model.unchecked(_attributes(payload, source, sequence), extensions)


def _attributes(payload: Payload, source: str, sequence: int | None) -> dict[str, Any]:
    """Return the attributes of the envelope, in the order of the model's fields."""
    return {
        "specversion": "1.0",
        "id": payload.event_id,
        "source": source,
        "sequence": sequence,
        "time": payload.instant,
        "subject": payload.subject,
        "datacontenttype": "application/json",
        "type": payload.type,
        "data": payload,
    }


class Draft(NamedTuple):
    """Encoded event without source and sequence, which the outbox assigns in its transaction."""

    event_id: UUID
    type: str
    summary: str
    before: str
    after: str

    def text(self, source: str, sequence: int) -> str:
        """Return the text that `encode` makes of the event with this source and sequence."""
        return f"{self.before}{_SOURCE_AND_SEQUENCE.format(source, sequence)}{self.after}"


# In the JSON text of each kind of event. A source has no character that JSON escapes.
_SOURCE_AND_SEQUENCE = '"source":"{}","sequence":"{:019d}"'


def draft_of(payload: Payload, source: str, *, trace: TraceContext | None = None) -> Draft:
    """Encode `payload` as an event. `source` must be valid, and as long as the source that the event gets.

    Raises:
        InvalidEvent: as `encode`.
    """
    event = unchecked_event_of(payload, source=source, sequence=1, trace=trace)
    before, _, after = encode(event).partition(_SOURCE_AND_SEQUENCE.format(source, 1))
    return Draft(event.id, payload.type, payload.summary, before, after)


def encode(event: Event) -> str:
    """Return `event` as JSON on one line. The same event gives the same text, and numbers in signals keep all digits.

    Raises:
        InvalidEvent: the text is too long for its kind of event, or has more than MAX_EVENT_STRUCTURE brackets, colons
            and commas.
    """
    text = event.to_text()
    _check_size(text, type(event))
    return text


def decode(text: str, model: type[AnyEvent]) -> AnyEvent:
    """Read an event of the expected type from its JSON text. Numbers in signals become exact Decimals.

    Raises:
        InvalidEvent: the text breaks the contract; the message names the first fields and the reasons.
    """
    if not isinstance(text, str):
        raise InvalidEvent(f"event: must be one JSON string, not {type_name(text)}")
    _check_size(text, model)
    try:
        return model.from_text(text)
    except ValidationError as error:
        raise invalid(error) from None


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of the JSON text of all events."""
    events: Any = Union[tuple(kind.model for kind in KINDS.values())]  # noqa: UP007  # of any number of models
    schema = TypeAdapter(events).json_schema(mode="validation")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "trading-history events",
        **schema,
    }


def has_bounded_structure(text: str) -> bool:
    """Return whether reading `text` as JSON takes a bounded amount of memory."""
    # This also counts the characters inside JSON strings: to leave them out, the text would have to be parsed.
    return len(text) <= MAX_EVENT_STRUCTURE or sum(map(text.count, "{[:,")) <= MAX_EVENT_STRUCTURE


def _check_size(text: str, model: type[Event]) -> None:
    # A character takes at most four bytes, so a short text is within the limit without being encoded.
    if len(text) * 4 > MAX_EVENT_BYTES and len(text.encode("utf-8", "surrogatepass")) > MAX_EVENT_BYTES:
        raise InvalidEvent.at("event", f"is larger than {MAX_EVENT_BYTES // 2**20} MiB")
    if not has_bounded_structure(text):
        raise InvalidEvent.at("event", f"has more than {MAX_EVENT_STRUCTURE} brackets, colons and commas")
    if len(text) > model.max_characters:
        raise InvalidEvent.at("event", f"is larger than {model.max_characters // 2**10} KiB, the limit of its type")
