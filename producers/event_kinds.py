"""Base classes for the kinds of events: the payload, the envelope, and the table KINDS that describes each kind.

The kinds themselves are defined in `producers.events`.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from hashlib import sha1
from typing import Annotated, Any, ClassVar, Literal, Self
from uuid import UUID

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError, model_validator
from pydantic.config import JsonDict
from pydantic_core import InitErrorDetails, PydanticCustomError

from producers.errors import InvalidEvent
from producers.fields import EPOCH, NO_NAME, EventId, Instant, Sequence, contract_error, readable, type_name
from producers.json_values import MAX_SIGNALS
from producers.trace_context import TraceContext, trace_of

_ID_NAMESPACE = UUID("6f9a1d4e-2c57-5b0e-9d52-1c7b7f0e8a63").bytes
_ID_MASK = UUID("ffffffff-ffff-0fff-3fff-ffffffffffff").int
_ID_VERSION_5 = UUID("00000000-0000-5000-8000-000000000000").int
_REPORTED_PROBLEMS = 3
_MESSAGE_CHARACTERS = 1000
_PLAIN_REASONS = {
    "extra_forbidden": "is not a field of this event",
    "int_type": "must be an integer",
    "missing": "is missing",
    "string_pattern_mismatch": "is empty or has a character that is not allowed",
    "too_long": f"has more than {MAX_SIGNALS} items",
    "too_short": "must not be empty",
}

_PIECE = r"[A-Za-z0-9._~-]+"
SourceName = Annotated[str, StringConstraints(pattern=f"^{_PIECE}$", max_length=100, strict=True)]
Source = Annotated[str, StringConstraints(pattern=f"^{_PIECE}(/{_PIECE})*$", max_length=250, strict=True)]
_Subject = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f-\x9f]+$", max_length=250, strict=True)]

_EXTENSION_NAME = re.compile(r"[a-z0-9]{1,20}")
# Types of CloudEvents: a string has no control characters, and an integer is signed and has 32 bits.
_EXTENSION_TEXT = re.compile(r"[^\x00-\x1f\x7f-\x9f]*")
_LARGEST_INTEGER = 2**31 - 1
_EXTENSIONS_SCHEMA: JsonDict = {
    "propertyNames": {"pattern": f"^{_EXTENSION_NAME.pattern}$"},
    "additionalProperties": {
        "type": ["string", "integer", "boolean", "null"],
        "pattern": f"^{_EXTENSION_TEXT.pattern}$",
        "minimum": -_LARGEST_INTEGER - 1,
        "maximum": _LARGEST_INTEGER,
    },
}


def event_id(event_type: str, *identity: datetime | int | str | None) -> UUID:
    """Return the id of the fact that the type and the values of its identity name. UTC offsets make no difference."""
    return UUID(int=_id_number(event_type, identity))


def _id_number(event_type: str, identity: Iterable[datetime | int | str | None]) -> int:
    # The same as uuid.uuid5, in half the time: an id is made or checked at each step of the pipeline.
    name = event_type
    for value in identity:
        if value is None:
            name += "|"
        elif isinstance(value, datetime):
            since = value - EPOCH
            name += f"|{(since.days * 86400 + since.seconds) * 1_000_000 + since.microseconds}"
        elif isinstance(value, str):
            # Quotes keep adjacent texts apart, and an empty text apart from an absent one.
            name += f"|{json.dumps(value)}"
        elif isinstance(value, int):
            name += f"|{value}"
        else:  # equal Decimals or floats can have different texts
            raise TypeError(f"an event cannot be identified by a value of type {type_name(value)}")
    digest = int.from_bytes(sha1(_ID_NAMESPACE + name.encode(), usedforsecurity=False).digest()[:16])
    return digest & _ID_MASK | _ID_VERSION_5


class _Contract(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)

    @classmethod
    def checked(cls, **values: Any) -> Self:
        """Build an instance from Python values.

        Raises:
            InvalidEvent: a field breaks the contract; the message names it.
        """
        try:
            return cls(**values)
        except ValidationError as error:
            raise invalid(error) from None


class Payload(_Contract, ABC):
    """The data of an event: one fact.

    `identity` lists the fields that identify the fact. The event's id is made of `type` and the values of these fields,
    which are instants, integers, texts or None.
    """

    type: ClassVar[str]
    identity: ClassVar[tuple[str, ...]]

    @property
    @abstractmethod
    def instant(self) -> datetime:
        """The time of the fact."""

    @property
    @abstractmethod
    def subject(self) -> str:
        """The CloudEvents attribute `subject`, such as `portfolio/1`."""

    @property
    @abstractmethod
    def summary(self) -> str:
        """One readable line for logs and lists of jobs."""

    @property
    def event_id(self) -> UUID:
        return UUID(int=self.id_number)

    @property
    def id_number(self) -> int:
        """The event id as an integer, which saves the microsecond that it takes to make a UUID."""
        return _id_number(self.type, [getattr(self, name) for name in self.identity])


class Event(_Contract):
    """The CloudEvents envelope of a payload. Each kind of event declares its own `type` and `data`.

    It may have extension attributes of other programs. They are not part of the content. Log lines
    show the trace context.

    `max_characters` limits the length of the JSON text. The default is enough for a kind with few, short fields.
    """

    model_config = ConfigDict(extra="allow", json_schema_extra=_EXTENSIONS_SCHEMA)

    max_characters: ClassVar[int] = 16 * 1024

    specversion: Literal["1.0"]
    id: EventId
    source: Source
    sequence: Sequence | None = None
    time: Instant
    subject: _Subject | None = None
    datacontenttype: Literal["application/json"] | None = None
    type: str
    data: Payload

    @model_validator(mode="after")
    def _id_belongs_to_the_fact(self) -> Self:
        # With another id, one fact could be stored twice, or block the id of another fact.
        if self.id.int != self.data.id_number:
            names = " and ".join([", ".join(["type", *self.data.identity[:-1]]), self.data.identity[-1]])
            raise PydanticCustomError("wrong_id", "does not match {names}", {"names": names})
        return self

    @model_validator(mode="after")
    def _extensions_have_the_types_of_cloud_events(self) -> Self:
        problems = [
            InitErrorDetails(type=problem, loc=(name,), input=None)
            for name, value in (self.model_extra or {}).items()
            if (problem := _problem_of_extension(name, value))
        ]
        if problems:
            raise ValidationError.from_exception_data(type(self).__name__, problems)
        return self

    @classmethod
    def unchecked(cls, attributes: dict[str, Any], extensions: dict[str, str]) -> Self:
        """Return the event of attributes that were checked before; they must have the order of the fields.

        Pydantic's `model_construct` takes three times as long.
        """
        event = object.__new__(cls)
        object.__setattr__(event, "__dict__", attributes)
        object.__setattr__(event, "__pydantic_fields_set__", {*attributes, *extensions})
        object.__setattr__(event, "__pydantic_extra__", extensions)
        object.__setattr__(event, "__pydantic_private__", None)
        return event

    @property
    def trace(self) -> TraceContext | None:
        """The trace context of the call that recorded the event, if its envelope has a valid one."""
        return trace_of(self.model_extra or {})

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Read a JSON text of at most `max_characters`. Kinds whose digits Pydantic's JSON reader loses override it.

        Raises:
            InvalidEvent, ValidationError: the text breaks the contract.
        """
        return cls.model_validate_json(text)

    def to_text(self) -> str:
        """Return JSON on one line, which `from_text` reads without loss."""
        return self.model_dump_json(exclude_none=True)


