"""Output of the commands: tables for people, JSON, NDJSON and CSV for programs."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import signal
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from datetime import UTC, datetime
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import simplejson
from rich.cells import cell_len
from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text
from simplejson import RawJSON

from consumers.row_texts import ndjson_line, plain

# A pipe has no width, so nothing is cut there.
_PIPE_COLUMNS = 250
_ONE_LINE_COLUMNS = 100_000
_SHOWN_DIFFERENCES = 10  # for each source
MOST_REJECTIONS = 1000  # a table needs all its rows in memory to find the width of its columns
_STATUS_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def _console(pipe_columns: int = _PIPE_COLUMNS) -> Console:
    return Console() if sys.stdout.isatty() else Console(width=pipe_columns)


def _print(what: Table | str, *, pipe_columns: int = _PIPE_COLUMNS) -> None:
    console = _console(pipe_columns)
    with console.capture() as captured:
        console.print(printable(what), markup=False, emoji=False) if isinstance(what, str) else console.print(what)
    # Remove the blanks that pad the last column of a table.
    sys.stdout.write("".join(line.rstrip() + "\n" for line in captured.get().splitlines()))


# Columns that a small window omits, in this order. A number that is cut off would be a wrong number.
_LESSER = (
    "example job",
    "first",
    "event",
    "rejected at",
    "latest",
    "host",
    "last event",
    "row",
    "month",
    "trades",
    "open",
    "invested",
    "date",
    "profit/loss",
    "balance",
    "portfolio",
)
# Columns that are wrapped instead, to no less than this width.
_FREE_TEXT = {"first signal": 12, "reason": 40, "missing": 12, "damage": 12}
_GAP = 2
_NUMBERS = {"row", "portfolio", "balance", "invested", "profit/loss", "value", "open", "trades", "signals"}
_NUMBERS |= {"stored", "duplicate", "rejected", "discarded", "withdrawn", "under way", "last", "from"}
_NUMBERS |= {"events", "read", "already there", "equal", "differences", "entries"}


def print_rows(columns: Sequence[str], rows: Sequence[Sequence[str]], otherwise: str) -> None:
    """Print a table that fits the window, or `otherwise` if there are no rows."""
    if not rows:
        _print(otherwise)
        return
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = {
        column: min(width, _FREE_TEXT.get(column, width))
        for column, cells in zip(columns, zip(columns, *rows, strict=True), strict=True)
        for width in [max(cell_len(cell) for cell in cells)]
    }
    left_out = set[str]()
    for name in _LESSER:
        needed = sum(width + _GAP for column, width in widths.items() if column not in left_out) - _GAP
        if needed <= _console().width:
            break
        left_out |= {name} & set(columns)
    table = _table(columns, rows, left_out)
    if left_out:
        table.caption = f"without: {', '.join(column for column in columns if column in left_out)}"
        table.caption_justify = "left"
    _print(table)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], left_out: Set[str]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        if column not in left_out:
            justify: JustifyMethod = "right" if column in _NUMBERS else "left"
            wrapped = column in _FREE_TEXT
            table.add_column(column, justify=justify, no_wrap=not wrapped, overflow="fold" if wrapped else "ellipsis")
    for row in rows:
        # As Text: rich would read brackets in a cell as styles.
        table.add_row(*(Text(cell) for column, cell in zip(columns, row, strict=True) if column not in left_out))
    return table


def print_snapshots(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a table of snapshots, the dicts of `get_portfolio_history`."""
    columns = ("row", "portfolio", "date", "at", "balance", "invested", "profit/loss", "value", "open", "trades")
    amounts = ("balance", "total_invested", "total_profit_loss", "total_value")
    cells = [
        (
            str(row["id"]),
            _portfolio(row["portfolio_id"]),
            str(row["snapshot_date"]),
            _moment(row["timestamp"]),
            *(f"{row[amount]:,.2f}" for amount in amounts),
            str(row["open_positions"]),
            str(row["trade_count"]),
        )
        for row in rows
    ]
    print_rows(columns, cells, "There are no portfolio snapshots.")


