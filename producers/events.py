"""The event contract: CloudEvents 1.0 envelopes around portfolio snapshots and signal archives.

One fact has one id, wherever and however often it is produced: a UUIDv5 of the event's type, its portfolio
and the UTC instant in microseconds. The contract is checked by the same models on both sides of the queue.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from decimal import Decimal
from hashlib import sha1
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar
from uuid import UUID

import simplejson
from pydantic import BaseModel, ConfigDict, StringConstraints, TypeAdapter, ValidationError, model_validator
from pydantic_core import PydanticCustomError, from_json

from producers.errors import InvalidEvent
from producers.fields import (
    EPOCH,
    Count,
    EventId,
    Instant,
    LocalDate,
    Money,
    PortfolioId,
    Sequence,
    readable,
    type_name,
)
from producers.json_values import MAX_SIGNALS, Signals, storable_signals

SnapshotType = Literal["trading.portfolio-snapshot.v1"]
ArchiveType = Literal["trading.signal-archive.v1"]
SNAPSHOT_TYPE: SnapshotType = "trading.portfolio-snapshot.v1"
ARCHIVE_TYPE: ArchiveType = "trading.signal-archive.v1"

IMPORT_PREFIX = "import/"  # of the sources of old history: import/<file>/<digest>

MAX_EVENT_BYTES = 8 * 1024 * 1024
# Brackets, colons and commas. The fullest archive of signals such as ours has 620,000 of them, and those in its texts;
# a million of anything takes some 150 MiB to read, where 8 MiB of brackets would take gigabytes.
MAX_EVENT_STRUCTURE = 2**20
_MAX_SNAPSHOT_CHARACTERS = 16 * 1024  # one has 500, and with every one of its texts at its longest some 4,000
_MAX_MEMBERS = 100  # of an envelope or its data, which have nine at the most
_ID_NAMESPACE = UUID("6f9a1d4e-2c57-5b0e-9d52-1c7b7f0e8a63").bytes
_ID_MASK = UUID("ffffffff-ffff-0fff-3fff-ffffffffffff").int
_ID_VERSION_5 = UUID("00000000-0000-5000-8000-000000000000").int
_REPORTED_PROBLEMS = 3
_MESSAGE_CHARACTERS = 1000
_PLAIN_REASONS = {
    "extra_forbidden": "is not a field of this event",
    "int_type": "must be an integer",
    "missing": "is missing",
    "too_long": f"has more than {MAX_SIGNALS} of them",
    "too_short": "must not be empty",
}

_PIECE = r"[A-Za-z0-9._~-]+"
SourceName = Annotated[str, StringConstraints(pattern=f"^{_PIECE}$", max_length=100, strict=True)]
Source = Annotated[str, StringConstraints(pattern=f"^{_PIECE}(/{_PIECE})*$", max_length=250, strict=True)]
_Subject = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f]+$", max_length=250, strict=True)]


def event_id(event_type: str, portfolio_id: int | None, instant: datetime) -> UUID:
    """The id of the fact that `portfolio_id` had at `instant`; the instant's offset makes no difference."""
    since = instant - EPOCH
    microseconds = (since.days * 86400 + since.seconds) * 1_000_000 + since.microseconds
    portfolio = "" if portfolio_id is None else portfolio_id
    # What uuid.uuid5 does, at half the price; it is made or checked at each step of an event's way.
    name = f"{event_type}|{portfolio}|{microseconds}".encode()
    digest = int.from_bytes(sha1(_ID_NAMESPACE + name, usedforsecurity=False).digest()[:16])
    return UUID(int=digest & _ID_MASK | _ID_VERSION_5)


class _Contract(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)

    @classmethod
    def checked(cls, **values: Any) -> Self:
        """Build from Python values.

        Raises:
            InvalidEvent: a field breaks the contract; the message names it.
        """
        try:
            return cls(**values)
        except ValidationError as error:
            raise _invalid(error) from None


class PortfolioSnapshot(_Contract):
    """One portfolio at one instant. Amounts are Decimals of at most 12 integer digits and 8 decimals."""

    type: ClassVar[str] = SNAPSHOT_TYPE

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
    def event_id(self) -> UUID:
        return event_id(self.type, self.portfolio_id, self.timestamp)

    @property
    def summary(self) -> str:
        """What a person wants to read in a list of jobs: `portfolio 1 · 2026-11-22 · 10 097.37`."""
        value = f"{self.total_value:z,.2f}".replace(",", " ")
        return f"{_portfolio_label(self.portfolio_id)} · {self.snapshot_date} · {value}"