def _problem_of_extension(name: str, value: object) -> str | PydanticCustomError | None:
    if not _EXTENSION_NAME.fullmatch(name):
        return "extra_forbidden"
    if value is None:  # unset, as the JSON format of CloudEvents says
        return None
    if not isinstance(value, str | int):  # a boolean is an int
        return contract_error("must be a string, an integer or a boolean")
    if isinstance(value, str) and not _EXTENSION_TEXT.fullmatch(value):
        return contract_error("contains a control character")
    if isinstance(value, int) and not -_LARGEST_INTEGER - 1 <= value <= _LARGEST_INTEGER:
        return contract_error("must be an integer of 32 bits")
    return None


@dataclass(frozen=True)
class Column:
    """A column of a kind's table. Its value is the payload's `attribute`, by default the one with the column's name.

    Two events with the same id have the same content if their columns are equal. A `derived` column follows from the id
    or from the other columns and is not compared.
    """

    name: str
    type: Literal["bigint", "boolean", "date", "integer", "jsonb", "numeric", "text", "timestamptz"]
    attribute: str | None = None
    derived: bool = False

    @property
    def field(self) -> str:
        """The payload's attribute that has the value."""
        return self.attribute or self.name


@dataclass(frozen=True, eq=False, kw_only=True)
class EventKind:
    """Description of one kind of event.

    Attributes:
        name: A short name for people, such as `snapshot`.
        model: The envelope.
        job_function: The dotted path of the consumer's function. It is text, because a producer never imports the
            consumer.
        table: A table of schema.sql with the columns `id`, `event_id`, `source` and `sequence`, those in `columns`, and
            a primary key named `<table>_pk`.
        columns: The table's columns that are filled from the payload.
    """

    name: str
    model: type[Event]
    job_function: str
    table: str
    columns: tuple[Column, ...]

    @cached_property
    def payload(self) -> type[Payload]:
        """The payload's class, from the envelope's field `data`."""
        payload: type[Payload] | Any = self.model.model_fields["data"].annotation
        assert isinstance(payload, type)
        assert issubclass(payload, Payload)
        return payload

    @cached_property
    def type(self) -> str:
        """The CloudEvents attribute `type`."""
        return self.payload.type

    @property
    def identity(self) -> tuple[str, ...]:
        return self.payload.identity


