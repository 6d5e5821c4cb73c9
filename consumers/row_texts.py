"""Values of rows as text for programs: one spelling in CSV, NDJSON and JSON.

An amount has all its digits, no exponent and no trailing zeros. A time is RFC 3339 with `T` and offset.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import date
from decimal import Decimal
from typing import Any
from uuid import UUID

from producers.fields import money_text

# Some readers end a line at U+0085, U+2028 or U+2029. The others control a terminal or the direction of text.
_ESCAPED = re.compile("[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")

_encoded = json.JSONEncoder(ensure_ascii=False).encode  # json.dumps would make an encoder for each value


def plain(value: Any) -> Any:
    """Return an amount, a time, a date or an id as text, and any other value unchanged."""
    if isinstance(value, Decimal):
        return money_text(value)
    if isinstance(value, date):  # a datetime is one too
        return value.isoformat()
    return str(value) if isinstance(value, UUID) else value


def ndjson_line(columns: Sequence[str], values: Sequence[Any], document: str | None) -> str:
    r"""Return a row as one JSON object on a line that ends with `\n`.

    Amounts are strings, because most readers of JSON turn a number into a float. The column `document` is JSON text,
    as PostgreSQL writes it, and becomes a nested value with all its digits.
    """
    members = [
        f"{json.dumps(name)}: {value if name == document else _encoded(plain(value))}"
        for name, value in zip(columns, values, strict=True)
    ]
    # Outside of strings JSON has none of these characters.
    return _ESCAPED.sub(lambda found: f"\\u{ord(found[0]):04x}", f"{{{', '.join(members)}}}") + "\n"
