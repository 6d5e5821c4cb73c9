"""Changes of JSON as a tree. Changes of single bytes rarely keep a document valid, and never move a whole value."""

from __future__ import annotations

import json
import random
from decimal import Decimal
from typing import Any

import simplejson

_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1.5, -0.0, 2**31, 2**63, -(2**63), 10**400, 5e-324, 1e308, float("nan"), float("inf")),
    *(Decimal("1E-16383"), Decimal("1E-16384"), Decimal("0E+99999"), Decimal("1E+309"), Decimal("0.000000005")),
    *("", "\0", "\ud800", "\u2028", "\x85", "é", "1e5", " 1 ", "NaN", "1_000", "٣", "٠.٥", "٢٠٢٦-٠٥-٠١", "9" * 30),
    *("1970-01-01T00:00:00Z", "9998-12-31T23:59:59.999999-23:59", "9999-12-31T23:59:59Z", "0001-01-01", "9999-12-31"),
    *("2026-10-25T02:30:00", "2026-03-29T02:30:00", "2026-W10-1", "20261122T180246", "2026-11-22T24:00:00"),
    *("1790000000", 1_790_000_000, 1_790_000_000_000, 1.79e9, "2026-05-01 10:00:00 UTC", "2026-05-01T10:00,5"),
    *([], {}, [[]], [{}], {"": {}}, {"a": [None]}, [[1, 2], [3]]),
)  # fmt: skip
_NAMES = (
    *("", "a", "timestamp", "archived_at", "signals", "signals_data", "portfolio_id", "history", "snapshots", "date"),
    *("snapshot_date", "balance", "type", "data", "sequence", "time", "\0", "\ud800", "é", "a" * 70, "archive_month"),
)  # fmt: skip
_PLACE = tuple[Any, Any]  # a container and a key or index in it


def mutated(text: str, chance: random.Random) -> str:
    """Return a JSON text with one or a few changes of its tree.

    Raises:
        ValueError, RecursionError: `text` is not JSON.
    """
    root = [json.loads(text, parse_float=Decimal)]
    for _ in range(chance.choice((1, 1, 2, 4))):
        _change(root, chance)
    plain = chance.random() < 0.8
    return simplejson.dumps(root[0], use_decimal=True, allow_nan=True, ensure_ascii=plain)


def _change(root: list[Any], chance: random.Random) -> None:
    """Change one value below `root`, a list of the whole document. Wrap it if the chosen change does not suit it."""
    places: list[_PLACE] = []
    _collect(root, places)
    container, key = chance.choice(places)
    value = container[key]
    match chance.randrange(7):
        case 0:
            container[key] = chance.choice(_VALUES)
        case 1 if container is not root:
            del container[key]
        case 2:
            other, name = chance.choice(places)
            container[key] = json.loads(
                simplejson.dumps(other.get(name) if isinstance(other, dict) else other[name], use_decimal=True),
                parse_float=Decimal,
            )
        case 3 if isinstance(value, dict):
            value[chance.choice(_NAMES)] = chance.choice(_VALUES)
        case 3 | 4 if isinstance(value, list):
            value.insert(chance.randrange(len(value) + 1), chance.choice([*_VALUES, *value]))
        case 4 if isinstance(container, dict):
            container[chance.choice(_NAMES)] = container.pop(key)
        case 5 if isinstance(value, str) and value:
            at = chance.randrange(len(value))
            container[key] = (
                value[:at]
                + chance.choice(("", "\0", "\ud800", "é", " ", "0", "+", "Z", "\n"))
                + value[at + chance.randrange(2) :]
            )
        case 5 if isinstance(value, int | Decimal):
            container[key] = value * chance.choice((-1, 10, 10**8, 0)) + chance.choice((-1, 0, 1))
        case _:
            wrapped = [value] if chance.random() < 0.5 else {chance.choice(_NAMES): value}
            container[key] = wrapped


def _collect(container: Any, places: list[_PLACE]) -> None:
    for key, value in list(container.items()) if isinstance(container, dict) else list(enumerate(container)):
        places.append((container, key))
        if isinstance(value, dict | list):
            _collect(value, places)
