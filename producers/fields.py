"""Field types of the event contract: exact money, aware times, counts, ids.

Each type validates two kinds of input. From the wire (JSON) it accepts one spelling and never changes the value. From
Python it accepts what callers have and rounds or converts it, once, so that no later step needs to.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from decimal import ROUND_HALF_EVEN, Context, Decimal, Inexact, InvalidOperation
from enum import Enum
from fractions import Fraction
from numbers import Integral, Rational, Real
from operator import index
from typing import Annotated, Any, TypeGuard
from uuid import UUID

from pydantic import GetCoreSchemaHandler
from pydantic_core import PydanticCustomError, core_schema

from producers.errors import InvalidEvent

MONEY_DECIMALS = 8
_MONEY_STEP = Decimal(1).scaleb(-MONEY_DECIMALS)
_MONEY_LIMIT = Decimal(10) ** 12
# The caller's decimal context may round to fewer digits, or trap conditions that are normal here. The largest sum has
# 13 digits before the decimal point and 8 after it.
_MONEY_CONTEXT = Context(prec=30, rounding=ROUND_HALF_EVEN, traps=[])
_MONEY_TOO_LARGE = "has more than 12 digits before the decimal point"
_MONEY_TYPES = (int, float, Decimal, str)  # a constant, because a union type would be built at each evaluation
_MOST_EXACT_DIGITS = 400  # for a fraction; the largest float has 309

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_LAST_INSTANT = datetime(9999, 1, 1, tzinfo=UTC)  # in any UTC offset, the local time is before the year 10000
TIME_RANGE = "must lie between the years 1970 and 9998"

NO_NAME = "(no name)"  # shown in messages for a field or parameter whose name is the empty text
NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")


def contract_error(reason: str) -> PydanticCustomError:
    """Return the error that a validator raises for a value that breaks the contract."""
    return PydanticCustomError("contract", "{reason}", {"reason": reason})


def readable(text: str, limit: int) -> str:
    """Return untrusted `text` for a message: control characters are escaped, and at most `limit` characters remain."""
    shown = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text[:limit])
    return shown if len(shown) <= limit and len(text) <= limit else shown[: limit - 1] + "…"


def type_name(value: Any) -> str:
    """Return the name of the type of `value` for a message, with its module unless builtin: `int`, `numpy.ndarray`."""
    kind = type(value)
    module = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    return readable(f"{module}{kind.__qualname__}", 80)


def replacement_for(value: Any) -> str:
    """Return, for a message, what to pass in place of a value that JSON cannot represent."""
    if isinstance(value, Enum):
        return "pass its .value"
    if isinstance(value, date | time) and value == value:  # noqa: PLR0124  # not pandas' NaT
        return "pass its .isoformat()"
    if isinstance(value, tuple | set | frozenset):
        return "pass a list"
    if type_name(value) in {"numpy.datetime64", "numpy.timedelta64"}:
        return "pass its text, str(value)"
    if hasattr(value, "tolist"):
        return "pass its .tolist()"
    return "pass text, or None"


def plain_number(value: Any) -> int | Decimal | Fraction | None:
    """Return the value of a number of another type than int, float and Decimal; None if it is not a real number.

    A binary float of another precision becomes the shortest decimal that converts back to it: NumPy's float32(0.1) is
    0.1. NaN and infinities become the Decimals of the same name.
    """
    try:
        if isinstance(value, Integral):
            return index(value)  # raises for NumPy's timedelta64, which is registered as an Integral
        if isinstance(value, Rational):
            return Fraction(index(value.numerator), index(value.denominator))
        return _shortest(value) if isinstance(value, Real) else None
    except (ArithmeticError, TypeError, ValueError):
        return None


def _shortest(value: Real) -> Decimal:
    text = str(value)
    try:
        converts_back = type(value)(text) == value  # type: ignore[call-arg]  # raises if the type takes no text
    except (ArithmeticError, TypeError, ValueError):
        converts_back = False
    # The text may depend on a setting: NumPy's legacy print mode omits digits.
    return Decimal(text if converts_back and NUMBER.fullmatch(text) else repr(float(value)))


def exact_decimal(value: Fraction) -> Decimal | None:
    """Return the Decimal that equals `value`; None if none does (1/3), or it has more than 400 digits."""
    context = Context(prec=_MOST_EXACT_DIGITS, traps=[Inexact])
    try:
        return context.divide(Decimal(value.numerator), Decimal(value.denominator))
    except Inexact:
        return None


@dataclass(frozen=True)
class _WireText:
    """Pydantic annotation: `pattern` and `parse` read JSON, `coerce` reads Python values, `render` writes JSON.

    `reason` is the error message for JSON that does not fit.
    """

    pattern: str
    parse: Callable[[str], Any]
    coerce: Callable[[Any], Any]
    render: Callable[[Any], str]
    reason: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        wire = core_schema.custom_error_schema(
            core_schema.no_info_after_validator_function(self.parse, core_schema.str_schema(pattern=self.pattern)),
            "contract",
            custom_error_message=self.reason,
        )
        return core_schema.json_or_python_schema(
            wire,
            core_schema.no_info_plain_validator_function(self.coerce),
            serialization=core_schema.plain_serializer_function_ser_schema(
                self.render, return_schema=core_schema.str_schema()
            ),
        )


def _money_from_python(value: Any) -> Decimal:
    exact = _exact_number(value)
    if not exact.is_finite():
        raise contract_error("must be finite, not NaN or Infinity")
    if exact.copy_abs() < _MONEY_LIMIT:
        exact = exact.quantize(_MONEY_STEP, context=_MONEY_CONTEXT)
    if exact.copy_abs() >= _MONEY_LIMIT:
        raise contract_error(_MONEY_TOO_LARGE)
    return exact


def _exact_number(value: Any) -> Decimal:
    if isinstance(value, bool) or not isinstance(value, _MONEY_TYPES):
        value = _other_number(value)
    if isinstance(value, str) and not NUMBER.fullmatch(value):
        raise contract_error("is text that is not a number")
    try:
        # repr() gives the shortest decimal that converts back to this float, Decimal(float) all its binary digits.
        return Decimal(repr(float(value)) if isinstance(value, float) else value)
    except (InvalidOperation, ValueError):
        raise contract_error("is text that is not a number") from None


def _other_number(value: Any) -> int | Decimal:
    number = None if isinstance(value, bool) else plain_number(value)
    if number is None:
        instead = ": pass its .value" if isinstance(value, Enum) else ""
        raise contract_error(f"must be a number, not {type_name(value)}{instead}")
    if not isinstance(number, Fraction):
        return number
    if abs(number) >= _MONEY_LIMIT:
        raise contract_error(_MONEY_TOO_LARGE)  # before rounding, which takes long for very many digits
    # round() rounds half-even, as for all amounts; the result is not rounded again.
    return Decimal(round(number * 10**MONEY_DECIMALS)).scaleb(-MONEY_DECIMALS, context=_MONEY_CONTEXT)


def as_money(value: Any, field: str) -> Decimal:
    """Return `value` as an amount, rounded half-even to 8 decimals.

    Raises:
        InvalidEvent: it is not a number, not finite or too large; the message begins with `field`.
    """
    try:
        return _money_from_python(value)
    except PydanticCustomError as error:
        raise InvalidEvent.at(field, error.message()) from None


def money_sum(first: Decimal, second: Decimal) -> Decimal:
    """Return the exact sum, independent of the caller's decimal context."""
    return _MONEY_CONTEXT.add(first, second)