class SignalArchive(_Contract):
    """The signals of one trading cycle. Month and count are derived, so that they cannot disagree."""

    type: ClassVar[str] = ARCHIVE_TYPE

    archived_at: Instant
    signals: Signals
    portfolio_id: PortfolioId | None = None

    @property
    def instant(self) -> datetime:
        return self.archived_at

    @property
    def archive_month(self) -> str:
        """`YYYY-MM` of the local date that `archived_at` has in its own offset."""
        return f"{self.archived_at.year:04d}-{self.archived_at.month:02d}"

    @property
    def signals_count(self) -> int:
        return len(self.signals)

    @property
    def subject(self) -> str:
        return f"signals/{self.archive_month}"

    @property
    def event_id(self) -> UUID:
        return event_id(self.type, self.portfolio_id, self.archived_at)

    @property
    def summary(self) -> str:
        """What a person wants to read in a list of jobs: `portfolio 1 · 2026-11-22 · 3 signals`."""
        noun = "signal" if self.signals_count == 1 else "signals"
        day = self.archived_at.date()
        return f"{_portfolio_label(self.portfolio_id)} · {day} · {self.signals_count} {noun}"


def _portfolio_label(portfolio_id: int | None) -> str:
    return "portfolio" if portfolio_id is None else f"portfolio {portfolio_id}"


Payload = PortfolioSnapshot | SignalArchive


class _Envelope(_Contract):
    specversion: Literal["1.0"]
    id: EventId
    source: Source
    sequence: Sequence | None = None
    time: Instant
    subject: _Subject | None = None
    datacontenttype: Literal["application/json"] | None = None

    @model_validator(mode="after")
    def _id_belongs_to_the_fact(self) -> Self:
        # A foreign id would let one fact in twice, or occupy the place of another.
        if self.id != self.data.event_id:  # type: ignore[attr-defined]  # each subclass declares data
            raise PydanticCustomError("wrong_id", "is not the id of this type, portfolio and time")
        return self


class PortfolioSnapshotEvent(_Envelope):
    """A portfolio snapshot as it travels."""

    type: SnapshotType
    data: PortfolioSnapshot


class SignalArchiveEvent(_Envelope):
    """A signal archive as it travels."""

    type: ArchiveType
    data: SignalArchive


Event = PortfolioSnapshotEvent | SignalArchiveEvent
MODELS: dict[str, type[Event]] = {SNAPSHOT_TYPE: PortfolioSnapshotEvent, ARCHIVE_TYPE: SignalArchiveEvent}
# By name: the producer never imports the consumer. A test resolves each.
JOB_FUNCTIONS = {
    SNAPSHOT_TYPE: "consumers.handlers.record_portfolio_snapshot",
    ARCHIVE_TYPE: "consumers.handlers.record_signal_archive",
}
AnyEvent = TypeVar("AnyEvent", bound=PortfolioSnapshotEvent | SignalArchiveEvent)


def event_of(payload: Payload, *, source: str, sequence: int | None) -> Event:
    """The envelope of `payload`, which happened at its own instant.

    Raises:
        InvalidEvent: the source or sequence breaks the contract.
    """
    model = PortfolioSnapshotEvent if isinstance(payload, PortfolioSnapshot) else SignalArchiveEvent
    return model.checked(
        specversion="1.0",
        id=payload.event_id,
        source=source,
        sequence=sequence,
        type=payload.type,
        time=payload.instant,
        subject=payload.subject,
        datacontenttype="application/json",
        data=payload,
    )


# Decimals stay numbers with every digit they have; money never gets here as a Decimal, its field renders text.
_ENCODER = simplejson.JSONEncoder(ensure_ascii=False, separators=(",", ":"), use_decimal=True, allow_nan=False)


def encode(event: Event) -> str:
    """`event` as JSON on one line: the same event gives the same text, numbers in signals keep every digit.

    Raises:
        InvalidEvent: the text is longer than MAX_EVENT_BYTES, or has more than MAX_EVENT_STRUCTURE in it.
    """
    if isinstance(event, PortfolioSnapshotEvent):
        return event.model_dump_json(exclude_none=True)  # the same text, in a third of the time; always short
    text: str = _ENCODER.encode(event.model_dump(exclude_none=True))
    _check_size(text)
    return text