class EventKinds(Mapping[str, EventKind]):
    """All kinds of events, by type. Code reads it at each use and keeps no copy, so that a test can add a kind."""

    def __init__(self, *kinds: EventKind) -> None:
        self._by_type: dict[str, EventKind] = {}
        self._by_job_function: dict[str, EventKind] = {}
        for kind in kinds:
            self.register(kind)

    def __getitem__(self, event_type: str) -> EventKind:
        return self._by_type[event_type]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_type)

    def __len__(self) -> int:
        return len(self._by_type)

    def of_job(self, function: str) -> EventKind | None:
        """Return the kind whose job function has this dotted path, or None."""
        return self._by_job_function.get(function)

    def has(self, payload: object) -> bool:
        """Return whether `payload` belongs to a registered kind."""
        return isinstance(payload, Payload) and payload.type in self and isinstance(payload, self[payload.type].payload)

    def register(self, kind: EventKind) -> ExitStack:
        """Add a kind. If the result is used as a context manager, remove the kind at the end of the block.

        Raises:
            ValueError: another kind has the same type, name, job function or table.
        """
        for other in self.values():
            for name in ("type", "name", "job_function", "table"):
                if getattr(kind, name) == getattr(other, name):
                    raise ValueError(f"another kind of event has the {name} {getattr(kind, name)}")
        self._by_type[kind.type] = self._by_job_function[kind.job_function] = kind
        removal = ExitStack()
        removal.callback(self._remove, kind)
        return removal

    def _remove(self, kind: EventKind) -> None:
        del self._by_type[kind.type], self._by_job_function[kind.job_function]


def invalid(error: ValidationError) -> InvalidEvent:
    """Return an error whose message lists, on one line, the first problems with their fields and without any value."""
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    fields = [_field(problem) for problem in problems]
    lines = []
    for field, problem in zip(fields, problems, strict=True):
        reason = _PLAIN_REASONS.get(problem["type"], problem["msg"])
        # A reason that begins with a path inside the field ("0.price: must be finite") continues the field's path.
        joint = "." if field.endswith("signals") and problem["type"] == "contract" else ": "
        lines.append(f"{field}{joint}{reason}" if field else reason)
    more = len(lines) - _REPORTED_PROBLEMS
    message = "; ".join(lines[:_REPORTED_PROBLEMS]) + (f"; and {more} more" if more > 0 else "")
    return InvalidEvent(readable(message, _MESSAGE_CHARACTERS), fields[0] or None)


def _field(problem: Mapping[str, Any]) -> str:
    path = ".".join(str(part) or NO_NAME for part in problem["loc"])
    return readable(path, 200) if problem["type"] != "wrong_id" else "id"
