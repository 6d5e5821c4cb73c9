"""Import and export of old files: regular files come out unchanged, irregular ones corrected.

These tests convert the entries and insert the events with the source and sequence of an import, without the importer.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import simplejson
from hypothesis import HealthCheck, Phase, assume, example, given, settings
from hypothesis import strategies as st

from consumers.db.engine import get_db
from consumers.db.inserts import Stored, insert_events
from consumers.errors import EventConflict
from consumers.legacy.exporter import Selection, export_history
from consumers.legacy.json_arrays import Damaged, read_entries, write_entries
from consumers.legacy.legacy_json import archive_entry, archive_from, history_files, snapshot_entry, snapshot_from
from producers.errors import InvalidEvent
from producers.events import Event, PortfolioSnapshot, SignalArchive, event_of
from producers.times import read_back, wall_clock
from tests.property.test_payloads import _with_exact_numbers as exactly
from tests.property.test_payloads import json_values, signal_lists, texts

_PURE = settings(deadline=None, max_examples=150)
# Without shrinking: each example costs several transactions, and a failing history is readable.
_STORED = settings(
    deadline=None,
    max_examples=12,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

BERLIN = ZoneInfo("Europe/Berlin")
_NAMES = ("Europe/Berlin", "America/New_York", "America/St_Johns", "Australia/Lord_Howe", "Asia/Tokyo", "UTC")
zones = st.sampled_from([ZoneInfo(name) for name in _NAMES])
# Any time of some years, and often one near a clock change of Berlin or New York.
_CHANGES = [datetime(2025, 3, 30, 1), datetime(2025, 10, 26, 1), datetime(2025, 3, 9, 7), datetime(2025, 11, 2, 6)]
_near_changes = st.builds(
    lambda change, seconds, microseconds: change + timedelta(seconds=seconds, microseconds=microseconds),
    st.sampled_from(_CHANGES),
    st.integers(-7200, 7200),
    st.sampled_from([0, 1, 101234, 999999]),
)
instants = st.one_of(st.datetimes(datetime(2023, 1, 1), datetime(2027, 1, 1)), _near_changes).map(
    lambda naive: naive.replace(tzinfo=UTC)
)
AMOUNTS = ("balance", "total_invested", "total_profit_loss", "total_value")
COUNTS = ("open_positions", "trade_count")

# ---- regular entries of the old controller, and irregular ones

exact_amounts = st.builds(
    lambda n, places: Decimal(n).scaleb(-places), st.integers(-(10**13), 10**13), st.integers(2, 8)
)
regular_amounts = exact_amounts.map(float)  # at most 14 digits: float keeps them
counts = st.integers(0, 2**31 - 1)
noisy_amounts = st.one_of(
    regular_amounts,
    st.integers(-(10**11), 10**11),
    st.sampled_from([9987.350000000001, 0.1 + 0.2, -0.0, 1e-9]),
    regular_amounts.map(repr),
    regular_amounts.map(lambda amount: f" {amount} "),
)
irregular_counts = st.one_of(counts, counts.map(str), counts.map(float))


@st.composite
def regular_snapshots(draw: st.DrawFn, zone: ZoneInfo) -> dict[str, Any]:
    shown = wall_clock(draw(instants), zone)
    values = {name: draw(regular_amounts) for name in AMOUNTS} | {name: draw(counts) for name in COUNTS}
    return {"date": shown.date().isoformat(), "timestamp": shown.isoformat(), **values}


@st.composite
def irregular_snapshots(draw: st.DrawFn, zone: ZoneInfo) -> dict[str, Any]:
    entry = draw(regular_snapshots(zone))
    entry |= {name: draw(noisy_amounts) for name in AMOUNTS} | {name: draw(irregular_counts) for name in COUNTS}
    entry |= draw(st.dictionaries(texts.map("x".__add__), json_values, max_size=2))
    irregularity = draw(st.sampled_from(["none", "no date", "other date", "offset", "in a gap", "invalid"]))
    if irregularity == "no date":
        del entry["date"]
    elif irregularity == "other date":
        entry["date"] = draw(st.dates()).isoformat()
    elif irregularity == "offset":
        entry["timestamp"] = draw(instants).astimezone(draw(zones)).isoformat()
    elif irregularity == "in a gap":
        entry["timestamp"] = "2025-03-30T02:30:00.5"
    elif irregularity == "invalid":
        entry[draw(st.sampled_from([*AMOUNTS, *COUNTS, "timestamp"]))] = draw(
            st.sampled_from([None, "much", [], "NaN"])
        )
    return entry


@st.composite
def archives(draw: st.DrawFn, zone: ZoneInfo, *, irregular: bool) -> dict[str, Any]:
    signals = draw(signal_lists)
    count = draw(st.integers(0, 5)) if irregular else len(signals)
    return {"archived_at": wall_clock(draw(instants), zone).isoformat(), "signals_count": count, "signals": signals}


@st.composite
def irregular_files(draw: st.DrawFn) -> tuple[ZoneInfo, bytes]:
    """Irregular entries, some of them twice, perhaps a byte order mark, perhaps a missing end."""
    zone = draw(zones)
    entries = draw(st.lists(irregular_snapshots(zone), max_size=12))
    if entries:
        entries += draw(st.lists(st.sampled_from(entries), max_size=3))
    text = simplejson.dumps(entries, indent=draw(st.sampled_from([None, 2])), use_decimal=True).encode()
    if draw(st.booleans()):
        text = text[: draw(st.integers(0, len(text)))]
    return zone, draw(st.sampled_from([b"", b"\xef\xbb\xbf"])) + text


# ---- conversion

Payload = PortfolioSnapshot | SignalArchive


def _readable(path: Path) -> Iterator[Any]:
    """Yield the entries before the damage, if any."""
    try:
        for entry in read_entries(path):
            yield entry.data
    except Damaged:
        pass


def _payloads(entries: Iterator[Any] | Sequence[Any], zone: ZoneInfo, portfolio_id: int | None) -> list[Payload]:
    """Return the payloads that an import accepts, in order."""
    accepted: list[Payload] = []
    after = None
    for data in entries:
        read = archive_from if isinstance(data, Mapping) and "signals" in data else snapshot_from
        try:
            accepted.append(read(data, zone=zone, portfolio_id=portfolio_id, after=after))
        except InvalidEvent:
            continue
        after = accepted[-1].instant
    return accepted


def _once(payloads: Sequence[Payload]) -> list[Payload]:
    """Return the first payload of each event id."""
    return list({payload.event_id: payload for payload in reversed(payloads)}.values())[::-1]


def _entries(payloads: Sequence[Payload], zone: ZoneInfo) -> list[dict[str, Any]]:
    return [
        snapshot_entry(one, zone)
        if isinstance(one, PortfolioSnapshot)
        else archive_entry(one.archived_at, _as_text(one.signals), one.signals_count, zone)
        for one in payloads
    ]


def _as_text(signals: Any) -> simplejson.RawJSON:
    return simplejson.RawJSON(simplejson.dumps(signals, use_decimal=True))


def _content_of(payload: Payload) -> dict[str, Any]:
    """Return the content by value: the instant in UTC, exact numbers."""
    content: dict[str, Any] = exactly(payload.model_dump())
    name = "timestamp" if isinstance(payload, PortfolioSnapshot) else "archived_at"
    return content | {name: payload.instant.astimezone(UTC)}


# ---- without a database


@given(entries=st.lists(st.dictionaries(texts, json_values, max_size=4), max_size=6))
@example(entries=[{"": '\u2028\u2029"\\\n\U0001f309é'}, {"1": Decimal("0.00000001")}, {"2": 10**300}])
@_PURE
def test_a_written_file_is_read_with_the_same_values(entries: list[dict[str, Any]]) -> None:
    """Every digit and any text is kept. The file is ASCII, and the standard library reads the same values."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "portfolio_history.json"
        number = write_entries(path, entries)
        read = [entry.data for entry in read_entries(path)]
        other_reader = json.loads(path.read_text("ascii"), parse_float=Decimal)

    assert (number, exactly(read), exactly(other_reader)) == (len(entries), exactly(entries), exactly(entries))


