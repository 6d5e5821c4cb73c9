"""Signals: JSON of any shape, as long as PostgreSQL's JSONB holds it without loss; and archives of them as text."""

from __future__ import annotations

import json
import re
import sys
from decimal import Decimal
from fractions import Fraction
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationInfo
from pydantic_core import PydanticCustomError, from_json

from producers.errors import InvalidEvent
from producers.fields import exact_decimal, plain_number, readable, refuse, type_name

MAX_NESTING = 50
MAX_SIGNALS = 20_000  # of 400 bytes each they fill the largest event
_MAX_MEMBERS = 100  # of an envelope or its data, which have nine at the most
# int | float | Decimal is made anew each time that it is evaluated.
_NUMBERS = (int, float, Decimal)
_CONTAINERS = (dict, list)
_MAX_FLOAT = sys.float_info.max
_MAX_DECIMAL = Decimal(repr(_MAX_FLOAT))
# PostgreSQL's numeric, which JSONB uses, keeps at most 16383 digits after the point.
_MIN_EXPONENT = -16383
_MAX_EXPONENT = 100_000  # only zeros have one above 308, and these PostgreSQL still takes
_UNSTORABLE_CHARACTER = re.compile("[\0\ud800-\udfff]")

# A path into a document, innermost step first: (step, rest). Made into text only for a message, since a document
# may have a hundred thousand leaves below one long key.
Path = tuple[Any, ...]


def path_text(path: Path) -> str:
    """`path` for a message, outermost step first: `0.prices.yes`."""
    steps = []
    while path:
        step, path = path
        steps.append(readable(str(step), 60))
    return readable(".".join(reversed(steps)), 200)


def _refuse_at(path: Path, reason: str) -> PydanticCustomError:
    return refuse(f"{path_text(path)}: {reason}")


def _storable_number(value: int | float | Decimal, path: Path) -> None:
    if not isinstance(value, Decimal):
        within = -_MAX_FLOAT <= value <= _MAX_FLOAT  # False for NaN as well
    elif value.is_finite():
        if int(value.as_tuple().exponent) < _MIN_EXPONENT:
            raise _refuse_at(path, "has too many decimals")
        within = value.copy_abs() <= _MAX_DECIMAL and int(value.as_tuple().exponent) <= _MAX_EXPONENT
    else:
        within = False
    if not within:
        # An interoperable reader of JSON holds at most a double's range, so nothing beyond it is sent.
        raise _refuse_at(path, "must be finite and within ±1.8e308")


def _storable(value: Any, path: Path, foreign: list[Any], depth: int = 0) -> None:
    """Raise unless `value` is JSON that JSONB holds without loss; `path` leads to it in messages.

    Numbers and booleans of other types than Python's own, such as NumPy's, go into `foreign`.
    """
    if isinstance(value, str):
        if _UNSTORABLE_CHARACTER.search(value):
            raise _refuse_at(path, "contains a NUL character or a lone surrogate")
    elif isinstance(value, bool) or value is None:
        pass
    elif isinstance(value, _NUMBERS):
        _storable_number(value, path)
    elif not isinstance(value, _CONTAINERS):
        foreign.append(_of_pythons_own(value, path))
    elif depth >= MAX_NESTING:
        raise _refuse_at(path, f"is nested deeper than {MAX_NESTING} levels")
    elif isinstance(value, dict):
        _storable_keys(value, path)
        for key, item in value.items():
            _storable(item, (key, path), foreign, depth + 1)
    else:
        for index, item in enumerate(value):
            _storable(item, (index, path), foreign, depth + 1)


def _of_pythons_own(value: Any, path: Path) -> Any:
    """A number or boolean of another type, such as NumPy's, as Python's own of the same value."""
    # NumPy's boolean is registered with no abstract class; before 2.0 its name was bool_.
    if type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_"):
        return bool(value)
    number = plain_number(value)
    if number is None:
        raise _refuse_at(path, f"is of type {type_name(value)}, which JSON does not have")
    if isinstance(number, Fraction):
        number = exact_decimal(number)
        if number is None:
            raise _refuse_at(path, "is a fraction that no decimal equals: round it")
    _storable_number(number, path)
    return number


def _without_foreign(value: Any) -> Any:
    """A copy of what is storable: the caller's own is left as it is."""
    if isinstance(value, dict):
        return {key: _without_foreign(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_foreign(item) for item in value]
    return value if value is None or isinstance(value, (str, *_NUMBERS)) else _of_pythons_own(value, ())


def _storable_keys(document: dict[Any, Any], path: Path) -> None:
    for key in document:
        if not isinstance(key, str):
            raise _refuse_at(path, f"has a key that is not text but {type_name(key)}")
        if _UNSTORABLE_CHARACTER.search(key):
            raise _refuse_at(path, "a key contains a NUL character or a lone surrogate")


def storable_signals(signals: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The signals, or a copy of them if numbers or booleans had to become Python's own.

    Raises PydanticCustomError, its message beginning with the path below the list.
    """
    foreign: list[Any] = []
    for index, signal in enumerate(signals):
        _storable(signal, (index, ()), foreign)
    return _without_foreign(signals) if foreign else signals


def _storable_from_python(signals: list[dict[str, Any]], info: ValidationInfo) -> list[dict[str, Any]]:
    return signals if info.mode == "json" else storable_signals(signals)


# From the wire only the shape: the contents are judged by decode, when it has read the numbers without loss.
Signals = Annotated[
    list[dict[str, Any]],
    Field(min_length=1, max_length=MAX_SIGNALS, strict=True),
    AfterValidator(_storable_from_python),
]


def outline(text: str) -> str:
    """An archive event as JSON without what is in its signals: its model finds the same faults in it.

    Raises:
        InvalidEvent: it is no JSON, or has too many fields.
    """
    try:
        document = from_json(text)
    except ValueError as error:
        raise InvalidEvent(f"Invalid JSON: {error}") from None
    except TypeError:
        return text  # has a lone surrogate, and the model says so before it reads any of it
    if not isinstance(document, dict):
        return json.dumps(_hull(document))
    outlined = _hulls(document, "event")
    data = document.get("data")
    if isinstance(data, dict):
        outlined["data"] = _hulls(data, "data")
        signals = data.get("signals")
        if isinstance(signals, list):
            outlined["data"]["signals"] = [_hull(signal) for signal in signals[: MAX_SIGNALS + 1]]
    return json.dumps(outlined, ensure_ascii=False)


_HULLS: dict[type, Any] = {dict: {}, list: []}


def _hulls(members: dict[str, Any], field: str) -> dict[str, Any]:
    if len(members) > _MAX_MEMBERS:
        raise InvalidEvent.at(field, f"has more than {_MAX_MEMBERS} fields")
    return {name: _hull(value) for name, value in members.items()}


def _hull(value: Any) -> Any:
    return _HULLS.get(type(value), value)


def exact_signals(text: str) -> list[dict[str, Any]]:
    """The signals of an archive event that its model has checked, numbers with every digit.

    Raises:
        InvalidEvent: one holds what JSONB cannot; the message says where.
    """
    # The model's JSON reader goes through binary floats; this one keeps the digits.
    try:
        return storable_signals(json.loads(text, parse_float=Decimal)["data"]["signals"])
    except PydanticCustomError as error:
        raise InvalidEvent(f"data.signals.{error.message()}", "data.signals") from None
    except (ArithmeticError, ValueError):
        raise InvalidEvent.at("data.signals", "has a number with too many digits") from None
