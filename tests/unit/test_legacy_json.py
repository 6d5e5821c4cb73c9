"""Reading the old controller's files, with every irregularity that was found in real ones."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re
import subprocess
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from consumers.legacy import json_arrays
from consumers.legacy.json_arrays import Damaged, Entry, read_entries
from consumers.legacy.legacy_json import archive_from, history_files, notes_on, null_for_nan, snapshot_from
from consumers.legacy.old_history import OldHistory, file_sources
from producers.errors import InvalidEvent
from producers.events import MAX_EVENT_BYTES
from tests.factories import an_old_archive, an_old_snapshot

BERLIN = ZoneInfo("Europe/Berlin")
_EXAMPLE = "write it as in 2026-05-01T10:00:00+02:00"
_NO_EPOCH = "is a number, but not an epoch time in seconds or milliseconds from 2001 to 2286"


def _entry(**overrides: Any) -> dict[str, Any]:
    amounts = {"balance": Decimal("9900.0"), "total_profit_loss": Decimal("0.0"), "total_value": Decimal("9900.0")}
    return an_old_snapshot(datetime(2025, 10, 20, 17, 2, 46, 101234), **amounts) | overrides


def _archive(**overrides: Any) -> dict[str, Any]:
    return an_old_archive(datetime(2025, 10, 20, 17, 2, 47, 1), [{"market_id": "1"}]) | overrides


def _read(path: Path) -> tuple[list[Any], Damaged | None]:
    """Return the entries before the damage, and the damage."""
    found: list[Any] = []
    try:
        found.extend(entry.data for entry in read_entries(path))
    except Damaged as damage:
        return found, damage
    return found, None


def _read_bytes(tmp_path: Path, content: bytes) -> tuple[list[Any], Damaged | None]:
    path = tmp_path / "portfolio_history.json"
    path.write_bytes(content)
    return _read(path)


def test_numbers_are_read_exactly(tmp_path: Path) -> None:
    """They are never converted to float. Text stays text."""
    found, damage = _read_bytes(
        tmp_path, b'[{"a": 9987.350000000001, "b": 12345678901234567890, "c": "1.5", "d": 1e2}]'
    )
    assert damage is None
    assert (
        repr(found)
        == "[{'a': Decimal('9987.350000000001'), 'b': 12345678901234567890, 'c': '1.5', 'd': Decimal('1E+2')}]"
    )


_NO_NAME = "Expecting property name enclosed in double quotes"
_MORE = "has more objects in 'more', which were not read: import them from a separate folder"


@pytest.mark.parametrize("content", [b"[]", b" [ ]\n", b"\xef\xbb\xbf[]"])
def test_an_empty_array_has_no_entries_and_no_damage(tmp_path: Path, content: bytes) -> None:
    assert _read_bytes(tmp_path, content) == ([], None)


def test_a_byte_order_mark_and_blanks_are_skipped(tmp_path: Path) -> None:
    found, damage = _read_bytes(tmp_path, '\ufeff\n [ {"a": "ö"} ,\r\n\t{"b": 1 } ] \n'.encode())
    assert (found, damage) == ([{"a": "ö"}, {"b": 1}], None)


@pytest.mark.parametrize(
    ("content", "whole", "message"),
    [
        (b"", 0, "is empty: restore it from a backup, or delete it if it never had an entry (entry 0, byte 0)"),
        (
            b"\xef\xbb\xbf ",
            0,
            "is empty: restore it from a backup, or delete it if it never had an entry (entry 0, byte 4)",
        ),
        (b"null", 0, "is not a JSON array (entry 0, byte 0)"),
        (b'{"a": 1', 0, "is cut off (entry 0, byte 0)"),
        (b'{"a": tru, "history": [{"a": 1}]}' + b" " * 10_000, 0, "is not JSON: Expecting value (entry 0, byte 6)"),
        (b'{"a": 1, b: %s' % (b"1" * 20_000), 0, f"is not JSON: {_NO_NAME} (entry 0, byte 9)"),
        (b'{"history": [{"a": 1}, {"a"', 1, "is cut off (entry 1, byte 23)"),
        (b'{"history": [{"a": 1}]', 1, "is cut off (entry 1, byte 22)"),
        (b'{"history": [{"a": 1}], "b', 1, "is cut off (entry 1, byte 24)"),
        (b'{"history": [{"a": 1}], "b"', 1, "is cut off (entry 1, byte 27)"),
        (b'{"history": [{"a": 1}], b}', 1, "is not JSON: a member of the object is incomplete (entry 1, byte 24)"),
        (b'{"history": [{"a": 1}] "b": 1}', 1, "is not JSON: a comma or } is missing (entry 1, byte 23)"),
        (b'{"history": [{"a": 1}]}]', 1, "has data that is not an entry: correct or delete it (entry 1, byte 23)"),
        (b'{"history": [{"a": 1}], "more": [{"a": 2}]}', 1, f"{_MORE} (entry 1, byte 42)"),
        (b'{"history": [{"a": 1}], "more": {"history": [{"a": 2}]}}', 1, f"{_MORE} (entry 1, byte 55)"),
        (b'{"history": [{"a": 1}], "more": [null, {"a": 2}]}', 1, f"{_MORE} (entry 1, byte 48)"),
        (b'{"history": [{"a": 1}], "more": [[[{"a": 2}]]]}', 1, f"{_MORE} (entry 1, byte 46)"),
        (b'{"history": [{"a": 1}], "more": {"timestamp": 1, "balance": 2}}', 1, f"{_MORE} (entry 1, byte 62)"),
        (b'{"a": 1}\n{"a": 2}\n{"a"', 2, "is cut off (entry 2, byte 18)"),
        (b'{"a": 1}\nWARNING\n', 1, "has data that is not an entry: correct or delete it (entry 1, byte 9)"),
        (b"[", 0, "is cut off (entry 0, byte 1)"),
        (b'[{"a": 1}', 1, "is cut off (entry 1, byte 9)"),
        (b'[{"a": 1},', 1, "is cut off (entry 1, byte 10)"),
        (b'[{"a": 1}, {"a"', 1, "is cut off (entry 1, byte 11)"),
        (b'[{"a": 1}, {"a": "b', 1, "is cut off (entry 1, byte 11)"),
        (b'[{"a": 1}, {"a": tr', 1, "is cut off (entry 1, byte 11)"),
        (b'[{"a": 1}, {"a": Na', 1, "is cut off (entry 1, byte 11)"),
        (b'[{"a": 1}, {"a": Infin', 1, "is cut off (entry 1, byte 11)"),
        (b'[{"a": 1}, {"a": -Infin', 1, "is cut off (entry 1, byte 11)"),
        (b'\xef\xbb\xbf[{"a": "\xc3\xb6"}, {"a"', 1, "is cut off (entry 1, byte 17)"),
        (b'[{"a": 1} {"a": 2}]', 1, "is not JSON: a comma or ] is missing (entry 1, byte 10)"),
        (b'[{"a": 1},]', 1, "is not JSON: Expecting value (entry 1, byte 10)"),
        (b'[{"a": 1}, {"a": what is this, then?}, {"a": 3}]', 1, "is not JSON: Expecting value (entry 1, byte 17)"),
        (b'[{"a": 1}][{"a": 2}', 2, "is cut off (entry 2, byte 19)"),
        (b'[{"a": 1}]\0\0\0', 1, "has data that is not an entry: correct or delete it (entry 1, byte 10)"),
        (b"[" * 100_000, 0, "is nested too deeply (entry 0, byte 1)"),
    ],
)
def test_all_entries_before_the_damage_are_read(tmp_path: Path, content: bytes, whole: int, message: str) -> None:
    """The error names the entry and the byte at which reading stopped."""
    found, damage = _read_bytes(tmp_path, content)
    assert found == [{"a": 1}, {"a": 2}][:whole] or found == [{"a": "ö"}]
    assert str(damage) == f"portfolio_history.json: {message}"
    assert damage is not None
    assert damage.index == whole


_REVERSED = b'{"signals": [{"archived_at": 1, "x": 2}], "archived_at": "2026-05-01T10:00:00"}'
_LINE = b'{"archived_at": "2026-05-01T10:00:00", "signals": [{"archived_at": "x"}]}'


@pytest.mark.parametrize("block", [1, 7, 2**18])
@pytest.mark.parametrize(
    ("content", "entries"),
    [
        (b'{"history": [{"a": 1}, {"b": 2}]}', [{"a": 1}, {"b": 2}]),
        (b'\xef\xbb\xbf{"portfolio_history" : [\n{"a": 1}], "version": 2}\n', [{"a": 1}]),
        (b'{"version": 2, "at": {"timestamp": 3}, "tags": ["x"], "snapshots": [{"a": 1}], "t": []}', [{"a": 1}]),
        (b'{"timestamp": "2026-05-01T10:00:00", "history": [{"a": 1}]}', [{"a": 1}]),
        (b'{"signals": [{"archived_at": 5, "signals": []}]}', [{"archived_at": 5, "signals": []}]),
        (b'{"history": []}', []),
        (b'{"a": 1}\n{"b": 2}\r\n\n{"c": 3}', [{"a": 1}, {"b": 2}, {"c": 3}]),
        (b'{"timestamp": "2026-05-01T10:00:00"}\n', [{"timestamp": "2026-05-01T10:00:00"}]),
        (b"%s\n%s\n" % (_LINE, _LINE), [json.loads(_LINE)] * 2),
        (_LINE, [json.loads(_LINE)]),
        (_REVERSED, [json.loads(_REVERSED)]),
        (b'[{"a": 1}]\n[]\n[{"b": 2}]\n', [{"a": 1}, {"b": 2}]),
        (b'{"history": [{"a": 1}]}\n{"history": [{"b": 2}], "n": 1}\n', [{"a": 1}, {"b": 2}]),
        (b'{"history": [{"a": 1}]}\n{"b": 2}\n', [{"a": 1}, {"b": 2}]),
        (b'{"a": 1},\n{"b": 2},\n', [{"a": 1}, {"b": 2}]),
        (b'\xef\xbb\xbf{"a": 1}\n\xef\xbb\xbf{"b": 2}\n', [{"a": 1}, {"b": 2}]),
        (b'{"days": %s, "history": [{"a": 1}]}' % json.dumps([*range(2000)]).encode(), [{"a": 1}]),
    ],
    ids=lambda value: ascii(value)[2:40] if isinstance(value, bytes) else "",
)
def test_json_lines_and_an_array_in_an_object_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, entries: list[Any], block: int
) -> None:
    """The array has a known name. An archive's own signals are not taken for entries."""
    monkeypatch.setattr(json_arrays, "_BLOCK_BYTES", block)
    assert _read_bytes(tmp_path, content) == (entries, None)