@given(data=st.data(), zone=zones, portfolio_id=st.none() | st.integers(0, 9))
@_PURE
def test_a_snapshot_survives_export_and_import(data: st.DataObject, zone: ZoneInfo, portfolio_id: int | None) -> None:
    """In any zone and with any date. In a repeated hour, the previous entry decides."""
    instant = data.draw(instants)
    snapshot = PortfolioSnapshot.checked(
        snapshot_date=data.draw(st.dates()),
        timestamp=instant,
        **{name: data.draw(exact_amounts) for name in AMOUNTS},
        **{name: data.draw(counts) for name in COUNTS},
        portfolio_id=portfolio_id,
    )
    again = snapshot_from(snapshot_entry(snapshot, zone), zone=zone, portfolio_id=portfolio_id, after=instant)

    assert _content_of(again) == _content_of(snapshot)
    assert again.event_id == snapshot.event_id


@given(data=st.data(), zone=zones)
@_PURE
def test_a_regular_entry_is_exported_unchanged(data: st.DataObject, zone: ZoneInfo) -> None:
    """Compared as JSON with exact numbers."""
    entry = data.draw(regular_snapshots(zone) | archives(zone, irregular=False))
    (payload,) = _payloads([entry], zone, 1)
    (out,) = _entries([payload], zone)

    text = simplejson.dumps([entry, out], use_decimal=True)
    before, after = json.loads(text, parse_float=Decimal)
    assert exactly(after) == exactly(before)


