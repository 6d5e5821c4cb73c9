"""Cursors: the keys of a page's last row as opaque text. A client sends one to get the next page."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from datetime import UTC, date, datetime, timedelta
from hashlib import blake2b
from typing import Any

from consumers.web.api.problems import Problem

MAX_LENGTH = 200
_CHECK_BYTES = 4
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


def encode_cursor(kind: str, place: Mapping[str, Any]) -> str:
    """Return the cursor of a row of the query `kind`. `place` has the row's keys: dates, aware times and integers."""
    payload = json.dumps([kind, *(_plain(value) for value in place.values())], separators=(",", ":")).encode()
    return _text(_check(payload) + payload)


def decode_cursor(kind: str, keys: tuple[str, ...], text: str) -> dict[str, Any]:
    """Return the keys that `encode_cursor` was given.

    Raises:
        Problem: 422, the cursor was changed, or belongs to another query.
    """
    try:
        raw = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
        check, payload = raw[:_CHECK_BYTES], raw[_CHECK_BYTES:]
        if check != _check(payload) or _text(raw) != text:
            raise ValueError
        given, *values = json.loads(payload)
        if given != kind:
            raise _problem("belongs to another endpoint, or to another value of daily")
        return {name: _typed(name, value) for name, value in zip(keys, values, strict=True)}
    except (binascii.Error, ValueError, TypeError, OverflowError):
        raise _problem("is not a cursor of this API") from None


def _problem(reason: str) -> Problem:
    return Problem(422, f"cursor: {reason}", errors=[{"parameter": "cursor", "reason": reason}])


def _text(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def _check(payload: bytes) -> bytes:
    # Finds typing errors and truncated links. It needs no secret key: the keys of a row are not secret.
    return blake2b(payload, digest_size=_CHECK_BYTES).digest()


def _plain(value: Any) -> str | int:
    if isinstance(value, datetime):
        return (value - _EPOCH) // _MICROSECOND
    return value.isoformat() if isinstance(value, date) else int(value)


def _typed(name: str, value: Any) -> Any:
    if name == "snapshot_date":
        return date.fromisoformat(value)
    if type(value) is not int or not -(2**63) <= value < 2**63:
        raise ValueError
    return _EPOCH + value * _MICROSECOND if name in ("timestamp", "archived_at") else value