def test_a_number_that_continues_in_the_next_block_is_read_whole(tmp_path: Path) -> None:
    """It is in an object, before the array of entries."""
    before = b'{"text": "%s", "count": 12'
    before %= b"x" * (json_arrays._BLOCK_BYTES - len(before % b""))
    assert _read_bytes(tmp_path, before + b'345, "history": [{"a": 1}]}') == ([{"a": 1}], None)


def test_an_entry_that_is_far_too_large_for_an_event_ends_the_reading(tmp_path: Path) -> None:
    """It does not fill the memory: a quote that is missing would make an entry of the whole rest of the file."""
    found, damage = _read_bytes(tmp_path, b'[{"a": 1}, {"a": "' + b"x" * (2 * MAX_EVENT_BYTES))
    assert found == [{"a": 1}]
    assert str(damage) == "portfolio_history.json: has an entry of more than 16 million characters (entry 1, byte 11)"


def _history(tmp_path: Path, entries: list[Any], name: str = "portfolio_history.json") -> OldHistory:
    (tmp_path / name).write_text(json.dumps(entries))
    (source,) = file_sources(tmp_path)
    return OldHistory(source, zone=UTC, portfolio_id=1)


def test_a_file_that_cannot_be_read_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "portfolio_history.json").symlink_to("/proc/self/mem")  # the kernel refuses to read address 0
    (source,) = file_sources(tmp_path)
    history = OldHistory(source, zone=UTC, portfolio_id=1)
    assert list(history.chunks()) == []
    assert history.statistics.damage == "portfolio_history.json: cannot be read: Input/output error"


