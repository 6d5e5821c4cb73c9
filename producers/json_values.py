"""Signals: JSON of any shape, as long as PostgreSQL's JSONB holds it without loss."""

from __future__ import annotations

import re
import sys
from decimal import Decimal
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationInfo
from pydantic_core import PydanticCustomError

from producers.fields import readable, refuse

MAX_NESTING = 50
MAX_SIGNALS = 20_000  # of 400 bytes each they fill the largest event
_NUMBERS = (int, float, Decimal)  # int | float | Decimal is made anew each time that it is evaluated
_MAX_FLOAT = sys.float_info.max
_MAX_DECIMAL = Decimal(repr(_MAX_FLOAT))
# PostgreSQL's numeric, which JSONB uses, keeps at most 16383 digits after the point.
_MIN_EXPONENT = -16383
_MAX_EXPONENT = 100_000  # only zeros have one above 308, and these PostgreSQL still takes
_UNSTORABLE_CHARACTER = re.compile("[\0\ud800-\udfff]")

# A path into a document, innermost step first: (step, rest). Made into text only for a message, since a document
# may have a hundred thousand leaves below one long key.
_Path = tuple[Any, ...]


def _refuse_at(path: _Path, reason: str) -> PydanticCustomError:
    steps = []
    while path:
        step, path = path
        steps.append(readable(str(step), 60))
    return refuse(f"{readable('.'.join(reversed(steps)), 200)}: {reason}")


def _storable_number(value: int | float | Decimal, path: _Path) -> None:
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


def _storable(value: Any, path: _Path, depth: int = 0) -> None:
    """Raise unless `value` is JSON that JSONB holds without loss; `path` leads to it in messages."""
    if isinstance(value, str):
        if _UNSTORABLE_CHARACTER.search(value):
            raise _refuse_at(path, "contains a NUL character or a lone surrogate")
    elif isinstance(value, bool) or value is None:
        pass
    elif isinstance(value, _NUMBERS):
        _storable_number(value, path)
    elif depth >= MAX_NESTING:
        raise _refuse_at(path, f"is nested deeper than {MAX_NESTING} levels")
    elif isinstance(value, dict):
        _storable_keys(value, path)
        for key, item in value.items():
            _storable(item, (key, path), depth + 1)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _storable(item, (index, path), depth + 1)
    else:
        raise _refuse_at(path, f"is of type {type(value).__name__}, which JSON does not have")


def _storable_keys(document: dict[Any, Any], path: _Path) -> None:
    for key in document:
        if not isinstance(key, str):
            raise _refuse_at(path, f"has a key that is not text but {type(key).__name__}")
        if _UNSTORABLE_CHARACTER.search(key):
            raise _refuse_at(path, "a key contains a NUL character or a lone surrogate")


def storable_signals(signals: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Raises PydanticCustomError, its message beginning with the path below the list."""
    for index, signal in enumerate(signals):
        _storable(signal, (index, ()))
    return signals


def _storable_from_python(signals: list[dict[str, Any]], info: ValidationInfo) -> list[dict[str, Any]]:
    return signals if info.mode == "json" else storable_signals(signals)


# From the wire only the shape: the contents are judged by decode, when it has read the numbers without loss.
Signals = Annotated[
    list[dict[str, Any]],
    Field(min_length=1, max_length=MAX_SIGNALS, strict=True),
    AfterValidator(_storable_from_python),
]
