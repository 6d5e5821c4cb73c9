"""Rows and facts as tables for a person."""

from __future__ import annotations

import csv
import json
import signal
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from producers.fields import money_text

# A pipe has no width to fit: nothing is cut there.
_PIPE_COLUMNS = 250
_ONE_LINE_COLUMNS = 100_000
_STATUS_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def _print(what: Table | str, *, pipe_columns: int = _PIPE_COLUMNS) -> None:
    console = Console() if sys.stdout.isatty() else Console(width=pipe_columns)
    with console.capture() as captured:
        console.print(what, markup=False) if isinstance(what, str) else console.print(what)
    # Without the blanks that fill a table's last column.
    sys.stdout.write("".join(line.rstrip() + "\n" for line in captured.get().splitlines()))


def print_snapshots(rows: Sequence[Mapping[str, Any]]) -> None:
    table = _table("row", "portfolio", "date", "at", "balance", "invested", "profit/loss", "value", "open", "trades")
    for row in rows:
        amounts = (row["balance"], row["total_invested"], row["total_profit_loss"], row["total_value"])
        table.add_row(
            str(row["id"]),
            _portfolio(row["portfolio_id"]),
            str(row["snapshot_date"]),
            f"{row['timestamp']:%Y-%m-%d} {_clock(row['timestamp'])}",
            *(f"{amount:,.2f}" for amount in amounts),
            str(row["open_positions"]),
            str(row["trade_count"]),
        )
    _print(table if rows else "There are no portfolio snapshots.")


def print_archives(rows: Sequence[Mapping[str, Any]]) -> None:
    table = _table("row", "portfolio", "archived at", "month", "signals", "first signal")
    for row in rows:
        first = row["signals_data"][0]
        label = " ".join(str(first[name]) for name in ("action", "market_question") if first.get(name))
        table.add_row(
            str(row["id"]),
            _portfolio(row["portfolio_id"]),
            f"{row['archived_at']:%Y-%m-%d} {_clock(row['archived_at'])}",
            row["archive_month"],
            str(row["signals_count"]),
            label if len(label) <= 60 else label[:59] + "…",
        )
    _print(table if rows else "There are no signal archives.")


def print_rejections(rejections: Sequence[Mapping[str, Any]]) -> None:
    table = _table("job", "kind", "event", "at", "reason")
    for one in rejections:
        moment = f"{one['created_at']:%Y-%m-%d} {_clock(one['created_at'])}"
        table.add_row(one["job_id"], one["kind"] or "-", one["event_id"] or "-", moment, one["reason"])
    _print(table if rejections else "Nothing was rejected.")


def print_audit(audits: Sequence[Mapping[str, Any]]) -> None:
    columns = ("stored", "absorbed", "rejected", "discarded", "under way", "last")
    table = _table("source", *columns, "missing", "tail")
    for one in audits:
        ranges = [str(first) if first == last else f"{first}-{last}" for first, last in one["missing"]]
        ranges += [f"{number} (another event)" for number in one["mismatched"]]
        table.add_row(
            one["source"],
            *(str(one[column.replace(" ", "_")]) for column in columns),
            ", ".join(ranges[:5]) + (f" and {len(ranges) - 5} more" if len(ranges) > 5 else "") or "none",
            "known" if one["tail_known"] else "unknown",
        )
    _print(table if audits else "No source has numbered events here.")


def print_tallies(tallies: Sequence[Mapping[str, Any]]) -> None:
    table = _table("file", "read", "stored", "already there", "rejected", "damage")
    for one in tallies:
        counts = (one[name] for name in ("read", "stored", "already_there", "rejected"))
        table.add_row(one["name"], *(f"{count:,}" for count in counts), one["damage"] or "none")
    _print(table)
    for one in tallies:
        for note, count in one["notes"].items():
            _print(f"{one['name']}: {note} ({count:,} times)")


def print_compared(compared: Sequence[Mapping[str, Any]]) -> None:
    table = _table("file", "read", "equal", "differences")
    for one in compared:
        table.add_row(one["name"], *(f"{one[name]:,}" for name in ("read", "equal", "differences")))
    _print(table)


def print_facts(facts: Mapping[str, Any]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in facts.items():
        table.add_row(name.replace("_", " "), "-" if value is None else str(value))
    _print(table)


def print_checks(checks: Sequence[Mapping[str, Any]]) -> None:
    """One line a check in a pipe; in a window the last column may take several."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for column in ("status", "name", "found"):
        table.add_column(no_wrap=column != "found")
    for one in checks:
        # As Text: what was found may have brackets, which would be styles.
        found = Text(_printable(one["found"]))
        if one["advice"]:
            found.append(f" → {_printable(one['advice'])}", style="bold")
        table.add_row(Text(one["status"], style=_STATUS_STYLES[one["status"]]), one["name"], found)
    _print(table, pipe_columns=_ONE_LINE_COLUMNS)
    counts = Counter(one["status"] for one in checks)
    _print(f"{counts['ok']} fine, {counts['warn']} to look at, {counts['fail']} wrong")


def _printable(text: str) -> str:
    """Reasons and names come from others: what would steer the terminal is shown as a mark."""
    return "".join(character if character.isprintable() else "�" for character in text)


def print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, default=str, ensure_ascii=False, indent=2) + "\n")


def print_csv(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """RFC 4180 in UTF-8 with a header; amounts with every digit, times in ISO 8601 with offset, nothing for NULL.

    When the reader closes the pipe, this ends the process like the signal that a program in C dies of.
    """
    try:
        # A buffer of its own: what cannot be written any more must not be tried again at the end of the process.
        with open(sys.stdout.fileno(), "w", encoding="utf-8", newline="", closefd=False) as out:
            writer = csv.writer(out)
            writer.writerow(columns)
            writer.writerows([_csv_value(value) for value in row] for row in rows)
    except BrokenPipeError:
        raise SystemExit(128 + signal.SIGPIPE) from None


def _csv_value(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    return money_text(value) if isinstance(value, Decimal) else value


def print_exported(directory: Path, exported: Mapping[str, Any]) -> None:
    table = _table("file", "entries")
    for one in exported["files"]:
        table.add_row(one["file"], f"{one['entries']:,}")
    _print(table)
    files = f"{len(exported['files'])} file{'s' if len(exported['files']) > 1 else ''}"
    sys.stdout.write(f"\n{exported['entries']:,} entries in {files} in {directory}\n")


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    numbers = {"row", "portfolio", "balance", "invested", "profit/loss", "value", "open", "trades", "signals"}
    numbers |= {"read", "already there", "equal", "differences"}
    numbers |= {"stored", "absorbed", "rejected", "discarded", "under way", "last", "entries"}
    for column in columns:
        # Only free text may be cut when the window is narrow.
        free = column in ("first signal", "reason", "missing", "damage")
        table.add_column(column, justify="right" if column in numbers else "left", no_wrap=not free)
    return table


def _portfolio(portfolio_id: int | None) -> str:
    return "-" if portfolio_id is None else str(portfolio_id)


def _clock(moment: datetime) -> str:
    return f"{moment:%H:%M:%S}Z"