def test_at_most_20_different_notes_are_kept_and_counted(tmp_path: Path) -> None:
    """A thousand unknown keys must not print a thousand lines."""
    history = _history(tmp_path, [an_old_snapshot(datetime(2026, 1, 1), **dict.fromkeys(_KEYS, 1))] * 2)
    for chunk in history.chunks():
        for entry in chunk:
            history.event(entry)
    assert history.statistics.notes == {f"unknown key '{key}' was left out": 2 for key in _KEYS[:20]}


_KEYS = [f"key {number:02}" for number in range(25)]


def test_the_option_for_nan_is_named_only_if_it_makes_the_entry_valid(tmp_path: Path) -> None:
    nan = float("nan")
    both = [an_old_archive(datetime(2026, 1, 1), [{"a": nan}]) | {"portfolio_id": one} for one in (1, "one")]
    history = _history(tmp_path, both, "signals_archive_2026-01.json")
    reasons = []
    for chunk in history.chunks():
        for entry in chunk:
            with pytest.raises(InvalidEvent) as caught:
                history.event(entry)
            reasons.append(str(caught.value))
    assert [reason.endswith(" (--nan-as-null reads NaN in signals as null)") for reason in reasons] == [True, False]
    assert reasons[1] == "portfolio_id: is text that is not an integer"


def test_a_large_array_in_an_object_is_read_piece_by_piece(tmp_path: Path) -> None:
    """The object may be larger than the largest entry."""
    path = tmp_path / "portfolio_history.json"
    path.write_bytes(b'{"history": [' + b",".join([b'{"a": "%s"}' % (b"x" * 2**20)] * 20) + b"]}")
    assert path.stat().st_size > json_arrays._MOST_CHARACTERS
    assert sum(1 for _ in read_entries(path)) == 20


_ENTRIES: list[dict[str, Any]] = [
    {"timestamp": "2026-05-01T10:00:00", "balance": 1.5},
    {"timestamp": "2026-05-02T10:00:00", "balance": 2},
]
_COLUMNS = {name: [entry[name] for entry in _ENTRIES] for name in _ENTRIES[0]}
_JSON = json.dumps(_ENTRIES)


def _as_csv(delimiter: str) -> bytes:
    lines = [_ENTRIES[0].keys(), *(map(str, entry.values()) for entry in _ENTRIES)]
    return "\n".join(delimiter.join(line) for line in lines).encode()