def decode(text: str, model: type[AnyEvent]) -> AnyEvent:
    """Read an event of the expected type from its wire form, numbers in signals as exact Decimals.

    Raises:
        InvalidEvent: the text breaks the contract; the message names each field and the reason.
    """
    if not isinstance(text, str):
        raise InvalidEvent(f"event: must be one JSON string, not {type_name(text)}")
    if len(text) > _MAX_SNAPSHOT_CHARACTERS:
        _check_long(text, model)
    # Pydantic's own reader takes 300 bytes for an empty list, and each unknown key is an error of a kilobyte or two: of
    # a long text it sees no more than it judges.
    outline = text if model is PortfolioSnapshotEvent else _outline(text)
    try:
        event = model.model_validate_json(outline)
    except ValidationError as error:
        raise _invalid(error) from None
    if event.type == ARCHIVE_TYPE:  # isinstance of another model takes Pydantic a microsecond
        data = event.data.model_copy(update={"signals": _exact_signals(text)})
        return event.model_copy(update={"data": data})  # type: ignore[return-value]  # still the caller's model
    return event  # type: ignore[return-value]  # narrowed away above


def _outline(text: str) -> str:
    """The archive event as JSON without what is in its signals: the model finds the same faults in it."""
    try:
        document = from_json(text)
    except ValueError as error:
        raise InvalidEvent(f"Invalid JSON: {error}") from None
    except TypeError:
        return text  # has a lone surrogate, and the model says so before it reads any of it
    if not isinstance(document, dict):
        return json.dumps(_hull(document))
    outline = _hulls(document, "event")
    data = document.get("data")
    if isinstance(data, dict):
        outline["data"] = _hulls(data, "data")
        signals = data.get("signals")
        if isinstance(signals, list):
            outline["data"]["signals"] = [_hull(signal) for signal in signals[: MAX_SIGNALS + 1]]
    return json.dumps(outline, ensure_ascii=False)


_HULLS: dict[type, Any] = {dict: {}, list: []}


def _hulls(members: dict[str, Any], field: str) -> dict[str, Any]:
    if len(members) > _MAX_MEMBERS:
        raise InvalidEvent.at(field, f"has more than {_MAX_MEMBERS} fields")
    return {name: _hull(value) for name, value in members.items()}


def _hull(value: Any) -> Any:
    return _HULLS.get(type(value), value)


def _exact_signals(text: str) -> list[dict[str, Any]]:
    # The model's JSON reader goes through binary floats; this one keeps the digits.
    try:
        return storable_signals(json.loads(text, parse_float=Decimal)["data"]["signals"])
    except PydanticCustomError as error:
        raise InvalidEvent(f"data.signals.{error.message()}", "data.signals") from None
    except (ArithmeticError, ValueError):
        raise InvalidEvent.at("data.signals", "has a number with too many digits") from None


def json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of the wire form of every event."""
    schema = TypeAdapter(Event).json_schema(mode="validation")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "trading-history events",
        **schema,
    }


def is_readable(text: str) -> bool:
    """Whether reading `text` as JSON takes a bounded amount of memory, whatever is in it."""
    # Counted in texts as well, and in what is no JSON: to know better would take a reader.
    return len(text) <= MAX_EVENT_STRUCTURE or sum(map(text.count, "{[:,")) <= MAX_EVENT_STRUCTURE


def _check_size(text: str) -> None:
    # Four bytes a character at the most: short texts need no encoding to know that they fit.
    if len(text) * 4 > MAX_EVENT_BYTES and len(text.encode("utf-8", "surrogatepass")) > MAX_EVENT_BYTES:
        raise InvalidEvent.at("event", f"is larger than {MAX_EVENT_BYTES // 2**20} MiB")
    if not is_readable(text):
        raise InvalidEvent.at("event", f"has more than {MAX_EVENT_STRUCTURE} brackets, colons and commas")


def _check_long(text: str, model: type[_Envelope]) -> None:
    _check_size(text)
    if model is PortfolioSnapshotEvent:
        raise InvalidEvent.at("event", f"is larger than {_MAX_SNAPSHOT_CHARACTERS // 2**10} KiB, as no snapshot is")


def _invalid(error: ValidationError) -> InvalidEvent:
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    fields = [_field(problem) for problem in problems]
    lines = []
    for field, problem in zip(fields, problems, strict=True):
        reason = _PLAIN_REASONS.get(problem["type"], problem["msg"])
        # A reason that starts below the field ("0.price: must be finite") continues its path.
        joint = "." if field.endswith("signals") and problem["type"] == "contract" else ": "
        lines.append(f"{field}{joint}{reason}" if field else reason)
    more = len(lines) - _REPORTED_PROBLEMS
    message = "; ".join(lines[:_REPORTED_PROBLEMS]) + (f"; and {more} more" if more > 0 else "")
    return InvalidEvent(readable(message, _MESSAGE_CHARACTERS), fields[0] or None)


def _field(problem: Mapping[str, Any]) -> str:
    path = ".".join(str(part) for part in problem["loc"])
    return readable(path, 200) if problem["type"] != "wrong_id" else "id"