def print_archives(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a table of archives, the dicts of `get_recent_signal_archives`, each with its first signal."""
    cells = [
        (
            str(row["id"]),
            _portfolio(row["portfolio_id"]),
            _moment(row["archived_at"]),
            row["archive_month"],
            str(row["signals_count"]),
            _label(row["signals_data"][0]),
        )
        for row in rows
    ]
    columns = ("row", "portfolio", "archived at", "month", "signals", "first signal")
    print_rows(columns, cells, "There are no signal archives.")


def _label(signal: Mapping[str, Any]) -> str:
    label = " ".join(str(signal[name]) for name in ("action", "market_question") if signal.get(name))
    return label if len(label) <= 60 else label[:59] + "…"


def print_rejection_groups(groups: Sequence[Mapping[str, Any]], otherwise: str) -> None:
    """Print a table of groups of rejections and their total, or `otherwise` if there are none.

    On a terminal, a source is cut to what `--source` needs to find it.
    """
    shorten = sys.stdout.isatty()
    cells = [
        (
            f"{one['count']:,}",
            one["kind"] or "-",
            one["reason"],
            (_SOURCE_ID.sub(r"\1", one["source"]) if shorten else one["source"]) if one["source"] else "-",
            _moment(one["last_at"]),
            _moment(one["first_at"]),
            one["job_id"],
        )
        for one in groups
    ]
    print_rows(("events", "kind", "reason", "source", "latest", "first", "example job"), cells, otherwise)
    if groups:
        count = sum(one["count"] for one in groups)
        what = "1 event was" if count == 1 else f"{count:,} events were"
        varying = " … stands for parts that differ." if any("…" in one["reason"] for one in groups) else ""
        _print(f"{what} rejected.{varying}")


# The id of an outbox, behind its first 8 digits.
_SOURCE_ID = re.compile(r"(/[0-9a-f]{8})[0-9a-f]{8,}$")


def print_rejections(rejections: Iterable[Mapping[str, Any]], otherwise: str) -> int:
    """Print the first MOST_REJECTIONS rejections and the number of the others, or `otherwise` if there are none.

    Return the number of all.
    """
    left = iter(rejections)
    cells = [
        (one["job_id"], one["kind"] or "-", one["event_id"] or "-", _moment(one["created_at"]), one["reason"])
        for one in islice(left, MOST_REJECTIONS)
    ]
    more = sum(1 for _ in left)
    print_rows(("job", "kind", "event", "rejected at", "reason"), cells, otherwise)
    if more:
        _print(f"{more:,} more are not shown; --json prints all of them.")
    return len(cells) + more


def print_audit(audits: Sequence[Mapping[str, Any]]) -> None:
    """Print a table of the audited sources, then notes on the checked range and on copies of an outbox.

    Sources of an outbox on this host come first, then those with the newest events.
    """
    counts = ("stored", "duplicate", "rejected", "discarded", "withdrawn", "under way", "last")
    cells = []
    never = datetime.min.replace(tzinfo=UTC)
    for one in sorted(audits, key=lambda one: (one["host"] is not None, one["last_at"] or never), reverse=True):
        ranges = [str(first) if first == last else f"{first}-{last}" for first, last in one["missing"]]
        ranges += [f"{number} (another event)" for number in one["mismatched"]]
        missing = ", ".join(ranges[:5]) + (f" and {len(ranges) - 5} more" if len(ranges) > 5 else "") or "none"
        tail = "known" if one["tail_known"] else "unknown"
        cells.append(
            (
                one["source"],
                str(one["proven_from"]),
                *(str(one[count.replace(" ", "_")]) for count in counts),
                missing,
                tail,
                one["host"] or "-",
                "-" if one["last_at"] is None else _moment(one["last_at"].astimezone(UTC)),
            )
        )
    columns = ("source", "from", *counts, "missing", "tail", "host", "last event")
    print_rows(columns, cells, "No source has numbered events here.")
    if audits and audits[0]["since"] is not None:
        since = _moment(audits[0]["since"])
        _print(f"Checked: events recorded since {since}, in each source from the number in column `from` on.")
    for one in audits:
        if one["copied"]:
            shared = ", ".join(map(str, one["shared"][:5])) + (" and more" if len(one["shared"]) > 5 else "")
            used = f" Numbers with several events: {shared}." if shared else ""
            _print(
                f"{one['source']} was used by copies of one outbox.{used} To find gaps in it, run audit on the host of"
                " each copy."
            )


def print_comparison(source: str, content: Mapping[str, Any], with_what: str) -> None:
    """Print whether the events of a source have the content that the outbox or a seal has, and how they differ."""
    count = content["checked"]
    compared = f"{source}: {count:,} {'event' if count == 1 else 'events'} compared with {with_what}"
    if not content["differing"]:
        _print(f"{compared}, all are equal." if count else f"{compared}.")
        return
    _print(f"{compared}, {content['differing']:,} {'differs' if content['differing'] == 1 else 'differ'}:")
    for one in content["differences"][:_SHOWN_DIFFERENCES]:
        numbers = f"number {one['first']}" if one["first"] == one["last"] else f"numbers {one['first']}-{one['last']}"
        _print(f"  {numbers}: {one['problem']}")
    if len(content["differences"]) > _SHOWN_DIFFERENCES:
        _print(f"  --json shows the first {len(content['differences'])}.")


def print_import_statistics(statistics: Sequence[Mapping[str, Any]]) -> None:
    """Print a table of the imported files, then their notes."""
    counts = ("read", "stored", "already there", "rejected")
    cells = [
        (
            one["name"],
            *(f"{one[count.replace(' ', '_')]:,}" for count in counts),
            "see below" if one["damage"] else "none",
        )
        for one in statistics
    ]
    print_rows(("file", *counts, "damage"), cells, "There is nothing to import.")
    for one in statistics:
        if one["damage"]:
            print_text(printable(one["damage"]))  # not wrapped: it may contain a command
        for note, count in one["notes"].items():
            _print(f"{one['name']}: {note} ({count:,} times)")


def print_compared(compared: Sequence[Mapping[str, Any]]) -> None:
    """Print a table of the verified files."""
    counts = ("read", "equal", "differences")
    cells = [(one["name"], *(f"{one[count]:,}" for count in counts)) for one in compared]
    print_rows(("file", *counts), cells, "There is nothing to compare.")


Values = Mapping[str, Any] | Sequence[tuple[str, Any]]


def print_values(values: Values) -> None:
    """Print names and values, one per line."""
    _print(values_table(values))


def values_table(values: Values) -> Table:
    """Return a table of names and values; a small window wraps the values."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    for name, value in values.items() if isinstance(values, Mapping) else values:
        table.add_row(name.replace("_", " "), Text(printable(_value_text(value))))
    return table


def _value_text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(value) or "-"
    return "-" if value is None else str(value)


def print_checks(checks: Sequence[Mapping[str, Any]]) -> None:
    """Print one line per check; in a window the last column may be wrapped."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for column in ("status", "name", "found"):
        table.add_column(no_wrap=column != "found")
    for one in checks:
        found = Text(printable(one["found"]))
        if one["advice"]:
            found.append(f" → {printable(one['advice'])}", style="bold")
        table.add_row(Text(one["status"], style=_STATUS_STYLES[one["status"]]), Text(printable(one["name"])), found)
    _print(table, pipe_columns=_ONE_LINE_COLUMNS)
    counts = Counter(one["status"] for one in checks)
    _print(f"{counts['ok']} ok, {counts['warn']} warn, {counts['fail']} fail")


def print_json(value: Any) -> None:
    """Print indented JSON; values that JSON does not have are printed as text, times as RFC 3339."""
    print_text(json_text(value, indent=2))


def json_text(value: Any, *, indent: int | None = None) -> str:
    """Return JSON, in which values that it does not have are text, times as RFC 3339, and RawJSON is as it is."""
    return simplejson.dumps(
        value,
        default=lambda other: str(plain(other)),
        ensure_ascii=False,
        indent=indent,
        use_decimal=False,
        allow_nan=True,
        namedtuple_as_object=False,
    )


def print_json_array(values: Iterable[Any]) -> int:
    """Print the values as `print_json` prints a list, one by one as they arrive. Return their number."""
    count = 0
    for count, value in enumerate(values, 1):
        sys.stdout.write("[" if count == 1 else ",")
        lines = json_text(value, indent=2).split("\n")
        sys.stdout.write("".join(f"\n  {escaped(line)}" for line in lines))
    sys.stdout.write("\n]\n" if count else "[]\n")
    return count


def print_text(text: str) -> None:
    """Print a text with its line breaks; characters that would control the terminal are escaped."""
    sys.stdout.write(escaped(text) + "\n")


def _portfolio(portfolio_id: int | None) -> str:
    return "-" if portfolio_id is None else str(portfolio_id)


def _moment(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S}Z"


def print_exact_json(columns: Sequence[str], rows: Iterable[Sequence[Any]], document: str | None) -> None:
    """Print rows as `print_json` prints a list of dicts, one by one as they arrive; all numbers are exact."""

    def exact(name: str, value: Any) -> Any:
        if isinstance(value, Decimal):
            return RawJSON(plain(value))
        return json.loads(value, parse_float=RawJSON, parse_int=RawJSON) if name == document else value

    print_json_array({name: exact(name, value) for name, value in zip(columns, row, strict=True)} for row in rows)


def print_csv(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print CSV (RFC 4180, UTF-8) with a header: exact amounts, RFC 3339 times, an empty field for NULL."""
    with _pipe() as out:
        writer = csv.writer(out)
        writer.writerow(columns)
        writer.writerows([plain(value) for value in row] for row in rows)


def print_ndjson(columns: Sequence[str], rows: Iterable[Sequence[Any]], document: str | None) -> None:
    """Print one JSON object per line, see `ndjson_line`."""
    with _pipe() as out:
        out.writelines(ndjson_line(columns, row, document) for row in rows)


@contextmanager
def _pipe() -> Iterator[TextIO]:
    """Yield standard output, in UTF-8, for many rows.

    If the reader closes the pipe, the process exits with 141, the status of a program that SIGPIPE ended.
    """
    try:
        # Not sys.stdout's buffer: the interpreter would try again at exit to write the rest of it.
        with open(sys.stdout.fileno(), "w", encoding="utf-8", newline="", closefd=False) as out:
            yield out
    except BrokenPipeError:
        raise SystemExit(128 + signal.SIGPIPE) from None


def print_exported(directory: Path, exported: Mapping[str, Any]) -> None:
    """Print a table of the exported files and the number of all entries."""
    print_rows(("file", "entries"), [(one["file"], f"{one['entries']:,}") for one in exported["files"]], "No files.")
    files = f"{len(exported['files'])} file{'s' if len(exported['files']) > 1 else ''}"
    sys.stdout.write(f"\n{exported['entries']:,} entries in {files} in {directory}\n")


# Text from events may contain characters that control the terminal.
_NOT_PLAIN = re.compile(r"[^ -~]")
_JOINERS = "\u200c\u200d"  # join letters, and emoji


def printable(text: str) -> str:
    """Return `text` as one line, with � in place of each control character and other unprintable one."""
    return _NOT_PLAIN.sub(lambda found: found[0] if _is_printable(found[0]) else "�", text)


def escaped(text: str) -> str:
    """Return `text` with unprintable characters as JSON escapes; line breaks and tabs stay. JSON keeps its value."""
    return _NOT_PLAIN.sub(
        lambda found: found[0] if found[0] in "\n\t" or _is_printable(found[0]) else json.dumps(found[0])[1:-1], text
    )


def print_any_character() -> None:
    """Make standard output write each character that its encoding does not have as a JSON escape.

    Otherwise a title with an umlaut would raise UnicodeEncodeError on a terminal that has only ASCII.
    """
    codecs.register_error("json-escape", _json_escapes)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="json-escape")


def _json_escapes(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)  # output is only encoded
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


def _is_printable(character: str) -> bool:
    # Python calls the spaces of other alphabets (category Zs) not printable.
    return character.isprintable() or character in _JOINERS or unicodedata.category(character) == "Zs"
