"""Digests of the content of events: what an outbox keeps of an event after it has deleted the entry.

A digest is made of values, not of bytes: the same event has the same digest in the outbox, in its row and in a
withdrawal. consumers/ops/CONTENT.md describes the canonical text and how digests are chained, with test vectors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, date, datetime
from decimal import Decimal
from hashlib import sha256
from typing import Any
from uuid import UUID

from producers.errors import InvalidEvent
from producers.event_kinds import Payload
from producers.events import KINDS, decode

# Marks a number in JSON text. The contract forbids lone surrogates, so no other text has one.
_NUMBER_MARK = "\ud800"


def canonical_text(event_type: str, event_id: UUID, columns: Mapping[str, Any]) -> str:
    """Return the JSON text that stands for an event: its type, its id, and its columns that are not None.

    Keys are sorted by code point, there is no white space, and only quotes, backslashes and control characters are
    escaped. A number has no exponent, no plus sign, no zeros at the end of its decimals, and zero has no sign. A time
    is text in UTC with microseconds. Numbers in `columns` are of type int or Decimal.
    """
    given = {name: value for name, value in columns.items() if value is not None}
    text = _ENCODER.encode([event_type, str(event_id), given])
    return text.replace(f'"{_NUMBER_MARK}', "").replace(f'{_NUMBER_MARK}"', "")


def _canonical_value(value: Any) -> str:
    if isinstance(value, Decimal):
        return f"{_NUMBER_MARK}{_plain_notation(value)}{_NUMBER_MARK}"
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat(timespec="microseconds")
    if isinstance(value, date):
        return value.isoformat()
    raise TypeError(f"a value of type {type(value).__name__} has no canonical text")


def _plain_notation(number: Decimal) -> str:
    if not number:
        return "0"
    text = format(number, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), sort_keys=True, default=_canonical_value)


def digest_of(event_type: str, event_id: UUID, columns: Mapping[str, Any]) -> bytes:
    """Return the SHA-256 digest of the canonical text."""
    return sha256(canonical_text(event_type, event_id, columns).encode()).digest()


def digest_of_text(event_type: str, text: str) -> bytes:
    """Return the digest of the event in `text`; if it breaks the contract, that of the text itself.

    An entry's event breaks the contract only if another version of this program has recorded it.
    """
    try:
        payload = decode(text, KINDS[event_type].model).data
        return digest_of(payload.type, payload.event_id, columns_of(payload))
    except (InvalidEvent, KeyError):
        return sha256(json.dumps(["unreadable", text]).encode()).digest()


def columns_of(payload: Payload) -> dict[str, Any]:
    """Return the columns of a payload's row by name."""
    return {column.name: getattr(payload, column.field) for column in KINDS[payload.type].columns}
