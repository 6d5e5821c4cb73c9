"""Target `import`: bytes as an old history file, through reading, conversion, report, and the import itself.

The first byte chooses options, the rest is the file. Invariants: reading ends with entries or named damage. If another
JSON reader reads the file, no entry is lost: each is read, or the damage is named. Each entry becomes an event that a
worker decodes as the same event, or a line of the report. The size of a block makes no difference. A stored import
decides each entry, and a second one adds nothing.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from datetime import datetime, timedelta
from decimal import Decimal, InvalidOperation
from itertools import takewhile
from pathlib import Path
from typing import Any
from unittest.mock import patch
from zoneinfo import ZoneInfo

import simplejson

from consumers.legacy import json_arrays
from consumers.legacy.entries_in_progress import EntriesInProgress
from consumers.legacy.import_report import Report
from consumers.legacy.importer import Importer, dry_run
from consumers.legacy.json_arrays import Damaged, read_entries
from consumers.legacy.legacy_json import SNAPSHOTS_FILE, archives_file
from consumers.legacy.old_history import OldHistory, file_sources
from consumers.legacy.verification import Verification
from producers.errors import InvalidEvent
from producers.events import decode, encode
from tests.factories import a_signal, an_old_archive, an_old_snapshot
from tests.fuzz.event_texts import check_message, exact
from tests.fuzz.invariants import require

_ZONE = ZoneInfo("Europe/Berlin")
_MARK = "\ufeff"  # byte order mark
_BLANKS = " \t\n\r" + _MARK
_ARRAYS = ("history", "portfolio_history", "snapshots", "signals")
_ARCHIVES, _NAN_AS_NULL, _PORTFOLIO, _SMALL_BLOCKS = 1, 2, 4, 8  # bits of the first byte
_MOMENT = datetime(2026, 10, 25, 2, 30, 0, 123456)  # in the hour that occurs twice


def seeds() -> Iterator[bytes]:
    """Yield files of each shape that is read, and of some that are not."""
    snapshots = [an_old_snapshot(_MOMENT + timedelta(minutes=20 * n)) for n in range(3)]
    archives = [
        an_old_archive(_MOMENT, [a_signal()]),
        an_old_archive(_MOMENT, [{"a": float("nan")}, {"b": [1e400, None]}]),
    ]
    odd: list[Any] = [
        an_old_snapshot(_MOMENT, timestamp=1_790_000_000, balance="1,5", trade_count="2"),
        an_old_snapshot(_MOMENT, timestamp="2026-05-01 10:00:00 UTC", date=None, portfolio_id="1", more={"x": []}),
        an_old_snapshot(_MOMENT, timestamp="05/06/2026", open_positions=1e3),
        an_old_snapshot(_MOMENT, timestamp="2026-05-01T10:00:00+0200", balance=1e999),
        *(5, None, [], "x"),
    ]
    for option, entries in (
        (b"0", snapshots),
        (b"1", archives),
        (b"3", archives),
        (b"<", odd),
        (b"8", odd),
        (b"9", odd),
    ):
        yield option + json.dumps(entries).encode()
        yield option + simplejson.dumps(entries, indent=1, ensure_ascii=False, allow_nan=True).encode()
        yield option + b"\n".join(json.dumps(one).encode() for one in entries)
        for name in _ARRAYS:
            yield option + json.dumps({"version": 1, name: entries, "more": []}).encode()
        yield option + json.dumps({"history": entries, "snapshots": entries}).encode()
        yield option + b"\xef\xbb\xbf" + json.dumps(entries).encode()[:-9]
        yield option + b",".join(json.dumps(one).encode() for one in entries)
        yield option + json.dumps(entries).encode() + b",,\n\xef\xbb\xbf" + json.dumps(entries[:1]).encode() + b","
        yield option + json.dumps({"history": entries}).encode() + json.dumps({"snapshots": entries}).encode()
    for content in (
        "",
        "[]",
        " [ ] x",
        "{}",
        "[1",
        "[-",
        "[tru",
        '["\\u12',
        '{"a',
        "NaN",
        "[[[[",
        "[" * 990 + "]" * 990,
        "<html>",
        "a,b\n1,2\n",
    ):
        yield b"0" + content.encode()
    columns = {name: [one[name] for one in snapshots] for name in snapshots[0]}
    yield b"0" + json.dumps(columns).encode()
    yield b"0" + json.dumps({name: dict(enumerate(column)) for name, column in columns.items()}).encode()
    yield b"0" + json.dumps(snapshots).encode("utf-16")
    yield b"0\x1f\x8b\x08\x00"
    yield b"0[" + b"9" * 5000 + b",1e9999999999999999999," + b'"\xff\xfe"]'
    yield b"1" + b'[{"archived_at":"2026-05-01T10:00:00","signals":[{"a":' + b"[" * 60 + b"]" * 60 + b"}]}]"


def check(data: bytes, *, store: bool) -> None:
    """Read `data` as a file, with the options of its first byte."""
    options = data[0] if data else 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, archives_file("2026-10") if options & _ARCHIVES else SNAPSHOTS_FILE)
        path.write_bytes(data[1:])
        _check_file(path, data[1:], options, store)


def _check_file(path: Path, content: bytes, options: int, store: bool) -> None:
    entries, damage = _read(path)
    _check_nothing_lost(content, entries, damage)
    if options & _SMALL_BLOCKS:
        with patch.object(json_arrays, "_BLOCK_BYTES", 16):
            in_small_blocks = _read(path)
        require(repr(in_small_blocks) == repr((entries, damage)), "the size of a block changes the result")
    accepted = _check_entries(_history(path, options))
    _check_dry_run(_history(path, options), path.with_name("dry-run"), accepted)
    if store:
        _check_import(path, options, len(entries), accepted)


def _read(path: Path) -> tuple[list[Any], str | None]:
    entries: list[Any] = []
    try:
        for entry in read_entries(path):
            require(entry.index == len(entries), "the numbers of entries have gaps")
            entries.append(entry.data)
    except Damaged as damage:
        require(damage.index in (len(entries), 0), f"{len(entries)} entries were read, but damage is at {damage.index}")
        require(str(damage).isprintable(), f"the message is not one printable line: {str(damage)!a}")
        return entries, str(damage)
    return entries, None


def _check_nothing_lost(content: bytes, entries: list[Any], damage: str | None) -> None:
    text = content.decode("utf-8-sig", "surrogateescape")
    documents = _documents(text)
    if documents is None and _MARK in text:
        return  # the product reads marks between any two values, the standard library does not
    if damage is None:
        require(documents, "a file without an entry or damage is not JSON")
        require(_are_entries_of(documents or [], entries), "entries are lost without damage being reported")
    elif documents:
        arrays = list(takewhile(lambda one: isinstance(one, list), documents))
        first = [entry for array in arrays for entry in array]
        require(_same(entries[: len(first)], first[: len(entries)]), "entries before the damage differ")
        is_damage = len(arrays) < len(documents) or "nested too deeply" in damage
        require(is_damage, f"an array that is JSON is damaged: {damage}")


def _are_entries_of(documents: list[Any], entries: list[Any]) -> bool:
    """Return whether a file of these documents, without damage, may mean these entries."""
    ends = {0}  # numbers of entries that the documents before this one may have
    for document in documents:
        meanings = list(_meanings(document))
        ends = {at + len(one) for at in ends for one in meanings if _same(entries[at : at + len(one)], one)}
    return len(entries) in ends


def _meanings(document: Any) -> Iterator[list[Any]]:
    """Yield the lists of entries that a document of a file may mean."""
    if isinstance(document, list):
        yield document
    if isinstance(document, dict):
        yield [document]
        members = {name: one for name, one in document.items() if isinstance(one, list)}
        arrays = {name for name, one in members.items() if one and isinstance(one[0], dict)}
        yield from (members[name] for name in _ARRAYS if arrays <= {name} and name in members)


def _documents(text: str) -> list[Any] | None:
    """Return all JSON documents of a text, as the standard library reads them; None if it cannot.

    Blanks and byte order marks may be before each document, and commas after the first one.
    """
    # -0 is an integer here, and equal to 0.
    decoder = json.JSONDecoder(parse_float=_decimal, parse_int=lambda text: Decimal(text) or Decimal(0))
    documents: list[Any] = []
    text = text.lstrip(_BLANKS)
    try:
        while text:
            document, end = decoder.raw_decode(text)
            documents.append(document)
            text = text[end:].lstrip(_BLANKS + ",")
    except (ValueError, RecursionError):
        return None
    return documents


def _decimal(text: str) -> Decimal:
    try:
        return Decimal(text)
    except InvalidOperation:
        return Decimal("NaN")


def _same(first: Any, second: Any) -> bool:
    try:
        return repr(exact(first)) == repr(exact(second))  # the text, because NaN does not equal itself
    except RecursionError:  # the product reads more levels than this check
        return True


def _history(path: Path, options: int) -> OldHistory:
    (source,) = file_sources(path.parent)
    portfolio = 1 if options & _PORTFOLIO else None
    return OldHistory(source, zone=_ZONE, portfolio_id=portfolio, nan_as_null=bool(options & _NAN_AS_NULL))


def _check_entries(history: OldHistory) -> int:
    """Convert each entry, and read its event as a worker does. Return the number of events."""
    accepted = 0
    for entry in (entry for chunk in history.chunks(3) for entry in chunk):
        try:
            event = history.event(entry)
            text = encode(event)
        except InvalidEvent as error:
            check_message(error)
            continue
        accepted += 1
        decoded = decode(text, type(event))
        require(exact(decoded.model_dump()) == exact(event.model_dump()), "a worker reads another event")
    require(all(note.isprintable() for note in history.statistics.notes), "a note is not one printable line")
    return accepted


def _check_dry_run(history: OldHistory, file: Path, accepted: int) -> None:
    with Report(file) as report:
        dry_run(history, report, lambda: None)
    lines = file.read_text("ascii").splitlines() if report.lines else []
    found = history.statistics
    require(
        found.read == accepted + found.rejected,
        f"{found.read} entries read, {accepted} accepted, {found.rejected} rejected",
    )
    require(len(lines) == report.lines == found.rejected, f"{len(lines)} lines for {found.rejected} rejected entries")
    for line in lines:
        require(line.startswith('{"file": ') and '"reason": ' in line, "a line of the report has no reason")


def _check_import(path: Path, options: int, read: int, accepted: int) -> None:
    decided = []
    for _ in range(2):
        history, file = _history(path, options), path.with_name("import")
        with Report(file) as report, EntriesInProgress(file) as in_progress:
            Importer(history, report, in_progress, say=lambda _: None, advance=lambda: None).run()
        found = history.statistics
        require(found.decided == found.read == read, f"{found.decided} of {read} entries are decided")
        decided.append((found.stored, found.already_there, found.rejected))
    require(decided[1][0] == 0, f"a second import stores {decided[1][0]} events")
    require(decided[0][2] >= read - accepted, "an entry that has no event is not rejected")
    for difference in Verification([_history(path, options)]).differences():
        require(difference.reason.isprintable(), "the reason of a difference is not one printable line")