def money_text(value: Decimal) -> str:
    """Return all digits, without an exponent or trailing zeros: `9900.12`, `0`."""
    text = format(value, "f")
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


Money = Annotated[
    Decimal,
    _WireText(
        pattern=r"^-?[0-9]{1,12}(\.[0-9]{1,8})?$",
        parse=Decimal,
        coerce=_money_from_python,
        render=money_text,
        reason="must be a decimal string with at most 12 integer digits and 8 decimals, such as '1234.56'",
    ),
]


def _in_range(value: datetime) -> datetime:
    if not EPOCH <= value < _LAST_INSTANT:
        raise ValueError
    return value


def _instant_from_wire(text: str) -> datetime:
    return _in_range(datetime.fromisoformat(text))


def is_datetime(value: Any) -> TypeGuard[datetime]:
    """Return whether `value` is a datetime. Pandas' NaT is not, although its type is a subclass."""
    return isinstance(value, datetime) and bool(value == value)  # noqa: PLR0124  # NaT is not equal to itself


def plain_datetime(moment: datetime) -> datetime:
    """Return a time of a subclass as a datetime: pandas' Timestamp has nanoseconds and other methods."""
    return datetime.combine(moment.date(), moment.time(), moment.tzinfo)


def not_a_datetime(value: Any) -> str:
    """Return the reason why a value cannot be a time, and the call that converts it."""
    instead = ""
    if isinstance(value, str):
        instead = ": pass datetime.fromisoformat(value)"
    elif type_name(value) == "numpy.datetime64":
        instead = ": pass value.astype('datetime64[us]').item(), with its time zone"
    elif isinstance(value, Real) and not isinstance(value, bool):
        instead = ": pass datetime.fromtimestamp(value, timezone.utc), in seconds"
    return f"must be a datetime, not {type_name(value)}{instead}"


