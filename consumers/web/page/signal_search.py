"""The signals inside archives, searched for a text.

Here and not in SQL: whether PostgreSQL knows that Ö and ö are one letter depends on how its database was made.
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
# One request reads no more than this before it answers with where to go on.
MOST_ARCHIVES = 2_000
_MOST_BYTES = 16 * 2**20
_PIECE = 2**16


@dataclass(frozen=True)
class Place:
    """A signal's place, and where a search goes on after it: `number` counts from 1 in its archive."""

    archived_at: datetime
    archive: int
    number: int


@dataclass(frozen=True)
class Found:
    """Signals in the order of the search, and where it goes on; None when everything was read."""

    signals: list[dict[str, Any]]
    after: Place | None


def find(archives: Iterator[Archive], wanted: str, start: Place | None) -> Found:
    """The signals, from `start` on, of which a value has this text in it, whatever its case; at most 50."""
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


_END = 2**31 - 1  # of an archive: no signal is numbered so


class _Number(str):
    """A number with the digits that it came with; a float would drop some."""

    __slots__ = ()


def _may_have(signals: str, wanted: str) -> bool:
    """False if no value has it, so that parsing is not needed; True also for texts that JSON may escape."""
    if not wanted.isprintable() or '"' in wanted or "\\" in wanted:
        return True
    folded = wanted.casefold()
    # In pieces: casefold takes twelve bytes a character.
    pieces = (signals[at : at + _PIECE + len(folded)] for at in range(0, len(signals), _PIECE))
    return any(folded in piece.casefold() for piece in pieces)


def _parsed(signals: str) -> list[dict[str, Any]]:
    return list(json.loads(signals, parse_float=_Number, parse_int=_Number))


def _text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else _written(value)


def _written(value: Any) -> str:
    """As JSON."""
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