@given(file=irregular_files())
@_PURE
def test_an_irregular_file_is_corrected_once(file: tuple[ZoneInfo, bytes]) -> None:
    """The accepted entries, written and read again, are the same. Written again, they are the same text."""
    zone, text = file
    with tempfile.TemporaryDirectory() as folder:
        given, corrected, again = (Path(folder) / name for name in ("given.json", "corrected.json", "again.json"))
        given.write_bytes(text)
        accepted = _once(_payloads(_readable(given), zone, None))
        write_entries(corrected, _entries(accepted, zone))
        accepted_again = _payloads([entry.data for entry in read_entries(corrected)], zone, None)
        write_entries(again, _entries(accepted_again, zone))
        texts_of_both = corrected.read_bytes(), again.read_bytes()

    assume(not _has_an_ambiguous_time(accepted, zone))
    assert [_content_of(one) for one in accepted_again] == [_content_of(one) for one in accepted]
    assert texts_of_both[0] == texts_of_both[1]


def _has_an_ambiguous_time(payloads: Sequence[Payload], zone: ZoneInfo) -> bool:
    """Return whether reading these in order gives one of them the other instant of a repeated hour."""
    after = None
    for one in payloads:
        read = read_back(wall_clock(one.instant, zone), zone, after, "timestamp")
        if read != one.instant.astimezone(UTC):
            return True
        after = read
    return False


# ---- with a database


def _empty() -> None:
    with get_db() as db:
        db.exec_driver_sql("TRUNCATE portfolio_history, signal_archives RESTART IDENTITY")


def _import(directory: Path, zone: ZoneInfo) -> tuple[int, int]:
    """Return the number of new rows and of conflicts."""
    new = conflicts = 0
    for path in history_files(directory):
        payloads = _payloads(_readable(path), zone, 7)
        events: list[Event] = [
            event_of(one, source=f"import/{path.name}/digest", sequence=n) for n, one in enumerate(payloads)
        ]
        with get_db() as db:
            answers = insert_events(db, events)
        new += sum(isinstance(answer, Stored) and answer.created for answer in answers)
        conflicts += sum(isinstance(answer, EventConflict) for answer in answers)
    return new, conflicts


