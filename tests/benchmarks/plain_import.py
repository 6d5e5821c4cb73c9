"""Limit of the import: decode the same files with the standard library and insert their rows, without validating.

The benchmark `import` runs it as a program: `python -m tests.benchmarks.plain_import FOLDER`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy import TextClause, text

from consumers.db.engine import engine
from consumers.legacy.legacy_json import SNAPSHOTS_FILE, history_files

_ROWS_A_STATEMENT = 500
_Entry = dict[str, Any]


def _insert(table: str, columns: dict[str, str]) -> TextClause:
    names = ", ".join(f'"{name}"' for name in columns)
    arrays = ", ".join(f"CAST(:{name} AS {kind}[])" for name, kind in columns.items())
    return text(f"""
        INSERT INTO {table} (event_id, source, portfolio_id, {names})
        SELECT gen_random_uuid(), 'import/plain', 1, * FROM unnest({arrays})
    """)  # from the constants below


_SNAPSHOTS = _insert(
    "portfolio_history",
    {
        "sequence": "bigint",
        "snapshot_date": "date",
        "timestamp": "timestamptz",
        "balance": "numeric",
        "total_invested": "numeric",
        "total_profit_loss": "numeric",
        "total_value": "numeric",
        "open_positions": "integer",
        "trade_count": "integer",
    },
)
_ARCHIVES = _insert(
    "signal_archives",
    {
        "sequence": "bigint",
        "archived_at": "timestamptz",
        "archive_month": "text",
        "signals_count": "integer",
        "signals_data": "jsonb",
    },
)
_SAME_NAMES = (
    "timestamp", "balance", "total_invested", "total_profit_loss", "total_value", "open_positions", "trade_count",
)  # fmt: skip


def _snapshot_columns(entries: list[_Entry]) -> dict[str, list[Any]]:
    same = {name: [entry[name] for entry in entries] for name in _SAME_NAMES}
    return same | {"snapshot_date": [entry["date"] for entry in entries]}


def _archive_columns(entries: list[_Entry]) -> dict[str, list[Any]]:
    return {
        "archived_at": [entry["archived_at"] for entry in entries],
        "archive_month": [entry["archived_at"][:7] for entry in entries],
        "signals_count": [entry["signals_count"] for entry in entries],
        "signals_data": [json.dumps(entry["signals"]) for entry in entries],
    }


def plain_import(folder: Path) -> None:
    """Insert all entries, one statement and commit for each 500."""
    for path in history_files(folder):
        entries = json.loads(path.read_bytes())
        if path.name == SNAPSHOTS_FILE:
            _insert_all(_SNAPSHOTS, entries, _snapshot_columns)
        else:
            _insert_all(_ARCHIVES, entries, _archive_columns)


def _insert_all(
    statement: TextClause, entries: list[_Entry], columns: Callable[[list[_Entry]], dict[str, list[Any]]]
) -> None:
    with engine().connect() as db:
        for first in range(0, len(entries), _ROWS_A_STATEMENT):
            batch = entries[first : first + _ROWS_A_STATEMENT]
            db.execute(statement, columns(batch) | {"sequence": list(range(first, first + len(batch)))})
            db.commit()


if __name__ == "__main__":
    plain_import(Path(sys.argv[1]))