@pytest.mark.parametrize(
    ("content", "shape"),
    [
        (gzip.compress(_JSON.encode()), "is compressed with gzip"),
        (bz2.compress(_JSON.encode()), "is compressed with bzip2"),
        (lzma.compress(_JSON.encode()), "is compressed with xz"),
        (_JSON.encode("utf-16"), "is text in UTF-16, not UTF-8"),
        (b"\xfe\xff" + _JSON.encode("utf-16-be"), "is text in UTF-16, not UTF-8"),
        (_JSON.encode("utf-16-le"), "is text in UTF-16LE, not UTF-8"),
        (_JSON.encode("utf-16-be"), "is text in UTF-16BE, not UTF-8"),
        (_JSON.encode("utf-32"), "is text in UTF-32, not UTF-8"),
        (_JSON.encode("utf-32-le"), "is text in UTF-32LE, not UTF-8"),
        (_as_csv(","), "is CSV, not JSON"),
        (b"\xef\xbb\xbf" + _as_csv(";"), "is CSV, not JSON"),
        (_as_csv("\t"), "is CSV, not JSON"),
        (json.dumps(_COLUMNS).encode(), "has one array for each field, not one object for each entry"),
        (
            json.dumps({name: dict(enumerate(values)) for name, values in _COLUMNS.items()}).encode(),
            "is stored by column (one object per field), not by entry",
        ),
        (
            json.dumps(
                {"columns": list(_ENTRIES[0]), "index": [0, 1], "data": [list(entry.values()) for entry in _ENTRIES]}
            ).encode(),
            "has the names of the fields in 'columns' and their values in 'data'",
        ),
        (json.dumps({entry["timestamp"][:10]: entry for entry in _ENTRIES}).encode(), "has one entry under each key"),
        (
            json.dumps({"2026-05": _ENTRIES[:1], "2026-06": _ENTRIES[1:]}).encode(),
            "has one array of entries under each key",
        ),
        (
            json.dumps({"ok": True, "it's": _ENTRIES}).encode(),
            "is an object with an array in 'it's', not an array of entries",
        ),
        (
            json.dumps({"\x1b[31m\n": _ENTRIES, "none": []}).encode(),
            r"is an object with an array in '\x1b[31m\n', not an array of entries",
        ),
        (
            json.dumps({"": None, "\ud800": _ENTRIES}).encode(),
            r"is an object with an array in '\ud800', not an array of entries",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_message_names_another_shape_and_its_command_converts_the_file(
    tmp_path: Path, content: bytes, shape: str
) -> None:
    """The command writes the same entries as an array; numbers may become text, which is read too.

    The message is one printable line, so that a terminal shows, and an operator copies, the whole command.
    """
    folder = tmp_path / "old files"
    folder.mkdir()
    found, damage = _read_bytes(folder, content)
    assert found == []
    assert damage is not None
    assert str(damage).isprintable()
    message, command = str(damage).split(". Convert it: ")
    assert message == f"portfolio_history.json: {shape}"
    subprocess.run(command, shell=True, check=True)  # an operator would type it
    assert [file.name for file in folder.iterdir()] == ["portfolio_history.json"]
    entries, rest = _read_bytes(tmp_path, (folder / "portfolio_history.json").read_bytes())
    assert rest is None
    assert [{name: str(value) for name, value in entry.items()} for entry in entries] == [
        {name: str(value) for name, value in entry.items()} for entry in _ENTRIES
    ]


def test_entries_under_the_numbers_of_portfolios_keep_them(tmp_path: Path) -> None:
    found, damage = _read_bytes(tmp_path, json.dumps({"1": _ENTRIES, "7": _ENTRIES}).encode())
    assert found == []
    message, command = str(damage).split(". Convert it: ")
    assert message == "portfolio_history.json: has one array of entries under the number of each portfolio"
    subprocess.run(command, shell=True, check=True)
    entries, damage = _read(tmp_path / "portfolio_history.json")
    assert damage is None
    assert [entry["portfolio_id"] for entry in entries] == ["1", "1", "7", "7"]


def test_signals_without_their_time_are_converted_with_a_given_time(tmp_path: Path) -> None:
    """The file is one of current signals. The operator replaces TIME in the command."""
    path = tmp_path / "signals_archive_2026-05.json"
    path.write_text('{"updated_at": 1, "signals": [{"market_id": "1"}]}')
    found, damage = _read(path)
    assert found == []
    message, command = str(damage).split(". Convert it, with their time in place of TIME: ")
    assert message == "signals_archive_2026-05.json: has signals, but not the time when they were archived"
    subprocess.run(command.replace("TIME", "2026-05-01T10:00:00"), shell=True, check=True)
    entries, damage = _read(path)
    assert damage is None
    (archive,) = [archive_from(entry, zone=UTC, portfolio_id=None) for entry in entries]
    assert archive.signals == [{"market_id": "1"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n <!DOCTYPE html>\n<html>", "is an HTML or XML page, not JSON, such as the error page of a web server"),
        (b'{"detail": "internal error"}', r"is one object \(its keys are 'detail'\), not an array of entries"),
        (b"{}", r"is one object \(its keys are \(none\)\), not an array of entries"),
        (b'{"a": [{"b": 1}], "history": [{"c": 1}]}', r"is one object \(its keys are 'a', 'history'\), not an array"),
        (b'{"timestamp": [1, 2], "balance": [1]}', r"is one object \(its keys are 'timestamp', 'balance'\)"),
        (b'{"%s": 1, "2": 1, "3": 1, "4": 1, "5": 1, "6": 1}' % (b"1" * 90), "'1{39}…', '2', '3', '4', '5' and 1 more"),
        (bytes(5000), "begins with zero bytes, as after a power failure: restore it from a backup"),
        (b"PK\x03\x04", "is compressed with zip.* unzip -p "),
        (b'{"\n": 1, "history": [{"a": 1}]}', r"is not JSON: Invalid control character at \(entry 0, byte 2\)"),
        (b"Service unavailable, try again", r"is not a JSON array \(entry 0, byte 0\)"),
    ],
)
def test_the_message_names_a_file_that_has_no_entries(tmp_path: Path, content: bytes, message: str) -> None:
    found, damage = _read_bytes(tmp_path, content)
    assert found == []
    assert re.match(f"portfolio_history.json: .*{message}", str(damage))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(
    entries=st.lists(
        st.dictionaries(st.text(max_size=5), st.one_of(st.text(), st.integers(), st.booleans(), st.none()), max_size=4),
        max_size=6,
    ),
    indent=st.sampled_from([None, 2]),
    block=st.integers(1, 40),
)
def test_the_block_size_does_not_change_the_result(
    tmp_path: Path, entries: list[dict[str, Any]], indent: int | None, block: int
) -> None:
    """A complete file gives every entry. A file that is cut off anywhere gives a prefix and the damage."""
    content = json.dumps(entries, indent=indent, ensure_ascii=False).encode("utf-8", "surrogatepass")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_arrays, "_BLOCK_BYTES", block)
        assert _read_bytes(tmp_path, content) == (json.loads(json.dumps(entries)), None)
        for cut in {len(content) // 3, len(content) // 2, len(content) - 1}:
            found, damage = _read_bytes(tmp_path, content[:cut])
            assert found == entries[: len(found)]
            assert damage is not None
            assert damage.index == len(found)


def test_a_number_across_two_blocks_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elements that are not objects are read too. Only their conversion fails."""
    monkeypatch.setattr(json_arrays, "_BLOCK_BYTES", 2)
    found, damage = _read_bytes(tmp_path, b'[12345, null, "x"]')
    assert (found, damage) == ([12345, None, "x"], None)
    with pytest.raises(InvalidEvent, match="^entry: must be an object, not int"):
        snapshot_from(found[0], zone=UTC, portfolio_id=None)


@pytest.mark.parametrize("number", ["1.5", "-10.25e+3", "1E309", "0e-5", "-Infinity"])
def test_a_number_of_any_form_is_complete_wherever_a_block_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: str
) -> None:
    """As an entry, and as a member beside the array of entries."""
    (value,) = _read_bytes(tmp_path, f"[{number}]".encode())[0]
    for block in range(1, 12):
        monkeypatch.setattr(json_arrays, "_BLOCK_BYTES", block)
        assert _read_bytes(tmp_path, f"[{number}, {number}]".encode()) == ([value, value], None)
        beside = b'{"history": [{"a": "%s"}], "total": %s}' % (b"x" * 5000, number.encode())
        assert _read_bytes(tmp_path, beside) == ([{"a": "x" * 5000}], None)


def test_an_early_error_in_a_long_file_stops_reading_early(tmp_path: Path) -> None:
    """The rest of the file is not read."""
    path = tmp_path / "portfolio_history.json"
    path.write_bytes(b'[{"a" 1}' + b',{"a": 1}' * 1_000_000 + b"]")
    read = 0

    def progress(position: int) -> None:
        nonlocal read
        read = position

    with pytest.raises(Damaged, match="entry 0, byte 6"):
        list(read_entries(path, progress=progress))
    assert read < 2**20


def test_an_invalid_number_affects_one_entry(tmp_path: Path) -> None:
    """NaN as Python's json writes it, more digits than int() accepts, and exponents beyond Decimal's range."""
    odd = [b"NaN", b"-Infinity", b"1" * 5000, b"1" * 5000 + b".5", b"1e99999999999999999999"]
    found, damage = _read_bytes(tmp_path, b"[" + b",".join(b'{"balance": %s}' % number for number in odd) + b"]")
    assert damage is None
    assert len(found) == len(odd)
    for data in found:
        with pytest.raises(InvalidEvent, match="^balance: (must be finite|has more than 12 digits)"):
            snapshot_from(_entry(**data), zone=UTC, portfolio_id=None)


@pytest.mark.parametrize("block", range(1, 12))
def test_nan_and_infinity_are_read_wherever_a_block_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    """They are also read as elements of the array."""
    monkeypatch.setattr(json_arrays, "_BLOCK_BYTES", block)
    found, damage = _read_bytes(tmp_path, b'[NaN, {"a": -Infinity, "b": [Infinity]}, -Infinity]')
    assert (repr(found), damage) == ("[nan, {'a': -inf, 'b': [inf]}, -inf]", None)


_NOT_FINITE = [float("nan"), float("inf"), -float("inf")]


@pytest.mark.parametrize("value", _NOT_FINITE, ids=repr)
@pytest.mark.parametrize(
    "field",
    [
        "date", "snapshot_date", "timestamp", "balance", "total_invested", "total_profit_loss", "total_value",
        "open_positions", "trade_count", "portfolio_id", "unknown",
    ],
)  # fmt: skip
def test_nan_anywhere_in_a_snapshot_is_rejected(field: str, value: float) -> None:
    """The error names the field, also one in an unknown key."""
    with pytest.raises(InvalidEvent, match=f"^{field}: must be finite, not NaN or Infinity$") as caught:
        snapshot_from(_entry(**{field: value}), zone=UTC, portfolio_id=1)
    assert caught.value.field == field
    with pytest.raises(InvalidEvent, match=r"^unknown\.1\.a\\n: must be finite, not NaN or Infinity$"):
        snapshot_from(_entry(unknown=[0, {"a\n": value}]), zone=UTC, portfolio_id=1)
    with pytest.raises(InvalidEvent, match=r"^\(no name\): must be finite, not NaN or Infinity$"):
        snapshot_from(_entry(**{"": value}), zone=UTC, portfolio_id=1)


@pytest.mark.parametrize("value", _NOT_FINITE, ids=repr)
@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        (lambda value: {"archived_at": value}, "archived_at"),
        (lambda value: {"archive_month": value}, "archive_month"),
        (lambda value: {"signals_count": value}, "signals_count"),
        (lambda value: {"portfolio_id": value}, "portfolio_id"),
        (lambda value: {"unknown": {"a": [value]}}, r"unknown\.a\.0"),
        (lambda value: {"signals_data": [{"a": value}]}, r"signals_data\.0\.a"),
        (lambda value: {"signals": [{}, {"a": [{"b": value}]}]}, r"signals\.1\.a\.0\.b"),
        (lambda value: {"signals": [{}, value]}, r"signals\.1"),
        (lambda value: {"signals": value}, "signals"),
    ],
)
def test_nan_anywhere_in_an_archive_is_rejected(
    overrides: Callable[[float], dict[str, Any]], field: str, value: float
) -> None:
    """The error has the path of the value. null_for_nan() replaces it only in signals."""
    entry = _archive(**overrides(value))
    with pytest.raises(InvalidEvent, match=f"^{field}: "):
        archive_from(entry, zone=UTC, portfolio_id=1)
    nulled, count = null_for_nan(entry)
    if count:
        assert archive_from(nulled, zone=UTC, portfolio_id=1).signals == [{}, {"a": [{"b": None}]}]
        return
    with pytest.raises(InvalidEvent, match=f"^{field}: "):
        archive_from(nulled, zone=UTC, portfolio_id=1)


def test_the_first_nan_of_a_very_wide_and_deep_entry_is_named() -> None:
    """All elements of the long list share one object for its path."""
    deep: Any = [0] * 100_000 + [float("nan")]
    for _ in range(900):
        deep = {"k" * 1000: deep}
    with pytest.raises(InvalidEvent, match=r"^unknown\.k+…") as caught:
        snapshot_from(_entry(unknown=deep, later=float("nan")), zone=UTC, portfolio_id=1)
    assert len(str(caught.value)) < 300


def test_null_for_nan_counts_and_does_not_change_the_given_entry() -> None:
    """It keeps the NaN of a Decimal, and values that are nested too deeply, which are rejected later."""
    nan, infinity = float("nan"), float("inf")
    deep: Any = nan
    for _ in range(900):
        deep = [deep]
    signals = [{"a": nan, "b": [infinity, -infinity, 1, "NaN", None]}, {"c": Decimal("NaN"), "d": deep}]
    entry = _archive(signals=signals, extra=nan)
    before = repr(entry)

    nulled, count = null_for_nan(entry)

    assert repr(entry) == before
    assert count == 3
    assert nulled["signals"][0] == {"a": None, "b": [None, None, 1, "NaN", None]}
    assert repr(nulled["signals"][1]["c"]) == "Decimal('NaN')"
    assert repr(nulled["extra"]) == "nan"
    assert null_for_nan({"signals_data": [{"a": nan}]}) == ({"signals_data": [{"a": None}]}, 1)
    odd: list[Any] = [[nan], None, {"signals": {"a": nan}}, {"signals": None}, {}]
    assert [null_for_nan(one) for one in odd] == [(one, 0) for one in odd]


def test_a_byte_that_is_not_utf8_affects_one_entry(tmp_path: Path) -> None:
    """The other entries are read."""
    content = b'[{"signals": [{"q": "a"}]}, {"signals": [{"q": "\xff"}]}, {"signals": [{"q": "b"}]}]'
    found, damage = _read_bytes(tmp_path, content)
    assert damage is None
    with pytest.raises(InvalidEvent, match="^signals.0.q: contains a NUL character or a lone surrogate"):
        archive_from(_archive(**found[1]), zone=UTC, portfolio_id=None)
    assert archive_from(_archive(**found[2]), zone=UTC, portfolio_id=None).signals == [{"q": "b"}]


def test_progress_counts_the_bytes_up_to_the_size_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "portfolio_history.json"
    path.write_text(json.dumps([_entry(balance=1.5, total_profit_loss=0, total_value=1)] * 5000))
    seen: list[int] = []
    assert sum(1 for _ in read_entries(path, progress=seen.append)) == 5000
    assert seen == sorted(seen)
    assert seen[-1] == path.stat().st_size
    assert len(seen) > 3


def test_the_history_files_of_a_folder_are_listed_in_order(tmp_path: Path) -> None:
    """Snapshots first, then the months. Other files are not listed."""
    for name in (
        "signals_archive_2025-11.json",
        "signals_archive_2025-10.json",
        "portfolio_history.json",
        "other.json",
    ):
        (tmp_path / name).touch()
    assert [path.name for path in history_files(tmp_path)] == [
        "portfolio_history.json",
        "signals_archive_2025-10.json",
        "signals_archive_2025-11.json",
    ]


def test_an_entry_is_converted_into_a_snapshot() -> None:
    """Its naive time is in the given zone. Amounts as text or with float noise get 8 decimals."""
    data = _entry(
        balance=" 9900.5",
        total_profit_loss=Decimal("0.300000000000000045"),
        trade_count="7",
        open_positions=Decimal("2.0"),
    )
    snapshot = snapshot_from(data, zone=BERLIN, portfolio_id=3)
    assert snapshot.timestamp.isoformat() == "2025-10-20T17:02:46.101234+02:00"
    assert snapshot.snapshot_date == date(2025, 10, 20)
    assert (snapshot.balance, snapshot.total_profit_loss) == (Decimal("9900.5"), Decimal("0.3"))
    assert (snapshot.open_positions, snapshot.trade_count, snapshot.portfolio_id) == (2, 7, 3)
    assert list(notes_on(data, snapshot)) == []


def test_amounts_are_rounded_half_even_to_8_decimals() -> None:
    """The producer rounds in the same way."""
    data = _entry(balance=Decimal("0.000000005"), total_invested=Decimal("0.000000015"))
    snapshot = snapshot_from(data, zone=UTC, portfolio_id=None)
    assert (snapshot.balance, snapshot.total_invested) == (Decimal("0"), Decimal("0.00000002"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"timestamp": "yesterday"}, f"timestamp: must be an ISO 8601 time; {_EXAMPLE}"),
        ({"timestamp": 5}, f"timestamp: {_NO_EPOCH}; {_EXAMPLE}"),
        ({"timestamp": True}, "timestamp: must be a datetime, not bool"),
        ({"timestamp": []}, "timestamp: must be a datetime, not list"),
        ({"date": 5}, "date: must be a date, not int"),
        ({"date": "2026-05-01T10:00:00"}, "date: must be an ISO 8601 date"),
        ({"date": 1777629600}, "date: must be a date, not int"),
        ({"timestamp": None}, "timestamp: is missing"),
        ({"timestamp": "0001-01-01T00:00:00"}, "timestamp: must lie between the years 1970 and 9998"),
        ({"date": "20/10/2025"}, "date: must be an ISO 8601 date"),
        ({"balance": None}, "balance: is missing"),
        ({"balance": "1,000"}, "balance: is text that is not a number"),
        ({"balance": True}, "balance: must be a number, not bool"),
        ({"balance": Decimal("1e15")}, "balance: has more than 12 digits before the decimal point"),
        ({"trade_count": Decimal("1.5")}, "trade_count: must be a whole number in the range of a count"),
        ({"trade_count": "1e1000000000"}, "trade_count: must be a whole number in the range of a count"),
        ({"trade_count": []}, "trade_count: must be a whole number in the range of a count"),
        ({"open_positions": -1}, "open_positions: Input should be greater than or equal to 0"),
        ({"portfolio_id": "x"}, "portfolio_id: is text that is not an integer"),
    ],
)
def test_an_invalid_snapshot_is_rejected_with_field_and_reason(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidEvent) as caught:
        snapshot_from(_entry(**overrides), zone=None, portfolio_id=None)
    assert str(caught.value) == message


_MOMENT = datetime(2026, 5, 1, 10, 0, 0, 250000, tzinfo=UTC)


@pytest.mark.parametrize(
    "written",
    [
        Decimal("1777629600.25"),
        Decimal("1777629600.2500001"),
        1777629600250,
        1777629600250000,
        1777629600250000000,
        "1777629600.25",
        " 1777629600250 ",
        "2026-05-01 10:00:00.25 UTC",
        "2026-05-01 10:00:00.25UTC",
        "2026-05-01 10:00:00.250 +0000 UTC",
        "2026-05-01T10:00:00.25 gmt",
        "2026-05-01t10:00:00.25z",
        "2026-05-01T11:00:00.25+0100",
        "2026-05-01 11:00:00.25 +0100",
        "2026-05-01 12:00:00,25+02",
        "20260501T100000.25Z",
    ],
    ids=repr,
)
def test_a_time_is_read_in_each_form_that_is_certain(written: Any) -> None:
    """Epoch seconds to nanoseconds, as numbers and as text; names of UTC; offsets without colon."""
    snapshot = snapshot_from(_entry(timestamp=written), zone=BERLIN, portfolio_id=None)
    archive = archive_from(_archive(archived_at=written), zone=BERLIN, portfolio_id=None)
    assert (snapshot.timestamp, archive.archived_at) == (_MOMENT, _MOMENT)


def test_the_date_of_an_epoch_time_is_the_local_one() -> None:
    """An epoch time has no offset."""
    entry = _entry(timestamp=1777672800)  # 22:00 in UTC
    del entry["date"]
    assert snapshot_from(entry, zone=BERLIN, portfolio_id=None).snapshot_date == date(2026, 5, 2)
    assert snapshot_from(entry, zone=UTC, portfolio_id=None).snapshot_date == date(2026, 5, 1)


@pytest.mark.parametrize(
    "written", [1777593600, 1777593600000, "1777593600", "2026-05-01 00:00:00", "2026-05-01T00:00:00.000Z", "20260501"]
)
def test_a_date_may_be_written_as_midnight(written: Any) -> None:
    """Pandas writes dates like this."""
    assert snapshot_from(_entry(date=written), zone=BERLIN, portfolio_id=None).snapshot_date == date(2026, 5, 1)


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        (Decimal("1.78E9"), "is a number that may have lost digits, such as 1.7E9"),
        (999_999_999, _NO_EPOCH),
        (20260501, _NO_EPOCH),
        (20260501100000, _NO_EPOCH),
        (-1777629600, _NO_EPOCH),
        (10**400, _NO_EPOCH),
        (Decimal("NaN"), "is a number that may have lost digits, such as 1.7E9"),
        ("20260501100000", _NO_EPOCH),
        ("20260501100", _NO_EPOCH),
        ("05/06/2026 10:00:00", "has day and month in an order that is not certain"),
        ("01.05.2026", "has day and month in an order that is not certain"),
        ("2026-05-01 10:00:00 CET", "has a zone that is not certain"),
        ("2026-05-01T10:00:00.5ist", "has a zone that is not certain"),
        ("2026-05-01+02:00", "has a date and an offset, but no time"),
        ("2026-05-01 -0500", "has a date and an offset, but no time"),
        ("2026-05-01-0500", "has a date and an offset, but no time"),
        ("2026-05-01 10:00:00 PM", "must be an ISO 8601 time"),
        ("2026-05-01 10:00:00+01:00 UTC", "must be an ISO 8601 time"),
        ("1.78e9", "must be an ISO 8601 time"),
        ("2026-13-01T10:00:00", "must be an ISO 8601 time"),
        ("2026-02-30 10:00:00", "must be an ISO 8601 time"),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_a_time_that_is_not_certain_is_rejected_with_the_reason(written: Any, reason: str) -> None:
    """The message has an example."""
    with pytest.raises(InvalidEvent) as caught:
        snapshot_from(_entry(timestamp=written), zone=BERLIN, portfolio_id=None)
    assert str(caught.value) == f"timestamp: {reason}; {_EXAMPLE}"


def test_an_entry_is_converted_into_an_archive() -> None:
    """The number of signals is the length of the array. Notes name corrections and omissions."""
    data = _archive(signals_count=5, note="x")
    archive = archive_from(data, zone=BERLIN, portfolio_id=None)
    assert (archive.signals_count, archive.archive_month) == (1, "2025-10")
    assert list(notes_on(data, archive)) == [
        "unknown key 'note' was left out",
        "signals_count was not the number of signals and was corrected",
    ]
    no_signals: list[Any] = [None, [], {}, [1]]
    for signals in no_signals:
        with pytest.raises(InvalidEvent, match="^signals"):
            archive_from(_archive(signals=signals), zone=BERLIN, portfolio_id=None)


def test_a_date_that_differs_from_the_time_is_kept_and_noted() -> None:
    """Midnight may have passed between the two."""
    data = _entry(date="2025-10-19")
    snapshot = snapshot_from(data, zone=BERLIN, portfolio_id=None)
    assert snapshot.snapshot_date == date(2025, 10, 19)
    assert list(notes_on(data, snapshot)) == ["date is not the date of timestamp and was kept"]


def test_times_with_an_offset_keep_it() -> None:
    """The given zone is only for naive times. The entry's own portfolio overrides the given one."""
    aware = snapshot_from(_entry(timestamp="2025-10-20T17:02:46Z"), zone=BERLIN, portfolio_id=None)
    own = snapshot_from(_entry(timestamp="2025-10-20T17:02:46", portfolio_id="8"), zone=BERLIN, portfolio_id=1)
    assert aware.timestamp == datetime(2025, 10, 20, 17, 2, 46, tzinfo=UTC)
    assert own.timestamp == datetime(2025, 10, 20, 17, 2, 46, tzinfo=timezone(timedelta(hours=2)))
    assert own.portfolio_id == 8


def test_a_repeated_hour_is_read_as_the_first_if_the_order_does_not_decide() -> None:
    """Both readings are before the previous entry."""
    first = snapshot_from(_entry(timestamp="2025-10-26T02:30:00"), zone=BERLIN, portfolio_id=None)
    later = datetime(2025, 10, 27, 12, tzinfo=UTC)
    again = snapshot_from(_entry(timestamp="2025-10-26T02:30:00"), zone=BERLIN, portfolio_id=None, after=later)
    assert again.event_id == first.event_id


@pytest.mark.parametrize("count", ["1_000", "\u0663", "", "1e", "0x10"])
def test_a_count_that_is_not_a_plain_number_is_rejected(count: str) -> None:
    with pytest.raises(InvalidEvent, match="trade_count: must be a whole number"):
        snapshot_from(_entry(trade_count=count), zone=BERLIN, portfolio_id=None)


def test_a_folder_or_dangling_link_with_the_name_of_a_history_file_is_listed(tmp_path: Path) -> None:
    """Ignoring it, for example while a disk is not mounted, would hide a history."""
    (tmp_path / "portfolio_history.json").symlink_to(tmp_path / "nowhere")
    (tmp_path / "signals_archive_2025-10.json").mkdir()
    files = history_files(tmp_path)
    assert [file.name for file in files] == ["portfolio_history.json", "signals_archive_2025-10.json"]
    for file in files:
        with pytest.raises(Damaged, match="is not a file"):
            list(read_entries(file))


def test_the_order_of_the_file_decides_which_of_two_equal_hours_is_meant() -> None:
    """It is the first, until an entry is earlier than the one before it."""
    after = None
    offsets = []
    for clock in ("01:59", "02:30", "02:45", "02:15", "02:40", "03:00"):
        snapshot = snapshot_from(
            _entry(timestamp=f"2025-10-26T{clock}:00"), zone=BERLIN, portfolio_id=None, after=after
        )
        after = snapshot.timestamp
        offsets.append(snapshot.timestamp.isoformat()[-6:])
    assert offsets == ["+02:00", "+02:00", "+02:00", "+01:00", "+01:00", "+01:00"]


def test_a_time_that_does_not_exist_is_read_with_the_offset_before_the_gap() -> None:
    """Also if an earlier entry is out of order."""
    for after in (None, datetime(2026, 1, 1, tzinfo=UTC)):
        snapshot = snapshot_from(_entry(timestamp="2025-03-30T02:30:00"), zone=BERLIN, portfolio_id=None, after=after)
        assert snapshot.timestamp.isoformat() == "2025-03-30T02:30:00+01:00"


def test_an_entry_can_be_unpacked_into_index_and_data() -> None:
    index, data = Entry(3, {"a": 1})
    assert (index, data) == (3, {"a": 1})
