"""Validation of signals: JSON objects of any shape that PostgreSQL's JSONB can store without loss."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from decimal import Decimal
from fractions import Fraction
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationInfo
from pydantic_core import PydanticCustomError, from_json

from producers.errors import InvalidEvent
from producers.fields import (
    NO_NAME,
    contract_error,
    exact_decimal,
    plain_number,
    readable,
    replacement_for,
    type_name,
)

MAX_NESTING = 50
MAX_SIGNALS = 20_000  # with 400 bytes each, they fill the largest event
_MAX_MEMBERS = 100  # in an envelope, with its extension attributes, or in its data
# A constant, because the union type int | float would be built at each evaluation.
_NUMBERS = (int, float)
_CONTAINERS = (dict, list)
_MAX_FLOAT = sys.float_info.max
_MAX_DECIMAL = Decimal(repr(_MAX_FLOAT))
# PostgreSQL's numeric, which JSONB uses, has at most 16383 digits after the decimal point.
_MIN_EXPONENT = -16383
_MAX_EXPONENT = 100_000  # an exponent above 308 is possible only for zero; PostgreSQL accepts zeros up to this one
_UNSTORABLE_CHARACTER = re.compile("[\0\ud800-\udfff]")

# A path into a document as nested pairs, innermost step first: (step, rest). It becomes text only for a message,
# because a document may have 100,000 values below one long key.
Path = tuple[Any, ...]


def path_text(path: Path) -> str:
    """Return `path` as text for a message, outermost step first: `0.prices.yes`."""
    steps = []
    while path:
        step, path = path
        steps.append(readable(str(step) or NO_NAME, 60))
    return readable(".".join(reversed(steps)), 200)


def _error_at(path: Path, reason: str) -> PydanticCustomError:
    return contract_error(f"{path_text(path)}: {reason}")


def _storable_number(value: int | float | Decimal, path: Path) -> None:
    if not isinstance(value, Decimal):
        within = -_MAX_FLOAT <= value <= _MAX_FLOAT  # False for NaN too
    elif value.is_finite():
        exponent = int(value.as_tuple().exponent)
        if exponent < _MIN_EXPONENT:
            raise _error_at(path, "has too many decimals")
        within = value.copy_abs() <= _MAX_DECIMAL and exponent <= _MAX_EXPONENT
    else:
        within = False
    if not within:
        # Many JSON readers use doubles (RFC 8259, section 6), so larger numbers are not portable.
        raise _error_at(path, "must be finite and within ±1.8e308")


def _storable(value: Any, path: Path, converted: list[Any], depth: int = 0) -> None:
    """Raise unless JSONB can store `value` without loss; messages name its `path`.

    Append numbers and booleans that are not builtin types, such as NumPy's, to `converted`, as builtin types.
    """
    if isinstance(value, str):
        if _UNSTORABLE_CHARACTER.search(value):
            raise _error_at(path, "contains a NUL character or a lone surrogate")
    elif isinstance(value, bool) or value is None:
        pass
    # The text of a subclass of Decimal may not be the number: an enum's member has its name.
    elif isinstance(value, _NUMBERS) or type(value) is Decimal:
        _storable_number(value, path)
    elif not isinstance(value, _CONTAINERS):
        converted.append(_as_builtin(value, path))
    elif depth >= MAX_NESTING:
        raise _error_at(path, f"is nested deeper than {MAX_NESTING} levels")
    elif isinstance(value, dict):
        _storable_keys(value, path)
        for key, item in _other_than_texts(value):
            _storable(item, (key, path), converted, depth + 1)
    else:
        for index, item in enumerate(value):
            _storable(item, (index, path), converted, depth + 1)


def _other_than_texts(document: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the members of an object, without storable texts: most are texts, and a call for each one takes longer."""
    return (
        (key, item) for key, item in document.items() if type(item) is not str or _UNSTORABLE_CHARACTER.search(item)
    )