def _instant_from_python(value: Any) -> datetime:
    if not is_datetime(value):
        raise contract_error(not_a_datetime(value))
    moment = plain_datetime(value)
    try:
        offset = moment.utcoffset()
        if offset is not None:
            _in_range(moment)
    except (ValueError, OverflowError):
        raise contract_error(TIME_RANGE) from None
    if offset is None:
        raise contract_error("has no UTC offset")
    if offset % timedelta(minutes=1):
        raise contract_error("has a UTC offset with seconds, which RFC 3339 cannot write")
    return moment


def _instant_to_wire(value: datetime) -> str:
    return value.isoformat(timespec="microseconds")


Instant = Annotated[
    datetime,
    _WireText(
        pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])$",
        parse=_instant_from_wire,
        coerce=_instant_from_python,
        render=_instant_to_wire,
        reason="must be an RFC 3339 time with its offset, between the years 1970 and 9998,"
        " such as '2026-11-22T17:02:46.101234+01:00'",
    ),
]


def _date_from_python(value: Any) -> date:
    if isinstance(value, datetime) or not isinstance(value, date):
        instead = ": pass its .date()" if is_datetime(value) else ""
        raise contract_error(f"must be a date, not {type_name(value)}{instead}")
    return value


LocalDate = Annotated[
    date,
    _WireText(
        pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$",
        parse=date.fromisoformat,
        coerce=_date_from_python,
        render=date.isoformat,
        reason="must be a date such as '2026-11-22'",
    ),
]


@dataclass(frozen=True)
class _BoundedInteger:
    """Pydantic annotation: an integer within bounds. From Python, any numbers.Integral except a boolean."""

    lowest: int
    highest: int

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        within = core_schema.int_schema(ge=self.lowest, le=self.highest, strict=True)
        return core_schema.json_or_python_schema(
            within, core_schema.no_info_before_validator_function(_integer_from_python, within)
        )


def _integer_from_python(value: Any) -> int:
    if type(value) is int:
        return value
    number = plain_number(value) if isinstance(value, Integral) and not isinstance(value, bool) else None
    if not isinstance(number, int):
        raise contract_error(f"must be an integer, not {type_name(value)}")
    return number


Count = Annotated[int, _BoundedInteger(0, 2**31 - 1)]
SMALLEST_BIGINT, LARGEST_BIGINT = -(2**63), 2**63 - 1  # of PostgreSQL's type bigint
PortfolioId = Annotated[int, _BoundedInteger(SMALLEST_BIGINT, LARGEST_BIGINT)]


def _uuid_from_python(value: Any) -> UUID:
    if not isinstance(value, UUID):
        raise contract_error(f"must be a UUID, not {type_name(value)}")
    return value


EventId = Annotated[
    UUID,
    _WireText(
        pattern="^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$",
        parse=UUID,
        coerce=_uuid_from_python,
        render=str,
        reason="must be a UUID such as '7c1f366e-c9c3-5876-873e-6a33c29b098d'",
    ),
]


def _sequence_from_wire(text: str) -> int:
    sequence = int(text)
    if sequence >= 2**63:
        raise ValueError
    return sequence


def _sequence_from_python(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise contract_error("must be an integer from 0 to 2^63 - 1")
    return value


Sequence = Annotated[
    int,
    _WireText(
        pattern="^[0-9]{19}$",
        parse=_sequence_from_wire,
        coerce=_sequence_from_python,
        render="{:019d}".format,
        reason="must be a string of 19 digits, at most 9223372036854775807",
    ),
]
