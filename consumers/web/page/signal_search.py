"""Search for a text in the signals of archives.

It is done in Python: whether PostgreSQL treats Ö and ö as the same letter depends on the locale of the database.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from consumers.db.archive_queries import Archive

MOST_FOUND = 50
MOST_FIELDS = 64
MOST_CHARACTERS = 2_000
# A request that has read this much answers with what it has found and where to continue.
MOST_ARCHIVES = 2_000
_MOST_BYTES = 16 * 2**20
_PIECE = 2**16


@dataclass(frozen=True)
class Place:
    """Position of a signal; a search continues after it. `number` counts from 1 within the archive."""

    archived_at: datetime
    archive: int
    number: int


@dataclass(frozen=True)
class Found:
    """Signals found, in the order of the search, and the position after which to continue; None if all were read."""

    signals: list[dict[str, Any]]
    after: Place | None


def find(archives: Iterator[Archive], wanted: str, start: Place | None) -> Found:
    """Return at most 50 signals after `start` that have the text `wanted` in a value, in any letter case."""
    found: list[dict[str, Any]] = []
    read_bytes = 0
    last: Place | None = None
    for read_archives, archive in enumerate(archives, start=1):
        past = start.number if start and start.archive == archive.id else 0
        signals = _parsed(archive.signals) if _may_have(archive.signals, wanted) else []
        for number, signal in enumerate(signals, start=1):
            if number <= past or not _has(signal, wanted.casefold()):
                continue
            if len(found) == MOST_FOUND:
                return Found(found, last)
            last = Place(archive.archived_at, archive.id, number)
            found.append(_shown(archive, number, signal))
        last = Place(archive.archived_at, archive.id, _END)
        read_bytes += len(archive.signals)
        if read_archives == MOST_ARCHIVES or read_bytes > _MOST_BYTES:
            return Found(found, last)
    return Found(found, None)


_END = 2**31 - 1  # after the last signal of any archive


class _Number(str):
    """Number with its original digits; a float would drop some."""

    __slots__ = ()


def _may_have(signals: str, wanted: str) -> bool:
    """Return False only if no value contains `wanted`, to avoid parsing. A text that JSON may escape gives True."""
    if not wanted.isprintable() or '"' in wanted or "\\" in wanted:
        return True
    folded = wanted.casefold()
    # In pieces, because casefold needs up to twelve bytes per character.
    pieces = (signals[at : at + _PIECE + len(folded)] for at in range(0, len(signals), _PIECE))
    return any(folded in piece.casefold() for piece in pieces)


def _parsed(signals: str) -> list[dict[str, Any]]:
    return list(json.loads(signals, parse_float=_Number, parse_int=_Number))


def _text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else _written(value)


def _written(value: Any) -> str:
    """Return a value as JSON text."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_written(name)}: {_written(one)}" for name, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_written, value)) + "]"
    return str(value) if isinstance(value, _Number) else json.dumps(value, ensure_ascii=False)


def _has(signal: dict[str, Any], wanted: str) -> bool:
    return not wanted or any(wanted in (_text(value) or "").casefold() for value in signal.values())


def _shown(archive: Archive, number: int, signal: dict[str, Any]) -> dict[str, Any]:
    fields = [(name, _text(value)) for name, value in list(signal.items())[:MOST_FIELDS]]
    return {
        "archive": archive.id,
        "archived_at": archive.archived_at,
        "portfolio": archive.portfolio,
        "number": number,
        "fields": {name: _cut(value) for name, value in fields},
    }


def _cut(value: str | None) -> str | None:
    return value if value is None or len(value) <= MOST_CHARACTERS else value[:MOST_CHARACTERS] + "…"