def _as_builtin(value: Any, path: Path) -> Any:
    """Return a number or boolean of another type, such as NumPy's, as a builtin type or Decimal of the same value."""
    # NumPy's boolean is not registered with any abstract class. Before NumPy 2.0 its name was bool_.
    if type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_"):
        return bool(value)
    number = Decimal(value) if isinstance(value, Decimal) else plain_number(value)
    if number is None:
        raise _error_at(path, f"is of type {type_name(value)}, which JSON cannot represent: {replacement_for(value)}")
    if isinstance(number, Fraction):
        number = exact_decimal(number)
        if number is None:
            raise _error_at(path, "is a fraction without an exact decimal value: round it")
    _storable_number(number, path)
    return number


def with_builtins(value: Any) -> Any:
    """Return a deep copy of a storable value that has only builtin types and Decimals."""
    if isinstance(value, dict):
        return {key: with_builtins(item) for key, item in value.items()}
    if isinstance(value, list):
        return [with_builtins(item) for item in value]
    plain = value is None or isinstance(value, (str, *_NUMBERS)) or type(value) is Decimal
    return value if plain else _as_builtin(value, ())


def _storable_keys(document: dict[Any, Any], path: Path) -> None:
    with suppress(TypeError):  # a key is not text
        if not _UNSTORABLE_CHARACTER.search("".join(document)):
            return
    for key in document:  # pragma: no branch - one of the keys is wrong
        if not isinstance(key, str):
            raise _error_at(path, f"has a key of type {type_name(key)}; keys must be text")
        if _UNSTORABLE_CHARACTER.search(key):
            raise _error_at(path, "a key contains a NUL character or a lone surrogate")


def storable_signals(signals: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the signals, or a converted copy if some numbers or booleans are not builtin types.

    Raises:
        PydanticCustomError: JSONB cannot store a value; the message begins with the path inside the list.
    """
    converted: list[Any] = []
    for index, signal in enumerate(signals):
        _storable(signal, (index, ()), converted)
    return with_builtins(signals) if converted else signals


def _storable_from_python(signals: list[dict[str, Any]], info: ValidationInfo) -> list[dict[str, Any]]:
    return signals if info.mode == "json" else storable_signals(signals)


# From JSON, this checks the shape only: `exact_signals` checks the values after reading the numbers without loss.
Signals = Annotated[
    list[dict[str, Any]],
    Field(min_length=1, max_length=MAX_SIGNALS),
    AfterValidator(_storable_from_python),
]


def outline(text: str) -> str:
    """Return an archive event as JSON with empty signals. Its model finds the same errors in it as in the whole text.

    Raises:
        InvalidEvent: `text` is not JSON, or has too many fields.
    """
    try:
        document = from_json(text)
    except ValueError as error:
        raise InvalidEvent(f"Invalid JSON: {error}") from None
    except TypeError:
        return text  # it has a lone surrogate: the model reports that before it parses anything
    if not isinstance(document, dict):
        return json.dumps(_emptied(document))
    outlined = _emptied_members(document, "event")
    data = document.get("data")
    if isinstance(data, dict):
        outlined["data"] = _emptied_members(data, "data")
        signals = data.get("signals")
        if isinstance(signals, list):
            outlined["data"]["signals"] = [_emptied(signal) for signal in signals[: MAX_SIGNALS + 1]]
    return json.dumps(outlined, ensure_ascii=False)


_EMPTY: dict[type, Any] = {dict: {}, list: []}


def _emptied_members(members: dict[str, Any], field: str) -> dict[str, Any]:
    if len(members) > _MAX_MEMBERS:
        raise InvalidEvent.at(field, f"has more than {_MAX_MEMBERS} fields")
    return {name: _emptied(value) for name, value in members.items()}


def _emptied(value: Any) -> Any:
    """Return an empty object or array in place of any object or array."""
    return _EMPTY.get(type(value), value)


def exact_signals(text: str) -> list[dict[str, Any]]:
    """Return the signals of an archive event whose outline is valid. Numbers keep all digits.

    Raises:
        InvalidEvent: JSONB cannot store a value; the message says where it is.
    """
    # Pydantic's JSON reader converts numbers to binary floats; this one keeps the digits.
    try:
        return storable_signals(json.loads(text, parse_float=Decimal)["data"]["signals"])
    except PydanticCustomError as error:
        raise InvalidEvent(f"data.signals.{error.message()}", "data.signals") from None
    except (ArithmeticError, ValueError):
        raise InvalidEvent.at("data.signals", "has a number with too many digits") from None