def _export(directory: Path, zone: ZoneInfo) -> dict[str, Any]:
    export_history(directory, Selection(), zone=zone)
    return {path.name: exactly(json.loads(path.read_bytes(), parse_float=Decimal)) for path in history_files(directory)}


@st.composite
def regular_histories(draw: st.DrawFn) -> tuple[ZoneInfo, dict[str, list[Any]]]:
    """Draw files by name, as the old controller wrote them. Its clock may have been set back."""
    zone = draw(zones)
    snapshots = draw(st.lists(regular_snapshots(zone), min_size=1, max_size=60))
    files = {"portfolio_history.json": draw(st.permutations(_distinct_entries(snapshots, zone)))}
    for archive in _distinct_entries(draw(st.lists(archives(zone, irregular=False), max_size=20)), zone):
        files.setdefault(f"signals_archive_{archive['archived_at'][:7]}.json", []).append(archive)
    assume(all(len(_distinct_entries(entries, zone)) == len(entries) for entries in files.values()))
    return zone, files


def _distinct_entries(entries: list[Any], zone: ZoneInfo) -> list[Any]:
    """Return the entries without those that an import counts as already stored."""
    kept: list[Any] = []
    ids = set()
    for entry in entries:
        last = _payloads([*kept, entry], zone, 7)[-1]
        if last.event_id not in ids:
            ids.add(last.event_id)
            kept.append(entry)
    return kept


@given(history=regular_histories())
@_STORED
@pytest.mark.usefixtures("database_url")
def test_regular_files_are_exported_unchanged(history: tuple[ZoneInfo, dict[str, list[Any]]]) -> None:
    """Compared as JSON, file by file, in the same order. Importing them again adds no row."""
    zone, files = history
    _empty()
    with tempfile.TemporaryDirectory() as before, tempfile.TemporaryDirectory() as after:
        for name, entries in files.items():
            Path(before, name).write_text(simplejson.dumps(entries, indent=2, use_decimal=True))
        imported = _import(Path(before), zone)
        exported = _export(Path(after), zone)
        again = _import(Path(after), zone)

    originals = {
        name: json.loads(simplejson.dumps(entries, use_decimal=True), parse_float=Decimal)
        for name, entries in files.items()
    }
    assert exported == {name: exactly(entries) for name, entries in originals.items() if entries}
    assert (imported, again) == ((sum(map(len, files.values())), 0), (0, 0))


@given(file=irregular_files(), irregular_archives=st.lists(archives(BERLIN, irregular=True), max_size=8))
@_STORED
@pytest.mark.usefixtures("database_url")
def test_importing_corrected_files_again_changes_nothing(
    file: tuple[ZoneInfo, bytes], irregular_archives: list[dict[str, Any]]
) -> None:
    """Import, export, import: no row is added, and a second export equals the first."""
    zone, text = file
    _empty()
    with tempfile.TemporaryDirectory() as before, tempfile.TemporaryDirectory() as middle:
        Path(before, "portfolio_history.json").write_bytes(text)
        Path(before, "signals_archive_2025-01.json").write_text(simplejson.dumps(irregular_archives, use_decimal=True))
        new, _ = _import(Path(before), zone)
        assume(new > 0)
        exported = _export(Path(middle), zone)
        assume(
            not any(
                _has_an_ambiguous_time(_payloads(_readable(path), zone, 7), zone)
                for path in history_files(Path(before))
            )
        )
        again = _import(Path(middle), zone)
        with tempfile.TemporaryDirectory() as after:
            exported_again = _export(Path(after), zone)

    assert again == (0, 0)
    assert exported_again == exported
